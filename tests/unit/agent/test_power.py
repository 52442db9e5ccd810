"""A VM starts as its record says, and not as it said before."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.power import Power
from godwit.model import keys, ownership
from godwit.model.errors import Conflict, NotFound, OperationFailed
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Pins, Vm
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

PINS = Pins(uuid="u", machine="pc-q35-9.0", cpu_model="Westmere-v1", accelerator="tcg")
VM = Vm(name="web", cpus=1, memory_bytes=64 << 20, pins=PINS, created_at=0.0)


class World:
    """A VM's two records, and who changes one of them while it is about to start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records = Records(MemoryStore())
        lock = asyncio.Lock()
        self.desk = SimpleNamespace(
            host="host1",
            lock=lambda _name: lock,
            records=self.records,
            slots={},
            event=self._event,
            publish_status=self._event,
        )
        self.started: list[Vm] = []
        self.meanwhile: Vm | None = None
        self.power = Power(self.desk)  # type: ignore[arg-type]
        monkeypatch.setattr(self.power, "_check", self._check)
        monkeypatch.setattr(self.power, "_check_images", self._event)
        monkeypatch.setattr(self.power, "_power_on", self._power_on)
        monkeypatch.setattr(self.power, "status", lambda name: name)

    async def begin(self) -> None:
        await self.records.cas(keys.vm_spec("web"), VM, 0)
        await self.records.cas(keys.vm_owner("web"), Owner(), 0)

    async def _event(self, *_: Any, **__: Any) -> None:
        return

    async def _check(self, vm: Vm) -> None:
        assert vm == VM
        if self.meanwhile is not None:  # as a manager does: the ownership stays as it was
            await self.records.update(keys.vm_spec("web"), Vm, lambda _: self.meanwhile or VM)

    async def _power_on(self, vm: Vm, _owner: Owner, _image: Any) -> None:
        self.started.append(vm)

    async def owner(self) -> Owner:
        found = await self.records.owner("web")
        assert found is not None
        return found.value

    async def state(self) -> tuple[OwnerState, int]:
        owner = await self.owner()
        return owner.state, owner.epoch


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(monkeypatch)
    await made.begin()
    return made


async def test_it_starts_as_it_is_defined(world: World) -> None:
    await world.power.start("web")
    assert world.started == [VM]
    assert await world.state() == (OwnerState.RUNNING, 1)


async def test_a_definition_that_changes_meanwhile_is_not_started(world: World) -> None:
    world.meanwhile = VM.but(memory_bytes=128 << 20)
    with pytest.raises(Conflict, match="changed by somebody else"):
        await world.power.start("web")
    assert world.started == []
    assert await world.state() == (OwnerState.STOPPED, 0)


async def test_clones_are_looked_for_among_all_vms_only_without_word_of_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing 20,000 VMs for each one that starts would cost a host seconds, and the store more."""
    looked: list[str] = []

    async def look(vm: Vm) -> None:
        looked.append(vm.name)

    monkeypatch.setattr(world.power, "_check_images", look)
    found = await world.records.owner("web")
    assert found is not None
    await world.power.start("web", no_clones_at=found.revision)
    assert looked == []
    # A clone that was begun after that word has written the owner record: the word is too old.
    await world.records.update(keys.vm_owner("web"), Owner, ownership.stopped)
    await world.power.start("web", no_clones_at=found.revision)
    assert looked == ["web"]
    await world.records.update(keys.vm_owner("web"), Owner, ownership.stopped)
    await world.power.start("web")
    assert looked == ["web", "web"]


async def test_locks_that_a_lost_host_may_hold_are_tried_first_and_then_done_without(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = [True]

    async def power_on(_vm: Vm, owner: Owner, _image: Any) -> None:
        if locked[0] and not world.desk.unlocked:
            raise OperationFailed("it is locked", hint="")
        machine = SimpleNamespace(epoch=owner.epoch, amend=lambda **_: None)
        world.desk.slots["web"] = SimpleNamespace(machine=machine)

    monkeypatch.setattr(world.power, "_power_on", power_on)
    world.desk.unlocked = set()
    world.desk.slot = lambda name: world.desk.slots[name]
    with pytest.raises(OperationFailed):
        await world.power.start("web")
    await world.records.update(keys.vm_owner("web"), Owner, lambda o: o.but(unlock=True))
    await world.power.start("web")
    assert (world.desk.unlocked, (await world.owner()).unlock) == ({"web"}, True)
    world.desk.slots.clear()
    world.desk.unlocked.clear()
    locked[0] = False
    await world.records.update(
        keys.vm_owner("web"), Owner, lambda o: o.but(state=OwnerState.STOPPED)
    )
    await world.power.start("web")
    assert (world.desk.unlocked, (await world.owner()).unlock) == (set(), False)


async def test_what_its_hosts_loss_of_power_ended_is_recorded_when_somebody_stops_it(
    world: World, tmp_path: Path
) -> None:
    world.desk.config = SimpleNamespace(paths=SimpleNamespace(vm_run=lambda name: tmp_path / name))
    world.desk.clock = SimpleNamespace(realtime=lambda: 5.0)

    def gone() -> NotFound:
        return NotFound("it does not run", hint="")

    def slot(_name: str) -> None:
        raise gone()

    world.desk.slot = slot
    with pytest.raises(NotFound):  # it never ran
        await world.power.stop("web", force=True, timeout_s=1.0)
    runs = Owner(host="host1", epoch=3, state=OwnerState.RUNNING)
    await world.records.update(keys.vm_owner("web"), Owner, lambda _: runs.but(host="host2"))
    with pytest.raises(NotFound):  # another host's
        await world.power.stop("web", force=True, timeout_s=1.0)
    await world.records.update(keys.vm_owner("web"), Owner, lambda _: runs)
    await world.power.stop("web", force=True, timeout_s=1.0)
    assert await world.state() == (OwnerState.STOPPED, 3)
