"""Disks of a real QEMU that come, go and grow while its guest runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from godwit.host.run import run_async
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat, Vm
from godwit.qemu import growing, hotplug
from godwit.qemu.devices import device_size, grant_device
from godwit.qemu.launch import Binary
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.growth import grow
from godwit.storage.images import create_image, image_info
from godwit.storage.nodes import BrokerDisk

pytestmark = pytest.mark.system

MakeVm = Callable[..., Vm]
MakePlace = Callable[..., Place]
StartOne = Callable[..., Awaitable[Machine]]
ConsoleWait = Callable[[Machine, str], Awaitable[None]]
MakeDisk = Callable[..., Awaitable[Disk]]

NOBODY = (65534, 65534)
MIB = 1 << 20

# What qemu-img calls the formats of a record.
IMG = {"raw": ["raw"], "qcow2": ["qcow2"], "vhd-fixed": ["vpc", "-o", "subformat=fixed,force_size"]}


@pytest.fixture
def make_disk(root: Path) -> MakeDisk:
    """Images of QEMU's user, with their records."""

    async def make(n: int, kind: DiskFormat = "raw", *, size: int = 4 * MIB) -> Disk:
        path = root / f"hot{n}.{kind}"
        driver, *options = IMG[kind]
        await run_async(
            ["qemu-img", "create", "-q", "-f", driver, *options, str(path), str(size)], timeout=20
        )
        os.chown(path, *NOBODY)
        return Disk(
            id=f"hot{n}",
            volume="shared",
            path=str(path),
            size_bytes=size,
            format=kind,
            serial=f"GWHOT{n}",
            lun=n,
        )

    return make


@pytest.fixture
async def loop_disk(root: Path) -> AsyncIterator[Disk]:
    """A block device of this machine: a loop device over a file."""
    if not Path("/dev/loop-control").exists():
        pytest.skip("there is no /dev/loop-control")
    image = root / "loop.img"
    image.write_bytes(bytes(4 * MIB))
    out = await run_async(["losetup", "--find", "--show", str(image)], timeout=20)
    device = Path(out.decode().strip())
    yield Disk(
        id="hot9",
        path=str(device),
        size_bytes=4 * MIB,
        format="raw",
        source="device",
        serial="GWHOT9",
        lun=9,
    )
    os.chown(device, 0, -1)
    await run_async(["losetup", "--detach", str(device)], timeout=20)


async def _nodes(machine: Machine) -> set[str]:
    named = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    return {str(node["node-name"]) for node in named}


async def _differences(machine: Machine, vm: Vm) -> tuple[str, ...]:
    return hotplug.differences(vm.disks, await hotplug.list_disks(machine))


async def _move(source: Machine, target: Machine) -> str:
    for machine in (source, target):
        caps = [{"capability": name, "state": True} for name in ("events", "return-path")]
        await machine.monitor.execute("migrate-set-capabilities", {"capabilities": caps})
    await target.monitor.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    port = (await target.query_migrate())["socket-address"][0]["port"]
    with source.monitor.events("MIGRATION") as events:
        await source.monitor.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        end = await events.wait(
            lambda event: event.data["status"] in ("completed", "failed"), timeout=30
        )
    return str(end.data["status"])


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhd-fixed"])
async def test_a_disk_comes_and_goes(
    kind: DiskFormat,
    make_vm: MakeVm,
    make_place: MakePlace,
    start: StartOne,
    make_disk: MakeDisk,
    wait_for_console: ConsoleWait,
) -> None:
    vm, place, disk = make_vm(disks=1), make_place(), await make_disk(3, kind)
    machine = await start(vm, place)
    await machine.cont()
    await wait_for_console(machine, "GW")
    before = await _nodes(machine)
    for _ in range(2):  # the same names and the same place can be used again at once
        await hotplug.add_disk(machine, disk, place)
        plugged = {one.id: one for one in await hotplug.list_disks(machine)}["hot3"]
        assert (plugged.lun, plugged.serial, plugged.size_bytes) == (3, "GWHOT3", 4 * MIB)
        assert await _differences(machine, vm.but(disks=(*vm.disks, disk))) == ()
        assert await _differences(machine, vm) == ("hot3 is in the machine but not in the record",)
        blocked = (await machine.query_migrate()).get("blocked-reasons", [])
        assert blocked == [], "a VM with this disk can still be moved"
        await hotplug.remove_disk(machine, disk)
        assert await _differences(machine, vm) == ()
        assert await _nodes(machine) == before
    assert (await machine.status()).running
    with pytest.raises(NotFound):
        await hotplug.remove_disk(machine, disk, force=True)


async def test_a_device_is_passed_through(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, loop_disk: Disk
) -> None:
    path, place = Path(loop_disk.path), make_place()
    assert device_size(path) == 4 * MIB
    machine = await start(make_vm(), place)
    await machine.cont()
    await hotplug.add_disk(machine, loop_disk, place)
    assert path.stat().st_uid == NOBODY[0], "QEMU's own user opened it"
    assert await _differences(machine, make_vm().but(disks=(loop_disk,))) == ()
    nodes = await machine.monitor.execute("query-named-block-nodes", {"flat": True})
    assert {node["drv"] for node in nodes} == {"host_device", "raw"}

    os.truncate(Path(f"/sys/block/{path.name}/loop/backing_file").read_text().strip(), 6 * MIB)
    await run_async(["losetup", "--set-capacity", str(path)], timeout=20)
    assert await growing.resize_disk(machine, loop_disk, 6 * MIB) == 6 * MIB
    with pytest.raises(OperationFailed, match="grow") as caught:
        await growing.resize_disk(machine, loop_disk, 8 * MIB)
    assert "on its storage" in caught.value.hint

    no_lun = loop_disk.but(id="hot8", lun=8, passthrough=True)
    before = await _nodes(machine)
    with pytest.raises(OperationFailed, match="SG_IO") as caught:
        await hotplug.add_disk(machine, no_lun, place)
    assert "without --passthrough" in caught.value.hint
    assert await _nodes(machine) == before

    await hotplug.remove_disk(machine, loop_disk)
    assert path.stat().st_uid == 0
    assert await _nodes(machine) == set()
    cold = await start(
        make_vm(name="web2", disks=0).but(disks=(loop_disk,)), make_place("h2"), incoming=True
    )
    assert [one.id for one in await hotplug.list_disks(cold)] == ["hot9"]


async def test_what_is_no_device_is_refused(root: Path) -> None:
    (root / "plain").touch()
    with pytest.raises(Refused, match="no block device"):
        grant_device(root / "plain", NOBODY)
    with pytest.raises(NotFound, match="no device"):
        grant_device(root / "nothing", NOBODY)
    assert (root / "plain").stat().st_uid == 0


async def test_disks_grow_under_a_running_guest(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, make_disk: MakeDisk
) -> None:
    place, disks = make_place(), [await make_disk(1, "raw"), await make_disk(2, "qcow2")]
    fixed = await make_disk(3, "vhd-fixed")
    machine = await start(make_vm(), place)
    await machine.cont()
    await hotplug.add_disks(machine, [*disks, fixed], place)
    for disk in disks:
        assert await growing.resize_disk(machine, disk, 8 * MIB) == 8 * MIB
        with pytest.raises(Refused, match="only grows"):
            await growing.resize_disk(machine, disk, 4 * MIB)
    await grow(Path(fixed.path), format="vhd-fixed", size_bytes=8 * MIB, held=True)
    await machine.stop()
    fixed = fixed.but(size_bytes=8 * MIB)
    for _ in range(2):  # what was cut short is asked for again
        length = Path(fixed.path).stat().st_size
        size = await growing.take_size(machine, fixed, place, file_bytes=length)
        assert size == 8 * MIB
    await machine.cont()
    assert (await image_info(Path(fixed.path), format="vhd-fixed")).virtual_size == 8 * MIB
    grown = [disk.but(size_bytes=8 * MIB) for disk in disks]
    assert await _differences(machine, make_vm().but(disks=(*grown, fixed))) == ()
    assert Path(disks[0].path).stat().st_size == 8 * MIB


async def test_a_hot_added_machine_is_the_cold_one_and_moves(
    make_vm: MakeVm,
    make_place: MakePlace,
    start: StartOne,
    make_disk: MakeDisk,
    wait_for_console: ConsoleWait,
) -> None:
    kinds: list[DiskFormat] = ["raw", "qcow2", "vhd-fixed"]
    hot = [await make_disk(n + 4, kind) for n, kind in enumerate(kinds)]
    vm, place = make_vm(disks=2), make_place("h1")
    source = await start(vm, place)
    await source.cont()
    await wait_for_console(source, "GW")
    await hotplug.add_disks(source, hot, place)
    await hotplug.remove_disk(source, vm.disks[1])
    vm = vm.but(disks=(vm.disks[0], *hot))
    target = await start(vm, make_place("h2"), incoming=True)
    here, there = await asyncio.gather(source.device_tree(), target.device_tree())
    assert here == there
    assert here.differences(there) == ()
    assert [device.id for device in here.devices if device.driver == "scsi-hd"] == [
        "disk0",
        "hot4",
        "hot5",
        "hot6",
    ]
    assert await _move(source, target) == "completed"
    await source.quit()
    await target.cont()
    await hotplug.remove_disks(target, hot)
    await hotplug.add_disks(target, hot, make_place("h2"))
    assert await _differences(target, vm) == ()


async def test_nothing_changes_while_a_move_runs(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, make_disk: MakeDisk
) -> None:
    vm, place, disk = make_vm(disks=1), make_place("h1"), await make_disk(5)
    source = await start(vm, place)
    target = await start(vm, make_place("h2"), incoming=True)
    await source.cont()
    await source.monitor.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "pause-before-switchover", "state": True}]},
    )
    await target.monitor.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    port = (await target.query_migrate())["socket-address"][0]["port"]
    await source.monitor.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
    before = await _nodes(source)
    for change in (
        hotplug.add_disk(source, disk, place),
        hotplug.remove_disk(source, vm.disks[0], force=True),
        growing.resize_disk(source, vm.disks[0], 8 * MIB),
    ):
        with pytest.raises(Refused, match="is being moved"):
            await change
    assert await _nodes(source) == before


async def test_a_refused_disk_leaves_nothing_behind(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, make_disk: MakeDisk, root: Path
) -> None:
    vm, place = make_vm(disks=1), make_place()
    machine = await start(vm, place)  # stopped: a booting guest keeps QEMU's lock from the monitor
    good, taken = await make_disk(1), (await make_disk(2)).but(lun=0)
    missing = good.but(id="hot3", path=str(root / "nothing.raw"), lun=3)
    twin = good.but(id="hot4", lun=4, path=vm.disks[0].path)
    foreign = (await make_disk(5)).but(format="qcow2")
    before = await _nodes(machine)
    for disk, kind, words in (
        (taken, Conflict, "lun already used by 'disk0'"),
        (missing, OperationFailed, "No such file"),
        (twin, Conflict, "lock"),
        (foreign, OperationFailed, "not in qcow2 format"),
        (vm.disks[0], Conflict, "uplicate"),
    ):
        with pytest.raises(kind, match=words) as caught:
            await hotplug.add_disks(machine, [good, disk], place)
        assert caught.value.hint
        assert await _nodes(machine) == before
        assert await _differences(machine, vm) == ()
    assert not machine.exited.is_set()
    await hotplug.add_disk(machine, good, place)


def _writing_guest() -> bytes:
    """A boot sector that writes to its own disk for ever by the firmware, and prints each result:
    ``w`` for written, ``x`` for failed."""
    loop = bytes.fromhex("b80103 b90500 ba8000 31db cd13 b077 7302 b078 baf803 ee".replace(" ", ""))
    start = bytes.fromhex("31c08ed88ec0fb")  # ds = es = 0, interrupts on
    code = start + loop + bytes([0xEB, (-len(loop) - 2) & 0xFF])
    return code.ljust(510, b"\0") + b"\x55\xaa"


async def test_a_disk_the_guest_writes_to_goes_by_force_only(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, wait_for_console: ConsoleWait
) -> None:
    vm, place = make_vm(disks=1, kernel=False), make_place()
    path = Path(vm.disks[0].path)
    path.write_bytes(_writing_guest().ljust(4 * MIB, b"\0"))
    machine = await start(vm, place)
    await machine.cont()
    await wait_for_console(machine, "www")
    with pytest.raises(Refused, match="writes to disk0") as caught:
        await hotplug.remove_disk(machine, vm.disks[0])
    assert "--force" in caught.value.hint
    assert await _differences(machine, vm) == ()
    await hotplug.remove_disk(machine, vm.disks[0], force=True)
    assert await hotplug.list_disks(machine) == ()
    await wait_for_console(machine, "x")
    assert (await machine.status()).running, "the VM outlives its disk"


async def test_sixty_four_disks(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, make_disk: MakeDisk, root: Path
) -> None:
    first = await make_disk(1)
    disks = []
    for n in range(1, 65):
        path = root / f"many{n}.raw"
        shutil.copyfile(first.path, path)
        os.chown(path, *NOBODY)
        disks.append(first.but(id=f"hot{n}", path=str(path), serial=f"GWHOT{n}", lun=n))
    vm, place = make_vm(disks=1), make_place()
    machine = await start(vm, place)
    await machine.cont()
    began = time.perf_counter()
    await hotplug.add_disks(machine, disks, place)
    added = time.perf_counter()
    assert await _differences(machine, vm.but(disks=(*vm.disks, *disks))) == ()
    listed = time.perf_counter()
    await hotplug.remove_disks(machine, disks, force=True)
    removed = time.perf_counter()
    assert await _differences(machine, vm) == ()
    print(
        f"64 disks: added in {added - began:.2f} s, listed in {listed - added:.2f} s, "
        f"removed in {removed - listed:.2f} s"
    )
    assert added - began < 3
    assert removed - listed < 5, "one after the other would take that long on a quiet machine"


async def test_a_vhdx_comes_through_a_broker(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne, root: Path
) -> None:
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is not installed")
    path, socket = root / "hot1.vhdx", root / "nbd.sock"
    await create_image(path, format="vhdx", size_bytes=4 * MIB, owner=NOBODY)
    served = BrokerDisk(id="hot1", path=str(path), format="vhdx", size_bytes=4 * MIB)
    disk = Disk(
        id="hot1",
        volume="shared",
        path=str(path),
        size_bytes=4 * MIB,
        format="vhdx",
        serial="GWHOT1",
        lun=1,
    )
    place = make_place("h1", broker=str(socket))
    machine = await start(make_vm(), place)
    await machine.cont()
    with pytest.raises(OperationFailed, match=r"nbd\.sock") as caught:
        await hotplug.add_disk(machine, disk, place)
    assert "broker" in caught.value.hint
    with listen(socket, user=NOBODY) as listener:
        broker = await Broker.start(
            DaemonPlace("h1", root / "b", root / "b", Binary(path=program, user=NOBODY)),
            "web",
            socket=socket,
            listener=listener,
            disks=[served],
            opening={"hot1": Opening(epoch=1)},
        )
        try:
            await hotplug.add_disk(machine, disk, place)
            assert await _differences(machine, make_vm().but(disks=(disk,))) == ()
            assert (await machine.query_migrate()).get("blocked-reasons", []) == []
            await hotplug.remove_disk(machine, disk)
            assert await _nodes(machine) == set()
        finally:
            await broker.kill()
            broker.discard()
