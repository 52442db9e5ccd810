"""Power devices and deadlines as a validation tries them: nothing is switched."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.host.clock import RealClock
from godwit.manager.cutting import Cutter
from godwit.manager.work import validation_rungs
from godwit.manager.work.validation_rungs import rungs_seen
from godwit.model import keys
from godwit.model.membership import Renewal
from godwit.model.power import PowerConfig, PowerState
from godwit.model.validation_facts import CpuSeen, HostProbe, HostSeen
from godwit.power.errors import PowerDenied, PowerUnavailable
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode

REDFISH = PowerConfig(type="redfish", address="https://10.0.0.5", password="sealed")


@dataclass
class Device:
    """Says what it is told to; switching would be an error, for it has no such verbs."""

    says: Any
    asked: list[float] = field(default_factory=list)

    async def state(self, *, deadline_s: float) -> PowerState:
        self.asked.append(deadline_s)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says  # type: ignore[no-any-return]


@pytest.fixture
def try_host(monkeypatch: pytest.MonkeyPatch, make_host: Any) -> Any:
    """What is found of one host whose device says this."""

    async def tried(says: Any, *, answers: bool = True, leased: bool = True, **renewal: Any) -> Any:
        device = Device(says)

        @contextlib.asynccontextmanager
        async def opened(host: str, *_: Any, **__: Any) -> AsyncIterator[Device]:
            assert host == "host1"
            yield device

        monkeypatch.setattr(validation_rungs, "opened", opened)
        records = Records(MemoryStore())
        if renewal:
            record = Renewal(boot_id="b", number=1, **renewal)
            await records.store.put(keys.host_renewal("host1"), encode(record))
        powers = {} if says is None else {"host1": REDFISH}
        snapshot = SimpleNamespace(
            powers=powers, leases={"host1"} if leased else set(), volumes={}, hosts={}
        )
        cache: Any = SimpleNamespace(snapshot=snapshot)
        clock = RealClock()
        world: Any = SimpleNamespace(
            records=records,
            cache=cache,
            vault=None,
            clock=clock,
            cutter=Cutter(cache, None, clock),
        )
        probe = HostProbe(name="host1", cpu=CpuSeen(count=1), qemu=make_host("host1").qemu)
        host = HostSeen(name="host1", state="up", probe=probe if answers else None)
        found = await rungs_seen(world, (host,))
        await records.store.aclose()
        return found

    return tried


async def test_the_last_word_of_a_silent_host_is_no_rung(try_host: Any) -> None:
    word = {"guard": "armed", "watchdog": True}
    [rung] = await try_host(None, **word)
    assert (rung.rung, rung.answers) == ("deadline", True)
    assert await try_host(None, leased=False, **word) == ()


async def test_a_device_that_says_on_is_a_rung(try_host: Any) -> None:
    [rung] = await try_host(PowerState.ON)
    assert (rung.rung, rung.answers, rung.device) == ("power", True, "Redfish at https://10.0.0.5")


async def test_a_device_that_says_off_of_a_host_that_answers(try_host: Any) -> None:
    [rung] = await try_host(PowerState.OFF)
    assert not rung.answers
    assert "another machine" in rung.reason
    [rung] = await try_host(PowerState.OFF, answers=False)
    assert rung.answers


@pytest.mark.parametrize(
    "says", [PowerUnavailable("it timed out"), PowerDenied("wrong password"), PowerState.UNKNOWN]
)
async def test_a_device_that_cannot_tell_is_none(try_host: Any, says: Any) -> None:
    [rung] = await try_host(says)
    assert not rung.answers
    assert rung.reason


@pytest.mark.parametrize(
    ("guard", "watchdog", "expected"),
    [("armed", True, [True]), ("unarmed", True, [False]), ("armed", False, [])],
)
async def test_a_deadline_counts_with_a_watchdog_behind_it(
    try_host: Any, guard: str, watchdog: bool, expected: list[bool]
) -> None:
    found = await try_host(None, guard=guard, watchdog=watchdog)
    assert [rung.answers for rung in found] == expected


async def test_a_host_that_has_nothing_has_no_rung(try_host: Any) -> None:
    assert await try_host(None) == ()
