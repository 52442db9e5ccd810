"""Checkpoints: what may be asked for and what it comes to, exactly. Pure."""

from __future__ import annotations

from godwit.model.checkpoints import check_whole
from godwit.model.errors import Conflict, NotFound, Refused
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import CreateCheckpoint, DeleteCheckpoint, RevertCheckpoint
from godwit.model.vm import Checkpoint, Disk, Vm

CheckpointRequest = CreateCheckpoint | RevertCheckpoint | DeleteCheckpoint
MOST = 64
"""Checkpoints of one VM: each makes its images' tables longer."""


def check_state(owner: Owner, request: CheckpointRequest) -> None:
    """May a VM with this ownership record get, lose or go back to a checkpoint now?"""
    name = request.name
    if owner.state is OwnerState.STARTING:
        raise Conflict(f"{name} is just starting on {owner.host}", hint="try again when it runs")
    if owner.state is OwnerState.SAVED:
        raise Refused(
            f"{name} is saved: its memory expects its disks as they are",
            hint=f"first: godwit vm restore {name}",
        )
    if isinstance(request, RevertCheckpoint) and owner.state is OwnerState.RUNNING:
        raise Refused(
            f"{name} runs: its disks cannot go back under it",
            hint=f"first: godwit vm stop {name}, or with --force: what it writes is lost anyway",
        )


def check_request(vm: Vm, request: CheckpointRequest) -> None:
    """Refused when the VM's disks, or its checkpoints, do not allow it."""
    if isinstance(request, CreateCheckpoint):
        check_whole(vm)
        _check_new(vm, request)
        _check_disks(vm.name, vm.written)
        return
    found = find_checkpoint(vm, request.checkpoint)
    if isinstance(request, RevertCheckpoint):
        if vm.reverting != request.checkpoint:
            check_whole(vm)
        covered(vm, found)
    elif vm.reverting is not None:
        check_whole(vm)


def find_checkpoint(vm: Vm, name: str) -> Checkpoint:
    """The VM's checkpoint of that name; NotFound otherwise."""
    for one in vm.checkpoints:
        if one.name == name:
            return one
    raise NotFound(
        f"{vm.name} has no checkpoint {name}",
        hint=f"look with: godwit vm checkpoint list {vm.name}",
    )


def covered(vm: Vm, checkpoint: Checkpoint) -> tuple[Disk, ...]:
    """The disks that a checkpoint has; Refused when the VM does not have one of them."""
    found = tuple(disk for disk in vm.written if disk.id in checkpoint.disks)
    missing = sorted(set(checkpoint.disks) - {disk.id for disk in found})
    if missing:
        raise Refused(
            f"{vm.name} does not have {', '.join(missing)} any more, which {checkpoint.name} holds",
            hint="what is left of that checkpoint cannot be trusted",
        )
    return found


def with_checkpoint(vm: Vm, checkpoint: Checkpoint) -> Vm:
    """The VM with this checkpoint, once."""
    others = without_checkpoint(vm, checkpoint.name).checkpoints
    return vm.but(checkpoints=(*others, checkpoint))


def without_checkpoint(vm: Vm, name: str) -> Vm:
    """The VM without that checkpoint."""
    return vm.but(checkpoints=tuple(one for one in vm.checkpoints if one.name != name))


def _check_new(vm: Vm, request: CreateCheckpoint) -> None:
    if any(one.name == request.checkpoint for one in vm.checkpoints):
        raise Conflict(
            f"{vm.name} has a checkpoint {request.checkpoint} already", hint="choose another name"
        )
    if len(vm.checkpoints) >= MOST:
        raise Refused(
            f"{vm.name} has {MOST} checkpoints, which is the most",
            hint=f"delete one: godwit vm checkpoint delete {vm.name} {vm.checkpoints[0].name}",
        )
    if not vm.disks:
        raise Refused(f"{vm.name} has no disks", hint="a checkpoint keeps what disks hold")


def _check_disks(vm: str, disks: tuple[Disk, ...]) -> None:
    """VHD and VHDX have no snapshots inside, raw and devices no inside at all (design 0007)."""
    for disk in disks:
        if disk.source != "image":
            raise Refused(
                f"{disk.id} of {vm} is a {disk.source}: only a qcow2 image can keep a checkpoint",
                hint="keep what is on it where it comes from, or take it out of the VM",
            )
        if disk.format != "qcow2":
            raise Refused(
                f"{disk.id} of {vm} is {disk.format}, which has no room for a checkpoint: only "
                "qcow2 has",
                hint=f"make it qcow2, the VM may run: godwit vm disk move {vm} {disk.id} "
                "--format qcow2",
            )
