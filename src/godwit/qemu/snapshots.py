"""Snapshots inside the qcow2 images of a machine that lives: all disks at one instant.

    transaction { blockdev-snapshot-internal-sync disk-0, disk-1, ... }   all of them or none

QEMU holds back new requests of each disk from its snapshot to the end of the transaction, so no
write is in one image whose predecessor is missing in another. The guest only waits: about 10 ms for
each GiB that an image holds (measured on 128 GiB of metadata: 1.4 s to take, 1.2 s to drop). The
monitor's main loop waits with it, hence the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from godwit.model.disks import VARIABLES
from godwit.model.errors import OperationFailed, Refused
from godwit.model.units import format_size
from godwit.model.vm import Disk
from godwit.qemu import layout
from godwit.qemu.machine import Machine
from godwit.qmp import QmpError

TIMEOUT: Final = 60.0
LIVE_LIMIT: Final = 256 << 30
"""Bytes in all images together up to which a running guest is made to wait, some 3 seconds."""


@dataclass(frozen=True, slots=True)
class Held:
    """A disk's image as QEMU has it open: its snapshots, and the bytes it takes."""

    tags: tuple[str, ...]
    used_bytes: int


def held_image(image: Mapping[str, Any]) -> Held:
    """An image by what QEMU, or a storage daemon, says of it. Pure."""
    tags = tuple(str(one["name"]) for one in image.get("snapshots", ()))
    return Held(tags, int(image.get("actual-size", 0)))


def held(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Held]:
    """Disk -> its image, from ``query-block``. Pure.

    A disk is known by its device, UEFI variables (whose flash chip has no name) by their node.
    """
    found = {}
    for block in blocks:
        inserted = block.get("inserted")
        if block.get("qdev") and inserted:
            flash = inserted.get("node-name") == f"disk-{VARIABLES}"
            name = VARIABLES if flash else str(block["qdev"])
            found[name] = held_image(inserted["image"])
    return found


def check_wait(vm: str, images: Mapping[str, Held]) -> None:
    """Refused when the guest would be held for too long."""
    used = sum(image.used_bytes for image in images.values())
    if used > LIVE_LIMIT:
        raise Refused(
            f"the images of {vm} hold {format_size(used)}: its guest would stand still for "
            f"{used / (100 << 30):.0f} s",
            hint=f"stop it first: godwit vm stop {vm}",
        )


async def look(machine: Machine, disks: Sequence[Disk]) -> dict[str, Held]:
    """The images of these disks; OperationFailed when the machine lacks one."""
    found = held(await machine.monitor.execute("query-block", timeout=TIMEOUT))
    missing = [disk.id for disk in disks if disk.id not in found]
    if missing:
        raise OperationFailed(
            f"the machine of {machine.vm} has no disk {missing[0]}", hint="godwit vm disk list"
        )
    return {disk.id: found[disk.id] for disk in disks}


async def take(machine: Machine, disks: Sequence[Disk], tag: str) -> None:
    """Take a snapshot of all disks, or of none."""
    actions = [
        {
            "type": "blockdev-snapshot-internal-sync",
            "data": {"device": layout.format_node(disk), "name": tag},
        }
        for disk in disks
    ]
    try:
        await machine.monitor.execute("transaction", {"actions": actions}, timeout=TIMEOUT)
    except QmpError as error:
        raise OperationFailed(
            f"the disks of {machine.vm} could not be held: {error.desc}",
            hint="is there room on the volume?",
        ) from error


async def drop(machine: Machine, disk: Disk, tag: str) -> None:
    """Drop a snapshot of one disk."""
    try:
        await machine.monitor.execute(
            "blockdev-snapshot-delete-internal-sync",
            {"device": layout.format_node(disk), "name": tag},
            timeout=TIMEOUT,
        )
    except QmpError as error:
        raise OperationFailed(
            f"{tag} could not be dropped from {disk.id} of {machine.vm}: {error.desc}",
            hint="ask again",
        ) from error
