"""Changes of what holds from now on: a VM's rules, the cluster's settings."""

from __future__ import annotations

from godwit.manager.work.lookup import known
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.requests import SetCluster, SetVm
from godwit.model.settings import ClusterSettings
from godwit.model.vm import Vm
from godwit.store.records import CasFailed


async def set_vm(world: World, run: TaskRun, request: SetVm) -> Done:
    """Change the rules of a VM; done twice it is the same."""

    def change(vm: Vm) -> Vm:
        ha = vm.ha if request.ha is None else request.ha
        return vm.but(ha=ha, rules=request.applied(vm.rules))

    found = await world.records.update(keys.vm_spec(request.name), Vm, change)
    vm = known(found, "vm", request.name).value
    said = ", ".join(f"{key}={value}" for key, value in _said(request).items())
    message = f"rules of {vm.name} changed by {run.task.by}: {said}"
    await world.records.append_event(
        "vm.rules", f"vm/{vm.name}", message, at=world.clock.realtime()
    )
    return Done(f"{vm.name}: {said}", {"vm": vm.name})


def _said(request: SetVm) -> dict[str, object]:
    return request.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "name"})


async def set_cluster(world: World, run: TaskRun, request: SetCluster) -> Done:
    """Change the cluster's settings; the first change makes the record."""
    changes = request.changes
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
    said = ", ".join(f"{key}={value}" for key, value in changes.items())
    message = f"settings changed by {run.task.by}: {said}"
    await world.records.append_event(
        "cluster.settings", "cluster/settings", message, at=world.clock.realtime()
    )
    return Done(f"from now on: {said}", dict(changes))
