"""The agent's end of the guard's socket against the real other end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.guardlink import BEAT_S, GuardLink
from godwit.agent.ha import set_ha
from godwit.guard.lease import TTL_S, HostLease
from godwit.guard.socket import AgentLine
from godwit.guard.vms import Vms
from godwit.host.clock import RealClock
from godwit.host.process import identify
from godwit.host.sockets import bind_unix
from godwit.model.errors import Conflict, Unavailable
from godwit.model.vm import Pins, Vm
from godwit.qemu.runtime import Runtime
from godwit.qmp.fake import FakeQemu
from godwit.store.memory import MemoryStore


async def until(true: Callable[[], bool], seconds: float = 3.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - neither end tells
            await asyncio.sleep(0.01)


class Guard:
    """A guard that can be stopped and started again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tasks: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        clock = RealClock()
        self.vms = Vms(now=clock.monotonic, log=self.path / "log", notify=lambda: None)
        self.lease = HostLease(MemoryStore(), clock, host="h1", boot_id=lambda: "b")
        self.line = AgentLine(self.vms, self.lease, clock)
        listener = bind_unix(self.path / "agent.sock")
        self.tasks = [
            asyncio.create_task(self.line.serve(listener), name="serve"),
            asyncio.create_task(self.lease.serve(), name="lease"),
        ]

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.tasks:
            if self.line._current is not None:  # a real one would take its sockets along
                self.line._current.close()
            await self.vms.close()


class Both:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.guard = Guard(path)
        self.link = GuardLink(path / "agent.sock", RealClock())
        self.qemu = FakeQemu()

    def runtime(self) -> Runtime:
        me = identify(os.getpid())
        assert me is not None
        return Runtime(
            vm="web",
            host="h1",
            epoch=3,
            role="started",
            pid=me.pid,
            start_time=me.start_time,
            run=self.path,
            state=self.path,
        )


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[Both]:
    found = Both(tmp_path)
    await found.qemu.listen(tmp_path / "guard.sock")
    task = asyncio.create_task(found.link.serve(), name="link")
    yield found
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    found.link._drop()
    await asyncio.sleep(0.02)  # both ends of the socket close
    await found.guard.stop()
    await found.qemu.die()


async def test_without_a_guard_there_is_no_lease_and_nothing_fails(both: Both) -> None:
    assert not both.link.connected
    assert both.link.lease_left() == 0.0
    await both.link.register(both.runtime(), ha=False)
    await both.link.arm("web", "m-1", "source")


async def test_the_lease_is_the_guards_and_runs_out_when_it_is_gone(both: Both) -> None:
    await both.guard.start()
    await until(lambda: both.link.lease_left() > TTL_S - 2)
    assert both.link.lease_left() <= TTL_S
    await both.guard.stop()
    await until(lambda: not both.link.connected)
    left = both.link.lease_left()
    await asyncio.sleep(0.05)
    assert both.link.lease_left() < left


async def test_a_guard_that_does_not_know_a_word_is_told_once_and_kept(
    both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    await both.guard.start()
    await until(lambda: both.link.connected)
    for _ in range(2):
        await both.link._tell({"op": "levitate", "vm": "web"})
    said = [line for line in caplog.messages if "cannot 'levitate'" in line]
    assert len(said) == 1
    assert "restart it if it is older" in said[0]
    assert both.link.connected


async def test_what_was_told_to_nobody_is_told_to_the_next_guard(both: Both) -> None:
    await both.link.register(both.runtime(), ha=False)
    await both.link.arm("web", "m-1", "source")
    await both.guard.start()
    await until(lambda: "web" in both.guard.vms.vms)
    await until(lambda: both.guard.vms.vms["web"].armed is not None)
    entry = both.guard.vms.vms["web"]
    assert (entry.migration, entry.epoch) == ("m-1", 3)


async def test_a_restarted_guard_is_told_everything_again(both: Both) -> None:
    await both.guard.start()
    await until(lambda: both.link.lease_left() > 0)
    await both.link.register(both.runtime(), ha=False)
    await both.link.arm("web", "m-1", "source")
    await both.guard.stop()
    await until(lambda: not both.link.connected)
    await both.guard.start()
    await until(lambda: "web" in both.guard.vms.vms)
    await until(lambda: both.guard.vms.vms["web"].armed is not None)


async def test_disarmed_and_forgotten_stay_so(both: Both) -> None:
    await both.guard.start()
    await until(lambda: both.link.lease_left() > 0)
    await both.link.register(both.runtime(), ha=False)
    await both.link.arm("web", "m-1", "source")
    await both.link.disarm("web")
    assert both.guard.vms.vms["web"].armed is None
    await both.link.forget("web")
    assert both.guard.vms.vms == {}


async def test_the_agents_beats_keep_it_alive_in_the_guards_eyes(both: Both) -> None:
    await both.guard.start()
    await until(lambda: both.link.lease_left() > 0)
    await asyncio.sleep(3 * BEAT_S)
    assert both.guard.line.gone_for() == 0.0


async def test_the_guard_learns_whom_it_has_to_stop(both: Both) -> None:
    await both.guard.start()
    await until(lambda: both.link.lease_left() > 0)
    await both.link.register(both.runtime(), ha=True)
    entry = both.guard.vms.vms["web"]
    assert (entry.ha, entry.deadline, entry.cgroup) == (True, True, "")
    await both.link.change("web", ha=False)
    assert both.guard.vms.vms["web"] is entry
    assert not entry.ha
    await both.link.register(both.runtime(), ha=True, deadline=False)
    assert (entry.ha, entry.deadline) == (True, False)


async def test_nobody_waits_for_a_guard_that_is_not_there(both: Both) -> None:
    started = asyncio.get_running_loop().time()
    await both.link.until_it_moves("web", timeout=60)
    assert asyncio.get_running_loop().time() - started < 4
    await both.link.until_it_moves("web", timeout=60)
    assert asyncio.get_running_loop().time() - started < 4


async def test_a_frozen_vm_is_waited_for(both: Both) -> None:
    answer = {"renewed_at": 1.0, "ttl": 12, "counts_from": 1.0, "frozen": {"web": "why"}}
    both.link._note(answer)
    waiting = asyncio.create_task(both.link.until_it_moves("web", timeout=60), name="wait")
    await both.link.until_it_moves("other", timeout=60)
    await asyncio.sleep(BEAT_S)
    assert not waiting.done()
    both.link._note({**answer, "frozen": {}})
    await until(waiting.done)
    await waiting


def desk_of(both: Both) -> Any:
    """What `set_ha` needs of a desk, with one VM that runs."""
    pins = Pins(uuid="u", machine="q35", cpu_model="qemu64", accelerator="tcg")
    vm = Vm(name="web", cpus=1, memory_bytes=1 << 28, pins=pins, created_at=1.0)
    slot = SimpleNamespace(vm=vm, ending=False)
    lock = asyncio.Lock()
    return SimpleNamespace(
        host="h1", guard=both.link, moving=set(), slot=lambda _: slot, lock=lambda _: lock
    )


async def test_a_running_vm_becomes_ha_when_its_guard_has_been_told(both: Both) -> None:
    await both.link.register(both.runtime(), ha=False)
    desk = desk_of(both)
    with pytest.raises(Unavailable, match="the guard of h1 is away"):
        await set_ha(desk, "web", ha=True)
    await both.guard.start()
    await until(lambda: both.link.connected and "web" in both.guard.vms.vms)
    await set_ha(desk, "web", ha=True)
    assert both.guard.vms.vms["web"].ha, "it knows when the call returns"
    assert desk.slot("web").vm.ha, "a move takes it along"
    await set_ha(desk, "web", ha=False)
    assert not both.guard.vms.vms["web"].ha
    desk.moving.add("web")
    with pytest.raises(Conflict):
        await set_ha(desk, "web", ha=True)
    assert not both.guard.vms.vms["web"].ha
