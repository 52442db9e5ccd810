"""The cache against a store that is silent, away or has forgotten; and the leader's duties."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from godwit.manager.cache import Cache
from godwit.manager.keyspace import MEMBERS, place_of
from godwit.manager.leadership import prune
from godwit.model import keys
from godwit.model.errors import Unavailable
from godwit.model.event import Event
from godwit.model.network import Network
from godwit.store.api import WatchBatch, put
from godwit.store.errors import Compacted
from godwit.store.memory import MemoryStore
from godwit.store.records import encode


class Hard(MemoryStore):
    """A store whose watch says nothing, or breaks with ``broken``."""

    silent = False
    forgets: frozenset[str] = frozenset()  # names of keys whose changes the watch leaves out
    broken: Exception | None = None

    def watch(self, prefix: str, *, start_revision: int | None = None) -> Any:
        inner = super().watch(prefix, start_revision=start_revision)
        outer = self

        class Bad:
            async def __aenter__(self) -> Bad:
                return self

            async def __aexit__(self, *_: object) -> None:
                await inner.aclose()

            async def __anext__(self) -> WatchBatch:
                if outer.broken is not None:
                    error, outer.broken = outer.broken, None
                    raise error
                if outer.silent:
                    await asyncio.Event().wait()
                batch = await anext(inner)
                left = tuple(e for e in batch.events if e.kv.key not in outer.forgets)
                return replace(batch, events=left)

        return Bad()


def network(name: str) -> bytes:
    return encode(Network(name=name, bridge=f"br-{name}"))


@contextlib.asynccontextmanager
async def following(store: MemoryStore, **options: Any) -> AsyncIterator[Cache]:
    cache = Cache(store, **options)
    task = asyncio.create_task(cache.run())
    try:
        async with asyncio.timeout(5):
            await cache.ready.wait()
        yield cache
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.aclose()


def has(*names: str) -> Any:
    return lambda snapshot: True if set(snapshot.networks) == set(names) else None


async def test_a_silent_watch_is_found_out_by_looking() -> None:
    store = Hard()
    store.silent = True
    await store.put(keys.network("gone"), network("gone"))
    async with following(store, resync_s=0.05) as cache:
        seen: list[tuple[str, bool]] = []
        cache.listen(lambda changes: seen.extend((c.key, c.new is None) for c in changes))
        await store.put(keys.network("a"), network("a"))
        await store.delete(keys.network("gone"))
        assert await cache.until(has("a"), timeout=5)
    assert seen == [(keys.network("a"), False), (keys.network("gone"), True)]


async def test_an_event_that_a_busy_watch_left_out_is_found() -> None:
    store = Hard()
    store.forgets = frozenset({keys.network("lost")})
    async with following(store, resync_s=0.05) as cache:
        await store.put(keys.network("lost"), network("lost"))
        for number in range(20):  # it is never silent for as long as that
            await store.put(keys.network("busy"), network("busy"))
            await asyncio.sleep(0.01 if number < 19 else 0)
        assert await cache.until(has("lost", "busy"), timeout=5)


async def test_without_resync_a_silent_watch_would_be_missed() -> None:
    store = Hard()
    store.silent = True
    async with following(store, resync_s=60) as cache:
        await store.put(keys.network("a"), network("a"))
        assert await cache.until(has("a"), timeout=0.2) is None


async def test_a_history_that_is_gone_is_listed_anew() -> None:
    store = Hard()
    async with following(store) as cache:
        store.broken = Compacted("too old")
        await store.put(keys.network("a"), network("a"))
        await store.put(keys.network("b"), network("b"))
        assert await cache.until(has("a", "b"), timeout=5)
        assert cache.problem == ""


async def test_a_record_that_makes_no_sense_hides_nothing_else() -> None:
    store = MemoryStore()
    await store.put(keys.network("bad"), b"{")
    await store.put(keys.network("a"), network("a"))
    async with following(store) as cache:
        assert set(cache.snapshot.networks) == {"a"}


async def test_a_revision_that_never_comes_is_said_so() -> None:
    async with following(MemoryStore()) as cache:
        with pytest.raises(Unavailable):
            await cache.reached(10_000, timeout=0.05)


async def test_a_snapshot_does_not_change() -> None:
    store = MemoryStore()
    async with following(store) as cache:
        before = cache.snapshot
        await store.put(keys.network("a"), network("a"))
        assert await cache.until(has("a"), timeout=5)
        assert before.networks == {}
        assert cache.snapshot is cache.snapshot


async def test_the_leader_notes_what_happens_to_hosts(api: Any) -> None:
    async def noted(kind: str) -> Event:
        async with asyncio.timeout(5):
            while True:
                for kv in (await api.store.range(keys.EVENTS)).kvs:
                    event = Event.model_validate_json(kv.value)
                    if event.kind == kind:
                        return event
                await asyncio.sleep(0.02)

    async with asyncio.timeout(5):
        while not (await api.api.get("/v1/health"))["leads"]:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.05)  # its first look at the hosts is no news
    await api.store.delete(keys.host_agent("host2"))
    event = await noted("host.unmanaged")
    assert event.subject == "host/host2"
    await api.store.delete(keys.host_lease("host2"))
    assert (await noted("host.down")).level == "warning"
    members = (await api.store.range(MEMBERS)).kvs
    assert [kv.key for kv in members] == [f"{MEMBERS}m1.1"]
    assert all(kv.lease for kv in members)


async def test_what_only_the_leader_may_do_is_refused_once_another_leads(api: Any) -> None:
    leadership = api.manager.leadership
    async with asyncio.timeout(5):
        while not leadership.leads:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)
    proof = leadership.proof()
    assert (await api.store.txn([proof], [put("/x", b"1")])).succeeded
    other = await api.store.lease_grant(60)
    await api.store.put(keys.LEADER, b"m2/1", lease=other.id)
    assert not (await api.store.txn([proof], [put("/x", b"2")])).succeeded


async def test_a_leader_that_the_store_does_not_hear_stops_leading(api: Any) -> None:
    leadership = api.manager.leadership
    async with asyncio.timeout(5):
        while not leadership.leads:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)
        api.store.faults.unavailable = True
        while leadership.leads:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
    api.store.faults.unavailable = False


async def test_a_manager_that_ends_gives_the_lead_away_at_once(cluster: Any) -> None:
    async with cluster.serve():
        async with asyncio.timeout(5):
            while await cluster.store.get(keys.LEADER) is None:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
    assert await cluster.store.get(keys.LEADER) is None
    assert (await cluster.store.range(MEMBERS)).kvs == ()


async def test_old_history_is_pruned(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.manager.leadership.KEPT_EVENTS", 2)
    monkeypatch.setattr("godwit.manager.leadership.KEPT_TASKS", 1)
    for name in ("a", "b", "c"):
        await api.make_vm(name)
    newest = (await api.api.get("/v1/tasks"))[-1]["id"]
    world = api.manager.world
    assert await prune(world, world.cache) == 3
    tasks = (await api.store.range(keys.TASKS)).kvs
    assert [kv.key for kv in tasks] == [keys.task(newest)]
    assert len((await api.store.range(keys.EVENTS)).kvs) == 2


# Large clusters.


def renewal(number: int) -> bytes:
    return b'{"boot_id":"b","number":%d,"guard":"armed","watchdog":true}' % number


async def test_renewals_cost_no_snapshot_and_wake_nobody() -> None:
    """Most revisions of a large cluster are renewals: who waits for records is not asked again."""
    store = MemoryStore()
    await store.put(keys.network("a"), network("a"))
    async with following(store) as cache:
        before, looks = cache.snapshot, 0

        def look(snapshot: Any) -> Any:
            nonlocal looks
            looks += 1
            return has("a", "b")(snapshot)

        waiting = asyncio.create_task(cache.until(look, timeout=5))
        revision = 0
        for number in range(50):
            revision = await store.put(f"{keys.HOSTS}h1/renewal", renewal(number))
        await cache.reached(revision)
        assert cache.revision >= revision
        assert cache.snapshot is before
        assert looks == 1
        await store.put(keys.network("b"), network("b"))
        assert await waiting
        assert looks == 2


async def test_a_change_copies_the_records_of_its_kind_only() -> None:
    store = MemoryStore()
    for number in range(20):
        await store.put(keys.network(f"n{number}"), network(f"n{number}"))
    async with following(store) as cache:
        before = cache.snapshot
        assert before.clones == {}
        await cache.reached(await store.put(keys.host_lease("h1"), b"{}"))
        after = cache.snapshot
        assert after is not before
        assert after.leases == {"h1"}
        assert after.networks is before.networks
        # What was found in records that are the same is not looked for again.
        assert after.clones is before.clones


class Paged(MemoryStore):
    """A store on which something happens between the pages of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.between: list[Any] = []
        self.pages = 0

    async def range(self, prefix: str, **options: Any) -> Any:
        found = await super().range(prefix, **options)
        if options.get("limit", 0) > 1:
            self.pages += 1
            if self.between:
                await self.between.pop(0)()
        return found


async def test_a_list_in_pages_is_true_at_one_revision() -> None:
    store = Paged()
    for name in "bdfhjln":
        await store.put(keys.network(name), network(name))

    async def first() -> None:  # the page with b and d has been read, that with h not yet
        await store.delete(keys.network("b"))
        await store.put(keys.network("a"), network("a"))
        await store.put(keys.network("h"), encode(Network(name="h", bridge="br-new")))
        await store.delete(keys.network("l"))

    async def second() -> None:
        await store.put(keys.network("l"), encode(Network(name="l", bridge="br-again")))
        await store.delete(keys.network("d"))
        await store.put(keys.network("d"), encode(Network(name="d", bridge="br-back")))

    store.between = [first, second]
    seen: list[tuple[str, bool]] = []
    cache = Cache(store, page=2)
    cache.listen(lambda changes: seen.extend((c.key, c.first) for c in changes))
    task = asyncio.create_task(cache.run())
    async with asyncio.timeout(5):
        await cache.ready.wait()
    try:
        assert store.pages >= 3
        assert sorted(cache.snapshot.networks) == list("adfhjln")
        bridges = {name: one.bridge for name, one in cache.snapshot.networks.items()}
        assert (bridges["h"], bridges["l"], bridges["d"]) == ("br-new", "br-again", "br-back")
        # Each record was told once, as a part of the first list.
        assert sorted(seen) == [(keys.network(name), True) for name in "adfhjln"]
        revision = await store.put(keys.network("z"), network("z"))
        await cache.reached(revision)
        assert "z" in cache.snapshot.networks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.aclose()


async def test_pages_and_a_silent_watch_are_found_out_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What happened between the pages is missed by a silent watch, and found by the next look."""
    monkeypatch.setattr("godwit.manager.listing.SILENCE_S", 0.01)

    class Silent(Paged, Hard):
        silent = True

    store = Silent()
    for name in "bdf":
        await store.put(keys.network(name), network(name))

    async def between() -> None:
        await store.delete(keys.network("b"))

    store.between = [between]
    async with following(store, page=2, resync_s=0.05) as cache:
        assert await cache.until(has("d", "f"), timeout=5)


async def test_an_older_change_does_not_undo_what_a_later_page_said() -> None:
    """A watch that was silent at first tells of the time between the pages after all."""
    async with following(MemoryStore()) as cache:
        place = place_of(keys.network("a"))
        assert place is not None
        newest = cache.revision + 9
        cache._take(newest, keys.network("a"), place, Network(name="a", bridge="br-a"))
        stale = Network(name="a", bridge="br-old")
        assert cache._take(newest - 1, keys.network("a"), place, stale) is None
        assert cache._take(newest, keys.network("a"), place, None) is None
        assert cache.snapshot.networks["a"].bridge == "br-a"


class Leaky(MemoryStore):
    """A watch that leaves out every change, and a count of the values that were read."""

    def __init__(self) -> None:
        super().__init__()
        self.values_read = 0

    async def range(self, prefix: str, **options: Any) -> Any:
        found = await super().range(prefix, **options)
        self.values_read += sum(bool(kv.value) for kv in found.kvs)
        return found

    async def get(self, key: str, **options: Any) -> Any:
        found = await super().get(key, **options)
        self.values_read += found is not None
        return found

    def watch(self, prefix: str, *, start_revision: int | None = None) -> Any:
        inner = super().watch(prefix, start_revision=start_revision)

        class Deaf:
            async def __aenter__(self) -> Deaf:
                return self

            async def __aexit__(self, *_: object) -> None:
                await inner.aclose()

            async def __anext__(self) -> WatchBatch:
                return WatchBatch((await anext(inner)).revision)

        return Deaf()


@pytest.mark.parametrize("many", [500, 1])
async def test_a_later_list_reads_the_values_of_what_changed(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known already is compared by its revision: most of 40 MB, every 45 s."""
    monkeypatch.setattr("godwit.manager.listing.MANY", many)
    store = Leaky()
    for number in range(40):
        await store.put(keys.network(f"n{number}"), network(f"n{number}"))
    async with following(store, page=7, resync_s=0.05) as cache:
        assert store.values_read == 40
        await store.put(keys.network("n3"), encode(Network(name="n3", bridge="br-new")))
        await store.put(keys.network("new"), network("new"))
        await store.delete(keys.network("n5"))

        def told(snapshot: Any) -> Any:
            found = snapshot.networks
            return ("new" in found and "n5" not in found and found["n3"].bridge == "br-new") or None

        assert await cache.until(told, timeout=5)
        assert len(cache.snapshot.networks) == 40
        assert store.values_read == (42 if many == 500 else 40 + 40)
        # The next looks find nothing to read.
        looks = store.values_read
        await asyncio.sleep(0.2)
        assert store.values_read == looks


async def test_others_have_their_turn_while_a_list_is_read() -> None:
    """Else a supervisor believes that a manager which reads 20,000 VMs has stopped."""
    store, turns = MemoryStore(), 0
    for number in range(2000):
        await store.put(keys.network(f"n{number}"), network(f"n{number}"))
    cache = Cache(store, page=4000)
    task = asyncio.create_task(cache.run())
    while not cache.ready.is_set():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 8
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.aclose()


async def test_a_long_list_holds_up_no_news() -> None:
    """Listing 20,000 VMs again takes a moment, and longer on a store that is busy."""

    class Slow(MemoryStore):
        hold = False

        def __init__(self) -> None:
            super().__init__()
            self.asked, self.let = asyncio.Event(), asyncio.Event()

        async def range(self, prefix: str, **options: Any) -> Any:
            found = await super().range(prefix, **options)
            if self.hold and prefix == keys.ROOT:
                self.asked.set()
                await self.let.wait()
            return found

    store = Slow()
    await store.put(keys.network("a"), network("a"))
    async with following(store, resync_s=0.02) as cache:
        store.hold = True
        async with asyncio.timeout(5):
            await store.asked.wait()
        await store.put(keys.network("b"), network("b"))
        await store.delete(keys.network("a"))
        assert await cache.until(has("b"), timeout=5)  # and the list is not read yet
        store.let.set()
        await asyncio.sleep(0.1)
        # What the list had read before is older: it brings nothing back and takes nothing away.
        assert set(cache.snapshot.networks) == {"b"}
