"""What the agent does around a change of disks: order, undoing, and moves kept apart from it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import disks as room
from godwit.agent.catalog import Catalog
from godwit.agent.disk_journal import replaced
from godwit.agent.disks import Disks
from godwit.agent.files import Files
from godwit.host.config import QemuConfig
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.model.vm import Disk, Pins, Vm
from godwit.qemu.guest_agent import Mount, NoGuestAgent
from godwit.qemu.hotplug import PluggedDisk
from godwit.qmp import MonitorTimeout


def disk(n: int, **more: Any) -> Disk:
    values: dict[str, Any] = {
        "id": f"disk{n}",
        "volume": "shared",
        "path": f"/clusterstorage/shared/web/disk{n}.raw",
        "size_bytes": 1 << 20,
        "format": "raw",
        "serial": f"GW{n}",
        "lun": n,
    }
    return Disk.model_validate(values | more)


class World:
    """The agent's rooms and a machine, as far as they matter here; ``steps`` is what was done."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.plugged: dict[str, PluggedDisk] = {}
        self.failing: dict[str, Exception] = {}
        pins = Pins(uuid="u", machine="pc-q35-9.0", cpu_model="Westmere-v1", accelerator="tcg")
        vm = Vm(name="web", cpus=1, memory_bytes=64 << 20, pins=pins, created_at=0.0)
        self.slot = SimpleNamespace(vm=vm, machine=SimpleNamespace(epoch=4))
        self.lock = asyncio.Lock()
        self.image = tmp_path / "disk1.raw"
        self.desk = SimpleNamespace(
            moving=set(),
            changing=set(),
            copying=set(),
            slots={"web": self.slot},
            slot=lambda _name: self.slot,
            lock=lambda _name: self.lock,
            place=lambda vm: [disk.id for disk in vm.disks],
            brokers=SimpleNamespace(add=self._serve, remove=self._unserve),
        )
        files = SimpleNamespace(ready_disk=self._ready, remove_image=self._remove_image)
        power = SimpleNamespace(mine=self._mine)
        self.disks = Disks(self.desk, power, files)  # type: ignore[arg-type]
        self.disks._growth = SimpleNamespace(grow=self._grow)  # type: ignore[assignment]
        for name in ("add_disk", "remove_disk", "list_disks"):
            monkeypatch.setattr(room.hotplug, name, getattr(self, f"_{name}"))

    def _step(self, word: str) -> None:
        self.steps.append(word)
        assert "web" in self.desk.changing, "a move could begin now"
        if (error := self.failing.get(word)) is not None:
            raise error

    async def _mine(self, _slot: Any) -> None:
        self._step("owned")

    async def _ready(self, _disk: Disk) -> bool:
        self._step("image")
        made = not self.image.exists()
        self.image.touch()
        return made

    async def _remove_image(self, _disk: Disk) -> None:
        self.image.unlink()

    async def _serve(self, _vm: Vm, _disk: Disk, *, epoch: int) -> None:
        assert epoch == 4
        self._step("broker")

    async def _unserve(self, _vm: str, _disk: Disk) -> None:
        self._step("no broker")

    async def _add_disk(self, _machine: Any, disk: Disk, place: Any) -> None:
        self._step("plug")
        assert disk.id in place, "its broker's socket depends on it"
        self.plugged[disk.id] = PluggedDisk(
            id=disk.id,
            lun=disk.lun,
            serial=disk.serial,
            size_bytes=disk.size_bytes,
            driver="raw",
            node=f"disk-{disk.id}",
            file=disk.path,
        )

    async def _remove_disk(self, _machine: Any, disk: Disk, *, force: bool) -> None:
        self._step("unplug by force" if force else "unplug")
        if self.plugged.pop(disk.id, None) is None:
            raise NotFound("not there")

    async def _grow(self, slot: Any, disk: Disk, size_bytes: int) -> Disk:
        self._step("resize")
        grown = disk.but(size_bytes=-(-size_bytes // 512) * 512)
        slot.vm = replaced(slot.vm, grown)
        return grown

    async def _list_disks(self, _machine: Any) -> tuple[PluggedDisk, ...]:
        return tuple(self.plugged.values())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


async def test_a_disk_is_added_grown_and_removed(world: World) -> None:
    assert await world.disks.add("web", disk(1)) == disk(1)
    assert await world.disks.add("web", disk(2)) == disk(2)
    assert world.slot.vm.disks == (disk(1), disk(2)), "the next move carries them"
    assert world.steps[:4] == ["owned", "image", "broker", "plug"]
    grown = await world.disks.resize("web", "disk1", (2 << 20) - 1)
    assert grown.size_bytes == 2 << 20
    assert world.slot.vm.disks == (grown, disk(2)), "in its old place"
    assert (await world.disks.show("web"))["differences"] == [
        f"disk1 holds {1 << 20} bytes, the record says {2 << 20}"
    ]
    world.steps.clear()
    assert await world.disks.remove("web", "disk1", force=True) == grown
    assert world.steps == ["owned", "unplug by force", "no broker"]
    assert world.slot.vm.disks == (disk(2),)
    assert not world.desk.changing


async def test_asked_twice_is_done_once(world: World) -> None:
    await world.disks.add("web", disk(1))
    await world.disks.add("web", disk(1))
    assert world.steps.count("plug") == 1
    assert world.slot.vm.disks == (disk(1),)
    with pytest.raises(Conflict, match="another disk disk1"):
        await world.disks.add("web", disk(1, serial="other"))


async def test_a_removal_cut_short_is_finished(world: World) -> None:
    await world.disks.add("web", disk(1))
    world.plugged.clear()
    await world.disks.remove("web", "disk1", force=False)
    assert world.slot.vm.disks == ()
    with pytest.raises(NotFound, match="has no disk 'disk1'"):
        await world.disks.remove("web", "disk1", force=False)


async def test_a_mounted_disk_is_taken_by_force_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def says(_port: Path, disk: Disk) -> list[Mount]:
        asked.append(disk.id)
        return [Mount("/dev/sda1", "/data")]

    async def says_nothing(_port: Path, _disk: Disk) -> list[Mount]:
        raise NoGuestAgent("silent")

    monkeypatch.setattr("godwit.agent.guest_agents.mounts", says)
    world.slot.machine.runtime = SimpleNamespace(guest_agent=Path("/nowhere"))
    await world.disks.add("web", disk(1))
    await world.disks.add("web", disk(2))
    await world.disks.add("web", disk(3))
    await world.disks.remove("web", "disk3", force=False)
    assert asked == [], "it was made without the port"
    world.slot.vm = world.slot.vm.but(guest_agent=True)
    with pytest.raises(Refused, match="has disk1 mounted at /data") as caught:
        await world.disks.remove("web", "disk1", force=False)
    assert "--force" in caught.value.hint
    assert "unplug" not in world.steps[-1:]
    await world.disks.remove("web", "disk1", force=True)
    monkeypatch.setattr("godwit.agent.guest_agents.mounts", says_nothing)
    await world.disks.remove("web", "disk2", force=False)
    assert world.slot.vm.disks == ()


@pytest.mark.parametrize("step", ["image", "broker", "plug"])
async def test_a_failure_is_undone_in_reverse(step: str, world: World) -> None:
    world.failing[step] = OperationFailed("no")
    with pytest.raises(OperationFailed):
        await world.disks.add("web", disk(1))
    assert world.slot.vm.disks == ()
    assert not world.image.exists()
    assert ("no broker" in world.steps) == (step == "plug")
    assert not world.desk.changing
    assert not world.lock.locked()


async def test_an_unknown_outcome_leaves_what_qemu_may_have_open(world: World) -> None:
    world.failing["plug"] = MonitorTimeout("web", "device_add", 30.0)
    with pytest.raises(MonitorTimeout):
        await world.disks.add("web", disk(1))
    assert world.image.exists()
    assert "no broker" not in world.steps
    assert world.slot.vm.disks == ()
    del world.failing["plug"]
    await world.disks.add("web", disk(1))
    assert world.slot.vm.disks == (disk(1),)


async def test_an_image_that_was_there_stays_after_a_failure(world: World) -> None:
    world.image.touch()
    world.failing["plug"] = OperationFailed("no")
    with pytest.raises(OperationFailed):
        await world.disks.add("web", disk(1))
    assert world.image.exists()


async def test_a_disk_that_is_used_stays_in_the_record(world: World) -> None:
    await world.disks.add("web", disk(1))
    world.failing["unplug"] = Refused("the guest writes")
    with pytest.raises(Refused):
        await world.disks.remove("web", "disk1", force=False)
    assert world.slot.vm.disks == (disk(1),)


async def test_a_move_is_not_waited_for(world: World) -> None:
    world.desk.moving.add("web")
    await world.lock.acquire()  # as a move does
    with pytest.raises(Conflict, match="being moved"):
        await asyncio.wait_for(world.disks.add("web", disk(1)), timeout=1)
    assert world.steps == []


async def test_a_disk_on_its_way_to_another_image_is_not_disturbed(world: World) -> None:
    world.desk.copying.add("web")
    for change in (
        world.disks.add("web", disk(1)),
        world.disks.remove("web", "disk1", force=True),
        world.disks.resize("web", "disk1", 2 << 20),
    ):
        with pytest.raises(Conflict, match="on its way"):
            await change
    assert world.steps == []


async def test_a_move_that_began_while_waiting_for_the_lock(world: World) -> None:
    await world.lock.acquire()
    task = asyncio.create_task(world.disks.add("web", disk(1)))
    await asyncio.sleep(0)
    world.desk.moving.add("web")
    world.lock.release()
    with pytest.raises(Conflict, match="being moved"):
        await task
    assert world.steps == []


async def test_images_of_a_running_vm_are_deleted_only_when_unused(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "shared" / "web"
    folder.mkdir(parents=True)
    one, two = (disk(n, path=str(folder / f"disk{n}.raw")) for n in (1, 2))
    saved = folder / "saved-4.mem"
    for path in (one.path, two.path, saved):
        Path(path).touch()
    device = disk(3, path="/dev/null", source="device")
    world.slot.vm = world.slot.vm.but(disks=(one, device))
    config = SimpleNamespace(
        paths=SimpleNamespace(volumes=tmp_path),
        tls=SimpleNamespace(dir=tmp_path),
        qemu=QemuConfig(),
        storage=SimpleNamespace(ceph_conf=tmp_path / "ceph.conf"),
    )
    equipment = SimpleNamespace(binary=SimpleNamespace(user=None))
    desk = SimpleNamespace(config=config, slots=world.desk.slots, equipment=equipment, host="host1")
    desk.catalog = Catalog(desk)  # type: ignore[arg-type]
    files = Files(desk)  # type: ignore[arg-type]
    for disks in ([one], [one, two], [device], []):
        with pytest.raises(Refused, match="runs here"):
            await files.delete_disks("web", disks)
    await files.delete_disks("web", [two, device.but(id="disk4", path="/dev/zero")])
    assert sorted(path.name for path in folder.iterdir()) == ["disk1.raw", "saved-4.mem"]
    desk.slots.clear()
    await files.delete_disks("web", [one, device], whole=True)
    assert not folder.exists()
    assert Path("/dev/null").exists()
