"""The hosts as placement sees them, from one snapshot: marks, memory, CPUs, who is kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import state_of
from godwit.model.host import HostInfo
from godwit.model.migration import Migration, MoveState
from godwit.model.ownership import OwnerState
from godwit.model.vm import Vm
from godwit.model.volume import VolumeState
from godwit.planner.placement import OVERHEAD_BYTES, Room

RUNS = (OwnerState.RUNNING, OwnerState.STARTING)


def rooms_of(snapshot: Snapshot, free: Mapping[str, int | None]) -> list[Room]:
    """Every known host as a room; ``free`` holds the free memory that the hosts answered.

    Memory already promised to VMs that start or arrive is not yet missing from what a host
    measures, so what remains unpromised is an upper bound.
    """
    present, coming = _here(snapshot), _coming(snapshot)
    rooms = []
    for info in sorted(snapshot.hosts.values(), key=lambda host: host.name):
        state, reason = state_of(snapshot, info.name)
        here = present.get(info.name, {})
        promised = list((here | coming.get(info.name, {})).values())
        left = info.memory_bytes - sum(vm.memory_bytes + OVERHEAD_BYTES for vm in promised)
        measured = free.get(info.name)
        rooms.append(
            Room(
                info=info,
                state=state,
                reason=reason,
                memory_free_bytes=None if measured is None else max(0, min(measured, left)),
                cpus_promised=sum(vm.cpus for vm in promised),
                cpus_limit=info.cpus * snapshot.settings.cpus_per_core,
                vms=len(here),
                lost=_lost_paths(snapshot, info),
                groups=_groups(promised),
            )
        )
    return rooms


def _here(snapshot: Snapshot) -> dict[str, dict[str, Vm]]:
    """Host -> its VMs, by name."""
    found: dict[str, dict[str, Vm]] = {}
    for name, owner in snapshot.owners.items():
        vm = snapshot.vms.get(name)
        if vm is not None and owner.host and owner.state in RUNS:
            found.setdefault(owner.host, {})[name] = vm
    return found


def _coming(snapshot: Snapshot) -> dict[str, dict[str, Vm]]:
    """Host -> the VMs on their way there, also those whose move still waits for its turn."""
    found: dict[str, dict[str, Vm]] = {}
    for name, owner in snapshot.owners.items():
        move, vm = owner.migration, snapshot.vms.get(name)
        if move is not None and vm is not None and owner.host != move.destination:
            found.setdefault(move.destination, {})[name] = vm
    for record in waiting_moves(snapshot):
        vm = snapshot.vms.get(record.vm)
        if vm is not None and snapshot.owner(record.vm).host == record.source:
            found.setdefault(record.destination, {})[record.vm] = vm
    return found


def waiting_moves(snapshot: Snapshot) -> list[Migration]:
    """Moves that wait for their turn, oldest first; not those that nobody works on any more."""
    carried = {
        task.progress.get("migration") for task in snapshot.tasks.values() if not task.state.final
    }
    found = [
        move
        for move in snapshot.migrations.values()
        if move.state is MoveState.WAITING and move.id in carried
    ]
    return sorted(found, key=lambda move: move.id)


def _groups(vms: Iterable[Vm]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for vm in vms:
        for group in vm.rules.apart:
            found.setdefault(group, set()).add(vm.name)
    return {group: frozenset(names) for group, names in found.items()}


def _lost_paths(snapshot: Snapshot, info: HostInfo) -> dict[str, str]:
    """The volumes that a host says it has no path of its own to: state and reason."""
    seen = {volume: snapshot.seen_volume(volume, info.name) for volume in info.volumes}
    return {
        volume: f"{one.state.value} ({one.reason})"
        for volume, one in seen.items()
        if one is not None and one.state is not VolumeState.DIRECT
    }
