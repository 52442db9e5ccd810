"""Make and unmake definitions of VMs and networks.

The name is claimed first, by the transaction that only succeeds where nothing is; what was begun
is undone when a later step says no.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from typing import Any

from godwit.manager.failover.admission import check_ha
from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.manager.work.admit import admit, check_action, check_unused
from godwit.manager.work.cpus import Chosen, choose_cpu
from godwit.manager.work.define import define_network, define_vm
from godwit.manager.work.fresh import vms_since
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.clones import refuse_if_cloned
from godwit.model.create import CreatePlan
from godwit.model.errors import (
    Conflict,
    GodwitError,
    NotFound,
    OperationFailed,
    OutcomeUnknown,
    TooOld,
    Unavailable,
)
from godwit.model.host import HostInfo, HostState
from godwit.model.ownership import Owner
from godwit.model.requests import CreateNetwork, CreateVm, DeleteNetwork, DeleteVm
from godwit.model.vm import Boot, Disk, Pins, Vm
from godwit.model.volume import VolumeState
from godwit.store.api import Compare, Op, absent, delete, exists, mod_is, put
from godwit.store.records import CasFailed, encode

_DISKS_S = 300.0


async def create_vm(world: World, run: TaskRun, request: CreateVm) -> Done:
    """Pin, claim the name, create the disks. A failure leaves nothing behind."""
    snapshot = world.cache.snapshot
    vm = snapshot.vms.get(request.name) if run.task.progress.get("claimed") else None
    if vm is None:
        pins, why = _pins(world, request)
        boot = await _boot_of(world, request)
        vm = define_vm(snapshot, request, pins=pins, boot=boot, now=world.clock.realtime())
        check_ha(snapshot, world.cache.renewals, vm, world.cutter)
        await _claim(run, vm, Owner(host=request.host), why=why)
    try:
        if vm.written and run.adopted:
            # What the manager before us had begun; nothing can have run on it.
            await on_some_host(
                world,
                vm,
                "POST",
                f"/v1/vms/{vm.name}/delete-disks",
                {"disks": _dump(vm.written), "whole": True},
                prefer=request.host,
            )
        if vm.disks:
            await on_some_host(
                world,
                vm,
                "POST",
                f"/v1/vms/{vm.name}/create-disks",
                {"disks": _dump(vm.disks)},
                prefer=request.host,
            )
        if vm.firmware is not None:
            await _make_variables(world, vm, vm.firmware.variables)
        if request.cloud_init is not None:
            await _make_seed(world, vm, request.cloud_init)
    except OutcomeUnknown:
        raise  # what is there may be in use by the agent that was asked; `vm delete` clears it
    except GodwitError as error:
        # A Conflict: a file of that name was there before us, such as a disk that was kept.
        await _unclaim(world, vm, images=not isinstance(error, Conflict))
        raise
    pinned = f"{vm.pins.machine}, {vm.pins.cpu_model}, {vm.pins.accelerator}"
    why = str(run.task.progress.get("cpu", ""))
    await _log(
        world,
        "vm.created",
        f"vm/{vm.name}",
        f"{vm.name} defined by {run.task.by}: {pinned}" + (f"; its CPU: {why}" if why else ""),
    )
    return Done(f"{vm.name} defined ({pinned})", {"vm": vm.name, "uuid": vm.pins.uuid})


async def plan_create(world: World, request: CreateVm) -> CreatePlan:
    """What the VM would be, without making it; what would be refused is."""
    snapshot = world.cache.snapshot
    admit(snapshot, request)
    chosen = choose_cpu(snapshot.hosts, snapshot.settings, request.cpu)
    pins = _pinned(world, chosen)
    now = world.clock.realtime()
    check_ha(
        snapshot,
        world.cache.renewals,
        define_vm(snapshot, request, pins=pins, boot=Boot(), now=now),
        world.cutter,
    )
    return CreatePlan(
        vm=request.name,
        machine=pins.machine,
        cpu_model=pins.cpu_model,
        accelerator=pins.accelerator,
        reason=chosen.reason,
        cannot=dict(chosen.cannot),
    )


def _pins(world: World, request: CreateVm) -> tuple[Pins, str]:
    snapshot = world.cache.snapshot
    chosen = choose_cpu(snapshot.hosts, snapshot.settings, request.cpu)
    return _pinned(world, chosen), chosen.reason


def _pinned(world: World, chosen: Chosen) -> Pins:
    """The rest has to suit only the hosts that can give the CPU: nowhere else will it be."""
    hosts = world.cache.snapshot.hosts.items()
    return world.pin([info for name, info in hosts if name not in chosen.cannot], chosen.model)


async def _make_variables(world: World, vm: Vm, variables: Disk) -> None:
    """The image of its UEFI variables, from a host whose firmware has some."""
    body = {"disk": variables.model_dump(mode="json")}
    path = f"/v1/vms/{vm.name}/make-variables"
    volumes = {variables.volume}
    await on_some_host(world, None, "POST", path, body, volumes=volumes, uefi=True)


async def _make_seed(world: World, vm: Vm, user_data: str) -> None:
    """The CD from which the guest's cloud-init learns who it is; made anew when asked again."""
    body = {"user_data": user_data, "instance_id": vm.pins.uuid, "hostname": vm.name}
    await on_some_host(world, vm, "POST", f"/v1/vms/{vm.name}/make-seed", body)


async def _boot_of(world: World, request: CreateVm) -> Boot:
    """What the VM boots from, with an image resolved to files by content hash."""
    if request.image is None:
        return Boot(kernel=request.kernel, initrd=request.initrd, append=request.append)
    answer = await on_some_host(
        world, None, "POST", f"/v1/images/{request.image}/publish", {}, prefer=request.host
    )
    words = (answer.get("append") or "", request.append)
    return Boot(
        image=request.image,
        kernel=answer.get("kernel"),
        initrd=answer.get("initrd"),
        append=" ".join(word for word in words if word),
    )


async def _claim(run: TaskRun, vm: Vm, owner: Owner, *, why: str) -> None:
    spec_key, owner_key = keys.vm_spec(vm.name), keys.vm_owner(vm.name)
    networks = {nic.network for nic in vm.nics}
    compare: list[Compare] = [absent(spec_key), absent(owner_key)]
    compare += [exists(keys.network(name)) for name in sorted(networks)]
    also: list[Op] = [put(spec_key, encode(vm)), put(owner_key, encode(owner))]
    try:
        await run.say(
            f"the name {vm.name} is taken for it",
            progress={"claimed": True, "cpu": why},
            compare=compare,
            also=also,
        )
    except CasFailed:
        raise Conflict(
            f"there is a VM {vm.name} already, or one of its networks is gone",
            hint=f"look: godwit vm show {vm.name}; godwit network list",
        ) from None


async def _unclaim(world: World, vm: Vm, *, images: bool) -> None:
    if images:
        body, path = {"disks": _dump(vm.written), "whole": True}, f"/v1/vms/{vm.name}/delete-disks"
        with contextlib.suppress(GodwitError):
            await on_some_host(world, vm, "POST", path, body)
    names = (
        keys.vm_spec(vm.name),
        keys.vm_owner(vm.name),
        keys.vm_status(vm.name),
        keys.vm_restarts(vm.name),
    )
    await world.records.store.txn([], [delete(name) for name in names])


def _dump(disks: Iterable[Disk]) -> list[dict[str, Any]]:
    return [disk.model_dump(mode="json") for disk in disks]


def lost_path(snapshot: Snapshot, volume: str, host: str) -> bool:
    """Whether a host has said that it has no path of its own to a volume. Pure."""
    seen = snapshot.seen_volume(volume, host)
    return seen is not None and seen.state is not VolumeState.DIRECT


def helpers(
    snapshot: Snapshot,
    vm: Vm | None,
    *,
    prefer: str | None = None,
    volumes: Collection[str] = (),
    uefi: bool = False,
) -> list[HostInfo]:
    """Hosts that are up and have a path of their own to all the VM's volumes (and these): the
    preferred first, then who coordinates one of them. Pure.

    ``uefi``: only hosts with such firmware.
    Where one of them is a local volume, only the host whose own is meant: the preferred one, or
    the one where the VM is.
    """
    own = vm.volumes if vm else frozenset()
    volumes = {*own, *volumes}
    local = bool(volumes & snapshot.local_volumes)
    home = prefer or (snapshot.owner(vm.name).host if vm else None)
    found = [
        info
        for info in snapshot.hosts.values()
        if volumes <= set(info.volumes)
        and (not local or info.name == home)
        and (not uefi or info.uefi is not None)
        and not any(lost_path(snapshot, name, info.name) for name in volumes)
        and host_state(leased=info.name in snapshot.leases, agent=info.name in snapshot.agents)[0]
        is HostState.UP
    ]
    leading = {snapshot.volumes[name].coordinator for name in volumes & set(snapshot.volumes)}
    return sorted(
        found, key=lambda info: (info.name != prefer, info.name not in leading, info.name)
    )


async def on_some_host(
    world: World,
    vm: Vm | None,
    method: str,
    path: str,
    body: dict[str, Any],
    *,
    prefer: str | None = None,
    volumes: Collection[str] = (),
    uefi: bool = False,
    deadline_s: float = _DISKS_S,
) -> Any:
    """Ask the first host that can be reached; Unavailable when there is none.

    Only what was certainly not done is asked of the next host. ``volumes`` are those it must see
    beside the VM's.
    """
    last: GodwitError | None = None
    fit = helpers(world.cache.snapshot, vm, prefer=prefer, volumes=volumes, uefi=uefi)
    for info in fit:
        try:
            return await world.agents.call(info, method, path, body, deadline_s=deadline_s)
        except (TooOld, Unavailable) as error:
            last = error
    raise last or Unavailable(
        "no host that is up sees what is needed", hint="see: godwit host list"
    )


async def delete_vm(world: World, run: TaskRun, request: DeleteVm) -> Done:
    """Forget the VM, then delete its files. The record goes first, and only if nobody started it.

    Files that cannot be deleted bring the record back, unless nobody knows what happened.
    """
    name = request.name
    spec = await world.records.vm(name)
    if spec is None:
        left = run.task.progress.get("vm")
        if left is None:
            raise NotFound(f"no vm {name}", hint="look with: godwit vm list")
        vm, saved = Vm.model_validate(left), run.task.progress.get("saved")
        owner = Owner()
    else:
        vm = spec.value
        found = await world.records.owner(name)
        owner = found.value if found else Owner()
        check_action(owner, request)
        # Making a clone writes the owner record, which is compared below.
        since = found.revision if found else spec.revision
        refuse_if_cloned(vm, await vms_since(world, since), "delete")
        saved = owner.saved.path if owner.saved else None
        owner_key = keys.vm_owner(name)
        names = (
            keys.vm_spec(name),
            owner_key,
            keys.vm_status(name),
            keys.vm_restarts(name),
        )
        await run.say(
            f"{name} is forgotten, its files are next",
            progress={"vm": vm.model_dump(mode="json"), "saved": saved},
            compare=[
                mod_is(keys.vm_spec(name), spec.revision),
                mod_is(owner_key, found.revision) if found else absent(owner_key),
            ],
            also=[delete(key) for key in names],
        )
    if vm.written or vm.cdroms or saved:
        await _delete_files(world, vm, owner, saved)
    await _log(world, "vm.deleted", f"vm/{name}", f"{name} deleted by {run.task.by}")
    return Done(f"{name} deleted with {len(vm.disks)} disks", {"vm": name})


async def _delete_files(world: World, vm: Vm, owner: Owner, saved: str | None) -> None:
    body = {"disks": _dump(vm.written), "saved": saved, "whole": True}
    try:
        path = f"/v1/vms/{vm.name}/delete-disks"
        await on_some_host(world, vm, "POST", path, body, prefer=owner.host)
    except OutcomeUnknown:
        raise
    except GodwitError as error:
        spec_key, owner_key = keys.vm_spec(vm.name), keys.vm_owner(vm.name)
        answer = await world.records.store.txn(
            [absent(spec_key), absent(owner_key)],
            [put(spec_key, encode(vm)), put(owner_key, encode(owner))],
        )
        state = "it is still defined" if answer.succeeded else "its files are left"
        raise OperationFailed(
            f"the files of {vm.name} could not be deleted, {state}: {error.message}",
            hint=error.hint or "try again when a host is up",
        ) from error


async def create_network(world: World, run: TaskRun, request: CreateNetwork) -> Done:
    """Write the definition; every host's agent sees it and makes its bridge."""
    network = define_network(request)
    snapshot = world.cache.snapshot
    if run.adopted and snapshot.networks.get(network.name) == network:
        return Done(f"network {network.name} is defined", {"network": network.name})
    twin = next((n for n in snapshot.networks.values() if n.bridge == network.bridge), None)
    if twin is not None:
        raise Conflict(
            f"the bridge {network.bridge} belongs to the network {twin.name}",
            hint="choose another name",
        )
    await world.records.cas(keys.network(network.name), network, 0)
    message = f"network {network.name} defined by {run.task.by}"
    await _log(world, "network.created", f"network/{network.name}", message)
    said = f"network {network.name} defined; hosts make the bridge {network.bridge}"
    return Done(said, {"network": network.name})


async def delete_network(world: World, run: TaskRun, request: DeleteNetwork) -> Done:
    """Remove the definition; the agents remove their bridges."""
    key = keys.network(request.name)
    snapshot = world.cache.snapshot
    if request.name in snapshot.networks:
        check_unused(snapshot, request.name)
        answer = await world.records.store.txn([exists(key)], [delete(key)])
        if answer.succeeded:
            message = f"network {request.name} deleted by {run.task.by}"
            await _log(world, "network.deleted", f"network/{request.name}", message)
    elif not run.adopted:
        raise NotFound(f"no network {request.name}", hint="look: godwit network list")
    return Done(f"network {request.name} deleted", {"network": request.name})


async def _log(world: World, kind: str, subject: str, message: str) -> None:
    await world.records.append_event(kind, subject, message, at=world.clock.realtime())
