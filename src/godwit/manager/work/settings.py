"""Changes of what holds from now on: a VM's rules, the cluster's settings."""

from __future__ import annotations

from godwit.manager.failover.admission import check_ha
from godwit.manager.work.cpus import choose_cpu
from godwit.manager.work.lookup import known
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.work.vms import host_of
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import Conflict
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import SetCluster, SetVm
from godwit.model.settings import ClusterSettings
from godwit.model.vm import Vm
from godwit.store.api import absent, mod_is
from godwit.store.records import CasFailed


async def set_vm(world: World, run: TaskRun, request: SetVm) -> Done:
    """Change the rules of a VM; done twice it is the same.

    A running VM's host learns that it is highly available before the record says so, for from then
    on it may be started elsewhere; that it no longer is, after.
    """
    name, told = request.name, False
    while True:
        spec = known(await world.records.vm(name), "vm", name)
        found = await world.records.owner(name)
        owner = found.value if found else Owner()
        ha = spec.value.ha if request.ha is None else request.ha
        if ha != spec.value.ha:
            _check_still(name, owner)
            cache, changed = world.cache, _applied(spec.value, request, ha=ha)
            check_ha(cache.snapshot, cache.renewals, changed, world.cutter)
        if ha and not spec.value.ha and owner.state is OwnerState.RUNNING:
            await _tell(world, owner, name, ha=True)
            told = True
        changed = _applied(spec.value, request, ha=ha)
        key = keys.vm_owner(name)
        guard = mod_is(key, found.revision) if found else absent(key)
        try:
            await world.records.cas(keys.vm_spec(name), changed, spec.revision, compare=[guard])
        except CasFailed:
            continue  # it was started, moved or changed meanwhile: look again
        break
    if told or (request.ha is False and owner.state is OwnerState.RUNNING):
        # Once more: an agent that was started anew meanwhile has read the record as it was.
        await _tell(world, owner, name, ha=ha)
    said = ", ".join(f"{field}={value}" for field, value in _said(request).items())
    message = f"rules of {name} changed by {run.task.by}: {said}"
    await world.records.append_event("vm.rules", f"vm/{name}", message, at=world.clock.realtime())
    return Done(f"{name}: {said}", {"vm": name})


def _check_still(name: str, owner: Owner) -> None:
    """Who stops a VM in time cannot change while it changes hands."""
    if owner.migration is not None:
        raise Conflict(
            f"{name} is being moved by {owner.migration.id}", hint="ask again when it is there"
        )
    if owner.state is OwnerState.STARTING:
        raise Conflict(f"{name} starts just now", hint="ask again when it runs")


async def _tell(world: World, owner: Owner, name: str, *, ha: bool) -> None:
    host = host_of(world.cache.snapshot, owner)
    await world.agents.call(host, "POST", f"/v1/vms/{name}/set-ha", {"ha": ha})


def _said(request: SetVm) -> dict[str, object]:
    return request.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "name"})


async def set_cluster(world: World, run: TaskRun, request: SetCluster) -> Done:
    """Change the cluster's settings; the first change makes the record."""
    changes = request.changes
    if model := str(changes.get("cpu_baseline", "")):
        choose_cpu(world.cache.snapshot.hosts, ClusterSettings(), model)  # Refused: nobody has it
    while True:
        found = await world.records.get(keys.CLUSTER, ClusterSettings)
        before = found.value if found else ClusterSettings()
        try:
            await world.records.cas(
                keys.CLUSTER, before.but(**changes), found.revision if found else 0
            )
        except CasFailed:
            continue  # somebody changed another setting: that stays, too
        break
    said = ", ".join(f"{key}={'auto' if value == '' else value}" for key, value in changes.items())
    message = f"settings changed by {run.task.by}: {said}"
    await world.records.append_event(
        "cluster.settings", "cluster/settings", message, at=world.clock.realtime()
    )
    return Done(f"from now on: {said}", dict(changes))


def _applied(vm: Vm, request: SetVm, *, ha: bool) -> Vm:
    return vm.but(ha=ha, rules=request.applied(vm.rules))
