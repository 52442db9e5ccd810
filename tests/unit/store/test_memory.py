"""What only the in-memory twin has: an injected clock and faults on demand. And prefixes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.store import errors
from godwit.store.codec import prefix_end, prefix_range
from godwit.store.engine import in_range
from godwit.store.memory import MemoryStore


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_leases_run_on_the_injected_clock() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    lease = await store.lease_grant(12)
    await store.put("h", b"", lease=lease.id)
    watch = store.watch("")
    await anext(watch)
    clock.now += 11.9
    assert await store.lease_keepalive(lease.id) == 12
    clock.now += 11.9
    assert await store.get("h") is not None
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    clock.now += 0.2
    store.expire_due()
    batch = await waiting
    assert [(event.kind, event.kv.key) for event in batch.events] == [("delete", "h")]
    with pytest.raises(errors.LeaseNotFound):
        await store.lease_keepalive(lease.id)
    await store.aclose()


async def test_faults_happen_as_often_as_asked_for() -> None:
    store = MemoryStore(clock=Clock())
    store.faults.fail_next(2)
    for _ in range(2):
        with pytest.raises(errors.StoreUnavailable):
            await store.put("k", b"1")
    assert await store.get("k") is None
    store.faults.outcome_unknown_next(applied=False)
    assert await store.get("k") is None
    with pytest.raises(errors.StoreOutcomeUnknown):
        await store.put("k", b"2")
    assert await store.get("k") is None
    store.faults.outcome_unknown_next(applied=True)
    with pytest.raises(errors.StoreOutcomeUnknown):
        await store.put("k", b"3")
    kv = await store.get("k")
    assert kv is not None
    assert kv.value == b"3"
    store.faults.unavailable = True
    for attempt in (store.get("k"), store.status(), store.lease_grant(5)):
        with pytest.raises(errors.StoreUnavailable):
            await attempt
    await store.aclose()


@given(st.binary(max_size=4), st.binary(max_size=6))
def test_a_prefix_range_holds_what_starts_with_it(prefix: bytes, key: bytes) -> None:
    start, end = prefix_range(prefix)
    assert in_range(key, start, end) is (key.startswith(prefix) and key >= b"\0")


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"a\xff", b"b"), (b"a\xff\xff", b"b"), (b"\xff", b"\0"), (b"", b"\0")],
)
def test_the_end_of_a_prefix(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end
