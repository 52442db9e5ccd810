"""The ground truth of a simulated cluster in virtual time: hosts, networks, the store, QEMUs.

What is simulated is the world, never a decision: who may act, when and why comes from
``godwit.cluster`` and ``godwit.model.ownership``. Time is true time in seconds; each host has a
monotonic clock of its own, which may run faster or slower, and a wall clock that may jump.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from godwit.cluster.facts import Member
from godwit.model.host import ConfirmedDown
from godwit.model.marks import HostMark
from godwit.model.membership import Renewal
from godwit.model.ownership import Owner, OwnerState
from godwit.model.rules import Rules
from godwit.model.vm import Disk, Pins, Vm
from godwit.model.volume import Volume

BOOT_S = 20.0  # from power to a running guard and agent
ELECTION_S = 1.5
NO_LEADER_S = 1.0  # members say "no leader" after their election timeout
LEASE_S = 12.0
STARTS_S = 0.5  # a QEMU, from the request to running vCPUs


class Violation(AssertionError):
    """An invariant does not hold: the decisions, or the model of the guard, are wrong."""


@dataclass(eq=False)
class Qemu:
    """One process. ``cut``: its disks do not reach it any more."""

    vm: str
    host: Host
    epoch: int
    state: str = "starting"
    migration: str = ""
    driven: bool = False
    complete: bool = False
    released: bool = False
    cut: bool = False

    @property
    def could_write(self) -> bool:
        """It runs and reaches its disks, now or as soon as its host is thawed."""
        return self.state == "running" and self.host.powered and not self.cut


@dataclass(eq=False)
class Daemon:
    """A guard, an agent or a manager. ``held``: its supervisor does not bring it back."""

    state: str = "alive"  # alive, frozen, dead
    held: bool = False
    since: float = 0.0  # when this process was born

    @property
    def alive(self) -> bool:
        """It runs."""
        return self.state == "alive"


@dataclass(eq=False)
class Host:
    """A host and what is plugged into it."""

    name: str
    powered: bool = True
    frozen: bool = False
    booting: bool = False
    boots: int = 1
    memory: int = 8
    watchdog: bool = True
    freezer: bool = True
    bmc: bool = False
    bmc_answers: bool = True
    rate: float = 1.0
    wall: float = 0.0
    links: set[str] = field(default_factory=lambda: {"management", "storage", "migration"})
    guard: Daemon = field(default_factory=Daemon)
    agent: Daemon = field(default_factory=Daemon)
    manager: Daemon | None = None
    renewed: float = 0.0  # true time at which the last answered renewal was sent
    numbers: int = 0
    told_boot: str = ""  # by its agent, in the store; empty: the first
    cannot_start: set[str] = field(default_factory=set)
    cannot_end: bool = False

    @property
    def boot_id(self) -> str:
        """Of the boot that runs, or ran last."""
        return f"{self.name}-boot{self.boots}"

    @property
    def works(self) -> bool:
        """Something runs there."""
        return self.powered and not self.frozen and not self.booting

    def age(self, now: float) -> float:
        """Seconds since the last answered renewal, on the host's own clock."""
        return (now - self.renewed) * self.rate


@dataclass
class Store:
    """Records with revisions, leases by host, members with a leader."""

    members: dict[str, str] = field(default_factory=dict)  # name -> host; "" is a witness
    down: set[str] = field(default_factory=set)
    leader: str = ""
    term: int = 1
    leaderless: float | None = None
    latency: float = 0.02
    embedded: bool = False
    revision: int = 1
    owners: dict[str, tuple[Owner, int]] = field(default_factory=dict)
    renewals: dict[str, tuple[Renewal, int]] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    agents: dict[str, float] = field(default_factory=dict)
    marks: dict[str, HostMark] = field(default_factory=dict)
    words: dict[str, ConfirmedDown] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    restarts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    chief: tuple[str, float] = ("", 0.0)  # the leading manager's session, its lease's end

    def touch(self) -> int:
        """A new revision."""
        self.revision += 1
        return self.revision

    def put_owner(self, vm: str, owner: Owner) -> None:
        """Write a record; epochs only rise."""
        before = self.owners.get(vm, (Owner(), 0))[0]
        if owner.epoch < before.epoch:
            raise Violation(f"the epoch of {vm} went from {before.epoch} to {owner.epoch}")
        self.owners[vm] = (owner, self.touch())


class World:
    """Everything that exists, and the queue of what happens next."""

    def __init__(self) -> None:
        self.now = 0.0
        self.hosts: dict[str, Host] = {}
        self.store = Store()
        self.vms: dict[str, Vm] = {}
        self.volumes: dict[str, Volume] = {}
        self.uncuttable: dict[str, str] = {}
        self.qemus: list[Qemu] = []
        self.lines: list[str] = []
        self.apart: dict[str, int] = {}  # partitions of the management network
        self.storage_server = True
        self.stalled = False
        self.deaf: set[str] = set()  # hosts that the store does not let in
        self.outsiders: set[str] = set()  # machines that are no hosts of the cluster
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.reacts: Callable[[], None] = lambda: None

    # --- time

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._queue, (self.now + delay, next(self._numbers), action))

    def run(self, until: float) -> None:
        """Let everything happen up to a time; invariants are judged after each event."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action = heapq.heappop(self._queue)
            action()
            self.judge()
        self.now = until

    def say(self, text: str) -> None:
        """A line of the log, once per instant."""
        line = f"{self.now:7.2f}  {text}"
        if not self.lines or self.lines[-1] != line:
            self.lines.append(line)

    # --- networks

    def reach(self, one: str, other: str, link: str = "management") -> bool:
        """Whether two nodes hear each other; a witness is a node that never fails by itself."""
        if link == "management" and self.apart.get(one, 0) != self.apart.get(other, 0):
            return False
        return one == other or (self._linked(one, link) and self._linked(other, link))

    def _linked(self, node: str, link: str) -> bool:
        host = self.hosts.get(node)
        return host is None or (host.works and link in host.links)

    def node(self, member: str) -> str:
        """Where a member of the store runs."""
        return self.store.members[member] or member

    # --- the store

    def healthy(self, member: str) -> bool:
        """A member that runs."""
        host = self.hosts.get(self.node(member))
        return member not in self.store.down and (host is None or host.works)

    def sees_majority(self, member: str) -> bool:
        """It and those it reaches are more than half."""
        if not self.healthy(member):
            return False
        seen = sum(
            self.healthy(other) and self.reach(self.node(member), self.node(other))
            for other in self.store.members
        )
        return seen > len(self.store.members) // 2

    def elect(self) -> None:
        """A leader that lost its majority leads no more; another follows after a while."""
        store = self.store
        if store.leader and self.sees_majority(store.leader) and not self.stalled:
            return
        if store.leader:
            self.say(f"store: {store.leader} leads no more")
            store.leader, store.leaderless = "", self.now
            self.at(ELECTION_S, self._election)

    def _election(self) -> None:
        store = self.store
        if store.leader:
            return
        able = [name for name in sorted(store.members) if self.sees_majority(name)]
        if not able or self.stalled:
            self.at(0.5, self._election)
            return
        store.leader, store.term, store.leaderless = able[0], store.term + 1, None
        # A new leader of etcd gives every lease its whole length again.
        for leases in (store.leases, store.agents):
            for host in leases:
                leases[host] = self.now + LEASE_S
        self.say(f"store: {store.leader} leads, term {store.term}")

    def usable(self, node: str) -> bool:
        """A linearizable operation from this node would be answered."""
        store = self.store
        if not store.leader or node in self.deaf:
            return False
        leads = self.node(store.leader)
        return any(
            self.healthy(m)
            and self.reach(node, self.node(m))
            and (m == store.leader or self.reach(self.node(m), leads))
            for m in store.members
        )

    def says_no_leader(self, node: str) -> bool:
        """A majority of the members answers this node that there is no leader."""
        store = self.store
        if (
            node in self.deaf
            or store.leaderless is None
            or self.now - store.leaderless < NO_LEADER_S
        ):
            # With a leader, members that are cut off from it say so too: never a majority.
            return False
        answers = sum(self.healthy(m) and self.reach(node, self.node(m)) for m in store.members)
        return answers > len(store.members) // 2

    def expire(self) -> None:
        """Leases that ran out take their keys along, while there is a leader."""
        store = self.store
        if not store.leader:
            return
        for host, end in list(store.leases.items()):
            if end <= self.now:
                del store.leases[host]  # the renewal stays: the last word that came of it
                store.touch()
        for host, end in list(store.agents.items()):
            if end <= self.now:
                del store.agents[host]

    def members(self) -> tuple[Member, ...]:
        """As a manager sees them."""
        return tuple(
            Member(name=name, host=host, healthy=self.healthy(name))
            for name, host in sorted(self.store.members.items())
        )

    # --- QEMUs

    def owner(self, vm: str) -> Owner:
        """The record as it is."""
        return self.store.owners[vm][0]

    def on(self, host: Host, vm: str | None = None) -> list[Qemu]:
        """The processes of a host."""
        return [q for q in self.qemus if q.host is host and vm in (None, q.vm)]

    def runs(self, qemu: Qemu) -> None:
        """Its vCPUs run from here; the record has to say so."""
        owner = self.owner(qemu.vm)
        if (owner.host, owner.epoch) != (qemu.host.name, qemu.epoch):
            raise Violation(f"{qemu.vm} runs on {qemu.host.name} at {qemu.epoch}: not the record")
        qemu.state = "running"
        self.store.refused.pop(qemu.vm, None)
        self.say(f"{qemu.host.name}: {qemu.vm} runs at epoch {qemu.epoch}")

    def end(self, qemu: Qemu, why: str, *, fault: bool = False) -> None:
        """A process is gone. Who is not highly available is ended by nobody but a fault."""
        if qemu not in self.qemus:
            return
        owner = self.owner(qemu.vm)
        mine = (owner.host, owner.epoch) == (qemu.host.name, qemu.epoch)
        wanted = owner.state in (OwnerState.RUNNING, OwnerState.STARTING)
        if mine and wanted and not fault and not self.vms[qemu.vm].ha:
            raise Violation(f"{qemu.vm} is not highly available and was ended: {why}")
        self.qemus.remove(qemu)
        self.say(f"{qemu.host.name}: {qemu.vm} at epoch {qemu.epoch} ends, {why}")

    def judge(self) -> None:
        """Never two running intervals of one VM overlap, of those that reach a disk."""
        seen: dict[str, Qemu] = {}
        for qemu in self.qemus:
            if qemu.could_write and not qemu.host.frozen:
                other = seen.setdefault(qemu.vm, qemu)
                if other is not qemu:
                    raise Violation(
                        f"{self.now:.2f}: {qemu.vm} runs on {other.host.name} at {other.epoch} "
                        f"and on {qemu.host.name} at {qemu.epoch}"
                    )

    def prove(self, vm: str) -> None:
        """Before it gets a new epoch to run at: nothing of it runs, or could when thawed."""
        for qemu in self.qemus:
            if qemu.vm == vm and qemu.could_write:
                raise Violation(
                    f"{self.now:.2f}: {vm} is taken over while it runs on {qemu.host.name}"
                )

    def running(self, vm: str) -> Iterator[Qemu]:
        """What runs of a VM."""
        return (q for q in self.qemus if q.vm == vm and q.could_write and not q.host.frozen)


def make_vm(
    name: str,
    *,
    ha: bool,
    memory: int,
    volume: str,
    rules: Rules,
    local: bool = False,
    source: str = "image",
) -> Vm:
    """A definition as the cluster would have it; ``volume`` empty: no disk at all."""
    disks: tuple[Disk, ...] = ()
    if volume or source == "device":
        place = "" if source == "device" else volume
        disks = (
            Disk(
                id="root",
                volume=place,
                path=f"/clusterstorage/{volume}/{name}",
                size_bytes=1 << 30,
                format="raw",
                source="device" if source == "device" else "image",
                serial=name,
                lun=0,
                local=local,
            ),
        )
    return Vm(
        name=name,
        cpus=1,
        memory_bytes=memory << 30,
        disks=disks,
        ha=ha,
        rules=rules,
        pins=Pins(uuid=name, machine="pc-q35-10.0", cpu_model="qemu64-v1", accelerator="tcg"),
        created_at=0.0,
    )
