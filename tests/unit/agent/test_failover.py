"""A VM that was lost elsewhere is started here only as the record says; strays are ended."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.failover import Failover
from godwit.agent.power import Power
from godwit.host.process import Process, identify
from godwit.model import keys, ownership
from godwit.model.errors import Conflict, OperationFailed
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.vm import Pins, Vm, VmState
from godwit.qemu.runtime import Runtime
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

PINS = Pins(uuid="u", machine="pc-q35-9.0", cpu_model="Westmere-v1", accelerator="tcg")
VM = Vm(name="web", cpus=1, memory_bytes=64 << 20, pins=PINS, created_at=0.0, ha=True)
LOST = Owner(host="host2", epoch=4, state=OwnerState.RUNNING)
GIVEN = ownership.fail_over(LOST, host="host1")


class World:
    """The VM's record, the desk of host1, and what was really started and ended there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.records = Records(MemoryStore())
        lock = asyncio.Lock()
        self.ended: list[str] = []
        self.events: list[str] = []
        self.desk = SimpleNamespace(
            host="host1",
            lock=lambda _name: lock,
            records=self.records,
            slots={},
            moving=set(),
            settling={},
            unlocked=set(),
            guard=SimpleNamespace(frozen={}),
            slot=lambda name: self.desk.slots[name],
            event=self._event,
            take=self._take,
            brokers=SimpleNamespace(end=self._event),
            equipment=SimpleNamespace(info=SimpleNamespace(boot_id="b-1")),
            config=SimpleNamespace(
                paths=SimpleNamespace(run=folder, vm_run=lambda name: folder / "vms" / name)
            ),
        )
        self.started: list[int] = []
        self.refusal: Exception | None = None
        self.power = Power(self.desk)  # type: ignore[arg-type]
        for name in ("_check", "_check_images"):
            monkeypatch.setattr(self.power, name, self._fine)
        monkeypatch.setattr(self.power, "_power_on", self._power_on)
        monkeypatch.setattr(self.power, "status", lambda name: name)
        self.arrivals = SimpleNamespace(incoming={})
        self.taken_up: list[str] = []
        departures = SimpleNamespace(take_up=self._take_up)
        self.failover = Failover(self.power, self.arrivals, departures)  # type: ignore[arg-type]

    async def begin(self, owner: Owner) -> None:
        await self.records.cas(keys.vm_spec("web"), VM, 0)
        await self.records.cas(keys.vm_owner("web"), owner, 0)

    async def _fine(self, *_: Any) -> None:
        return

    async def _event(self, kind: str, *_: Any, **__: Any) -> None:
        self.events.append(kind)

    async def _take_up(self, slot: Any, bound: MoveIntent) -> None:
        self.taken_up.append(bound.id)
        self.desk.moving.add(slot.vm.name)

    async def _take(self, slot: Any) -> None:
        self.desk.slots.pop(slot.vm.name)

    async def _power_on(self, vm: Vm, owner: Owner, _image: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.started.append(owner.epoch)
        self.slot(owner.epoch)

    def slot(self, epoch: int, state: VmState = VmState.RUNNING) -> Any:
        async def kill() -> None:
            self.ended.append(f"epoch {epoch}")

        machine = SimpleNamespace(
            epoch=epoch, pid=os.getpid(), kill=kill, amend=self._amend, exited=asyncio.Event()
        )
        self.desk.slots["web"] = SimpleNamespace(
            vm=VM, machine=machine, state=state, ending=False, reason=""
        )
        return self.desk.slots["web"]

    def _amend(self, **changes: object) -> None:
        self.amended = changes

    async def owner(self) -> Owner:
        found = await self.records.owner("web")
        assert found is not None
        return found.value


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path)


async def test_what_the_record_gives_is_started_at_its_epoch_once(world: World) -> None:
    await world.begin(GIVEN)
    await world.failover.take_over("web", epoch=5)
    await world.failover.take_over("web", epoch=5)
    assert world.started == [5]
    assert await world.owner() == GIVEN.but(state=OwnerState.RUNNING)


@pytest.mark.parametrize(
    ("owner", "epoch"),
    [
        (GIVEN, 4),  # an order from before the record changed
        (GIVEN.but(host="host3"), 5),
        (ownership.stopped(GIVEN), 5),
        (GIVEN.but(state=OwnerState.RUNNING), 5),  # somebody has started it, and it is not here
    ],
)
async def test_anything_else_is_refused_and_nothing_changed(
    world: World, owner: Owner, epoch: int
) -> None:
    await world.begin(owner)
    with pytest.raises(Conflict, match="not host1's to start"):
        await world.failover.take_over("web", epoch=epoch)
    assert world.started == []
    assert await world.owner() == owner


async def test_a_lost_hosts_locks_are_no_obstacle(world: World) -> None:
    await world.begin(ownership.fail_over(LOST, host="host1", unlock=True))
    await world.failover.take_over("web", epoch=5)
    assert (world.desk.unlocked, world.amended) == ({"web"}, {"unlocked": True})
    assert (await world.owner()).unlock


async def test_a_record_that_moved_on_while_it_booted_ends_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.begin(GIVEN)
    boots = world._power_on

    async def power_on(vm: Vm, owner: Owner, image: Any) -> None:
        await boots(vm, owner, image)
        moved = ownership.fail_over(owner, host="host3")
        await world.records.update(keys.vm_owner("web"), Owner, lambda _: moved)

    monkeypatch.setattr(world.power, "_power_on", power_on)
    with pytest.raises(Conflict):
        await world.failover.take_over("web", epoch=5)
    assert (world.started, world.ended, world.desk.slots) == ([5], ["epoch 5"], {})
    assert (await world.owner()).host == "host3"


async def test_one_whose_last_answer_was_lost_is_recorded_when_asked_again(world: World) -> None:
    await world.begin(GIVEN)
    world.slot(5)
    await world.failover.take_over("web", epoch=5)
    assert world.started == []
    assert await world.owner() == GIVEN.but(state=OwnerState.RUNNING)


async def test_a_start_that_fails_leaves_the_record_to_the_manager(world: World) -> None:
    await world.begin(GIVEN)
    world.refusal = OperationFailed("the image is not there", hint="")
    with pytest.raises(OperationFailed):
        await world.failover.take_over("web", epoch=5)
    assert await world.owner() == GIVEN


async def test_a_stray_is_ended_and_never_the_vm_itself(world: World) -> None:
    await world.begin(GIVEN)
    world.slot(4, VmState.FROZEN)
    (ending,) = world.failover.processes().processes  # its process is gone, its end is not told
    assert (ending.epoch, ending.driven) == (4, True)
    await world.failover.end_stray("web", epoch=4)
    assert (world.ended, world.desk.slots) == (["epoch 4"], {})
    world.slot(5)
    with pytest.raises(Conflict, match="belongs to host1"):
        await world.failover.end_stray("web", epoch=5)
    assert world.ended == ["epoch 4"]


async def test_a_vm_is_given_up_only_by_the_very_record(world: World) -> None:
    await world.begin(LOST.but(host="host1"))
    world.slot(4)
    found = await world.records.owner("web")
    assert found is not None
    with pytest.raises(Conflict, match="has changed"):
        await world.failover.end_own("web", revision=found.revision - 1)
    assert world.ended == []
    await world.failover.end_own("web", revision=found.revision)
    assert (world.ended, world.desk.slots) == (["epoch 4"], {})
    assert await world.owner() == LOST.but(host="host1")


MOVE = MoveIntent(id="m-1", method="live", source="host1", destination="host2")
BOUND = ownership.begin_move(LOST.but(host="host1"), MOVE)


@pytest.mark.parametrize(
    "owner",
    [BOUND, ownership.committing(BOUND, "m-1"), ownership.swap(BOUND, "m-1")],
    ids=["intent", "committing", "swapped"],
)
async def test_a_move_that_nobody_drives_is_taken_up_once(world: World, owner: Owner) -> None:
    await world.begin(owner)
    world.slot(4, VmState.PAUSED)
    await world.failover.take_up_move("web", migration="m-1")
    await world.failover.take_up_move("web", migration="m-1")  # the answer was lost
    assert world.taken_up == ["m-1"]
    assert await world.owner() == owner  # what becomes of it is the engine's to write
    assert world.events == ["migration.taken-up"]


@pytest.mark.parametrize("owner", [LOST.but(host="host1"), BOUND.but(migration=None)])
async def test_a_move_that_the_record_names_no_more_is_nobodys(world: World, owner: Owner) -> None:
    await world.begin(owner)
    world.slot(4, VmState.PAUSED)
    await world.failover.take_up_move("web", migration="m-1")
    assert (world.taken_up, world.events) == ([], [])


async def test_another_move_is_left_alone(world: World) -> None:
    await world.begin(BOUND.but(migration=MOVE.but(id="m-2")))
    world.slot(4, VmState.PAUSED)
    await world.failover.take_up_move("web", migration="m-1")
    assert world.taken_up == []


@pytest.mark.parametrize("what", ["nothing here", "its QEMU has ended", "another began it"])
async def test_what_is_not_here_cannot_be_taken_up(world: World, what: str) -> None:
    other = MOVE.but(source="host3") if what == "another began it" else MOVE
    await world.begin(BOUND.but(migration=other))
    if what != "nothing here":
        slot = world.slot(4, VmState.PAUSED)
        if what == "its QEMU has ended":
            slot.machine.exited.set()
    with pytest.raises(Conflict, match="nothing of m-1"):
        await world.failover.take_up_move("web", migration="m-1")
    assert world.taken_up == []


def me() -> Process:
    found = identify(os.getpid())
    assert found is not None
    return found


def note(world: World, folder: Path, **more: Any) -> None:
    """The durable note of a QEMU that lives: this very process."""
    run = folder / "vms" / "web"
    run.mkdir(parents=True)
    about = {"vm": "web", "host": "host1", "epoch": 4, "role": "started", "run": run}
    process = {"pid": me().pid, "start_time": me().start_time, "state": folder}
    Runtime.model_validate({**about, **process, **more}).save()


async def test_every_living_qemu_is_told_known_or_not(world: World, tmp_path: Path) -> None:
    note(world, tmp_path)
    (unknown,) = world.failover.processes().processes
    assert (unknown.vm, unknown.epoch, unknown.state, unknown.known) == ("web", 4, "running", False)
    world.slot(6, VmState.FROZEN)
    (known,) = world.failover.processes().processes
    assert (known.epoch, known.state, known.known, known.driven) == (6, "frozen", True, False)
    world.desk.moving.add("web")
    assert world.failover.processes().processes[0].driven


@pytest.mark.parametrize(
    ("phase", "state", "complete", "driven"),
    [
        ("ready", "incoming", False, True),
        ("loaded", "incoming", True, True),
        ("running", "running", False, True),
        ("gone", "incoming", False, False),
    ],
)
async def test_a_copy_on_its_way_in_tells_how_far_it_is(
    world: World, tmp_path: Path, phase: str, state: str, complete: bool, driven: bool
) -> None:
    note(world, tmp_path, role="incoming", migration="m-1")
    world.arrivals.incoming["m-1"] = SimpleNamespace(phase=phase)
    (one,) = world.failover.processes().processes
    assert (one.state, one.complete, one.driven) == (state, complete, driven)
    assert one.migration == "m-1"


async def test_a_copy_that_was_let_go_of_is_told_as_whole(world: World, tmp_path: Path) -> None:
    note(world, tmp_path, role="incoming", migration="m-1", released=True)
    world.arrivals.incoming["m-1"] = SimpleNamespace(phase="ready")
    (one,) = world.failover.processes().processes
    assert (one.complete, one.released, one.driven) == (True, True, True)


async def test_a_process_that_is_gone_is_not_told(world: World, tmp_path: Path) -> None:
    note(world, tmp_path)
    path = tmp_path / "vms" / "web" / "runtime.json"
    since = f'"start_time": {me().start_time}'
    path.write_text(path.read_text().replace(since, '"start_time": 1'))
    assert world.failover.processes().processes == ()
