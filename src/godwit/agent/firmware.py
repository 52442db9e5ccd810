"""UEFI for VMs: the variables of a new one, and the code that one is powered on with."""

from __future__ import annotations

import asyncio
from pathlib import Path

from godwit.agent.desk import Desk
from godwit.agent.files import Files, asked
from godwit.model import keys
from godwit.model.errors import NotFound, Refused
from godwit.model.firmware import FirmwareImage, UefiFacts
from godwit.model.vm import Disk, Vm
from godwit.qemu.firmware import PACKAGE_HINT, SAME_HINT
from godwit.qemu.launch import Binary
from godwit.storage.convert import convert


async def make_variables(desk: Desk, files: Files, disk: Disk) -> dict[str, int]:
    """Make the image of a VM's variables, as the firmware package has them; nothing is overwritten.

    Conflict when there is a file already, Refused when this host's firmware has others.
    """
    here = await _here(desk)
    if here.template.size_bytes != disk.size_bytes:
        raise Refused(
            f"the UEFI variables of {desk.host} take {here.template.size_bytes} bytes, "
            f"{disk.size_bytes} were asked for",
            hint=SAME_HINT,
        )
    path, volume = files.disk_path(disk), desk.catalog.files(disk.volume)
    await asked(volume.make_directories(path.parent), path.parent)
    info = await convert(
        Path(here.template.path),
        source_format="raw",
        target=path,
        target_format=disk.format,
        owner=desk.equipment.binary.user,
        tool=Binary.named("qemu-img", user=desk.config.qemu.user),
        target_files=volume,
    )
    return {"size_bytes": info.virtual_size}


async def powered_on(desk: Desk, vm: Vm) -> Vm:
    """The VM as it is to be powered on: with this host's code, which its record then names.

    Where the package was upgraded, a VM starts with the new firmware, as a machine does. Refused
    when this host's is of another size, or missing.
    """
    if vm.firmware is None:
        return vm
    here, pinned = (await _here(desk)).code, vm.firmware.code
    if here == pinned:
        return vm
    if (here.size_bytes, here.format) != (pinned.size_bytes, pinned.format):
        raise Refused(
            f"{vm.name} needs UEFI firmware of {pinned.size_bytes} bytes, {desk.host} has "
            f"{here.size_bytes}",
            hint=SAME_HINT,
        )
    if await desk.records.update(keys.vm_spec(vm.name), Vm, lambda now: _with(now, here)) is None:
        raise NotFound(f"there is no VM {vm.name}", hint="look: godwit vm list")
    message = f"its UEFI firmware is now that of {desk.host}: {here.sha256[:12]}"
    await desk.event("vm.firmware-renewed", vm.name, message)
    return _with(vm, here)


def _with(vm: Vm, code: FirmwareImage) -> Vm:
    return vm if vm.firmware is None else vm.but(firmware=vm.firmware.but(code=code))


async def _here(desk: Desk) -> UefiFacts:
    found = await asyncio.to_thread(desk.firmware.uefi)
    if found is None:
        raise Refused(f"{desk.host} has no UEFI firmware", hint=PACKAGE_HINT)
    return found
