"""Every store over the network, behind a proxy that delays, drops, repeats, forgets and lies not.

Writers append words of their own to one record by compare-and-swap, and heed what an error means;
a reader mirrors a prefix by list, watch and list again. At the end every word that was
acknowledged is there exactly once, none that was refused is, and the mirror is equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from godwit.store import errors
from godwit.store.api import KeyValue, Store, WatchBatch, WatchKind, mod_is, put

if TYPE_CHECKING:
    from .conftest import Rig
    from .faulty import FaultyProxy

WRITERS, EACH = 4, 25
CHANCES = {"delay": 0.15, "drop": 0.06, "unknown": 0.06, "duplicate": 0.15, "compact": 0.03}


async def append(store: Store, key: str, word: bytes, tale: dict[bytes, str]) -> None:
    """Add a word to the record, once; ``tale`` gets what its writer came to believe."""
    while True:
        try:
            found = await store.get(key)
            words = found.value.split() if found else []
            if word in words:
                tale[word] = "found after an unknown outcome"
                return
            swap = mod_is(key, found.mod_revision if found else 0)
            new = b" ".join([*words, word])
            if (await store.txn([swap], [put(key, new)], timeout=2.0)).succeeded:
                tale[word] = "acknowledged"
                return
        except errors.StoreOutcomeUnknown:
            continue  # look whether it happened
        except errors.StoreUnavailable:
            continue  # nothing was done


class Mirror:
    """What a watcher believes the keys under a prefix to be."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.keys: dict[str, bytes] = {}
        self.revision = 0
        self.lists = 0
        self.order: list[int] = []
        self.told = asyncio.Event()
        self._store = store
        self._prefix = prefix

    async def run(self) -> None:
        while True:
            try:
                listed = await self._store.range(self._prefix)
                self.keys = {kv.key: kv.value for kv in listed.kvs}
                self.revision, self.lists = listed.revision, self.lists + 1
                self.told.set()
                watch = self._store.watch(self._prefix, start_revision=self.revision + 1)
                async with watch:
                    async for batch in watch:
                        self._take(batch)
            except (errors.Compacted, errors.StoreUnavailable):
                continue

    def _take(self, batch: WatchBatch) -> None:
        for event in batch.events:
            self.order.append(batch.revision)
            if event.kind is WatchKind.DELETE:
                self.keys.pop(event.kv.key, None)
            else:
                self.keys[event.kv.key] = event.kv.value
        self.revision = max(self.revision, batch.revision)
        self.told.set()


async def churn(store: Store, prefix: str) -> None:
    """Keys that come and go beside the record."""
    for number in range(EACH * 2):
        try:
            if number % 3:
                await store.put(f"{prefix}k{number % 7}", b"%d" % number, timeout=2.0)
            else:
                await store.delete(f"{prefix}k{number % 7}", timeout=2.0)
        except (errors.StoreOutcomeUnknown, errors.StoreUnavailable):
            continue


async def test_nothing_acknowledged_is_lost_and_nothing_comes_twice(
    rig: Rig, faulty: FaultyProxy, base: str
) -> None:
    faulty.chances = CHANCES
    tale: dict[bytes, str] = {}
    direct = rig.client()
    mirror = Mirror(rig.client(faulty.endpoint), base)
    following = asyncio.ensure_future(mirror.run())
    try:
        await _write_all(rig, faulty, base, tale)
        print(f"{rig.name}: {dict(faulty.done)}, {mirror.lists} lists")
        assert all(faulty.done[kind] for kind in CHANCES), "a kind of fault never struck"
        assert "found after an unknown outcome" in tale.values()
        # Without a list in between a gap in the watch would stay: each key is written once.
        faulty.chances = {kind: CHANCES[kind] for kind in ("delay", "drop", "duplicate")}
        await _write_once(rig.client(faulty.endpoint), base)
        faulty.chances = {}
        final = await direct.range(base)
        _every_word_once(final.kvs, base, tale)
        wanted = {kv.key: kv.value for kv in final.kvs}
        async with asyncio.timeout(30):  # a watch that the proxy holds up starts anew
            while mirror.keys != wanted:
                news = asyncio.ensure_future(mirror.told.wait())  # the last events are on their way
                await asyncio.wait({news, following}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                if following.done():
                    await following  # it ends by an error alone: that is what went wrong
                mirror.told.clear()
        assert mirror.order == sorted(set(mirror.order))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _write_once(store: Store, base: str) -> None:
    for number in range(EACH):
        while True:
            try:
                await store.put(f"{base}once/{number}", b"%d" % number, timeout=2.0)
                break
            except errors.StoreUnavailable:
                continue  # nothing was done
            except errors.StoreOutcomeUnknown:
                if await _there(store, f"{base}once/{number}"):
                    break


async def _there(store: Store, key: str) -> bool:
    while True:
        try:
            return await store.get(key) is not None
        except errors.StoreUnavailable:
            continue


async def _write_all(rig: Rig, faulty: FaultyProxy, base: str, tale: dict[bytes, str]) -> None:
    async def write(writer: int) -> None:
        store = rig.client(faulty.endpoint)
        for number in range(EACH):
            await append(store, base + "words", b"w%d-%d" % (writer, number), tale)

    async with asyncio.timeout(60):
        await asyncio.gather(
            *(write(writer) for writer in range(WRITERS)),
            churn(rig.client(faulty.endpoint), base),
        )


def _every_word_once(kvs: Sequence[KeyValue], base: str, tale: dict[bytes, str]) -> None:
    words = next(kv for kv in kvs if kv.key == base + "words").value.split()
    assert sorted(words) == sorted(tale)
    for writer in range(WRITERS):
        own = [word for word in words if word.startswith(b"w%d-" % writer)]
        assert own == [b"w%d-%d" % (writer, number) for number in range(EACH)]


async def test_a_lease_outlives_what_befalls_its_renewals(
    rig: Rig, faulty: FaultyProxy, base: str
) -> None:
    """Renewing twice does no harm; a renewal that failed is repeated in time."""
    faulty.chances = {"delay": 0.3, "drop": 0.2, "unknown": 0.2, "duplicate": 0.3}
    holder, direct = rig.client(faulty.endpoint), rig.client()
    lease = await direct.lease_grant(2)
    await direct.put(base + "k", b"", lease=lease.id)
    answered = 0
    for _ in range(30):
        try:
            assert await holder.lease_keepalive(lease.id, timeout=0.5) == lease.ttl_s
            answered += 1
        except errors.LeaseNotFound:
            raise
        except errors.StoreError:
            pass
        await asyncio.sleep(0.05)
    assert answered > 5
    assert await direct.get(base + "k") is not None
    with pytest.raises(errors.LeaseNotFound):
        await direct.lease_keepalive(lease.id + 1)
