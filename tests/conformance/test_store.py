"""One suite for everything that calls itself a store."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from godwit.store import errors
from godwit.store.api import (
    Compare,
    CompareResult,
    CompareTarget,
    Op,
    Store,
    Watch,
    WatchBatch,
    WatchKind,
    absent,
    create_is,
    delete,
    delete_prefix,
    exists,
    get,
    get_prefix,
    lease_is,
    mod_is,
    put,
    value_is,
    version_is,
)

if TYPE_CHECKING:
    from conftest import Proxy, Rig


async def next_batch(watch: Watch, *, within: float = 5.0) -> WatchBatch:
    """The next batch with events; news of progress is skipped."""
    async with asyncio.timeout(within):
        async for batch in watch:
            if batch.events:
                return batch
    raise AssertionError("the watch ended")


async def begin(store: Store, prefix: str, start: int | None = None) -> Watch:
    """A watch that is known to stand."""
    watch = store.watch(prefix, start_revision=start)
    async with asyncio.timeout(5):
        first = await anext(watch)
    assert first.events == ()
    return watch


# -- keys


async def test_a_key_is_written_read_changed_and_removed(store: Store, base: str) -> None:
    key = base + "a"
    assert await store.get(key) is None
    first = await store.put(key, b"one")
    kv = await store.get(key)
    assert kv is not None
    assert (kv.key, kv.value, kv.version, kv.lease) == (key, b"one", 1, 0)
    assert kv.create_revision == kv.mod_revision == first
    second = await store.put(key, b"two")
    assert second == first + 1
    kv = await store.get(key)
    assert kv is not None
    assert (kv.value, kv.version, kv.create_revision, kv.mod_revision) == (b"two", 2, first, second)
    assert await store.delete(key) == 1
    assert await store.delete(key) == 0
    assert await store.get(key) is None
    await store.put(key, b"again")
    kv = await store.get(key, linearizable=False)
    assert kv is not None
    assert kv.version == 1


async def test_the_empty_value_is_a_value(store: Store, base: str) -> None:
    await store.put(base + "e", b"")
    kv = await store.get(base + "e")
    assert kv is not None
    assert kv.value == b""


async def test_an_empty_key_is_refused(store: Store) -> None:
    with pytest.raises(errors.StoreRefused):
        await store.put("", b"x")
    with pytest.raises(errors.StoreRefused):
        await store.get("")


async def test_a_range_is_the_prefix_in_byte_order(store: Store, base: str) -> None:
    for name in ("b", "a", "a/1", "ab", "c", "ä", "日本"):
        await store.put(base + name, name.encode())
    await store.put(base[:-1] + "0", b"just after the prefix")
    found = await store.range(base)
    names = [kv.key.removeprefix(base) for kv in found.kvs]
    assert names == sorted(names, key=str.encode) == ["a", "a/1", "ab", "b", "c", "ä", "日本"]
    assert [kv.value for kv in found.kvs] == [name.encode() for name in names]
    assert [kv.key for kv in (await store.range(base + "a")).kvs] == [
        base + "a",
        base + "a/1",
        base + "ab",
    ]
    assert len((await store.range(base, limit=3)).kvs) == 3
    pages, after = [], ""
    while page := (await store.range(base, limit=3, after=after)).kvs:
        pages.append([kv.key.removeprefix(base) for kv in page])
        after = page[-1].key
    assert pages == [names[:3], names[3:6], names[6:]]
    behind = (await store.range(base, after=base + "a/0")).kvs  # which is no key itself
    assert [kv.key.removeprefix(base) for kv in behind] == names[1:]
    assert (await store.range(base, after=base + "\U0010ffff")).kvs == ()
    assert (await store.range(base, after="\x00")).kvs == found.kvs  # before the prefix
    bare = (await store.range(base, keys_only=True)).kvs
    assert bare == tuple(replace(kv, value=b"") for kv in found.kvs)
    assert found.revision == (await store.status()).revision


async def test_a_prefix_that_ends_in_the_highest_byte(store: Store, base: str) -> None:
    top = (base.encode() + b"\xff").decode("utf-8", "surrogateescape")
    inside = (base.encode() + b"\xff\xff\x01").decode("utf-8", "surrogateescape")
    await store.put(inside, b"in")
    await store.put(base[:-1] + "0", b"out")
    assert [kv.key for kv in (await store.range(top)).kvs] == [inside]
    assert await store.delete(top, prefix=True) == 1


async def test_the_empty_prefix_is_everything(store: Store, base: str) -> None:
    await store.put(base + "x", b"")
    await store.put("\x01" + base, b"")
    keys = [kv.key for kv in (await store.range("")).kvs]
    assert base + "x" in keys
    assert "\x01" + base in keys


async def test_deleting_a_prefix_counts_what_was_there(store: Store, base: str) -> None:
    for number in range(5):
        await store.put(f"{base}{number}", b"")
    assert await store.delete(base, prefix=True) == 5
    assert (await store.range(base)).kvs == ()


@pytest.mark.parametrize("key", ["ключ", "鍵/🔑", "a b\tc", 'quo"te\\', "\x00\x01", "é\u0301"])
async def test_any_text_is_a_key(store: Store, base: str, key: str) -> None:
    await store.put(base + key, key.encode())
    kv = await store.get(base + key)
    assert kv is not None
    assert (kv.key, kv.value) == (base + key, key.encode())


async def test_a_value_of_one_mebibyte(store: Store, base: str) -> None:
    value = bytes(range(256)) * 4096
    async with await begin(store, base) as watch:
        await store.put(base + "big", value)
        kv = await store.get(base + "big")
        assert kv is not None
        assert kv.value == value
        assert (await next_batch(watch)).events[0].kv.value == value


async def test_a_read_sees_every_write_answered_before(rig: Rig, base: str) -> None:
    writer, reader = rig.client(), rig.client()
    for number in range(50):
        revision = await writer.put(base + "n", b"%d" % number)
        kv = await reader.get(base + "n")
        assert kv is not None
        assert (kv.value, kv.mod_revision) == (b"%d" % number, revision)


# -- transactions


@pytest.mark.parametrize(
    ("target", "holds", "fails"),
    [
        ("version", 2, 1),
        ("create", 0, 1),
        ("mod", 1, 0),
        ("value", b"two", b"tw"),
        ("lease", 0, 7),
    ],
)
async def test_both_branches_by_each_comparison(
    store: Store, base: str, target: str, holds: int | bytes, fails: int | bytes
) -> None:
    key = base + target
    revisions = [await store.put(key, b"one"), await store.put(key, b"two")]

    def compare(operand: int | bytes) -> Compare:
        if isinstance(operand, bytes):
            return value_is(key, operand)
        match target:
            case "version":
                return version_is(key, operand)
            case "create":
                return create_is(key, revisions[operand])
            case "mod":
                return mod_is(key, revisions[operand])
        return lease_is(key, operand)

    branches: tuple[list[Op], list[Op]] = ([get(key)], [put(base + "else", b"")])
    yes = await store.txn([compare(holds)], *branches)
    assert yes.succeeded
    assert yes.responses[0].kv is not None
    assert yes.responses[0].kv.value == b"two"
    assert yes.revision == revisions[1]
    no = await store.txn([compare(fails)], *branches)
    assert not no.succeeded
    assert no.revision == revisions[1] + 1
    assert await store.get(base + "else") is not None


async def test_orderings_and_all_conditions_must_hold(store: Store, base: str) -> None:
    key = base + "k"
    await store.put(key, b"m")
    for relation, operand, expected in [
        (CompareResult.GREATER, b"a", True),
        (CompareResult.GREATER, b"m", False),
        (CompareResult.LESS, b"z", True),
        (CompareResult.NOT_EQUAL, b"m", False),
        (CompareResult.NOT_EQUAL, b"n", True),
    ]:
        compare = Compare(key, CompareTarget.VALUE, operand, relation)
        assert (await store.txn([compare], [])).succeeded is expected
    assert not (await store.txn([exists(key), absent(key)], [])).succeeded
    assert (await store.txn([], [])).succeeded


async def test_an_absent_key_compares_as_zero_but_has_no_value(store: Store, base: str) -> None:
    key = base + "none"
    for compare in (absent(key), version_is(key, 0), mod_is(key, 0), create_is(key, 0)):
        assert (await store.txn([compare], [])).succeeded
    for compare in (
        exists(key),
        value_is(key, b""),
        Compare(key, CompareTarget.VALUE, b"x", CompareResult.NOT_EQUAL),
    ):
        assert not (await store.txn([compare], [])).succeeded


async def test_a_transaction_has_one_revision_and_sees_its_own_steps(
    store: Store, base: str
) -> None:
    await store.put(base + "old", b"")
    result = await store.txn(
        [],
        [
            put(base + "a", b"1"),
            get(base + "a"),
            put(base + "b", b"2"),
            delete(base + "old"),
            get_prefix(base),
            delete_prefix(base + "nothing"),
        ],
    )
    kinds = [response.deleted for response in result.responses]
    assert kinds == [0, 0, 0, 1, 0, 0]
    assert result.responses[1].kv is not None
    assert result.responses[1].kv.mod_revision == result.revision
    assert [kv.key for kv in result.responses[4].kvs] == [base + "a", base + "b"]
    assert {kv.mod_revision for kv in result.responses[4].kvs} == {result.revision}


async def test_nothing_changed_means_no_new_revision(store: Store, base: str) -> None:
    before = (await store.status()).revision
    await store.delete(base + "nothing")
    await store.txn([exists(base + "nothing")], [put(base + "x", b"")])
    assert (await store.status()).revision == before


async def test_writing_one_key_twice_is_refused_as_a_whole(store: Store, base: str) -> None:
    before = (await store.status()).revision
    for steps in (
        [put(base + "a", b"1"), put(base + "a", b"2")],
        [put(base + "a", b"1"), delete_prefix(base)],
        [put(base + "a", b"1"), put(base + "b", b"", lease=987654321)],
    ):
        with pytest.raises(errors.StoreRefused):
            await store.txn([], steps)
    assert (await store.range(base)).kvs == ()
    assert (await store.status()).revision == before


async def test_racing_compare_and_swap_counts_exactly(rig: Rig, base: str) -> None:
    key, workers, each = base + "counter", 8, 10
    await rig.client().put(key, b"0")

    async def count(store: Store) -> int:
        lost = 0
        for _ in range(each):
            while True:
                kv = await store.get(key)
                assert kv is not None
                swap = put(key, b"%d" % (int(kv.value) + 1))
                if (await store.txn([mod_is(key, kv.mod_revision)], [swap])).succeeded:
                    break
                lost += 1
                await asyncio.sleep(0)
        return lost

    await asyncio.gather(*(count(rig.client()) for _ in range(workers)))
    kv = await rig.client().get(key)
    assert kv is not None
    assert (int(kv.value), kv.version) == (workers * each, workers * each + 1)


# -- leases


async def test_a_lease_that_runs_out_takes_its_keys_along(store: Store, base: str) -> None:
    async with await begin(store, base) as watch:
        lease = await store.lease_grant(1)
        granted = time.monotonic()
        await store.put(base + "a", b"", lease=lease.id)
        await store.put(base + "b", b"", lease=lease.id)
        await store.put(base + "free", b"")
        kv = await store.get(base + "a")
        assert kv is not None
        assert kv.lease == lease.id
        for _ in range(3):
            await next_batch(watch)
        batch = await next_batch(watch, within=lease.ttl_s + 5)
        # A TTL is a lower bound.
        assert time.monotonic() - granted >= lease.ttl_s - 0.05
        assert [(e.kind, e.kv.key) for e in batch.events] == [
            (WatchKind.DELETE, base + "a"),
            (WatchKind.DELETE, base + "b"),
        ]
    assert [kv.key for kv in (await store.range(base)).kvs] == [base + "free"]
    with pytest.raises(errors.LeaseNotFound):
        await store.lease_keepalive(lease.id)
    with pytest.raises(errors.LeaseNotFound):
        await store.lease_time_to_live(lease.id)


async def test_keeping_a_lease_alive(store: Store, base: str) -> None:
    lease = await store.lease_grant(1)
    await store.put(base + "a", b"", lease=lease.id)
    end = time.monotonic() + lease.ttl_s + 1.0
    while time.monotonic() < end:
        assert await store.lease_keepalive(lease.id) == lease.ttl_s
        await asyncio.sleep(0.25)
    assert await store.get(base + "a") is not None
    assert 0 <= await store.lease_time_to_live(lease.id) <= lease.ttl_s


async def test_revoking_a_lease_removes_its_keys_at_once(store: Store, base: str) -> None:
    lease = await store.lease_grant(60, lease_id=4711)
    assert (lease.id, lease.ttl_s) == (4711, 60)
    with pytest.raises(errors.LeaseExists):
        await store.lease_grant(60, lease_id=4711)
    await store.put(base + "a", b"", lease=lease.id)
    await store.put(base + "moved", b"", lease=lease.id)
    await store.put(base + "moved", b"")
    await store.lease_revoke(lease.id)
    assert [kv.key for kv in (await store.range(base)).kvs] == [base + "moved"]
    with pytest.raises(errors.LeaseNotFound):
        await store.lease_revoke(lease.id)
    with pytest.raises(errors.LeaseNotFound):
        await store.put(base + "a", b"", lease=lease.id)


# -- watches


async def test_a_watch_from_now_on(store: Store, base: str) -> None:
    await store.put(base + "before", b"")
    async with await begin(store, base) as watch:
        created = await store.put(base + "a", b"1")
        changed = await store.put(base + "a", b"2")
        await store.put("elsewhere/" + base, b"")
        await store.delete(base + "a")
        batches = [await next_batch(watch) for _ in range(3)]
    assert [b.revision for b in batches] == [created, changed, changed + 2]
    first, second, third = (b.events[0] for b in batches)
    assert (first.kind, first.kv.value, first.prev) == (WatchKind.PUT, b"1", None)
    assert second.prev == first.kv
    assert (third.kind, third.kv.key, third.kv.mod_revision) == (
        WatchKind.DELETE,
        base + "a",
        changed + 2,
    )
    assert third.prev == second.kv


async def test_a_watch_from_a_past_revision(store: Store, base: str) -> None:
    revisions = [await store.put(base + str(number % 3), b"%d" % number) for number in range(300)]
    async with await begin(store, base, revisions[100]) as watch:
        batches = [await next_batch(watch) for _ in range(200)]
        revisions.append(await store.put(base + "last", b""))
        batches.append(await next_batch(watch))
    assert [b.revision for b in batches] == revisions[100:]
    assert batches[1].events[0].prev is not None
    assert batches[1].events[0].prev.value == b"98"


async def test_a_watch_from_a_future_revision(store: Store, base: str) -> None:
    now = (await store.status()).revision
    async with await begin(store, base, now + 3) as watch:
        revisions = [await store.put(base + "k", b"%d" % number) for number in range(4)]
        assert [(await next_batch(watch)).revision for _ in range(2)] == revisions[2:]


async def test_a_transaction_arrives_as_one_batch(store: Store, base: str) -> None:
    steps = [put(f"{base}{number:02}", b"") for number in range(20)]
    async with await begin(store, base) as watch:
        result = await store.txn([], [*steps, put("elsewhere/" + base, b"")])
        batch = await next_batch(watch)
    assert batch.revision == result.revision
    assert [event.kv.key for event in batch.events] == [step.key for step in steps]


async def test_every_watch_sees_everything_in_order(rig: Rig, base: str) -> None:
    watches = [await begin(rig.client(), base) for _ in range(5)]
    writers = [rig.client() for _ in range(4)]
    written = await asyncio.gather(
        *(writer.put(f"{base}{number}", b"") for number in range(25) for writer in writers)
    )
    for watch in watches:
        seen = [(await next_batch(watch)).revision for _ in range(len(written))]
        assert seen == sorted(written)
        await watch.aclose()


async def test_waiting_for_a_batch_can_be_cancelled_without_losing_one(
    store: Store, base: str
) -> None:
    written, seen = [], []
    async with await begin(store, base) as watch:
        for number in range(60):
            written.append(await store.put(base + "k", b"%d" % number))
            try:
                async with asyncio.timeout(0.0005 * (number % 5)):
                    seen.append((await anext(watch)).revision)
            except TimeoutError:
                pass
        while len(seen) < len(written):
            seen.append((await next_batch(watch)).revision)
    assert seen == written


async def test_a_closed_watch_ends(store: Store, base: str) -> None:
    watch = await begin(store, base)
    waiting = asyncio.ensure_future(anext(watch, None))
    await asyncio.sleep(0.01)
    await watch.aclose()
    async with asyncio.timeout(2):
        assert await waiting is None


async def test_a_watch_into_compacted_history_says_so(store: Store, base: str) -> None:
    revisions = [await store.put(base + "k", b"%d" % number) for number in range(5)]
    await store.compact(revisions[3])
    with pytest.raises(errors.Compacted) as caught:
        await next_batch(store.watch(base, start_revision=revisions[1]))
    assert caught.value.compact_revision == revisions[3]
    async with await begin(store, base, revisions[3]) as later:
        assert [(await next_batch(later)).revision for _ in range(2)] == revisions[3:]
    with pytest.raises(errors.Compacted):
        await store.compact(revisions[1])
    with pytest.raises(errors.StoreRefused):
        await store.compact(revisions[4] + 1000)
    kv = await store.get(base + "k")
    assert kv is not None
    assert kv.value == b"4"


# -- broken connections


async def test_a_watch_resumes_without_gap_or_repeat(rig: Rig, proxy: Proxy, base: str) -> None:
    direct, watcher = rig.client(), rig.client(proxy.endpoint)
    written: list[int] = []

    async def write() -> None:
        for number in range(120):
            written.append(await direct.put(f"{base}{number % 7}", b"%d" % number))
            if number % 20 == 10:
                proxy.drop()
            await asyncio.sleep(0.001)

    async with await begin(watcher, base) as watch:
        writing = asyncio.ensure_future(write())
        seen = [(await next_batch(watch, within=10)).revision for _ in range(120)]
        await writing
    assert seen == written


async def test_a_watch_waits_for_a_store_that_is_away(rig: Rig, proxy: Proxy, base: str) -> None:
    direct, watcher = rig.client(), rig.client(proxy.endpoint)
    async with await begin(watcher, base) as watch:
        proxy.open.clear()
        proxy.drop()
        waiting = asyncio.ensure_future(next_batch(watch))
        revision = await direct.put(base + "k", b"")
        await asyncio.sleep(0.1)
        assert not waiting.done()
        proxy.open.set()
        assert (await waiting).revision == revision


async def test_a_watch_that_fell_behind_a_compaction_says_so(
    rig: Rig, proxy: Proxy, base: str
) -> None:
    direct, watcher = rig.client(), rig.client(proxy.endpoint)
    async with await begin(watcher, base) as watch:
        proxy.open.clear()
        proxy.drop()
        last = [await direct.put(base + "k", b"%d" % number) for number in range(5)][-1]
        await direct.compact(last)
        proxy.open.set()
        with pytest.raises(errors.Compacted):
            await next_batch(watch)


async def test_a_write_whose_answer_is_lost_has_an_unknown_outcome(
    rig: Rig, proxy: Proxy, base: str
) -> None:
    store, direct = rig.client(proxy.endpoint), rig.client()
    await store.put(base + "warm", b"")
    proxy.swallow_answers = True
    with pytest.raises(errors.StoreOutcomeUnknown):
        await store.put(base + "k", b"late", timeout=0.5)
    with pytest.raises(errors.StoreTimeout):
        await store.get(base + "warm", timeout=0.3)
    kv = await direct.get(base + "k")
    assert kv is not None
    proxy.swallow_answers = False
    assert await store.put(base + "k", b"after") > 0

    proxy.swallow_answers = True
    writing = asyncio.ensure_future(store.put(base + "k", b"cut"))
    await asyncio.sleep(0.1)
    proxy.drop()
    with pytest.raises(errors.StoreOutcomeUnknown):
        await writing


async def test_a_store_that_is_not_there_is_unavailable(rig: Rig, proxy: Proxy, base: str) -> None:
    store = rig.client(proxy.endpoint)
    await proxy.close()
    for attempt in (store.put(base + "k", b""), store.get(base + "k"), store.status()):
        with pytest.raises(errors.StoreUnavailable):
            await attempt


# -- the member


async def test_status_describes_the_member(store: Store, base: str) -> None:
    revision = await store.put(base + "k", b"")
    status = await store.status()
    assert status.revision == revision
    assert status.leader == status.member_id > 0
    assert status.raft_term >= 1
    assert status.cluster_id > 0
