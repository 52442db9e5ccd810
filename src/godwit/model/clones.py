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


def all_clones(vms: Iterable[Vm]) -> dict[str, tuple[str, ...]]:
    """`clones_of` for every VM that has some, looking at each disk once."""
    standing: dict[str, set[str]] = {}  # image -> VMs whose images stand on it
    disks = [(vm.name, disk) for vm in vms for disk in vm.disks]
    for name, disk in disks:
        if disk.backing is not None:
            standing.setdefault(disk.backing.path, set()).add(name)
    found: dict[str, set[str]] = {}
    if standing:
        for name, disk in disks:
            if others := standing.get(disk.path, set()) - {name}:
                found.setdefault(name, set()).update(others)
    return {name: tuple(sorted(clones)) for name, clones in found.items()}


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
