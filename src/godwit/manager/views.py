"""What people see in lists: records joined into one row each, by pure rules.

A VM's state comes from its ownership record, the only truth; the agent's status refines it
(paused, io-error, ...) when it speaks of the same host and epoch. Where the owner's host does
not renew its lease nobody can know, and the list says so.
"""

from __future__ import annotations

from godwit.manager.snapshot import Snapshot
from godwit.model.base import Name
from godwit.model.disks import CLUSTER_STORAGE, tier_of
from godwit.model.host import HostInfo, HostState, HostView
from godwit.model.network import Network, NetworkView
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import DiskView, Vm, VmState, VmStatus, VmView
from godwit.model.volume import (
    Volume,
    VolumeHealth,
    VolumeHostView,
    VolumeOnHost,
    VolumeState,
    VolumeView,
)

# What a status may say of a VM that its owner runs; anything else there is merely late.
_SEEN_RUNNING = frozenset(
    {
        VmState.RUNNING,
        VmState.PAUSED,
        VmState.FROZEN,
        VmState.IO_ERROR,
        VmState.FAILED,
        VmState.UNKNOWN,
    }
)


def vm_state(
    owner: Owner | None, status: VmStatus | None, *, leased: bool, agent: bool = True
) -> tuple[VmState, str]:
    """The state of a VM and the sentence that explains it (empty when it goes without saying)."""
    if owner is None:
        return VmState.STOPPED, ""
    fresh = status if status and status.epoch == owner.epoch and owner.epoch > 0 else None
    if owner.state is OwnerState.STOPPED:
        if fresh and fresh.state is VmState.FAILED:
            return VmState.FAILED, fresh.reason
        return VmState.STOPPED, fresh.reason if fresh else ""
    if owner.state is OwnerState.SAVED:
        return VmState.SAVED, ""
    if not leased:
        return VmState.UNKNOWN, f"{owner.host} does not renew its lease: nobody can tell"
    away = "" if agent else f"the agent of {owner.host} is away; this is what it last saw"
    if owner.migration is not None:
        move = owner.migration
        return VmState.MIGRATING, f"{move.id}: from {move.source} to {move.destination}"
    if owner.state is OwnerState.STARTING:
        return VmState.STARTING, away
    if fresh and fresh.host == owner.host and fresh.state in _SEEN_RUNNING:
        late = fresh.state is VmState.RUNNING and owner.paused
        return (VmState.PAUSED if late else fresh.state), fresh.reason or away
    return (VmState.PAUSED if owner.paused else VmState.RUNNING), away


def view_vm(
    spec: Vm,
    owner: Owner | None,
    status: VmStatus | None,
    *,
    leased: bool,
    agent: bool = True,
    clones: tuple[Name, ...] = (),
) -> VmView:
    """One row of ``vm list``; ``leased``/``agent``: the owner's host renews its keys."""
    state, reason = vm_state(owner, status, leased=leased, agent=agent)
    known = owner or Owner()
    placed = state not in (VmState.STOPPED, VmState.SAVED)
    return VmView(
        name=spec.name,
        state=state,
        host=known.host if placed else None,  # the record keeps the last place; nothing is there
        epoch=known.epoch,
        cpus=spec.cpus,
        memory_bytes=spec.memory_bytes,
        ha=spec.ha,
        rules=spec.rules,
        reason=reason,
        uuid=spec.pins.uuid,
        cpu_model=spec.pins.cpu_model,
        boot=spec.boot,
        firmware=spec.firmware,
        guest_agent=spec.guest_agent,
        disks=spec.disks,
        cdroms=spec.cdroms,
        nics=spec.nics,
        migration=known.migration.id if known.migration else None,
        checkpoints=spec.checkpoints,
        clones=clones,
        created_at=spec.created_at,
    )


def state_of_vm(snapshot: Snapshot, name: Name) -> tuple[VmState, str]:
    """The state of one VM of the snapshot, without the rest of its row."""
    owner = snapshot.owners.get(name)
    host = owner.host if owner else None
    return vm_state(
        owner,
        snapshot.statuses.get(name),
        leased=host in snapshot.leases,
        agent=host in snapshot.agents,
    )


def vm_of(snapshot: Snapshot, name: Name) -> VmView | None:
    """The row of one VM, None when there is none."""
    spec = snapshot.vms.get(name)
    if spec is None:
        return None
    owner = snapshot.owners.get(name)
    host = owner.host if owner else None
    return view_vm(
        spec,
        owner,
        snapshot.statuses.get(name),
        leased=host in snapshot.leases,
        agent=host in snapshot.agents,
        clones=snapshot.clones.get(name, ()),
    )


def host_state(*, leased: bool, agent: bool) -> tuple[HostState, str]:
    """Membership of a host from its two leased keys, with the sentence that explains it."""
    if leased and agent:
        return HostState.UP, ""
    if leased:
        return HostState.UNMANAGED, "its agent is away, its guard's lease has not run out"
    if agent:
        return HostState.DOWN, "its agent answers, but its guard does not renew the lease"
    return HostState.DOWN, "it renews no lease"


def state_of(snapshot: Snapshot, name: str) -> tuple[HostState, str]:
    """A host's state and the sentence that explains it; one that is up may carry a mark."""
    state, reason = host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
    mark = snapshot.marks.get(name)
    if mark is None:
        return state, reason
    said = mark.reason or f"asked for by {mark.by or 'somebody'}"
    if mark.state == "draining":
        left = len(snapshot.running_on(name))
        there = "1 VM is" if left == 1 else f"{left} VMs are"
        said += f"; {there} still there" if left else "; it is empty"
    if state is HostState.UP:
        return HostState(mark.state), said
    return state, f"{reason}; {mark.state}: {said}"


def view_host(
    snapshot: Snapshot, info: HostInfo, *, memory_free_bytes: int | None = None
) -> HostView:
    """One row of ``host list``; free memory is what the host measured, else what is not promised.

    A host that is down has none to give.
    """
    state, reason = state_of(snapshot, info.name)
    vms = snapshot.running_on(info.name)
    promised = info.memory_bytes - sum(vm.memory_bytes for vm in vms)
    free = promised if memory_free_bytes is None else memory_free_bytes
    return HostView(
        name=info.name,
        state=state,
        vms=len(vms),
        cpus=info.cpus,
        memory_bytes=info.memory_bytes,
        memory_free_bytes=0 if state is HostState.DOWN else max(0, free),
        reason=reason,
        cpu_model_name=info.cpu_model_name,
        kernel=info.kernel,
        qemu_version=".".join(map(str, info.qemu.version)),
        accelerator=info.qemu.accelerator,
        migration_address=info.migration_address,
        networks=info.networks,
        volumes=info.volumes,
        version=info.version,
        level=info.level,
    )


def view_network(snapshot: Snapshot, network: Network) -> NetworkView:
    """One row of ``network list``."""
    return NetworkView(
        **dict(network),
        hosts=snapshot.network_hosts.get(network.name, ()),
        vms=snapshot.network_vms.get(network.name, 0),
    )


def view_disks(vm: Vm) -> list[DiskView]:
    """The rows of ``vm disk list``, by place on the controller."""
    found = sorted(vm.disks, key=lambda disk: disk.lun)
    return [DiskView(**dict(disk), effective_tier=tier_of(disk)) for disk in found]


def all_volumes(snapshot: Snapshot) -> list[VolumeView]:
    """The volumes that hosts report or that were defined, by name."""
    found = (volume_of(snapshot, name) for name in sorted(snapshot.volume_names))
    return [view for view in found if view is not None]


def volume_of(snapshot: Snapshot, name: str) -> VolumeView | None:
    """The row of one volume, None when nobody reports or defined it."""
    if name not in snapshot.volume_names:
        return None
    return view_volume(snapshot, snapshot.volumes.get(name) or Volume(name=name))


def view_volume(snapshot: Snapshot, volume: Volume) -> VolumeView:
    """One row of ``volume list``; sizes are what the last host to speak has measured."""
    seen = snapshot.volume_hosts.get(volume.name, {})
    hosts = {
        info.name: _reach(snapshot, info, volume.name, seen.get(info.name))
        for _, info in sorted(snapshot.hosts.items())
        if volume.name in info.volumes or info.name in seen
    }
    sized = [one for one in seen.values() if one.capacity_bytes is not None]
    newest = max(sized, key=lambda one: one.since, default=None)
    return VolumeView(
        name=volume.name,
        kind=volume.kind,
        path=volume.path or f"{CLUSTER_STORAGE}/{volume.name}",
        server=volume.server,
        export=volume.export,
        portal=volume.portal,
        pool=volume.pool,
        client=volume.client,
        target=volume.target,
        description=volume.description,
        coordinator=volume.coordinator,
        capacity_bytes=newest.capacity_bytes if newest else None,
        used_bytes=newest.used_bytes if newest else None,
        health=_health(hosts),
        hosts=hosts,
        created_at=volume.created_at,
        fence_url=volume.fence_url,
    )


def _reach(
    snapshot: Snapshot, info: HostInfo, volume: str, seen: VolumeOnHost | None
) -> VolumeHostView:
    """How a host reaches a volume: what it said last, unless nobody can tell any more."""
    state, reason = host_state(
        leased=info.name in snapshot.leases, agent=info.name in snapshot.agents
    )
    if state is HostState.DOWN:
        text = f"{info.name} is down: {reason}"
        return VolumeHostView(state=VolumeState.UNAVAILABLE, reason=text)
    if seen is not None:
        return VolumeHostView(state=seen.state, reason=seen.reason)
    return VolumeHostView(state=VolumeState.DIRECT)


def _health(hosts: dict[str, VolumeHostView]) -> VolumeHealth:
    states = {one.state for one in hosts.values()}
    if not states & {VolumeState.DIRECT, VolumeState.REDIRECTED}:
        return "unavailable"
    return "ok" if states == {VolumeState.DIRECT} else "degraded"
