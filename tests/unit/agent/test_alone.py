"""An agent whose guard is silent, and what it tells of VMs that stand still."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.alone import Alone, View, must_act
from godwit.agent.guardlink import GuardLink
from godwit.guard.deadline import Stand
from godwit.host.process import Process, identify
from godwit.model import keys
from godwit.model.vm import VmState, VmStatus
from godwit.qemu.intervals import read_guard
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

CASES = [
    # seconds since the guard answered, since the deadline counts, whether to act
    (0.5, 60.0, False),  # it lives: it will do it
    (1.9, 60.0, False),
    (2.0, 7.9, False),  # it is being started again, and nothing is due
    (2.0, 8.0, True),
    (60.0, 60.0, True),
]


@pytest.mark.parametrize(("silent", "late", "act"), CASES)
def test_when_it_has_to_act(silent: float, late: float, act: bool) -> None:
    assert must_act(View(1000 - silent, 1000 - late), now=1000) is act


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead

    def realtime(self) -> float:
        return 1.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


class Rig:
    """A desk with two VMs, no guard, and freezers that note what they do."""

    def __init__(self, path: Path) -> None:
        me = identify(os.getpid())
        assert me is not None
        self.path = path
        self.clock = Clock()
        self.store = MemoryStore()
        self.froze: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.guard = GuardLink(path / "none.sock", self.clock)
        self.slots = {name: self.slot(name, me, ha=name == "web") for name in ("web", "plain")}
        self.desk: Any = SimpleNamespace(
            clock=self.clock,
            config=SimpleNamespace(paths=SimpleNamespace(state=path)),
            guard=self.guard,
            slots=self.slots,
            host="h1",
            records=Records(self.store),
            event=self.event,
        )
        self.alone = Alone(self.desk, freezer=self.freezer)

    def slot(self, name: str, process: Process, *, ha: bool) -> Any:
        runtime = SimpleNamespace(process=process, cgroup=name)
        return SimpleNamespace(
            vm=SimpleNamespace(name=name, ha=ha),
            machine=SimpleNamespace(runtime=runtime, epoch=3, exited=asyncio.Event()),
            state=VmState.RUNNING,
            reason="",
            paused=False,
        )

    def freezer(self, _process: Process, name: str) -> Any:
        def freeze() -> Stand:
            self.froze.append(name)
            return Stand.FROZEN

        return SimpleNamespace(freeze=freeze)

    async def event(self, kind: str, vm: str, message: str, **_more: Any) -> None:
        self.events.append((kind, f"{vm}: {message}"))

    async def status(self) -> VmStatus | None:
        found = await self.store.get(keys.vm_status("web"))
        return None if found is None else VmStatus.model_validate_json(found.value)

    async def until(self, true: Any) -> None:
        async with asyncio.timeout(3):
            while not true():  # noqa: ASYNC110 - nothing here tells
                await asyncio.sleep(0.005)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    tasks = [
        asyncio.create_task(found.alone.serve(), name="serve"),
        asyncio.create_task(found.alone.tell(), name="tell"),
    ]
    await asyncio.sleep(0.01)
    yield found
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await found.store.aclose()


async def test_it_freezes_what_is_highly_available_once(rig: Rig) -> None:
    rig.guard._note({"renewed_at": rig.clock.monotonic(), "ttl": 12, "counts_from": 0.0})
    rig.guard.counts_from = rig.clock.monotonic()
    rig.clock.ahead = 7.0
    await asyncio.sleep(0.1)
    assert rig.froze == []
    rig.clock.ahead = 8.5
    await rig.until(lambda: rig.slots["web"].state is VmState.FROZEN)
    await asyncio.sleep(0.1)
    assert rig.froze == ["web"]
    assert [word for _, word in read_guard(rig.path / "guard.log", "web")] == ["frozen"]
    found = await rig.status()
    assert found is not None
    assert (found.state, found.epoch) == (VmState.FROZEN, 3)
    assert "frozen by the agent" in found.reason


async def test_a_guard_that_answers_is_left_alone(rig: Rig) -> None:
    for _ in range(5):
        rig.clock.ahead += 4
        answer = {"renewed_at": 1.0, "ttl": 12, "counts_from": rig.clock.monotonic() - 60}
        rig.guard._note(answer)
        await asyncio.sleep(0.06)
    assert rig.froze == []


async def test_what_the_guard_froze_is_told_once_the_store_is_back(rig: Rig) -> None:
    rig.store.faults.unavailable = True
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {"web": "not renewed: frozen"}})
    await rig.until(lambda: rig.slots["web"].state is VmState.FROZEN)
    rig.store.faults.unavailable = False
    async with asyncio.timeout(3):
        while (found := await rig.status()) is None:  # noqa: ASYNC110 - nothing here tells
            await asyncio.sleep(0.01)
    assert (found.state, found.reason) == (VmState.FROZEN, "not renewed: frozen")
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {}})
    await rig.until(lambda: rig.events)
    found = await rig.status()
    assert found is not None
    assert found.state is VmState.RUNNING
    assert rig.events[0][0] == "vm.thawed"
    assert "web: stood still for" in rig.events[0][1]
    assert len(rig.events) == 1
    assert rig.slots["plain"].state is VmState.RUNNING


async def test_that_a_vm_goes_on_is_told_until_the_store_has_taken_it(rig: Rig) -> None:
    """The guard's store may be back before the agent's connection to it is."""
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {"web": "not renewed: frozen"}})
    async with asyncio.timeout(3):
        while await rig.status() is None:  # noqa: ASYNC110 - nothing here tells
            await asyncio.sleep(0.01)
    rig.store.faults.unavailable = True
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {}})
    await rig.until(lambda: rig.slots["web"].state is VmState.RUNNING)
    await asyncio.sleep(0.1)
    assert rig.events == []
    rig.store.faults.unavailable = False
    await rig.until(lambda: rig.events)
    found = await rig.status()
    assert found is not None
    assert found.state is VmState.RUNNING


async def test_what_it_froze_itself_stays_told_until_a_guard_has_it(rig: Rig) -> None:
    rig.guard.froze("web", "by the agent")
    assert rig.guard.frozen == {"web": "by the agent"}
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {}})  # not asked to look yet
    assert rig.guard.frozen == {"web": "by the agent"}
    rig.guard._handed_over = rig.clock.monotonic()
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {"web": "found frozen"}})
    assert rig.guard.frozen == {"web": "found frozen"}
    rig.clock.ahead += 2.5
    rig.guard._note({"renewed_at": 1.0, "ttl": 12, "frozen": {}})
    assert rig.guard.frozen == {}
