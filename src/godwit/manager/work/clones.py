"""Clones of VMs: the images first, then the record, which nobody has seen before they are whole.

    images made, one by one --> one transaction: the new VM is there, and the first one is as read

That transaction also writes the first VM's ownership record anew: a start that had read it before
must fail, or its guest would write what the clone stands on. A failure deletes the images; so does
a manager that takes the task over, which begins again under other names.
"""

from __future__ import annotations

import contextlib
from typing import Any
from uuid import uuid4

from godwit.manager.work.admit import check_action
from godwit.manager.work.clone_rules import check_clone, define_clone
from godwit.manager.work.define_acts import on_some_host
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import Conflict, GodwitError, NotFound, OutcomeUnknown
from godwit.model.ownership import Owner
from godwit.model.requests import CloneVm
from godwit.model.vm import Disk, Vm
from godwit.store.api import absent, exists, mod_is, put
from godwit.store.records import CasFailed, Versioned, encode

_COPY_S = 6 * 3600.0
"""Seconds for a copy of an image: terabytes, but not for ever."""


async def clone(world: World, run: TaskRun, request: CloneVm) -> Done:
    """Make the new VM out of the stopped one. A failure leaves nothing behind."""
    name, target = request.name, request.target
    if run.task.progress.get("claimed"):
        return _done(request)
    spec = await world.records.vm(name)
    found = await world.records.owner(name)
    if spec is None:
        raise NotFound(f"no vm {name}", hint="look with: godwit vm list")
    vm = spec.value
    check_action(found.value if found else Owner(), request)
    check_clone(vm, request)
    new = await _planned(world, run, vm, request)
    try:
        pairs = list(zip(vm.written, new.written, strict=True))
        for number, (source, disk) in enumerate(pairs, start=1):
            verb = "linking" if disk.backing is not None else "copying"
            await run.say(f"{verb} {source.id} of {name}: {number} of {len(pairs)}")
            await _ask(world, target, "clone", source, target=disk)
        await _claim(run, new, spec, found)
    except OutcomeUnknown:
        raise  # a host may still be writing; the images have names that nobody will use
    except GodwitError:
        await _discard(world, target, new.written)
        raise
    kind = "linked clone" if request.linked else "clone"
    message = f"{kind} of {name}, made by {run.task.by}"
    await world.records.append_event(
        "vm.cloned", f"vm/{target}", message, at=world.clock.realtime()
    )
    return _done(request)


async def _planned(world: World, run: TaskRun, vm: Vm, request: CloneVm) -> Vm:
    """What is to be made, noted before anything is; an earlier try's images go."""
    before = run.task.progress
    await _discard(
        world, request.target, [Disk.model_validate(disk) for disk in before.get("disks", ())]
    )
    tries = int(before.get("tries", 0)) + 1
    new = define_clone(
        vm,
        request,
        uuid=str(uuid4()),
        mark=f"{run.task.id[-6:]}{'' if tries == 1 else tries}",
        taken=(nic.mac for one in world.cache.snapshot.vms.values() for nic in one.nics),
        now=world.clock.realtime(),
    )
    disks = [disk.model_dump(mode="json") for disk in new.written]
    await run.say(f"{request.target} will be made", progress={"tries": tries, "disks": disks})
    return new


async def _claim(
    run: TaskRun, new: Vm, spec: Versioned[Vm], owner: Versioned[Owner] | None
) -> None:
    first = keys.vm_owner(spec.value.name)
    spec_key, owner_key = keys.vm_spec(new.name), keys.vm_owner(new.name)
    networks = sorted({nic.network for nic in new.nics})
    try:
        await run.say(
            f"{new.name} is whole",
            progress={"claimed": True},
            compare=[
                absent(spec_key),
                absent(owner_key),
                mod_is(keys.vm_spec(spec.value.name), spec.revision),
                mod_is(first, owner.revision) if owner else absent(first),
                *(exists(keys.network(network)) for network in networks),
            ],
            also=[
                put(spec_key, encode(new)),
                put(owner_key, encode(Owner())),
                put(first, encode(owner.value if owner else Owner())),
            ],
        )
    except CasFailed:
        raise Conflict(
            f"{spec.value.name} was started or changed meanwhile, or there is a VM {new.name} now",
            hint="look, and ask again: godwit vm list",
        ) from None


async def _discard(world: World, target: str, disks: Any) -> None:
    for disk in disks:
        with contextlib.suppress(GodwitError):
            await _ask(world, target, "discard", disk)


async def _ask(world: World, vm: str, verb: str, disk: Disk, *, target: Disk | None = None) -> None:
    body: dict[str, Any] = {"disk": disk.model_dump(mode="json")}
    if target is not None:
        body["target"] = target.model_dump(mode="json")
    await on_some_host(
        world,
        None,
        "POST",
        f"/v1/vms/{vm}/disks/{verb}",
        body,
        volumes={disk.volume},
        deadline_s=_COPY_S,
    )


def _done(request: CloneVm) -> Done:
    kind = "a linked clone" if request.linked else "a clone"
    reason = f"{request.target} is {kind} of {request.name}"
    return Done(reason, {"vm": request.target})
