"""A real QEMU with UEFI: what a guest writes into a variable is on its image, and moves with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.system.qemu.conftest import NOBODY
from tests.system.qemu.uefi import fat_volume, uefi_program

from godwit.host.inotify import MODIFIED, PathWatch
from godwit.model.errors import Refused
from godwit.model.vm import Boot, Disk, Firmware, Vm
from godwit.qemu import snapshots
from godwit.qemu.firmware import FirmwareShelf
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.storage.convert import convert
from godwit.storage.images import check

pytestmark = pytest.mark.system


@pytest.fixture
async def uefi_vm(root: Path, make_vm: Callable[..., Vm]) -> Vm:
    """A VM with UEFI, its variables as the firmware package has them."""
    here = FirmwareShelf().uefi()
    if here is None:
        pytest.skip("no UEFI firmware is installed")
    vm = make_vm(disks=1, kernel=False)
    Path(vm.disks[0].path).write_bytes(fat_volume(uefi_program(root)).ljust(4 << 20, b"\0"))
    path = root / "vars0.qcow2"
    await convert(
        Path(here.template.path),
        source_format="raw",
        target=path,
        target_format="qcow2",
        owner=NOBODY,
    )
    variables = Disk(
        id="vars0",
        volume="shared",
        path=str(path),
        size_bytes=here.template.size_bytes,
        serial="GWVARS",
        lun=0,
    )
    return vm.but(boot=Boot(), firmware=Firmware(code=here.code, variables=variables))


async def _says(machine: Machine, wanted: str, *, after: int = 0) -> int:
    """Wait, at most half a minute, until the guest has said it; how long its log is then."""
    log = machine.runtime.console_log
    async with asyncio.timeout(30):
        with PathWatch(log, mask=MODIFIED) as watch:
            while wanted not in log.read_text(errors="replace")[after:]:
                await watch.changed()
    return len(log.read_text(errors="replace"))


async def _move(source: Machine, target: Machine) -> None:
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


def _writers(image: Path) -> int:
    """Processes that have the image open."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            found += any(one.samefile(image) for one in folder.iterdir() if one.exists())
        except OSError:
            continue  # it has ended meanwhile
    return found


async def test_a_variable_is_on_its_image_and_moves(
    root: Path,
    uefi_vm: Vm,
    make_place: Callable[..., Place],
    start: Callable[..., Awaitable[Machine]],
) -> None:
    assert uefi_vm.firmware is not None
    variables = uefi_vm.firmware.variables
    source = await start(uefi_vm, make_place("h1"))
    await source.cont()
    await _says(source, "UEFI 1.1.")
    # A checkpoint takes the variables along, beside a guest that reads them.
    await snapshots.take(source, [variables], "godwit-one")
    assert (await snapshots.look(source, [variables]))["vars0"].tags == ("godwit-one",)
    target = await start(uefi_vm, make_place("h2"), incoming=True)
    assert (await source.device_tree()).differences(await target.device_tree()) == ()
    assert (await source.query_migrate()).get("blocked-reasons", []) == []
    await _move(source, target)
    await target.cont()
    await source.kill()
    assert _writers(Path(variables.path)) == 1
    await _says(target, "1.1.")
    with target.monitor.events("SHUTDOWN") as events:
        await target.powerdown()  # what the guest writes now, the destination writes to the image
        await events.wait(timeout=20)
    await target.quit()
    assert not (await check(Path(variables.path), format="qcow2")).damaged
    out = root / "vars.raw"
    await convert(
        Path(variables.path), source_format="qcow2", target=out, target_format="raw", owner=NOBODY
    )
    name = "Godwit".encode("utf-16-le") + b"\0\0"
    assert {b"1", b"5"} == {part[:1] for part in out.read_bytes().split(name)[1:]}


async def test_other_firmware_is_refused_before_qemu_starts(
    uefi_vm: Vm, make_place: Callable[..., Place], start: Callable[..., Awaitable[Machine]]
) -> None:
    assert uefi_vm.firmware is not None
    other = uefi_vm.firmware.but(code=uefi_vm.firmware.code.but(sha256="0" * 64))
    place = make_place("h1")
    with pytest.raises(Refused, match="its content is"):
        await start(uefi_vm.but(firmware=other), place)
    assert not (place.run / "runtime.json").exists()
    gone = uefi_vm.firmware.but(code=uefi_vm.firmware.code.but(path="/nowhere/code.fd"))
    with pytest.raises(Refused, match="cannot be read"):
        await start(uefi_vm.but(firmware=gone), place)
