"""A real QEMU from its start to its end: started, adopted, told what to do, ended, cleared away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from godwit.host.errors import ProcessGone
from godwit.host.process import is_alive
from godwit.model.errors import Conflict, OperationFailed
from godwit.model.vm import Vm
from godwit.qemu import intervals
from godwit.qemu.machine import Machine
from godwit.qemu.runtime import load_runtime
from godwit.qemu.start import Place, end_unfinished, spawn
from godwit.qmp import Monitor, MonitorLost, QmpError

pytestmark = pytest.mark.system

MakeVm = Callable[..., Vm]
MakePlace = Callable[..., Place]
StartOne = Callable[..., Awaitable[Machine]]
ConsoleWait = Callable[[Machine, str], Awaitable[None]]


def _taps() -> set[str]:
    return {path.name for path in Path("/sys/class/net").glob("gw*")}


async def test_a_machine_from_start_to_end(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, wait_for_console: ConsoleWait
) -> None:
    place = make_place()
    before = _taps()
    machine = await start(make_vm(nics=1), place, epoch=7)
    assert (await machine.status()).status == "prelaunch"
    assert len(_taps() - before) == 1
    assert Path(f"/proc/{machine.pid}/status").read_text().count("65534") >= 2, "as nobody"
    assert os.getsid(machine.pid) == machine.pid, "in its own session"
    assert "Seccomp:\t2" in Path(f"/proc/{machine.pid}/status").read_text()
    assert machine.pid in machine.cgroup.pids()  # type: ignore[union-attr]

    earlier = time.time()
    resumed = await machine.cont()
    assert earlier - 0.001 <= resumed <= time.time()
    await wait_for_console(machine, "GW\n....")
    assert len(await machine.vcpu_threads()) == 1
    memory = await machine.memory_info()
    assert memory.total_bytes == memory.balloon_bytes == 64 << 20
    assert 0 < memory.resident_bytes < 1 << 30

    stopped = await machine.stop()
    assert resumed < stopped <= time.time()
    assert await machine.stop() >= stopped, "a stopped machine stays stopped"
    size = machine.runtime.console_log.stat().st_size
    await asyncio.sleep(0.1)
    assert machine.runtime.console_log.stat().st_size == size
    await machine.cont()
    await machine.cont()
    await machine.set_link("net0", up=False)
    await machine.set_link("net0", up=True)

    with machine.monitor.events("SHUTDOWN") as events:
        await machine.powerdown()
        shutdown = await events.wait(timeout=10)
    assert shutdown.data["reason"] == "guest-shutdown"
    assert not machine.exited.is_set(), "-no-shutdown keeps it for the record"
    assert await machine.quit() == 0
    await machine.discard()

    lines = intervals.read_lines(place.state)
    names = [line["event"] for line in lines]
    assert names[:2] == ["START", "RESUME"]
    assert names[-1] == "EXIT"
    assert all(line["epoch"] == 7 and line["host"] == "h1" for line in lines)
    spans = intervals.running_spans(place.state, until=time.time())
    assert len(spans) == 2
    assert spans[0].start == pytest.approx(resumed, abs=0.005)
    assert spans[0].end == pytest.approx(stopped, abs=0.005)
    assert _taps() == before
    assert not place.run.exists()
    assert not machine.cgroup.exists()  # type: ignore[union-attr]


async def test_adoption_does_not_touch_the_guest(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne
) -> None:
    place = make_place()
    machine = await start(make_vm(), place)
    await machine.cont()
    with pytest.raises(Conflict, match="recorded"):
        await spawn(make_vm(), place, epoch=2)
    await machine.close()
    await machine.close()
    runtime = load_runtime(place.run)
    assert runtime is not None
    adopted = await Machine.adopt(runtime)
    try:
        assert (await adopted.status()).running
        assert len(intervals.running_spans(place.state, until=time.time())) == 1
        adopted.amend(epoch=9)
        assert load_runtime(place.run) == adopted.runtime
        status = await adopted.kill()
        assert status == -signal.SIGKILL
    finally:
        await adopted.close()
    with pytest.raises(ProcessGone):
        await Machine.adopt(runtime)
    machine.exited.set()  # its own watch was let go of


async def test_a_recycled_number_is_not_adopted(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne
) -> None:
    machine = await start(make_vm())
    stranger = machine.runtime.but(start_time=machine.runtime.start_time - 1)
    with pytest.raises(ProcessGone):
        await Machine.adopt(stranger)
    assert (await machine.status()).status == "prelaunch"


@pytest.mark.parametrize("fault", ["cpu", "disk", "tap"])
async def test_a_failed_start_leaves_nothing(
    fault: str, make_vm: MakeVm, make_place: MakePlace, start: StartOne, root: Path
) -> None:
    vm, place = make_vm(nics=1, disks=1), make_place("h2")
    before = _taps()
    words = ""
    if fault == "cpu":
        vm, words = vm.but(pins=vm.pins.but(cpu_model="NoSuchModel-v1")), "NoSuchModel-v1"
    elif fault == "disk":
        (root / "disk0.raw").chmod(0)
        os.chown(root / "disk0.raw", 0, 0)
        words = "Permission denied"
    else:
        other = await start(make_vm(nics=1), make_place("h1"))
        before = _taps()
        words = "cannot make tap"
        assert other.runtime.taps
    with pytest.raises(OperationFailed, match=words) as caught:
        await spawn(vm, place, epoch=1)
    assert caught.value.hint
    assert not place.run.exists()
    assert _taps() == before
    assert not any(path.exists() for path in Path("/sys/fs/cgroup").glob(f"*/{place.cgroup}"))


async def test_an_incoming_machine_never_starts_by_itself(make_vm: MakeVm, start: StartOne) -> None:
    machine = await start(make_vm(), incoming=True, migration="m1")
    assert (await machine.status()).status == "inmigrate"
    with pytest.raises(Conflict, match="waits for its memory"):
        await machine.cont()
    assert machine.runtime.role == "incoming"
    assert machine.runtime.migration == "m1"


async def test_the_spare_monitor_is_independent(make_vm: MakeVm, start: StartOne) -> None:
    machine = await start(make_vm())
    async with await Monitor.connect(
        machine.runtime.guard_monitor, name="guard", deadline=2
    ) as spare:
        assert spare.oob
        assert (await spare.execute("query-status"))["status"] == "prelaunch"
        with pytest.raises(QmpError, match="Instance not found"):
            await spare.execute_oob("yank", {"instances": [{"type": "migration"}]})


async def test_a_killed_qemu_is_noticed_at_once(make_vm: MakeVm, start: StartOne) -> None:
    machine = await start(make_vm())
    await machine.cont()
    began = time.monotonic()
    os.kill(machine.pid, signal.SIGKILL)
    async with asyncio.timeout(2):
        await machine.exited.wait()
    assert time.monotonic() - began < 1
    assert machine.exit_status == -signal.SIGKILL
    with pytest.raises(MonitorLost):
        await machine.status()
    (span,) = intervals.running_spans(machine.runtime.state, until=time.time() + 100)
    assert span.end == pytest.approx(time.time(), abs=2)


async def test_a_frozen_qemu_is_ended_by_force(make_vm: MakeVm, start: StartOne) -> None:
    machine = await start(make_vm())
    os.kill(machine.pid, signal.SIGSTOP)
    with pytest.raises(Conflict, match="still runs"):
        await machine.discard()
    assert await machine.quit(timeout=0.3) == -signal.SIGKILL
    assert not is_alive(machine.runtime.process)


async def test_a_qemu_in_a_frozen_group_is_ended_by_force(make_vm: MakeVm, start: StartOne) -> None:
    machine = await start(make_vm())
    group = machine.cgroup
    assert group is not None
    await group.freeze()
    assert await machine.kill(timeout=5) == -signal.SIGKILL


async def test_a_start_cut_short_is_cleared_away(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne
) -> None:
    place = make_place()
    machine = await start(make_vm(), place)
    cut = machine.runtime.but(pid=0, start_time=0, argv=())
    await machine.monitor.close()
    await end_unfinished(cut)
    async with asyncio.timeout(5):
        await machine.exited.wait()
    assert machine.exit_status == 0
    assert not place.run.exists()
    place.run.mkdir()
    cut.save()
    await end_unfinished(cut)
    assert not place.run.exists()


async def test_a_running_guest_is_never_taken_for_a_cut_short_start(
    make_vm: MakeVm, start: StartOne
) -> None:
    machine = await start(make_vm())
    await machine.cont()
    await machine.monitor.close()
    cut = machine.runtime.but(pid=0, start_time=0)
    with pytest.raises(OperationFailed, match="is running"):
        await end_unfinished(cut)
    assert is_alive(machine.runtime.process)


async def test_boots_from_its_first_disk(
    make_vm: MakeVm, start: StartOne, wait_for_console: ConsoleWait
) -> None:
    machine = await start(make_vm(disks=2, kernel=False))
    await machine.cont()
    await wait_for_console(machine, "GW\n..")


async def test_start_is_quick(make_vm: MakeVm, make_place: MakePlace) -> None:
    vm, took = make_vm(disks=1, nics=1), []
    for n in range(5):
        place = make_place(f"q{n}")
        began = time.perf_counter()
        machine = await spawn(vm, place, epoch=1, incoming=True)
        await machine.status()
        took.append(time.perf_counter() - began)
        await machine.quit()
        await machine.discard()
    print(f"spawn to ready: {sorted(round(t * 1000) for t in took)} ms")
    assert min(took) < 2, "40-60 ms on a quiet machine"
