"""The cluster as one immutable value: every decision looks at one snapshot and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from godwit.manager import index
from godwit.model import keys
from godwit.model.clones import all_clones
from godwit.model.errors import TooOld
from godwit.model.host import ConfirmedDown, HostInfo
from godwit.model.marks import HostMark
from godwit.model.migration import Migration
from godwit.model.network import Network
from godwit.model.ownership import Owner, Restarts
from godwit.model.power import PowerConfig
from godwit.model.settings import ClusterSettings
from godwit.model.task import Task
from godwit.model.validation import HostValidated
from godwit.model.vm import Vm, VmStatus
from godwit.model.volume import Volume, VolumeOnHost


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All records as of ``revision``; ``leases``, ``agents`` and ``members`` are those alive.

    What is found by looking at many records is looked for once, see `godwit.manager.index`.
    ``owner_revisions``: the store's revision at which an ownership changed last, for who compares
    it in a transaction. What guards renew all the time is no part of it (`Cache.renewals`).
    """

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
    confirmed_down: Mapping[str, ConfirmedDown] = field(default_factory=dict)
    restarts: Mapping[str, Restarts] = field(default_factory=dict)
    owner_revisions: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)  # key -> why: of a newer version

    def check_vms_whole(self) -> None:
        """TooOld when a VM's definition cannot be read: what it uses would seem to be free."""
        for key, why in sorted(self.unreadable.items()):
            if key.startswith(keys.VMS) and key.endswith("/spec"):
                raise TooOld(
                    f"what that VM uses is not known: {why}",
                    hint="upgrade this manager, or ask one that is newer",
                )

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

    def inherit(self, before: Snapshot) -> None:
        """Keep what was found in ``before`` wherever it rests on the very same records."""
        for name, rooms in index.RESTS_ON.items():
            if name in before.__dict__ and all(
                getattr(self, room) is getattr(before, room) for room in rooms
            ):
                self.__dict__[name] = before.__dict__[name]

    @cached_property
    def vm_names(self) -> tuple[str, ...]:
        """The names of all VMs, sorted."""
        return tuple(sorted(self.vms))

    @cached_property
    def present(self) -> Mapping[str, tuple[Vm, ...]]:
        """Host -> the VMs it owns and runs (or is starting)."""
        return index.present(self.vms, self.owners)

    @cached_property
    def coming(self) -> Mapping[str, tuple[Vm, ...]]:
        """Host -> the VMs on their way to it."""
        return index.coming(self.vms, self.owners)

    @cached_property
    def clones(self) -> Mapping[str, tuple[str, ...]]:
        """VM -> the linked clones that stand on its images; only those that have some."""
        return all_clones(self.vms.values())

    @cached_property
    def network_vms(self) -> Mapping[str, int]:
        """Network -> how many VMs have a card on it."""
        return index.network_vms(self.vms.values())

    @cached_property
    def network_hosts(self) -> Mapping[str, tuple[str, ...]]:
        """Network -> the hosts that have its bridge."""
        return index.network_hosts(self.hosts.values())

    @cached_property
    def volume_names(self) -> frozenset[str]:
        """The volumes that hosts report or that were defined."""
        return index.volume_names(self.hosts.values(), self.volumes)

    @cached_property
    def volume_hosts(self) -> Mapping[str, Mapping[str, VolumeOnHost]]:
        """Volume -> host -> what the host said of it last."""
        return index.volume_hosts(self.volume_states)

    @cached_property
    def unfinished(self) -> Mapping[str, tuple[Task, ...]]:
        """What a task is about -> the unfinished tasks about it, oldest first."""
        return index.unfinished(self.tasks.values())

    def running_on(self, host: str) -> tuple[Vm, ...]:
        """The VMs this host owns and runs (or is starting)."""
        return self.present.get(host, ())

    def arriving_at(self, host: str) -> tuple[Vm, ...]:
        """The VMs on their way to this host; their memory is promised there."""
        return self.coming.get(host, ())

    def active_tasks(self, subject: str) -> tuple[Task, ...]:
        """The unfinished tasks about one object, oldest first."""
        return self.unfinished.get(subject, ())
