"""What checkpoints demand of everybody else: pure rules that manager and agent share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.model.errors import Conflict, Refused

if TYPE_CHECKING:
    from godwit.model.vm import Disk, Vm


def check_whole(vm: Vm) -> None:
    """Conflict while a revert was begun and not ended: its disks may be of two times."""
    if vm.reverting is not None:
        raise Conflict(
            f"the disks of {vm.name} are half way back to the checkpoint {vm.reverting}",
            hint=f"finish it: godwit vm checkpoint revert {vm.name} {vm.reverting}",
        )


def check_movable(vm: Vm, disk: Disk) -> None:
    """Refused for an image whose copy would not be all of it: checkpoints, what it stands on."""
    check_removal(vm, disk.id)
    if disk.backing is not None:
        raise Refused(
            f"{disk.id} of {vm.name} is a linked clone's: it stands on {disk.backing.path}",
            hint="make a full clone, which stands for itself: godwit vm clone",
        )


def check_removal(vm: Vm, disk_id: str) -> None:
    """Refused while a checkpoint has the disk: it would not be whole any more."""
    names = [one.name for one in vm.checkpoints if disk_id in one.disks]
    if names:
        raise Refused(
            f"{disk_id} of {vm.name} is in its checkpoints: {', '.join(names)}",
            hint=f"delete first: godwit vm checkpoint delete {vm.name} {names[0]}",
        )
