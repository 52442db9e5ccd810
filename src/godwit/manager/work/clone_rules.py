"""Clones of VMs: what may be cloned and what comes of it, exactly. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from godwit.manager.snapshot import Snapshot
from godwit.model.checkpoints import check_whole
from godwit.model.disks import SEED, image_path
from godwit.model.errors import Conflict, Refused
from godwit.model.requests import CloneVm
from godwit.model.vm import Backing, Disk, Firmware, Nic, Vm
from godwit.qemu.pins import new_mac, new_serial


def admit_clone(snapshot: Snapshot, request: CloneVm) -> None:
    """Refuse at once what cannot be cloned."""
    if request.target in snapshot.vms or request.target in snapshot.owners:
        raise Conflict(
            f"there is a VM {request.target} already",
            hint=f"choose another name, or look at it: godwit vm show {request.target}",
        )
    check_clone(snapshot.vms[request.name], request)


def check_clone(vm: Vm, request: CloneVm) -> None:
    """Refused for disks that cannot be cloned like this."""
    check_whole(vm)
    for disk in vm.disks:
        if disk.source != "image":
            raise Refused(
                f"{disk.id} of {vm.name} is the {disk.source} {disk.path}, which cannot be cloned",
                hint=f"take it out first: godwit vm disk remove {vm.name} {disk.id}",
            )
        if not request.linked:
            continue
        if disk.format not in ("raw", "qcow2"):
            raise Refused(
                f"{disk.id} of {vm.name} is {disk.format}; a linked clone stands on raw or qcow2",
                hint="leave --linked out: a full clone has images of its own",
            )
        if disk.backing is not None:
            raise Refused(
                f"{vm.name} is a linked clone itself",
                hint="leave --linked out, or clone what it stands on",
            )


def define_clone(
    vm: Vm, request: CloneVm, *, uuid: str, mark: str, taken: Iterable[str], now: float
) -> Vm:
    """The new VM: the same machine with another identity, so that both can run side by side.

    ``mark`` keeps the names of its images apart from what an earlier try may have left;
    ``taken`` are the network addresses that there are.
    """
    boot = vm.boot if request.append is None else vm.boot.but(append=request.append)
    return vm.but(
        name=request.target,
        pins=vm.pins.but(uuid=uuid),
        boot=boot,
        checkpoints=(),
        # A seed says who the first VM is; its clones have what came of it on their disks.
        cdroms=tuple(cdrom for cdrom in vm.cdroms if cdrom.id != SEED),
        firmware=_firmware(vm.firmware, request, uuid, mark),
        disks=tuple(_disk(disk, request, uuid, mark) for disk in vm.disks),
        nics=_nics(vm.nics, uuid, set(taken)),
        created_at=now,
    )


def _firmware(firmware: Firmware | None, request: CloneVm, uuid: str, mark: str) -> Firmware | None:
    """Variables of its own, a copy also in a linked clone: they are half a megabyte."""
    if firmware is None:
        return None
    alone = request.but(linked=False)
    return firmware.but(variables=_disk(firmware.variables, alone, uuid, mark))


def _disk(disk: Disk, request: CloneVm, uuid: str, mark: str) -> Disk:
    kind = "qcow2" if request.linked else disk.format
    base: Literal["raw", "qcow2"] = "raw" if disk.format == "raw" else "qcow2"
    return disk.but(
        path=image_path(disk.volume, request.target, f"{disk.id}-{mark}", kind),
        format=kind,
        serial=new_serial(uuid, disk.id),
        backing=Backing(path=disk.path, format=base) if request.linked else None,
    )


def _nics(nics: Iterable[Nic], uuid: str, taken: set[str]) -> tuple[Nic, ...]:
    made = []
    for nic in nics:
        mac = new_mac(uuid, nic.id, taken=taken)
        taken.add(mac)
        made.append(nic.but(mac=mac))
    return tuple(made)
