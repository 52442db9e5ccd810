"""The host's lease on the store's twin, in a time the test owns."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import pytest

from godwit.guard.lease import RENEW_S, RETRY_S, TTL_S, HostLease
from godwit.model import keys
from godwit.model.membership import Renewal
from godwit.store.errors import StoreUnavailable
from godwit.store.memory import MemoryStore

KEY = keys.host_lease("host1")


class ManualClock:
    """Time that moves when told to, waking who sleeps on the way."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return self.now

    def realtime(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        self._sleepers.append((self.now + seconds, woken))
        await woken.wait()

    async def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while due := [entry for entry in self._sleepers if entry[0] <= until]:
            first = min(due, key=lambda entry: entry[0])
            self._sleepers.remove(first)
            self.now = max(self.now, first[0])
            first[1].set()
            for _ in range(10):
                await asyncio.sleep(0)
        self.now = until
        for _ in range(10):  # who was woken by something else gets its turn, too
            await asyncio.sleep(0)


class Lab:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(clock=self.clock.monotonic)
        self.lease = HostLease(self.store, self.clock, host="host1", boot_id=lambda: "boot-1")
        self.task = asyncio.create_task(self.lease.serve(), name="lease")

    async def present(self) -> bool:
        away, self.store.faults.unavailable = self.store.faults.unavailable, False
        found = await self.store.get(KEY)
        self.store.faults.unavailable = away
        return found is not None


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    found = Lab()
    await found.clock.advance(0)
    for _ in range(5):
        await asyncio.sleep(0)
    yield found
    found.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await found.task
    await found.store.aclose()


async def test_it_is_there_and_says_which_boot(lab: Lab) -> None:
    kv = await lab.store.get(KEY)
    assert kv is not None
    assert json.loads(kv.value)["boot_id"] == "boot-1"
    assert kv.lease
    assert lab.lease.renewed_at == 100.0


async def test_it_stays_while_it_is_renewed(lab: Lab) -> None:
    for _ in range(20):
        await lab.clock.advance(RENEW_S)
        assert await lab.present()
        assert lab.lease.renewed_at is not None
        assert lab.clock.now - lab.lease.renewed_at <= RENEW_S


async def test_what_we_believe_is_never_longer_than_what_the_store_keeps(lab: Lab) -> None:
    """From the sending of the last answered renewal: whoever trusts it is on the safe side."""
    await lab.clock.advance(2 * RENEW_S)
    lab.store.faults.unavailable = True
    renewed = lab.lease.renewed_at
    assert renewed is not None
    while lab.clock.now - renewed < TTL_S:
        assert await lab.present()
        await lab.clock.advance(RETRY_S)
    assert lab.lease.renewed_at == renewed  # nobody pretends
    await lab.clock.advance(0.1)
    assert not await lab.present()


async def test_a_store_that_comes_back_in_time_costs_nothing(lab: Lab) -> None:
    before = await lab.store.get(KEY)
    lab.store.faults.unavailable = True
    await lab.clock.advance(RENEW_S + 4)
    lab.store.faults.unavailable = False
    await lab.clock.advance(1)
    after = await lab.store.get(KEY)
    assert before is not None
    assert after is not None
    assert after.lease == before.lease
    assert lab.lease.renewed_at is not None
    assert lab.clock.now - lab.lease.renewed_at <= 1


async def test_a_lost_lease_is_replaced(lab: Lab) -> None:
    before = await lab.store.get(KEY)
    assert before is not None
    lab.store.faults.unavailable = True
    await lab.clock.advance(TTL_S + 1)
    lab.store.faults.unavailable = False
    await lab.clock.advance(RENEW_S)
    after = await lab.store.get(KEY)
    assert after is not None
    assert after.lease != before.lease


LOSSES: list[Callable[[Lab], None]] = [
    lambda lab: lab.store.faults.outcome_unknown_next(applied=True),
    lambda lab: lab.store.faults.outcome_unknown_next(applied=False),
    lambda lab: lab.store.faults.fail_next(),
]


@pytest.mark.parametrize("loss", LOSSES)
async def test_one_lost_answer_is_asked_again_at_once(
    lab: Lab, loss: Callable[[Lab], None]
) -> None:
    await lab.clock.advance(RENEW_S - 0.1)
    loss(lab)
    await lab.clock.advance(0.1)
    assert lab.lease.renewed_at == 100.0
    await lab.clock.advance(RETRY_S)
    assert lab.lease.renewed_at == 103.0 + RETRY_S
    assert await lab.present()


async def renewal(lab: Lab) -> tuple[Renewal, int]:
    kv = await lab.store.get(keys.host_renewal("host1"))
    assert kv is not None
    assert not kv.lease
    return Renewal.model_validate_json(kv.value), kv.mod_revision


async def test_each_renewal_is_seen_by_a_taker(lab: Lab) -> None:
    """What it compares changes with each, and is there when the lease is not."""
    first, revision = await renewal(lab)
    assert first == Renewal(boot_id="boot-1", number=1, guard="unarmed", watchdog=False)
    await lab.clock.advance(RENEW_S)
    second, later = await renewal(lab)
    assert second.number > first.number
    assert later > revision
    lab.store.faults.unavailable = True
    await lab.clock.advance(TTL_S + 1)
    lab.store.faults.unavailable = False
    assert await lab.store.get(KEY) is None
    assert await renewal(lab) == (second, later)


async def test_half_a_renewal_is_none(lab: Lab) -> None:
    """The lease was kept alive, but what a taker looks at did not change."""
    renewed = lab.lease.renewed_at
    put = lab.store.put

    async def refused(*_args: object, **_words: object) -> int:
        raise StoreUnavailable("only the record fails")

    lab.store.put = refused  # type: ignore[method-assign]
    await lab.clock.advance(RENEW_S + 1)
    assert await lab.present()
    assert lab.lease.renewed_at == renewed
    lab.store.put = put  # type: ignore[method-assign]
    await lab.clock.advance(RETRY_S)
    assert lab.lease.renewed_at == pytest.approx(lab.clock.now, abs=RETRY_S)


async def test_what_changed_is_said_at_once(lab: Lab) -> None:
    _, revision = await renewal(lab)
    lab.lease.hasten()
    await lab.clock.advance(0.1)
    assert (await renewal(lab))[1] > revision
    assert lab.lease.renewed_at == pytest.approx(lab.clock.now, abs=0.1)


async def test_a_next_guard_counts_from_what_the_last_one_had(lab: Lab) -> None:
    other = HostLease(lab.store, lab.clock, host="host1", boot_id=lambda: "boot-1")
    other.resume(renewed_at=90.0, counts_from=91.0, number=41)
    assert (other.renewed_at, other.counts_from) == (90.0, 91.0)
    task = asyncio.create_task(other.serve(), name="other")
    await lab.clock.advance(0.1)
    assert (await renewal(lab))[0].number == 42
    assert other.renewed_at == other.counts_from == pytest.approx(100.0, abs=0.2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
