"""The cluster as one immutable value: all that a decision may look at.

Everything in a `Snapshot` was read linearizably and at one revision of the store, except what says
otherwise. Times: ``*_at`` of the store are seconds of the deciding manager's own monotonic clock,
the one that ``now`` comes from; wall-clock times are named so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from godwit.model.host import ConfirmedDown
from godwit.model.marks import HostMark
from godwit.model.membership import Renewal
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Vm
from godwit.model.volume import Volume

HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The figures of the failover cluster, in seconds; ``docs/design/0014`` derives them.

    ``gap_s`` may not be longer than the store's election timeout (etcd's default is 1 s): between
    two readings that are closer together no majority of its members can have been without a
    leader, and only then a silence counts through.
    """

    renew_s: float = 3.0
    lease_s: float = 12.0
    freeze_s: float = 8.0  # the guard freezes, after the send time of the last answered renewal
    reset_s: float = 10.0  # the watchdog resets when the freeze did not take
    margin: float = 0.2  # how much faster a taker's clock may run than a host's
    gap_s: float = 1.0
    retry_s: float = 10.0  # until a rung that failed is tried again
    isolations: int = 3  # in an hour, and the host is quarantined
    settle_s: float = 2.0  # an owner's own agent comes first when its QEMU is gone
    cold_s: float = 120.0  # how long VMs wait for hosts and for each other after a loss of power

    @property
    def late_s(self) -> float:
        """Two renewals missed."""
        return 2 * self.renew_s

    @property
    def takeover_s(self) -> float:
        """A host that was silent for so long is lost."""
        return self.lease_s * (1 + self.margin)

    @property
    def after_gap_s(self) -> float:
        """What is left to count, at least, after a time in which the store had no leader.

        A guard may have counted "no leader" as a renewal up to the moment when there was one again;
        from then its own deadline needs ``reset_s``.
        """
        return self.reset_s * (1 + self.margin)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One voting member of the store. ``host``: where it runs, empty for a witness elsewhere."""

    name: str
    host: str = ""
    healthy: bool = True


@dataclass(frozen=True, kw_only=True)
class StoreSeen:
    """How the reading was had: ``asked_at`` when it was sent, ``answered_at`` when it came back.

    ``leader`` False: it was not answered. ``embedded``: the store daemon of one machine.
    """

    leader: bool = True
    term: int = 1
    asked_at: float = 0.0
    answered_at: float = 0.0
    embedded: bool = False
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Heard:
    """The last renewal of a host that this manager read, and since when it has not changed.

    ``revision``: its mod revision. It tells two renewals apart whose text is the same, as those of
    a guard that began to count anew are. ``since`` moves on when time did not count, ``at`` never.
    ``witnessed``: this manager saw it come; else it was there when it began to listen, however old,
    and counts from there.
    """

    renewal: Renewal | None
    revision: int
    since: float
    at: float
    witnessed: bool = True

    def identity(self) -> tuple[str, int]:
        """Boot and revision of the renewal: a proof counts for one silence only."""
        return ("", 0) if self.renewal is None else (self.renewal.boot_id, self.revision)


@dataclass(frozen=True)
class ColdStart:
    """VMs that ran when all power was lost and do not run yet; ``since`` when this was noticed."""

    since: float
    vms: frozenset[str]


@dataclass(frozen=True)
class Memory:
    """What a manager carries from one reading to the next; each replica keeps its own.

    ``answering``: since when a host's agent has answered without a break. ``boots``: each host's
    boot when the cluster last ran anything. ``bare``: VM -> its epoch, and since when nothing runs
    of it although its record says so.
    """

    hosts: Mapping[str, Heard] = field(default_factory=dict)
    term: int = 0
    asked_at: float | None = None  # of the last reading; None: the store did not answer since
    isolations: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answering: Mapping[str, float] = field(default_factory=dict)
    boots: Mapping[str, str] = field(default_factory=dict)
    bare: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    cold: ColdStart | None = None


class Rung(StrEnum):
    """The fencing ladder, in its order; and before it the host's own word, when it can give it."""

    AGENT = "agent"
    STORAGE = "storage"
    DEADLINE = "deadline"
    POWER = "power"
    PERSON = "person"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A fencing step that was carried out, or still is. ``heard``: `Heard.identity` at that time.

    ``disks``: ids of the disks that confirmed (storage). ``vm`` is empty for power, which is a
    host's. An outcome that is not known is ``failed``. ``cut``: what the storage server calls it,
    for whoever takes it back; a cut that a server tells of has confirmed no disk by that.
    """

    host: str
    rung: Rung
    vm: str = ""
    heard: tuple[str, int] = ("", 0)
    outcome: Literal["running", "confirmed", "failed"]
    ended_at: float = 0.0
    disks: frozenset[str] = frozenset()
    reason: str = ""
    cut: str = ""


ProcessState = Literal["starting", "running", "frozen", "paused", "incoming", "postmigrate"]


@dataclass(frozen=True, kw_only=True)
class Process:
    """A QEMU that a host's agent answered to have. The answer is of this reading.

    ``epoch``: the one of its durable note, or the one it would get (``incoming``). ``driven``: a
    move's engine works on it. ``complete``: it holds the whole VM. ``released``: the source's agent
    said that its QEMU had ``completed`` and its gate is closed: it will not run there by itself.
    ``known``: its agent has its monitor; one that it has not is believed to run.
    """

    host: str
    epoch: int
    state: ProcessState
    migration: str = ""
    driven: bool = False
    complete: bool = False
    released: bool = False
    known: bool = True

    @property
    def live(self) -> bool:
        """Its vCPUs run, are about to, or are only held by the guard."""
        return self.state in ("starting", "running", "frozen")


@dataclass(frozen=True, kw_only=True)
class HostSeen:
    """A host. ``renewal_revision``: mod revision of its renewal key, 0 when there is none.

    ``answers``: its agent answered this manager just now, whatever the store says. ``listed``: and
    it said which QEMUs there are (`VmSeen.processes`). ``power``: a power device is configured.
    ``redirected``: volume -> the peer through which all its I/O goes. ``runs``: every VM of which
    it said that there is a QEMU, known here or not.
    """

    name: str
    boot_id: str = ""
    renewal: Renewal | None = None
    renewal_revision: int = 0
    agent: bool = True
    answers: bool = True
    listed: bool = True
    mark: HostMark | None = None
    confirmed_down: ConfirmedDown | None = None
    power: bool = False
    redirected: Mapping[str, str] = field(default_factory=dict)
    runs: frozenset[str] = frozenset()

    @property
    def guarded(self) -> bool:
        """Its last renewal is of the boot that its agent told of: no guard of before speaks."""
        return self.renewal is not None and self.renewal.boot_id == self.boot_id


@dataclass(frozen=True, kw_only=True)
class VmSeen:
    """A VM, its record, and the QEMUs that answering hosts have of it.

    ``ended``: why a record is ``stopped``. ``restarts``: wall-clock times of its failovers.
    ``refused``: hosts that could not start it, with the reason, since it last ran or a person asked
    to start it. ``busy``: a person's task works on it, other than the move that binds its record,
    which the agents carry out. ``deadline``: its guard keeps the deadline for it, as it was
    registered.
    """

    vm: Vm
    owner: Owner = field(default_factory=Owner)
    owner_revision: int = 0
    processes: tuple[Process, ...] = ()
    ended: Literal["", "guest", "user", "crash"] = ""
    restarts: tuple[float, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    busy: bool = False
    deadline: bool = True

    @property
    def name(self) -> str:
        """Of the VM."""
        return self.vm.name

    @property
    def wanted(self) -> bool:
        """The record says that it runs, or is about to."""
        return self.owner.state in (OwnerState.RUNNING, OwnerState.STARTING)

    def on(self, host: str | None) -> tuple[Process, ...]:
        """Its QEMUs on one host."""
        return tuple(process for process in self.processes if process.host == host)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything at once. ``uncuttable``: volume -> why no client of it can be cut off;
    ``unbound``: (volume, host) -> why this one cannot."""

    store: StoreSeen
    hosts: Mapping[str, HostSeen] = field(default_factory=dict)
    vms: Mapping[str, VmSeen] = field(default_factory=dict)
    volumes: Mapping[str, Volume] = field(default_factory=dict)
    uncuttable: Mapping[str, str] = field(default_factory=dict)
    unbound: Mapping[tuple[str, str], str] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    heard: Memory = field(default_factory=Memory)
    wall: float = 0.0  # the wall clock: for counts an hour long, never for proof
    timings: Timings = field(default_factory=Timings)

    def owned_by(self, host: str) -> tuple[VmSeen, ...]:
        """The VMs that run there by their record, by name."""
        found = (self.vms[name] for name in sorted(self.vms))
        return tuple(vm for vm in found if vm.wanted and vm.owner.host == host)

    def identity(self, host: str) -> tuple[str, int]:
        """Of the last renewal heard of a host."""
        heard = self.heard.hosts.get(host)
        return ("", 0) if heard is None else heard.identity()

    def silence(self, host: str) -> float:
        """Seconds without a change of the host's renewal, as far as they count."""
        heard, read = self.heard.hosts.get(host), self.heard.asked_at
        return 0.0 if heard is None or read is None else max(0.0, read - heard.since)

    def unheard(self, host: str) -> float:
        """The same with the time that does not count: for people, never for proof."""
        heard, read = self.heard.hosts.get(host), self.heard.asked_at
        return 0.0 if heard is None or read is None else max(0.0, read - heard.at)
