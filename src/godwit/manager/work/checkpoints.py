"""Checkpoints of a VM: kept in its qcow2 images, listed in its record.

    create  images (all at one instant) -> record
    delete  record -> images
    revert  record: reverting -> images, one by one -> record: sizes, no more reverting

Cut short, a create or a delete leaves a snapshot in images that no record knows: it costs space
until the next checkpoint action of this VM drops it. A revert leaves ``reverting``, with which the
VM does not start and changes no disk; asked again it goes through all images once more, to the same
end. What begins it also writes the ownership record anew, so that a start that had read that must
fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from godwit.manager.work.admit import check_action
from godwit.manager.work.checkpoint_rules import (
    CheckpointRequest,
    check_request,
    covered,
    find_checkpoint,
    with_checkpoint,
    without_checkpoint,
)
from godwit.manager.work.define_acts import on_some_host
from godwit.manager.work.fresh import vms_since
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.work.vms import host_of
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.clones import refuse_if_cloned
from godwit.model.errors import (
    Conflict,
    GodwitError,
    NotFound,
    OperationFailed,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import CreateCheckpoint, DeleteCheckpoint, RevertCheckpoint
from godwit.model.vm import Checkpoint, Disk, Vm
from godwit.storage.snapshots import tag_of
from godwit.store.api import absent, mod_is, put
from godwit.store.records import CasFailed, Versioned, encode

_LIVE_S = 120.0
_STILL_S = 6 * 3600.0
_UNTOUCHED = (Refused, Conflict, NotFound, Unavailable)
"""A host that answers like this has changed nothing."""


async def create(world: World, run: TaskRun, request: CreateCheckpoint) -> Done:
    """Keep what all disks hold at one instant."""
    spec, owner = await _read(world, request.name)
    vm, noted = spec.value, run.task.progress.get("checkpoint")
    if noted and any(one.name == request.checkpoint for one in vm.checkpoints):
        return _created(vm.name, Checkpoint.model_validate(noted))
    await _check(world, vm, owner, request)
    fresh = Checkpoint(
        name=request.checkpoint,
        tag=tag_of(request.checkpoint, run.task.id[-6:]),
        disks=tuple(disk.id for disk in vm.written),
        running=_runs(owner),
        created_at=world.clock.realtime(),
    )
    # A manager before us may have had it made: then it is that one.
    found = Checkpoint.model_validate(noted) if noted else fresh
    await run.say(
        f"holding {len(vm.written)} images of {vm.name}",
        progress={"checkpoint": found.model_dump(mode="json")},
    )
    known = [one.tag for one in vm.checkpoints]
    await _ask(world, vm, owner, "take", vm.written, tag=found.tag, known=known)
    await _change(world, vm.name, lambda now: with_checkpoint(now, found))
    await _log(world, "vm.checkpoint-created", vm.name, f"checkpoint {found.name}", run)
    return _created(vm.name, found)


async def delete(world: World, run: TaskRun, request: DeleteCheckpoint) -> Done:
    """Forget a checkpoint, then give back what it takes."""
    spec, owner = await _read(world, request.name)
    vm, noted = spec.value, run.task.progress.get("checkpoint")
    if noted:
        found = Checkpoint.model_validate(noted)
    else:
        await _check(world, vm, owner, request)
        found = find_checkpoint(vm, request.checkpoint)
        await run.say(
            f"{found.name} of {vm.name} is to go",
            progress={"checkpoint": found.model_dump(mode="json")},
        )
    await _change(world, vm.name, lambda now: without_checkpoint(now, found.name))
    try:
        await _ask(world, vm, owner, "drop", covered(vm, found), tag=found.tag)
    except OutcomeUnknown:
        raise
    except GodwitError as error:
        raise OperationFailed(
            f"{found.name} is no checkpoint of {vm.name} any more, but its images still hold it: "
            f"{error.message}",
            hint="the next checkpoint of this VM gives the space back",
        ) from error
    await _log(world, "vm.checkpoint-deleted", vm.name, f"checkpoint {found.name} deleted", run)
    return Done(f"checkpoint {found.name} of {vm.name} deleted", {"vm": vm.name})


async def revert(world: World, run: TaskRun, request: RevertCheckpoint) -> Done:
    """Let the disks of a stopped VM hold what they held then; the checkpoint stays."""
    spec, owner = await _read(world, request.name)
    vm = spec.value
    await _check(world, vm, owner, request)
    found = find_checkpoint(vm, request.checkpoint)
    disks = covered(vm, found)
    again = vm.reverting is not None
    await _begin_revert(run, spec, owner, found)
    try:
        sizes = await _ask(world, vm, owner, "revert", disks, tag=found.tag)
    except _UNTOUCHED:
        if not again:
            await _change(world, vm.name, lambda now: now.but(reverting=None))
        raise
    await _change(world, vm.name, lambda now: _reverted(now, sizes))
    others = [disk.id for disk in vm.disks if disk.id not in found.disks]
    words = f"{vm.name} is back at the checkpoint {found.name}"
    if others:
        words += f"; {', '.join(others)} came later and stays as it is"
    await _log(world, "vm.checkpoint-reverted", vm.name, words, run)
    return Done(words, {"vm": vm.name, "checkpoint": found.name})


async def _begin_revert(
    run: TaskRun, spec: Versioned[Vm], owner: Versioned[Owner] | None, found: Checkpoint
) -> None:
    name = spec.value.name
    spec_key, owner_key = keys.vm_spec(name), keys.vm_owner(name)
    try:
        await run.say(
            f"{name} goes back to {found.name}",
            compare=[
                mod_is(spec_key, spec.revision),
                mod_is(owner_key, owner.revision) if owner else absent(owner_key),
            ],
            also=[
                put(spec_key, encode(spec.value.but(reverting=found.name))),
                put(owner_key, encode(owner.value if owner else Owner())),
            ],
        )
    except CasFailed:
        raise Conflict(
            f"{name} was started or changed at the same moment", hint="look, and ask again"
        ) from None


def _reverted(vm: Vm, sizes: Any) -> Vm:
    sizes = sizes if isinstance(sizes, dict) else {}
    disks = tuple(disk.but(size_bytes=sizes.get(disk.id, disk.size_bytes)) for disk in vm.disks)
    return vm.but(disks=disks, reverting=None)


async def _read(world: World, name: str) -> tuple[Versioned[Vm], Versioned[Owner] | None]:
    spec = await world.records.vm(name)
    if spec is None:
        raise NotFound(f"no vm {name}", hint="look with: godwit vm list")
    return spec, await world.records.owner(name)


async def _check(
    world: World, vm: Vm, owner: Versioned[Owner] | None, request: CheckpointRequest
) -> None:
    """The same as at the door, on fresh records."""
    check_action(owner.value if owner else Owner(), request)
    check_request(vm, request)
    # Making a clone writes the owner record, which is compared when this is written.
    vms = await vms_since(world, owner.revision if owner else 0)
    refuse_if_cloned(vm, vms, "change the disks of")


def _runs(owner: Versioned[Owner] | None) -> bool:
    return owner is not None and owner.value.state is OwnerState.RUNNING


async def _ask(
    world: World,
    vm: Vm,
    owner: Versioned[Owner] | None,
    verb: str,
    disks: Sequence[Disk],
    *,
    tag: str,
    known: Sequence[str] = (),
) -> Any:
    """Have the host that runs the VM do it, or any that sees the images of a stopped one."""
    body = {
        "disks": [disk.model_dump(mode="json") for disk in disks],
        "tag": tag,
        "known": list(known),
    }
    path = f"/v1/vms/{vm.name}/checkpoints/{verb}"
    if owner is not None and _runs(owner):
        host = host_of(world.cache.snapshot, owner.value)
        return await world.agents.call(host, "POST", path, body, deadline_s=_LIVE_S)
    still = path if verb == "revert" else f"{path}-still"
    return await on_some_host(world, vm, "POST", still, body, deadline_s=_STILL_S)


async def _change(world: World, vm: str, change: Callable[[Vm], Vm]) -> None:
    """Change the definition whatever else happens to the VM: what it says is already so."""
    if await world.records.update(keys.vm_spec(vm), Vm, change) is None:
        raise NotFound(f"no vm {vm}", hint="look with: godwit vm list")


def _created(vm: str, checkpoint: Checkpoint) -> Done:
    how = "while it ran" if checkpoint.running else "while it was stopped"
    reason = f"checkpoint {checkpoint.name} of {vm}: {len(checkpoint.disks)} images, {how}"
    return Done(reason, {"vm": vm, "checkpoint": checkpoint.name})


async def _log(world: World, kind: str, vm: str, message: str, run: TaskRun) -> None:
    text = f"{message}, asked by {run.task.by}"
    await world.records.append_event(kind, f"vm/{vm}", text, at=world.clock.realtime())
