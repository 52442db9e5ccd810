"""A disk of a real QEMU that takes to another image while its guest writes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from godwit.host.run import run_async
from godwit.model.disks import tier_of
from godwit.model.errors import OperationFailed
from godwit.model.vm import Disk, DiskFormat, Vm
from godwit.qemu import hotplug
from godwit.qemu.launch import Binary
from godwit.qemu.layout import broker_id
from godwit.qemu.machine import Machine
from godwit.qemu.mirror import Mirror, Seen, let_go
from godwit.qemu.start import Place
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.formats import FORMATS
from godwit.storage.images import create_image
from godwit.storage.nodes import BrokerDisk

from .test_hotplug import _differences, _move, _nodes, _writing_guest

pytestmark = pytest.mark.system

NOBODY = (65534, 65534)
MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def vm(make_vm: Callable[..., Vm], root: Path) -> Vm:
    """A VM that writes its own first sector for ever, and says so."""
    made = make_vm(disks=1, kernel=False)
    Path(made.disks[0].path).write_bytes(_writing_guest().ljust(SIZE, b"\0"))
    return made


async def _image(root: Path, disk: Disk, kind: DiskFormat) -> Disk:
    path = root / f"image{disk.generation + 1}.{kind}"
    await create_image(path, format=kind, size_bytes=SIZE, owner=NOBODY)
    return disk.but(path=str(path), format=kind, generation=disk.generation + 1)


def _served(disk: Disk) -> BrokerDisk:
    return BrokerDisk(id=broker_id(disk), path=disk.path, format=disk.format, size_bytes=SIZE)


@asynccontextmanager
async def _broker(root: Path, socket: Path) -> AsyncIterator[Broker]:
    """With a disk of its own that nobody uses, so that it can serve the others."""
    spare = root / "spare.raw"
    await create_image(spare, format="raw", size_bytes=SIZE, owner=NOBODY)
    with listen(socket, user=NOBODY) as listener:
        broker = await Broker.start(
            DaemonPlace("h1", root / "b", root / "b", Binary("qemu-storage-daemon", user=NOBODY)),
            "web",
            socket=socket,
            listener=listener,
            disks=[BrokerDisk(id="spare", path=str(spare), format="raw", size_bytes=SIZE)],
            opening={},
        )
        try:
            yield broker
        finally:
            await broker.kill()
            broker.discard()


async def _writes(machine: Machine) -> int:
    stats = await machine.monitor.execute("query-blockstats")
    return int(next(one["stats"]["wr_operations"] for one in stats if one.get("qdev")))


async def _goes_on(machine: Machine, before: int) -> None:
    """Wait until the guest has written more than before."""
    async with asyncio.timeout(20):
        while await _writes(machine) < before + 3:  # noqa: ASYNC110 - QEMU tells nobody of a write
            await asyncio.sleep(0.02)


async def _equal(one: Disk, two: Disk) -> None:
    """Both images hold the same for the guest."""
    words = ["qemu-img", "compare", "-f", FORMATS[one.format].driver]
    await run_async([*words, "-F", FORMATS[two.format].driver, one.path, two.path], timeout=20)


async def test_through_all_formats_and_both_ways_of_io(
    vm: Vm,
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> None:
    socket = root / "nbd.sock"
    place = make_place("h1", broker=str(socket))
    kinds: list[DiskFormat] = ["qcow2", "vhdx", "vhd", "raw", "vhd-fixed"]
    async with _broker(root, socket) as broker:
        machine = await start(vm, place)
        await machine.cont()
        await wait_for_console(machine, "www")
        old = vm.disks[0]
        for kind in kinds:
            new = await _image(root, old, kind)
            if tier_of(new) == "brokered":
                await broker.add_disk(_served(new), Opening(epoch=1))
            mirror, heard = Mirror(machine, old, new), []
            await mirror.begin(place)
            await mirror.until_ready(lambda copied, total, to=heard: to.append((copied, total)))
            assert SIZE <= heard[-1][0] <= heard[-1][1]
            assert await mirror.seen() == Seen("old", "ready")
            await machine.stop()
            await mirror.complete()
            assert await mirror.seen() == Seen("old", "pending")
            await mirror.finalize()
            assert await mirror.seen() == Seen("new", "")
            await mirror.close_old()
            before = await _writes(machine)
            await machine.cont()
            if tier_of(old) == "brokered":
                await broker.remove_disk(broker_id(old), force=True)
            await _goes_on(machine, before)
            vm = vm.but(disks=(new,))
            assert await _differences(machine, vm) == ()
            assert len(await _nodes(machine)) == (1 if tier_of(new) == "brokered" else 2)
            assert (await machine.query_migrate()).get("blocked-reasons", []) == []
            old = new
    assert "x" not in machine.runtime.console_log.read_text().replace("\0", "")


async def test_what_is_called_off_leaves_the_disk_as_it_was(
    vm: Vm,
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> None:
    place = make_place("h1")
    machine = await start(vm, place)
    await machine.cont()
    await wait_for_console(machine, "www")
    nodes, old = await _nodes(machine), vm.disks[0]
    new = await _image(root, old, "qcow2")
    mirror = Mirror(machine, old, new)
    for step in ("ready", "outrun", "last"):
        await mirror.begin(place)
        await mirror.until_ready(lambda _copied, _total: None)
        if step == "outrun":  # the guest's writes wait for the new image
            await mirror._block()
        if step == "last":
            await machine.stop()
            await mirror.complete()
        assert await let_go(mirror), (step, machine.runtime.qemu_log.read_text()[-600:])
        assert await let_go(mirror), "nothing to end is no fault"
        assert await _nodes(machine) == nodes
        assert await mirror.seen() == Seen("old", "")
    await _unlocked(machine, new)
    before = await _writes(machine)
    await machine.cont()
    await _goes_on(machine, before)
    assert await _differences(machine, vm) == ()
    await hotplug.remove_disk(machine, old, force=True)


async def _unlocked(machine: Machine, new: Disk) -> None:
    """Nobody has the new image open any more."""
    assert not machine.exited.is_set()
    await run_async(["qemu-io", "-f", new.format, "-c", "write 0 512", new.path], timeout=20)


async def test_both_images_are_equal_before_the_last_step(
    vm: Vm,
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> None:
    """Whatever dies there, either image will do: QEMU is killed at that very moment."""
    place = make_place("h1")
    machine = await start(vm, place)
    await machine.cont()
    await wait_for_console(machine, "www")
    old = vm.disks[0]
    new = await _image(root, old, "qcow2")
    mirror = Mirror(machine, old, new)
    await mirror.begin(place)
    await mirror.until_ready(lambda _copied, _total: None)
    await machine.stop()
    await mirror.complete()
    await machine.kill()
    await _equal(old, new)
    await run_async(["qemu-img", "check", "-q", "-f", "qcow2", new.path], timeout=20)


async def test_a_live_move_right_after(
    vm: Vm,
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> None:
    place = make_place("h1")
    source = await start(vm, place)
    await source.cont()
    await wait_for_console(source, "www")
    old = vm.disks[0]
    new = await _image(root, old, "qcow2")
    mirror = Mirror(source, old, new)
    await mirror.begin(place)
    await mirror.until_ready(lambda _copied, _total: None)
    await source.stop()
    await mirror.complete()
    await mirror.finalize()
    await mirror.close_old()
    await source.cont()
    vm = vm.but(disks=(new,))
    target = await start(vm, make_place("h2"), incoming=True)
    here, there = await asyncio.gather(source.device_tree(), target.device_tree())
    assert here == there
    assert await _nodes(source) == await _nodes(target)
    assert await _move(source, target) == "completed"
    await source.quit()
    await target.cont()
    assert await _differences(target, vm) == ()
    # And a disk moves right after a move of its VM.
    newer = await _image(root, new, "raw")
    again = Mirror(target, new, newer)
    await again.begin(make_place("h2"))
    await again.until_ready(lambda _copied, _total: None)
    await target.stop()
    await again.complete()
    await again.finalize()
    await again.close_old()
    assert await _differences(target, vm.but(disks=(newer,))) == ()


async def test_an_image_that_fails_fails_the_copy_alone(
    vm: Vm,
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> None:
    """A volume without room: the VM does not notice, its disk stays."""
    full = root / "full"
    full.mkdir()
    await run_async(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(full)], timeout=10)
    try:
        full.chmod(0o755)
        place = make_place("h1")
        Path(vm.disks[0].path).write_bytes(_writing_guest() + os.urandom(SIZE - 512))
        machine = await start(vm, place)
        await machine.cont()
        await wait_for_console(machine, "www")
        old = vm.disks[0]
        path = full / "new.qcow2"
        await create_image(path, format="qcow2", size_bytes=SIZE, owner=NOBODY)
        new = old.but(path=str(path), format="qcow2", generation=1)
        mirror = Mirror(machine, old, new)
        await mirror.begin(place)
        with pytest.raises(OperationFailed, match="No space") as caught:
            await mirror.until_ready(lambda _copied, _total: None)
        assert "room" in caught.value.hint
        assert await let_go(mirror)
        assert (await machine.status()).running
        assert await _differences(machine, vm) == ()
        await machine.kill()
    finally:
        await run_async(["umount", "-l", str(full)], timeout=10)
