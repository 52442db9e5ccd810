"""Small models of what runs on a host: the guard with its deadline, the agent, the supervisor.

The guard follows ``cluster.md``: renew every 3 s; at 8 s after the send time of the last answered
renewal freeze the highly available VMs; at 10 s the watchdog resets the host if that did not take;
thaw once renewed, if owner and epoch are unchanged, otherwise end them; "no leader", said by a
majority of the store's members, counts as a renewal. The agent freezes when the guard is silent.
``freezer`` False: what is done to a QEMU does not take, neither freeze nor kill.
"""

from __future__ import annotations

from collections.abc import Callable

from sim_world import BOOT_S, LEASE_S, STARTS_S, Daemon, Host, Qemu, World

from godwit.model import ownership
from godwit.model.membership import Renewal
from godwit.model.ownership import OwnerState

RENEW_S, RETRY_S, FREEZE_S, RESET_S, LEFT_S = 3.0, 0.5, 8.0, 10.0, 5.0
RESTART_S = 1.0  # a dead daemon is back
HUNG_S = 2.0  # a frozen one is killed


class Guards:
    """All guards, and the watchdogs they feed."""

    def __init__(self, world: World) -> None:
        self.world = world

    def begin(self, host: Host) -> None:
        """The first renewal of a boot, or of a guard that was started again."""
        self.look(host)
        self._renew(host, host.boots)

    def look(self, host: Host) -> None:
        """A guard that comes to itself looks at the clock first."""
        if host.age(self.world.now) >= FREEZE_S:
            self._deadline(host, host.renewed)

    def _renew(self, host: Host, boot: int) -> None:
        world, store = self.world, self.world.store
        if host.boots != boot or not host.powered or host.guard.state == "dead":
            return
        if host.frozen or not host.guard.alive:
            world.at(RETRY_S, lambda: self._renew(host, boot))
            return
        sent = world.now
        if store.latency < RENEW_S and world.usable(host.name):
            world.at(store.latency, lambda: self._answered(host, boot, sent))
            return
        if world.says_no_leader(host.name):
            self._kept(host, sent)
        world.at(RETRY_S, lambda: self._renew(host, boot))

    def _answered(self, host: Host, boot: int, sent: float) -> None:
        world, store = self.world, self.world.store
        works = host.works and host.guard.alive and host.boots == boot
        if not works or not world.usable(host.name):
            world.at(RETRY_S, lambda: self._renew(host, boot))
            return
        host.numbers += 1
        armed = "armed" if host.freezer else "unarmed"
        renewal = Renewal(
            boot_id=host.boot_id, number=host.numbers, guard=armed, watchdog=host.watchdog
        )
        store.renewals[host.name] = (renewal, store.touch())
        store.leases[host.name] = world.now + LEASE_S
        self._kept(host, sent)
        self._thaw(host)
        world.at(max(0.0, sent + RENEW_S - world.now), lambda: self._renew(host, boot))

    def _kept(self, host: Host, sent: float) -> None:
        """From ``sent`` the deadline runs anew."""
        host.renewed = sent
        for age, what in ((FREEZE_S, self._deadline), (RESET_S, self._reset)):
            wait = max(0.0, age / host.rate - (self.world.now - sent))
            self.world.at(wait, lambda what=what: what(host, sent))

    def _covered(self, host: Host) -> list[Qemu]:
        """The running VMs for which the deadline is kept. A page source is nobody's to freeze."""
        return [
            q
            for q in self.world.on(host)
            if q.state in ("running", "starting") and self.world.vms[q.vm].ha
        ]

    def _deadline(self, host: Host, sent: float) -> None:
        if host.renewed != sent or not host.works:
            return
        if not host.guard.alive:
            self._alone(host)
            return
        if not host.freezer:
            return
        for qemu in self._covered(host):
            if qemu.state == "starting":
                self.world.end(qemu, "the deadline came before it ran")
                continue
            qemu.state = "frozen"
            self.world.say(f"{host.name}: its guard freezes {qemu.vm}")

    def _alone(self, host: Host) -> None:
        """A guard that is silent at the deadline: its agent freezes what is highly available."""
        if host.agent.alive and host.freezer:
            for qemu in self._covered(host):
                qemu.state = "frozen"
                self.world.say(f"{host.name}: its agent freezes {qemu.vm}, the guard is silent")

    def _reset(self, host: Host, sent: float) -> None:
        """The watchdog fires when the guard did not say in time that everything stands still."""
        if host.renewed != sent or not host.powered or not host.watchdog:
            return
        frozen = [q for q in self.world.on(host) if q.state == "frozen"]
        fed = host.works and host.guard.state != "frozen" and not host.guard.held
        if self._covered(host) or (frozen and not fed):
            power_off(self.world, host, "its watchdog resets it")
            self.world.at(0.0, lambda: power_on(self.world, host, self))

    def _thaw(self, host: Host) -> None:
        """The renewal came first: who takes over after it has seen it changed."""
        for qemu in [q for q in self.world.on(host) if q.state == "frozen"]:
            owner = self.world.owner(qemu.vm)
            if (owner.host, owner.epoch) == (host.name, qemu.epoch):
                self.world.say(f"{host.name}: its guard thaws {qemu.vm}")
                self.world.runs(qemu)
            else:
                self.world.end(qemu, "the record moved while it was frozen")


def power_off(world: World, host: Host, why: str, *, fault: bool = True) -> None:
    """Everything on the host ends at once."""
    world.say(f"{host.name}: off, {why}")
    host.powered, host.frozen, host.booting = False, False, False
    for qemu in world.on(host):
        world.end(qemu, "the host is off", fault=fault)
    world.elect()


def power_on(world: World, host: Host, guards: Guards) -> None:
    """Boot: guard, agent and manager come up with a new boot id."""
    if host.powered:
        return
    host.powered, host.booting = True, True
    host.boots += 1
    boot = host.boots

    def up() -> None:
        if host.boots != boot or not host.powered:
            return
        host.booting = False
        host.told_boot = host.boot_id
        host.renewed = world.now
        host.numbers = 0
        host.guard, host.agent = Daemon(), Daemon()
        if host.manager is not None:
            host.manager = Daemon(since=world.now)
        world.say(f"{host.name}: up again as {host.boot_id}")
        world.elect()
        guards.begin(host)
        world.reacts()

    world.at(BOOT_S, up)


class Agents:
    """All agents: they start, end, and tidy up by the record."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.local: dict[str, int] = {}  # restarts of a dead QEMU by its own host
        self.take_up: Callable[[str], None] = lambda _vm: None  # a move whose engine broke

    def answers(self, host: Host, asker: str) -> bool:
        """A node gets an answer from a host's agent."""
        return host.works and host.agent.alive and self.world.reach(asker, host.name)

    def start(self, host: Host, vm: str, epoch: int) -> None:
        """Asked to start what the record says; refused without a lease that lasts."""
        world = self.world
        if not host.works or not host.agent.alive or world.on(host, vm):
            return
        if not self._may_run(host, vm, epoch):
            return
        if vm in host.cannot_start:
            world.store.refused.setdefault(vm, {})[host.name] = "QEMU does not start"
            world.say(f"{host.name}: {vm} cannot be started: QEMU does not start")
            return
        qemu = Qemu(vm=vm, host=host, epoch=epoch)
        world.qemus.append(qemu)
        world.at(STARTS_S, lambda: self._started(qemu))

    def _may_run(self, host: Host, vm: str, epoch: int) -> bool:
        world = self.world
        owner = world.owner(vm)
        left = LEASE_S - host.age(world.now)
        return (
            world.usable(host.name)
            and (owner.host, owner.epoch) == (host.name, epoch)
            and left >= LEFT_S
        )

    def _started(self, qemu: Qemu) -> None:
        world = self.world
        if qemu not in world.qemus:
            return
        if not qemu.host.works or not qemu.host.agent.alive:
            world.at(0.5, lambda: self._started(qemu))
            return
        if not self._may_run(qemu.host, qemu.vm, qemu.epoch):
            world.end(qemu, "the record or the lease does not allow it to run", fault=True)
            return
        world.runs(qemu)
        world.store.put_owner(qemu.vm, ownership.running(world.owner(qemu.vm)))

    def tidy(self, host: Host) -> None:
        """Once a second: copies that no record names are ended, a swapped one is run."""
        world = self.world
        if not host.works or not host.agent.alive or not world.usable(host.name):
            return
        for qemu in world.on(host):
            self.judge(qemu)

    def judge(self, qemu: Qemu) -> None:
        """What the record says of one process; a frozen one is its guard's."""
        world, host = self.world, qemu.host
        if qemu not in world.qemus or qemu.state == "frozen":
            return
        owner = world.owner(qemu.vm)
        move = owner.migration
        mine = (owner.host, owner.epoch) == (host.name, qemu.epoch)
        if mine and owner.state in (OwnerState.RUNNING, OwnerState.STARTING):
            takes = qemu.state == "incoming" and qemu.complete
            if takes and self._may_run(host, qemu.vm, qemu.epoch):
                qemu.driven, qemu.migration = False, ""  # it is the agent's own from here
                world.runs(qemu)
            return
        bound = (move.source, move.destination) if move is not None else ()
        quiet = qemu.state != "running" or qemu.driven
        if move is not None and host.name in bound and qemu.migration == move.id and quiet:
            return
        world.end(qemu, "the record does not name it")

    def died(self, vm: str, host: Host) -> None:
        """A QEMU ended by itself; its own host starts it again, at most three times an hour."""
        world = self.world
        if not host.works or not host.agent.alive or not world.usable(host.name):
            return
        owner = world.owner(vm)
        if owner.host != host.name or owner.state is not OwnerState.RUNNING or world.on(host, vm):
            return
        if owner.migration is not None:
            owner = owner.but(migration=None)
        if world.vms[vm].ha and self.local.get(vm, 0) < 3:
            self.local[vm] = self.local.get(vm, 0) + 1
            world.store.put_owner(vm, ownership.fail_over(owner, host=host.name))
            self.start(host, vm, owner.epoch + 1)
            return
        world.store.put_owner(vm, ownership.stopped(owner))
        world.store.ended[vm] = "crash"


class Supervisor:
    """Dead daemons are started again, hung ones killed first; only the guard and agent models need
    to know that they are new."""

    def __init__(self, world: World, guards: Guards) -> None:
        self.world = world
        self.guards = guards

    def strike(self, host: Host, which: str, state: str, *, held: bool = False) -> None:
        """Kill or freeze a daemon; ``held``: it does not come back by itself."""
        daemon = self._daemon(host, which)
        daemon.state, daemon.held = state, held
        if not held:
            self.world.at(
                RESTART_S if state == "dead" else HUNG_S + RESTART_S,
                lambda: self.back(host, which, daemon),
            )

    def back(self, host: Host, which: str, daemon: Daemon) -> None:
        """The daemon runs again, as a new process."""
        if self._daemon(host, which) is not daemon or daemon.state == "alive":
            return
        if not host.works:
            self.world.at(0.5, lambda: self.back(host, which, daemon))
            return
        daemon.state, daemon.held, daemon.since = "alive", False, self.world.now
        if which == "guard":
            self.guards.begin(host)
        self.world.reacts()

    @staticmethod
    def _daemon(host: Host, which: str) -> Daemon:
        found = {"guard": host.guard, "agent": host.agent, "manager": host.manager}[which]
        assert found is not None
        return found
