"""The cluster as one immutable value: every decision looks at one snapshot and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from godwit.model.host import HostInfo
from godwit.model.marks import HostMark
from godwit.model.migration import Migration
from godwit.model.network import Network
from godwit.model.ownership import Owner, OwnerState
from godwit.model.power import PowerConfig
from godwit.model.settings import ClusterSettings
from godwit.model.task import Task
from godwit.model.validation import HostValidated
from godwit.model.vm import Vm, VmStatus
from godwit.model.volume import Volume, VolumeOnHost


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All records as of ``revision``; ``leases``, ``agents`` and ``members`` are those alive."""

    revision: int = 0
    vms: Mapping[str, Vm] = field(default_factory=dict)
    owners: Mapping[str, Owner] = field(default_factory=dict)
    statuses: Mapping[str, VmStatus] = field(default_factory=dict)
    hosts: Mapping[str, HostInfo] = field(default_factory=dict)
    marks: Mapping[str, HostMark] = field(default_factory=dict)
    settings: ClusterSettings = field(default_factory=ClusterSettings)
    validated: Mapping[str, HostValidated] = field(default_factory=dict)
    leases: frozenset[str] = frozenset()
    agents: frozenset[str] = frozenset()
    powers: Mapping[str, PowerConfig] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    volume_states: Mapping[str, VolumeOnHost] = field(default_factory=dict)  # "VOLUME/HOST"
    migrations: Mapping[str, Migration] = field(default_factory=dict)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    members: frozenset[str] = frozenset()

    def owner(self, vm: str) -> Owner:
        """The ownership record, or that of a VM that never ran."""
        return self.owners.get(vm, Owner())

    @property
    def local_volumes(self) -> frozenset[str]:
        """The volumes of which each host has its own."""
        return frozenset(name for name, one in self.volumes.items() if one.kind == "local")

    @property
    def rbd_volumes(self) -> frozenset[str]:
        """Names of the volumes whose disks are images in a Ceph pool."""
        return frozenset(name for name, one in self.volumes.items() if one.kind == "rbd")

    def seen_volume(self, volume: str, host: str) -> VolumeOnHost | None:
        """What a host has said of a volume; None when it spoke of what lay there before that.

        A volume that was just defined is believed good until its hosts have looked at it.
        """
        seen, defined = self.volume_states.get(f"{volume}/{host}"), self.volumes.get(volume)
        if seen is None or defined is None:
            return seen
        if seen.defined_at is None:  # an agent that does not say it
            return seen if seen.since >= defined.created_at else None
        return seen if seen.defined_at == defined.created_at else None

    def running_on(self, host: str) -> tuple[Vm, ...]:
        """The VMs this host owns and runs (or is starting)."""
        return tuple(
            self.vms[name]
            for name, owner in self.owners.items()
            if owner.host == host
            and owner.state in (OwnerState.RUNNING, OwnerState.STARTING)
            and name in self.vms
        )

    def arriving_at(self, host: str) -> tuple[Vm, ...]:
        """The VMs on their way to this host; their memory is promised there."""
        return tuple(
            self.vms[name]
            for name, owner in self.owners.items()
            if owner.migration is not None
            and owner.migration.destination == host != owner.host
            and name in self.vms
        )

    def active_tasks(self, subject: str) -> tuple[Task, ...]:
        """The unfinished tasks about one object, oldest first."""
        found = [t for t in self.tasks.values() if t.subject == subject and not t.state.final]
        return tuple(sorted(found, key=lambda task: task.id))
