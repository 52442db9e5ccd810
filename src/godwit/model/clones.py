"""What linked clones forbid: the images they stand on are only read as long as they exist."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from godwit.model.errors import Refused

if TYPE_CHECKING:
    from godwit.model.vm import Vm


def clones_of(vm: Vm, vms: Iterable[Vm]) -> tuple[str, ...]:
    """Names of the VMs whose images stand on those of ``vm``, which nobody may write then."""
    paths = {disk.path for disk in vm.disks}
    return tuple(
        sorted(
            other.name
            for other in vms
            if other.name != vm.name
            and any(disk.backing is not None and disk.backing.path in paths for disk in other.disks)
        )
    )


def refuse_if_cloned(vm: Vm, vms: Iterable[Vm], verb: str) -> None:
    """Refused while linked clones stand on the VM's images; they are named."""
    clones = clones_of(vm, vms)
    if clones:
        what = "a linked clone stands" if len(clones) == 1 else "linked clones stand"
        raise Refused(
            f"cannot {verb} {vm.name}: {what} on its images: {', '.join(clones)}",
            hint=f"delete first: godwit vm delete {clones[0]}; a full clone needs no other VM",
            clones=list(clones),
        )
