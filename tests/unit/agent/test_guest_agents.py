"""A guest's clock after it stood still: set by its agent, or said to be behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import guest_agents
from godwit.qemu.guest_agent import NoGuestAgent


class World:
    """A desk that keeps its background work, and a clock that jumps with each look at it."""

    def __init__(self, *, guest_agent: bool = True) -> None:
        self.work: list[Any] = []
        self.events: list[str] = []
        self.now = 0.0
        vm = SimpleNamespace(name="web", guest_agent=guest_agent)
        runtime = SimpleNamespace(guest_agent=Path("/nowhere"))
        self.slot: Any = SimpleNamespace(vm=vm, machine=SimpleNamespace(runtime=runtime))
        self.desk: Any = SimpleNamespace(
            background=lambda work, _name: self.work.append(work),
            clock=SimpleNamespace(monotonic=self._monotonic, realtime=lambda: 1e9),
            event=self._event,
        )

    def _monotonic(self) -> float:
        self.now += 4.0
        return self.now

    async def _event(self, kind: str, vm: str, message: str, **_more: Any) -> None:
        self.events.append(f"{kind} {vm}: {message}")


async def test_it_is_set_as_soon_as_the_guest_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    async def second_time(_port: Path, now_s: float) -> None:
        asked.append(now_s)
        if len(asked) < 2:
            raise NoGuestAgent("busy")

    monkeypatch.setattr(guest_agents, "set_clock", second_time)
    monkeypatch.setattr(guest_agents, "_RETRY_S", 0.0)
    world = World()
    guest_agents.set_clock_soon(world.desk, world.slot)
    (work,) = world.work
    await work
    assert asked == [1e9, 1e9]
    assert world.events == []


async def test_one_that_stays_silent_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_port: Path, _now_s: float) -> None:
        raise NoGuestAgent("silent")

    monkeypatch.setattr(guest_agents, "set_clock", never)
    monkeypatch.setattr(guest_agents, "_RETRY_S", 0.0)
    world = World()
    guest_agents.set_clock_soon(world.desk, world.slot)
    await world.work[0]
    assert world.events == [
        "vm.clock web: its clock stays behind by the time it stood still: silent"
    ]


def test_a_vm_without_the_port_is_not_asked() -> None:
    world = World(guest_agent=False)
    guest_agents.set_clock_soon(world.desk, world.slot)
    assert world.work == []
