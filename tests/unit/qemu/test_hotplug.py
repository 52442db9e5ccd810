"""Which commands a change of disks sends, and what a refusal at each of them leaves: nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from godwit.host.process import identify
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.model.vm import Disk
from godwit.qemu import growing, hotplug
from godwit.qemu.hotplug import PluggedDisk, differences
from godwit.qemu.launch import Binary
from godwit.qemu.machine import Machine
from godwit.qemu.runtime import Runtime
from godwit.qemu.start import Place
from godwit.qmp import Monitor, MonitorTimeout
from godwit.qmp.fake import FakeQemu


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


class Qemu(FakeQemu):
    """The fake, with the block statistics and sizes that these commands ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.write_rate = 0
        self.sizes = {"disk1": 1 << 20}

    async def cmd_query__blockstats(self, _args: dict[str, Any]) -> Any:
        self.writes += self.write_rate
        stats = {"wr_operations": self.writes, "unmap_operations": 0, "flush_operations": 0}
        return [{"qdev": name, "stats": stats} for name in self.devices]

    async def cmd_query__block(self, _args: dict[str, Any]) -> Any:
        return [
            {"qdev": name, "inserted": {"image": {"virtual-size": self.sizes.get(name, 0)}}}
            for name in self.devices
        ]

    async def cmd_block_resize(self, args: dict[str, Any]) -> Any:
        self.sizes[str(args["node-name"]).removeprefix("disk-")] = args["size"]
        return {}

    async def cmd_blockdev__reopen(self, args: dict[str, Any]) -> Any:
        (node,) = args["options"]
        if "size" in node:
            self.sizes[str(node["node-name"]).removeprefix("disk-")] = node["size"]
        return {}

    async def cmd_blockdev__del(self, args: dict[str, Any]) -> Any:
        name = args["node-name"]
        if name not in self.blocks:
            self.fail("blockdev-del", f"Failed to find node with node-name='{name}'")
            return await self.run("blockdev-del", args, oob=False)
        return await super().cmd_blockdev__del(args)


@pytest.fixture
async def qemu(tmp_path: Path) -> AsyncIterator[Qemu]:
    fake = Qemu()
    await fake.listen(tmp_path / "qmp.sock")
    yield fake
    await fake.die()


@pytest.fixture
async def machine(qemu: Qemu, tmp_path: Path) -> AsyncIterator[Machine]:
    me = identify(os.getpid())
    assert me is not None
    runtime = Runtime(
        vm="web",
        host="h1",
        epoch=1,
        role="started",
        pid=me.pid,
        start_time=me.start_time,
        run=tmp_path,
        state=tmp_path,
    )
    monitor = await Monitor.connect(tmp_path / "qmp.sock", name="web", deadline=2)
    found = Machine(runtime, monitor)
    yield found
    await found.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(host="h1", run=tmp_path, state=tmp_path, binary=Binary(path="qemu"))


def _changes(qemu: Qemu) -> list[str]:
    return [
        f"{one.command} {one.arguments.get('node-name') or one.arguments.get('id')}"
        for one in qemu.received
        if not one.command.startswith("query")
    ]


async def test_nodes_come_before_devices_and_go_after_them(
    qemu: Qemu, machine: Machine, place: Place
) -> None:
    await hotplug.add_disks(machine, [disk(1), disk(2)], place)
    await hotplug.remove_disks(machine, [disk(1), disk(2)], force=True)
    assert _changes(qemu) == [
        "blockdev-add file-disk1",
        "blockdev-add disk-disk1",
        "blockdev-add file-disk2",
        "blockdev-add disk-disk2",
        "device_add disk1",
        "device_add disk2",
        "device_del disk1",
        "device_del disk2",
        "blockdev-del disk-disk2",
        "blockdev-del file-disk2",
        "blockdev-del disk-disk1",
        "blockdev-del file-disk1",
    ]
    assert not qemu.blocks
    assert not qemu.devices


@pytest.mark.parametrize(
    ("command", "words", "kind"),
    [
        ("blockdev-add", "Could not open: No such file or directory", OperationFailed),
        ("device_add", "lun already used by 'disk7'", Conflict),
        ("device_add", 'Failed to get "write" lock', Conflict),
    ],
)
async def test_a_refusal_leaves_nothing(
    command: str, words: str, kind: type[Exception], qemu: Qemu, machine: Machine, place: Place
) -> None:
    qemu.fail(command, words)
    with pytest.raises(kind, match=words) as caught:
        await hotplug.add_disks(machine, [disk(1), disk(2)], place)
    assert caught.value.hint  # type: ignore[attr-defined]
    assert not qemu.blocks
    assert not qemu.devices


async def test_a_disk_that_is_there_is_not_taken_away_by_its_twin(
    qemu: Qemu, machine: Machine, place: Place
) -> None:
    await hotplug.add_disk(machine, disk(1), place)
    with pytest.raises(Conflict, match="duplicate"):
        await hotplug.add_disk(machine, disk(1), place)
    assert set(qemu.blocks) == {"file-disk1", "disk-disk1"}
    assert set(qemu.devices) == {"disk1"}


async def test_a_cancelled_addition_leaves_nothing(
    qemu: Qemu, machine: Machine, place: Place
) -> None:
    gate = qemu.hang("device_add")
    task = asyncio.create_task(hotplug.add_disk(machine, disk(1), place))
    while not any(one.command == "device_add" for one in qemu.received):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.sleep(0.01)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not qemu.blocks
    assert not qemu.devices


async def test_a_silent_qemu_means_an_unknown_outcome(
    qemu: Qemu, machine: Machine, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "COMMAND_TIMEOUT", 0.05)
    monkeypatch.setattr(hotplug, "REMOVE_TIMEOUT", 0.05)
    gate = qemu.hang("blockdev-add")
    with pytest.raises(MonitorTimeout):
        await hotplug.add_disk(machine, disk(1), place)
    gate.set()


@pytest.mark.parametrize("status", ["setup", "active", "pre-switchover", "device", "cancelling"])
async def test_nothing_changes_during_a_move(
    status: str, qemu: Qemu, machine: Machine, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def moving(**_more: object) -> dict[str, str]:
        return {"status": status}

    monkeypatch.setattr(machine, "query_migrate", moving)
    for change in (
        hotplug.add_disk(machine, disk(1), place),
        hotplug.remove_disk(machine, disk(1), force=True),
        growing.resize_disk(machine, disk(1), 1 << 30),
    ):
        with pytest.raises(Refused, match="being moved") as caught:
            await change
        assert "cancel" in caught.value.hint
    assert _changes(qemu) == []


async def test_a_disk_in_use_is_removed_by_force_only(
    qemu: Qemu, machine: Machine, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "QUIET_S", 0.01)
    await hotplug.add_disk(machine, disk(1), place)
    qemu.write_rate = 1
    with pytest.raises(Refused, match="writes to disk1"):
        await hotplug.remove_disk(machine, disk(1))
    assert "disk1" in qemu.devices
    qemu.write_rate = 0
    await hotplug.remove_disk(machine, disk(1))
    assert not qemu.devices


async def test_a_guest_that_keeps_its_disk(
    qemu: Qemu, machine: Machine, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await hotplug.add_disk(machine, disk(1), place)

    async def ignore(_args: dict[str, Any]) -> Any:
        return {}

    qemu._handlers["device_del"] = ignore
    with pytest.raises(OperationFailed, match=r"keeps its disk disk1: .* within 0.05 s"):
        await hotplug.remove_disk(machine, disk(1), force=True, timeout=0.05)

    async def refuse(args: dict[str, Any]) -> Any:
        qemu.emit("DEVICE_UNPLUG_GUEST_ERROR", {"device": args["id"]})
        return {}

    qemu._handlers["device_del"] = refuse
    with pytest.raises(OperationFailed, match="the guest does not let go"):
        await hotplug.remove_disk(machine, disk(1), force=True)
    assert set(qemu.blocks) == {"file-disk1", "disk-disk1"}, "a device still stands on them"


async def test_a_removal_cut_short_can_be_finished(
    qemu: Qemu, machine: Machine, place: Place
) -> None:
    await hotplug.add_disk(machine, disk(1), place)
    del qemu.devices["disk1"]
    await hotplug.remove_disk(machine, disk(1), force=True)
    assert not qemu.blocks
    with pytest.raises(NotFound, match="no disk disk1"):
        await hotplug.remove_disk(machine, disk(1), force=True)


async def test_a_disk_only_grows(qemu: Qemu, machine: Machine, place: Place) -> None:
    await hotplug.add_disk(machine, disk(1), place)
    assert await growing.resize_disk(machine, disk(1), (2 << 20) + 1) == (2 << 20) + 512
    assert await growing.resize_disk(machine, disk(1), (2 << 20) + 512) == (2 << 20) + 512
    assert _changes(qemu).count("block_resize disk-disk1") == 1
    with pytest.raises(Refused, match="only grows"):
        await growing.resize_disk(machine, disk(1), 1 << 20)
    with pytest.raises(NotFound, match="no disk disk9"):
        await growing.resize_disk(machine, disk(9), 4 << 20)
    qemu.fail("block_resize", "Cannot grow NBD nodes")
    with pytest.raises(OperationFailed, match="Cannot grow") as caught:
        await growing.resize_disk(machine, disk(1, tier="brokered"), 4 << 20)
    assert "next time" in caught.value.hint


async def test_a_new_size_is_told_to_the_guest(qemu: Qemu, machine: Machine, place: Place) -> None:
    """A fixed VHD has an end for the guest, at which it must not be asked for its new size."""
    fixed = disk(1, format="vhd-fixed")
    await hotplug.add_disk(machine, fixed, place)
    before = len(qemu.received)
    grown = fixed.but(size_bytes=2 << 20)
    with pytest.raises(OperationFailed, match="bytes"):
        await growing.take_size(machine, grown, place, file_bytes=2 << 20)
    assert len(qemu.received) == before, "QEMU would have cut the footer off"
    await growing.take_size(machine, grown, place, file_bytes=(2 << 20) + 512)
    said = [one for one in qemu.received[before:] if not one.command.startswith("query")]
    assert [one.command for one in said] == ["blockdev-reopen", "block_resize", "blockdev-reopen"]
    assert "size" not in said[0].arguments["options"][0]
    assert said[2].arguments["options"][0]["size"] == 2 << 20
    qemu.fail("block_resize", "no")
    before = len(qemu.received)
    with pytest.raises(OperationFailed):
        await growing.take_size(machine, fixed.but(size_bytes=3 << 20), place, file_bytes=4 << 20)
    last = [one for one in qemu.received[before:] if not one.command.startswith("query")][-1]
    assert last.arguments["options"][0]["size"] == 2 << 20, "the footer is out of reach again"


def _plugged(one: Disk, **more: Any) -> PluggedDisk:
    values: dict[str, Any] = {
        "id": one.id,
        "lun": one.lun,
        "serial": one.serial,
        "size_bytes": one.size_bytes,
        "driver": "raw",
        "node": f"disk-{one.id}",
        "file": one.path,
    }
    return PluggedDisk(**(values | more))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"lun": 9}, "has LUN 9"),
        ({"serial": "X"}, "serial number X"),
        ({"size_bytes": 512}, "holds 512 bytes"),
        ({"file": "/other"}, "is /other"),
        ({"file": "nbd+unix:///web-disk1"}, None),
        ({"id": "disk2"}, "not in the"),
    ],
)
def test_differences_in_words(change: dict[str, Any], words: str | None) -> None:
    said = differences([disk(1)], [_plugged(disk(1), **change)])
    assert bool(said) == (words is not None)
    assert all(words in sentence for sentence in said if words)
