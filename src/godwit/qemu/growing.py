"""Disks of a machine that lives get larger, and its guest hears of it by a unit attention.

    raw, qcow2, device  block_resize of the format node: QEMU makes the image larger itself
    brokered            the export is larger already: blockdev-reopen of its client, block_resize
    vhd-fixed           the file is: reopen without an end, block_resize, reopen up to the footer

Facts, seen on QEMU 10.0: an NBD client learns the size of its export when it connects, and shows it
only when somebody asks for just that size; it connects again with the next request, and
``blockdev-reopen`` flushes first. ``block_resize`` of a raw node that has an end is refused, and
nothing else tells the guest; of one without an end it sets the length that the file has anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from godwit.model.disks import tier_of
from godwit.model.errors import NotFound, OperationFailed, Refused
from godwit.model.units import format_size
from godwit.model.vm import Disk
from godwit.qemu import layout
from godwit.qemu.blocks import disk_nodes, stored_size
from godwit.qemu.hotplug import COMMAND_TIMEOUT, check_at_rest
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.qmp import QmpError

_BY_ITSELF: Final = frozenset({"raw", "qcow2"})


def grows_by_itself(disk: Disk) -> bool:
    """Whether QEMU, which has the image open, can make it larger."""
    return tier_of(disk) == "direct" and disk.format in _BY_ITSELF


async def check_growth(machine: Machine, disk: Disk, size_bytes: int) -> int:
    """The bytes that the machine's disk has; Refused for less, and while a move is under way."""
    await check_at_rest(machine)
    now = await size_of(machine, disk)
    if stored_size(size_bytes) < now:
        raise Refused(
            f"{disk.id} of {machine.vm} has {format_size(now)}: a disk only grows",
            hint="what lies beyond the new end would be lost",
        )
    return now


async def resize_disk(machine: Machine, disk: Disk, size_bytes: int) -> int:
    """Let QEMU make a disk larger that it grows by itself; the bytes it has now.

    Errors as `check_growth`, and OperationFailed with QEMU's words. A device that has grown on its
    storage is taken as it is.
    """
    wanted = stored_size(size_bytes)
    if wanted == await check_growth(machine, disk, wanted):
        return wanted
    await _resize(machine, disk, wanted)
    return await size_of(machine, disk)


async def take_size(machine: Machine, disk: Disk, place: Place, *, file_bytes: int = 0) -> int:
    """Let the guest have the size that ``disk`` says, and its image or export has got; the bytes
    the machine's disk has now.

    A machine with a fixed VHD has to stand still, and ``file_bytes`` is the length of its file.
    OperationFailed with QEMU's words: the image has grown all the same.
    """
    # Also when it seems to have it: after a new connection it does, and no guest was told.
    wanted = stored_size(disk.size_bytes)
    served = place.served.get(disk.id)
    *_, node = disk_nodes(disk, vm=machine.vm, aio=place.aio, broker=place.broker, served=served)
    if tier_of(disk) == "brokered":
        await _reopen(machine, disk, node)
        await _resize(machine, disk, wanted)
    elif disk.format == "vhd-fixed":
        await _move_end(machine, disk, node, file_bytes=file_bytes)
    else:
        await _resize(machine, disk, wanted)
    return await size_of(machine, disk)


async def _move_end(
    machine: Machine, disk: Disk, node: Mapping[str, object], *, file_bytes: int
) -> None:
    if file_bytes <= stored_size(disk.size_bytes):
        # QEMU would cut the file down to what it is told, footer and all.
        raise OperationFailed(f"{disk.path} has {file_bytes} bytes", hint="is the file whole?")
    before = await size_of(machine, disk)
    await _reopen(machine, disk, {key: node[key] for key in node if key != "size"})
    try:
        # QEMU remembers the length that the file had.
        await _resize(machine, disk, file_bytes)
    except BaseException:
        await _reopen(machine, disk, {**node, "size": before})
        raise
    await _reopen(machine, disk, node)


async def size_of(machine: Machine, disk: Disk) -> int:
    """The bytes that the machine's disk has; NotFound when it has no such disk."""
    blocks: list[dict[str, Any]] = await machine.monitor.execute("query-block")
    for block in blocks:
        if block.get("qdev") == disk.id and block.get("inserted"):
            return int(block["inserted"]["image"]["virtual-size"])
    raise NotFound(f"the machine of {machine.vm} has no disk {disk.id}", hint="godwit vm disk list")


async def _resize(machine: Machine, disk: Disk, size_bytes: int) -> None:
    asked = {"node-name": layout.format_node(disk), "size": size_bytes}
    await _execute(machine, disk, "block_resize", asked)


async def _reopen(machine: Machine, disk: Disk, node: Mapping[str, object]) -> None:
    await _execute(machine, disk, "blockdev-reopen", {"options": [node]})


async def _execute(
    machine: Machine, disk: Disk, command: str, arguments: Mapping[str, object]
) -> None:
    try:
        await machine.monitor.execute(command, arguments, timeout=COMMAND_TIMEOUT)
    except QmpError as error:
        raise OperationFailed(
            f"{disk.id} of {machine.vm} could not grow: {error.desc}", hint=_hint(disk)
        ) from error


def _hint(disk: Disk) -> str:
    if disk.source != "image":
        return f"grow {disk.path} on its storage first"
    if not grows_by_itself(disk):
        return "its guest has the new size when it starts the next time"
    return "is there room on the volume?"
