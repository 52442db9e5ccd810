"""A brokered disk of a real QEMU gets larger while its guest writes, whatever its format."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from godwit.host.run import run_async
from godwit.model.vm import DiskFormat, Vm
from godwit.qemu import growing
from godwit.qemu.launch import Binary
from godwit.qemu.layout import broker_id
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.convert import convert
from godwit.storage.growth import grow
from godwit.storage.images import check, image_info
from godwit.storage.nodes import BrokerDisk

from .test_hotplug import _differences, _move, _writing_guest
from .test_mirror import _goes_on, _writes

pytestmark = pytest.mark.system

NOBODY = (65534, 65534)
MIB = 1 << 20
SIZE, LARGER = 4 * MIB, 400 * MIB


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhd-fixed", "vhd", "vhdx"])
async def test_a_brokered_disk_grows_under_its_guest(
    kind: DiskFormat,
    make_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
    root: Path,
) -> None:
    vm = make_vm(disks=1, kernel=False)
    plain = Path(vm.disks[0].path)
    plain.write_bytes(_writing_guest() + os.urandom(SIZE - 512))
    path = root / f"disk.{kind}"
    await convert(plain, source_format="raw", target=path, target_format=kind, owner=NOBODY)
    disk = vm.disks[0].but(path=str(path), format=kind, tier="brokered")
    vm, socket = vm.but(disks=(disk,)), root / "nbd.sock"
    served = BrokerDisk(id=broker_id(disk), path=disk.path, format=kind, size_bytes=SIZE)
    place = make_place("h1", broker=str(socket))
    with listen(socket, user=NOBODY) as listener:
        broker = await Broker.start(
            DaemonPlace("h1", root / "b", root / "b", Binary("qemu-storage-daemon", user=NOBODY)),
            "web",
            socket=socket,
            listener=listener,
            disks=[served],
            opening={served.id: Opening(epoch=1)},
        )
        try:
            machine = await start(vm, place)
            await machine.cont()
            await wait_for_console(machine, "www")
            await machine.stop()
            broker.note_growth(served.id, LARGER)
            assert (await broker.release_all()).how == "closed"
            await broker.kill()
            await grow(path, format=kind, size_bytes=LARGER)
            info = await image_info(path, format=kind)
            broker.settle_growth(served.id, info.virtual_size)
            await broker.restart({served.id: Opening(epoch=1)}, listener=listener)
            grown = disk.but(size_bytes=LARGER)
            assert await growing.take_size(machine, grown, place) == LARGER
            before = await _writes(machine)
            await machine.cont()
            await _goes_on(machine, before)
            vm = vm.but(disks=(grown,))
            assert await _differences(machine, vm) == ()
            target = await start(vm, make_place("h2", broker=str(socket)), incoming=True)
            here, there = await asyncio.gather(machine.device_tree(), target.device_tree())
            assert here == there
            assert await _move(machine, target) == "completed"
            await machine.quit()
            await target.cont()
            assert await _differences(target, vm) == ()
            await target.quit()
        finally:
            await broker.release_all()
            await broker.kill()
            broker.discard()
    # The unit attention that tells a guest of its new size; this one asks nobody what it means.
    assert machine.runtime.console_log.read_text().count("x") == 1
    assert not (await check(path, format=kind)).damaged
    await _equal_up_to(path, kind, plain)


async def _equal_up_to(path: Path, kind: DiskFormat, plain: Path) -> None:
    """Behind the few sectors that the guest writes all is as it was, then nothing but zeroes."""
    node = f"driver={'vpc' if kind == 'vhd' else kind},file.filename={path}"
    if kind in ("raw", "vhd-fixed"):
        node = f"driver=raw,size={LARGER},file.filename={path}"
    out = path.with_suffix(".out")
    await run_async(
        ["qemu-img", "convert", "--image-opts", node, "-O", "raw", str(out)], timeout=30
    )
    with out.open("rb") as one, plain.open("rb") as two:
        one.seek(MIB)
        two.seek(MIB)
        assert one.read(SIZE - MIB) == two.read()
        assert not any(one.read())
