"""What the records of a snapshot mean together, found in one look over each kind of record.

Every function is pure and touches a record once, so that what is asked of each host or each VM
costs the same however many there are. `Snapshot` keeps what they find as long as the records that
it was found in stay the same: `RESTS_ON` says which those are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from godwit.model.host import HostInfo
from godwit.model.ownership import Owner, OwnerState
from godwit.model.task import Task
from godwit.model.vm import Vm
from godwit.model.volume import VolumeOnHost

# What Snapshot keeps -> the kinds of records it was found in.
RESTS_ON: Final[Mapping[str, tuple[str, ...]]] = {
    "vm_names": ("vms",),
    "present": ("vms", "owners"),
    "coming": ("vms", "owners"),
    "clones": ("vms",),
    "network_vms": ("vms",),
    "network_hosts": ("hosts",),
    "volume_names": ("hosts", "volumes"),
    "volume_hosts": ("volume_states",),
    "unfinished": ("tasks",),
}
_RUNS = (OwnerState.RUNNING, OwnerState.STARTING)


def present(vms: Mapping[str, Vm], owners: Mapping[str, Owner]) -> dict[str, tuple[Vm, ...]]:
    """Host -> the VMs that it owns and runs, or is starting."""
    found: dict[str, list[Vm]] = {}
    for name, owner in owners.items():
        if owner.host is not None and owner.state in _RUNS and name in vms:
            found.setdefault(owner.host, []).append(vms[name])
    return {host: tuple(here) for host, here in found.items()}


def coming(vms: Mapping[str, Vm], owners: Mapping[str, Owner]) -> dict[str, tuple[Vm, ...]]:
    """Host -> the VMs on their way to it, which it does not own yet."""
    found: dict[str, list[Vm]] = {}
    for name, owner in owners.items():
        move = owner.migration
        if move is not None and move.destination != owner.host and name in vms:
            found.setdefault(move.destination, []).append(vms[name])
    return {host: tuple(there) for host, there in found.items()}


def network_vms(vms: Iterable[Vm]) -> Counter[str]:
    """Network -> how many VMs have a card on it."""
    return Counter(name for vm in vms for name in {nic.network for nic in vm.nics})


def network_hosts(hosts: Iterable[HostInfo]) -> dict[str, tuple[str, ...]]:
    """Network -> the hosts that have its bridge, by name."""
    found: dict[str, list[str]] = {}
    for info in hosts:
        for name in info.networks:
            found.setdefault(name, []).append(info.name)
    return {name: tuple(sorted(here)) for name, here in found.items()}


def volume_names(hosts: Iterable[HostInfo], defined: Iterable[str]) -> frozenset[str]:
    """The volumes that hosts report or that were defined."""
    return frozenset(defined).union(*(info.volumes for info in hosts))


def volume_hosts(states: Mapping[str, VolumeOnHost]) -> dict[str, dict[str, VolumeOnHost]]:
    """Volume -> host -> what the host said of it last."""
    found: dict[str, dict[str, VolumeOnHost]] = {}
    for name, state in states.items():
        volume, _, host = name.partition("/")
        found.setdefault(volume, {})[host] = state
    return found


def unfinished(tasks: Iterable[Task]) -> dict[str, tuple[Task, ...]]:
    """What a task is about -> the unfinished tasks about it, oldest first."""
    found: dict[str, list[Task]] = {}
    for task in sorted(tasks, key=lambda one: one.id):
        if not task.state.final:
            found.setdefault(task.subject, []).append(task)
    return {subject: tuple(here) for subject, here in found.items()}
