"""Power and state of VMs: find the host, ask its agent, and let the record have the last word.

When an answer is lost, or when a task is taken over from a dead manager, the ownership record
tells whether the step happened; only when it stays silent is the outcome unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from godwit.manager.rooms import rooms_of
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import check_action, host_that_is_up, known, need_of
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model.errors import OutcomeUnknown, Refused, Unavailable
from godwit.model.host import HostInfo
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import PauseVm, RestoreVm, ResumeVm, SaveVm, StartVm, StopVm
from godwit.model.units import format_size
from godwit.planner.placement import Need, Room, choose, reasons_against

_START_S = 120.0
_MEMORY_IO_S = 900.0  # writing or reading a VM's whole memory
_GRACE_S = 30.0

Test = Callable[[Owner], bool]


async def fresh_owner(world: World, vm: str) -> Owner:
    """The ownership record as it stands in the store; NotFound when the VM is gone."""
    found = await world.records.owner(vm)
    if found is None:
        known(world.cache.snapshot.vms.get(vm), "vm", vm)
    return found.value if found else Owner()


def host_of(snapshot: Snapshot, owner: Owner) -> HostInfo:
    """The host that runs the VM, if its agent can be asked; Unavailable otherwise."""
    name = owner.host or ""
    info = snapshot.hosts.get(name)
    if info is None:
        raise Unavailable(f"nothing is known about {name}", hint="see: godwit host list")
    if name not in snapshot.agents:
        raise Unavailable(
            f"the agent of {name} is away, so its VMs cannot be changed now",
            hint="they run on; try again when the agent is back: godwit host list",
        )
    return info


async def ask_agent(
    world: World,
    run: TaskRun,
    host: HostInfo,
    *,
    vm: str,
    verb: str,
    body: dict[str, Any],
    deadline_s: float,
    happened: Test,
) -> str:
    """Have an agent do something; returns how it is known that it happened.

    ``happened`` reads it off the record. A task that was taken over looks there first, because
    the agent may have been asked already.
    """
    if run.adopted and await _shows(world, vm, happened):
        return "the record shows it, the asking manager is gone"
    try:
        await world.agents.call(host, "POST", f"/v1/vms/{vm}/{verb}", body, deadline_s=deadline_s)
    except OutcomeUnknown:
        if await _shows(world, vm, happened):
            return "the answer was lost, the record shows it"
        raise
    return ""


async def _shows(world: World, vm: str, happened: Test) -> bool:
    def look(snapshot: Snapshot) -> bool | None:
        owner = snapshot.owners.get(vm)
        return True if owner is not None and happened(owner) else None

    return bool(await world.cache.until(look, timeout=world.settle_s))


async def start(world: World, run: TaskRun, request: StartVm | RestoreVm) -> Done:
    """Power on or restore, on the host asked for or where it is placed."""
    vm = request.name
    owner = await fresh_owner(world, vm)
    epoch = run.task.progress.get("epoch")
    if epoch is None:
        check_action(owner, request)
        epoch = owner.epoch
        host, why = await _place(world, request, owner)
        await run.say(why, progress={"host": host.name, "epoch": epoch})
    else:
        host = known(world.cache.snapshot.hosts.get(run.task.progress["host"]), "host", vm)
    restores = owner.state is OwnerState.SAVED or isinstance(request, RestoreVm)
    # No snapshot is newer than this; a host that knows it need not look through all VMs.
    revision, clones = world.cache.revision, world.cache.snapshot.clones.get(vm)
    how = await ask_agent(
        world,
        run,
        host,
        vm=vm,
        verb="restore" if restores else "start",
        body={} if clones else {"no_clones_at": revision},
        deadline_s=_MEMORY_IO_S if restores else _START_S,
        happened=lambda now: now.epoch > epoch and now.state is OwnerState.RUNNING,
    )
    did = "restored" if restores else "started"
    return Done(_sentence(f"{vm} {did} on {host.name}", how), {"vm": vm, "host": host.name})


async def _place(world: World, request: StartVm | RestoreVm, owner: Owner) -> tuple[HostInfo, str]:
    snapshot = world.cache.snapshot
    need = need_of(snapshot, request.name)
    rooms = rooms_of(snapshot, await world.free.for_placement(snapshot))
    by_name = {room.info.name: room for room in rooms}
    at_home = any(disk.local for disk in snapshot.vms[request.name].disks)
    if at_home and owner.host is not None:
        return _place_at_home(snapshot, request, owner.host, by_name, need)
    if request.host is not None:
        info = host_that_is_up(snapshot, request.host)
        against = reasons_against(by_name[request.host], need)
        if against:
            raise Refused(
                f"{request.host} cannot take {request.name}: {against[0]}",
                hint="choose another host, or leave the choice to Godwit",
                reasons=list(against),
            )
        return info, f"{request.host} was asked for"
    # What `vm create --host` said counts for the first start only.
    if owner.epoch == 0 and owner.host in by_name:
        preferred: Room = by_name[owner.host]
        if not reasons_against(preferred, need):
            return preferred.info, f"{owner.host} was named when {request.name} was created"
    decision = choose(rooms, need)
    return snapshot.hosts[decision.host], decision.reason


def _place_at_home(
    snapshot: Snapshot,
    request: StartVm | RestoreVm,
    home: str,
    rooms: dict[str, Room],
    need: Need,
) -> tuple[HostInfo, str]:
    """The host that has the VM's disks on its own storage, and no other."""
    if request.host not in (None, home):
        raise Refused(
            f"disks of {request.name} lie on the own storage of {home}",
            hint="start it there, then move it with its disks: godwit vm migrate",
        )
    info = host_that_is_up(snapshot, home)
    if against := reasons_against(rooms[home], need):
        raise Refused(
            f"{home} has its disks and cannot take {request.name}: {against[0]}",
            hint="make room there",
            reasons=list(against),
        )
    return info, f"{home} has its disks"


async def stop(world: World, run: TaskRun, request: StopVm) -> Done:
    """Shut down by ACPI, or cut the power; a VM that does not run is left as it is."""
    vm = request.name
    owner = await fresh_owner(world, vm)
    if owner.state in (OwnerState.STOPPED, OwnerState.SAVED):
        return Done(f"{vm} does not run: it is {owner.state.value}", {"vm": vm})
    check_action(owner, request)
    host = host_of(world.cache.snapshot, owner)
    what = "cutting the power" if request.force else f"ACPI, up to {request.timeout_s:g} s"
    await run.say(f"asking {host.name} to stop {vm} ({what})", progress={"host": host.name})
    how = await ask_agent(
        world,
        run,
        host,
        vm=vm,
        verb="stop",
        body={"force": request.force, "timeout_s": request.timeout_s},
        deadline_s=request.timeout_s + _GRACE_S,
        happened=lambda now: now.state is OwnerState.STOPPED,
    )
    return Done(_sentence(f"{vm} stopped on {host.name}", how), {"vm": vm})


async def hold(world: World, run: TaskRun, request: PauseVm | ResumeVm) -> Done:
    """Hold the vCPUs or let them run; the wish is kept in the record and travels along."""
    vm, paused = request.name, isinstance(request, PauseVm)
    owner = await fresh_owner(world, vm)
    check_action(owner, request)
    host = host_of(world.cache.snapshot, owner)
    how = await ask_agent(
        world,
        run,
        host,
        vm=vm,
        verb="pause" if paused else "resume",
        body={},
        deadline_s=_GRACE_S,
        happened=lambda now: now.state is OwnerState.RUNNING and now.paused is paused,
    )
    did = "paused" if paused else "resumed"
    return Done(_sentence(f"{vm} {did} on {host.name}", how), {"vm": vm, "host": host.name})


async def save(world: World, run: TaskRun, request: SaveVm) -> Done:
    """Write the memory to the volume and end the QEMU."""
    vm = request.name
    owner = await fresh_owner(world, vm)
    if run.adopted and owner.state is OwnerState.SAVED:
        return Done(f"{vm} is saved; the asking manager is gone", {"vm": vm})
    check_action(owner, request)
    host = host_of(world.cache.snapshot, owner)
    size = format_size(known(world.cache.snapshot.vms.get(vm), "vm", vm).memory_bytes)
    await run.say(f"{host.name} saves up to {size} of memory", progress={"host": host.name})
    how = await ask_agent(
        world,
        run,
        host,
        vm=vm,
        verb="save",
        body={},
        deadline_s=_MEMORY_IO_S,
        happened=lambda now: now.state is OwnerState.SAVED,
    )
    return Done(_sentence(f"{vm} saved by {host.name}", how), {"vm": vm})


def _sentence(what: str, how: str) -> str:
    return f"{what} ({how})" if how else what
