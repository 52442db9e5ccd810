"""What is begun with a disk that grows is ended: the image says how large the disk is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import growth as room
from godwit.agent.growth import NOTE, Growth, settle_others, settle_running
from godwit.model import keys
from godwit.model.errors import OperationFailed, Refused
from godwit.model.vm import Disk, Pins, Vm
from godwit.storage.files import LOCAL
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

PINS = Pins(uuid="u", machine="pc-q35-9.0", cpu_model="Westmere-v1", accelerator="tcg")
MIB = 1 << 20


class World:
    """A VM with one disk, its image, its guest and its record, as numbers of bytes."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        values: dict[str, Any] = {
            "id": "disk0",
            "volume": "shared",
            "path": "/clusterstorage/shared/web/disk0.vhdx",
            "size_bytes": MIB,
            "format": "vhdx",
            "serial": "GW0",
            "lun": 0,
        }
        self.disk = Disk.model_validate(values | more)
        vm = Vm(
            name="web", cpus=1, memory_bytes=64 * MIB, disks=(self.disk,), pins=PINS, created_at=0.0
        )
        self.image = self.guest = MIB
        self.stands = False
        self.failing: Exception | None = None
        self.steps: list[str] = []
        self.events: list[str] = []
        self.store = MemoryStore()
        self.records = Records(self.store)
        machine = SimpleNamespace(exited=asyncio.Event())
        self.slot = SimpleNamespace(vm=vm, machine=machine)
        paths = SimpleNamespace(
            state=state,
            vm_state=lambda name: state / "vms" / name,
            vm_run=lambda name: state / name,
        )
        qemu = SimpleNamespace(user="root")
        self.desk = SimpleNamespace(
            config=SimpleNamespace(paths=paths, qemu=qemu),
            catalog=SimpleNamespace(files=lambda _volume: LOCAL, sync=self._sync),
            brokers=SimpleNamespace(grow=self._through_broker),
            holds=SimpleNamespace(reach=self._hold),
            lock=lambda _name: asyncio.Lock(),
            place=lambda _vm: None,
            records=self.records,
            slots={"web": self.slot},
            event=self._event,
        )
        files = SimpleNamespace(disk_path=lambda disk: Path(disk.path))
        self.growth = Growth(self.desk, files)  # type: ignore[arg-type]
        monkeypatch.setattr(room, "standing_still", self._standing)
        monkeypatch.setattr(room, "image_info", self._info)
        monkeypatch.setattr(room, "grow", self._grow)
        monkeypatch.setattr(room, "check_room", self._room)
        monkeypatch.setattr(room.growing, "check_growth", self._check)
        monkeypatch.setattr(room.growing, "resize_disk", self._resize)
        monkeypatch.setattr(room.growing, "take_size", self._tell)
        self.note = state / "vms" / "web" / NOTE

    async def begin(self) -> None:
        await self.records.cas(keys.vm_spec("web"), self.slot.vm, 0)

    async def recorded(self) -> int:
        found = await self.records.vm("web")
        assert found is not None
        return found.value.disks[0].size_bytes

    def _step(self, word: str) -> None:
        self.steps.append(word)
        if word in ("image", "guest") and self.failing is not None:
            error, self.failing = self.failing, None
            raise error

    @asynccontextmanager
    async def _standing(self, _desk: Any, _slot: Any) -> AsyncIterator[None]:
        assert not self.stands
        self.stands = True
        try:
            yield
        finally:
            self.stands = False

    async def _sync(self) -> None:
        return

    async def _hold(self, _point: str, **_more: Any) -> None:
        return

    async def _event(self, _kind: str, _vm: str, message: str, **_more: Any) -> None:
        self.events.append(message)

    async def _through_broker(self, _vm: str, disk: Disk, size: int, work: Any) -> int:
        assert self.stands
        self.steps.append("closed")
        await work(disk, size)
        self.steps.append("served")
        return self.image

    async def _info(self, _path: Path, **_more: Any) -> Any:
        return SimpleNamespace(virtual_size=self.image)

    async def _room(self, _path: Path, **_more: Any) -> None:
        self._step("room")
        assert not self.note.exists(), "nothing is begun before it is known to be possible"

    async def _grow(self, _path: Path, *, size_bytes: int, **_more: Any) -> None:
        assert self.note.exists(), "what is begun is noted first"
        self._step("image")
        self.image = size_bytes

    async def _check(self, _machine: Any, _disk: Disk, size_bytes: int) -> int:
        if size_bytes < self.guest:
            raise Refused("smaller")
        return self.guest

    async def _resize(self, _machine: Any, _disk: Disk, size_bytes: int) -> int:
        assert self.note.exists()
        assert not self.stands
        self._step("image")
        self.image = self.guest = size_bytes
        return size_bytes

    async def _tell(self, _machine: Any, disk: Disk, _place: Any, **_more: Any) -> int:
        assert self.stands
        self._step("guest")
        self.guest = disk.size_bytes
        return self.guest


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, monkeypatch)
    await made.begin()
    return made


async def _agree(world: World, size: int) -> None:
    (disk,) = world.slot.vm.disks
    assert (world.image, world.guest, disk.size_bytes) == (size, size, size)
    assert await world.recorded() == size
    assert not world.note.exists()


async def test_one_that_goes_through_the_broker(world: World) -> None:
    grown = await world.growth.grow(world.slot, world.disk, 2 * MIB - 1)  # type: ignore[arg-type]
    assert grown == world.disk.but(size_bytes=2 * MIB)
    assert world.steps == ["room", "closed", "image", "served", "guest"]
    await _agree(world, 2 * MIB)
    world.steps.clear()
    assert await world.growth.grow(world.slot, grown, 2 * MIB) == grown  # type: ignore[arg-type]
    assert world.steps == [], "asked twice is done once"


async def test_one_that_qemu_grows_does_not_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch, format="qcow2")
    await world.begin()
    await world.growth.grow(world.slot, world.disk, 2 * MIB)  # type: ignore[arg-type]
    assert world.steps == ["room", "image"]
    await _agree(world, 2 * MIB)


async def test_an_image_that_does_not_grow(world: World) -> None:
    world.failing = OperationFailed("no room on the volume")
    with pytest.raises(OperationFailed, match="no room"):
        await world.growth.grow(world.slot, world.disk, 2 * MIB)  # type: ignore[arg-type]
    await _agree(world, MIB)


async def test_a_guest_that_cannot_be_told(world: World) -> None:
    """The image has grown; once more, and everybody knows."""

    async def grown(*_: Any, **__: Any) -> None:
        world.image = 2 * MIB
        world.failing = OperationFailed("QEMU refuses")

    room.grow = grown  # type: ignore[assignment]
    with pytest.raises(OperationFailed, match="QEMU refuses"):
        await world.growth.grow(world.slot, world.disk, 2 * MIB)  # type: ignore[arg-type]
    await _agree(world, 2 * MIB)


async def test_a_store_that_is_away_is_told_later(world: World) -> None:
    world.store.faults.fail_next(1)
    grown = await world.growth.grow(world.slot, world.disk, 2 * MIB)  # type: ignore[arg-type]
    assert world.slot.vm.disks == (grown,), "the next move carries it"
    assert world.note.exists()
    assert await world.recorded() == MIB
    await settle_running(world.desk, world.slot)  # type: ignore[arg-type]
    await _agree(world, 2 * MIB)


async def _cut_short(world: World) -> None:
    """As an agent leaves it that dies when the image is larger."""
    note = room.Note(vm="web", uuid="u", disk=world.disk)
    world.note.parent.mkdir(parents=True)
    room.save_json(world.note, note.model_dump(mode="json"))
    world.image = 2 * MIB


async def test_the_next_agent_ends_it(world: World) -> None:
    await _cut_short(world)
    await settle_running(world.desk, world.slot)  # type: ignore[arg-type]
    await _agree(world, 2 * MIB)
    assert world.steps == ["guest"]
    assert "cut short" in world.events[0]
    await settle_running(world.desk, world.slot)  # type: ignore[arg-type]
    assert world.steps == ["guest"]


async def test_without_a_qemu_the_record_says_what_the_image_holds(world: World) -> None:
    await _cut_short(world)
    await settle_others(world.desk)  # type: ignore[arg-type]
    assert world.note.exists(), "its QEMU runs here"
    world.desk.slots.clear()
    await settle_others(world.desk)  # type: ignore[arg-type]
    assert await world.recorded() == 2 * MIB
    assert not world.note.exists()


async def test_another_vm_of_that_name_is_left_alone(world: World) -> None:
    await _cut_short(world)
    world.slot.vm = world.slot.vm.but(pins=PINS.but(uuid="another"))
    await world.records.update(keys.vm_spec("web"), Vm, lambda _: world.slot.vm)
    await settle_running(world.desk, world.slot)  # type: ignore[arg-type]
    assert await world.recorded() == MIB
    assert not world.note.exists()


async def test_a_damaged_note_keeps_no_vm_from_being_adopted(world: World) -> None:
    await _cut_short(world)
    world.note.write_text("{")
    await settle_running(world.desk, world.slot)  # type: ignore[arg-type]
    assert "cannot be read" in world.events[0]
    world.note.write_text("[]")
    world.desk.slots.clear()
    await settle_others(world.desk)  # type: ignore[arg-type]
    assert "cannot be read" in world.events[-1]
