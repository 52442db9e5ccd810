"""A real QEMU starts from an ISO image, and moves with it in its drive."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.system.qemu.conftest import guest_code
from tests.system.qemu.iso import bootable_iso

from godwit.model.vm import Boot, Cdrom, Vm
from godwit.qemu import hotplug
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place

pytestmark = pytest.mark.system


@pytest.fixture
def make_iso_vm(root: Path, make_vm: Callable[..., Vm]) -> Callable[..., Vm]:
    """A VM with an ISO image that starts, and as many empty disks as wanted."""
    path = root / "guest.iso"
    path.write_bytes(bootable_iso(guest_code()))
    path.chmod(0o444)

    def make(disks: int) -> Vm:
        vm = make_vm(disks=disks).but(
            boot=Boot(), cdroms=(Cdrom(id="cd0", volume="shared", path=str(path)),)
        )
        for disk in vm.disks:
            size = Path(disk.path).stat().st_size
            Path(disk.path).write_bytes(bytes(size))
            os.chown(disk.path, 65534, 65534)
        return vm

    return make


@pytest.mark.parametrize("disks", [0, 1])
async def test_it_starts_from_an_iso_and_moves(
    disks: int,
    make_iso_vm: Callable[..., Vm],
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
) -> None:
    vm = make_iso_vm(disks)
    source = await start(vm, make_place("h1"))
    await source.cont()
    await wait_for_console(source, "GW")
    assert len(await hotplug.list_disks(source)) == disks, "a CD is no disk of the record"
    target = await start(vm, make_place("h2"), incoming=True)
    assert (await source.device_tree()).differences(await target.device_tree()) == ()
    assert (await source.query_migrate()).get("blocked-reasons", []) == []
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
    assert end.data["status"] == "completed"
    await target.cont()
    await wait_for_console(target, ".")
