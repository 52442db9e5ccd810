"""Scenario files: what there is, a script of faults, and the log that is expected.

    claim: what this shows, in one line
    hosts: 3
    vm web on host1 ha priority=80
    script:
    10 lose-power host1
    end 60
    log:
      ...

Words of a scenario are listed in `Setup`, words of a script in `Script`. ``python sim_scenario.py
--write FILE...`` writes the log that comes out; read it before it is committed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from sim_daemons import Agents, Guards, Supervisor, power_off, power_on  # noqa: E402
from sim_managers import Manager  # noqa: E402
from sim_transfers import Transfers  # noqa: E402
from sim_world import Daemon, Host, Qemu, World, make_vm  # noqa: E402

from godwit.model import ownership  # noqa: E402
from godwit.model.host import ConfirmedDown  # noqa: E402
from godwit.model.marks import HostMark  # noqa: E402
from godwit.model.ownership import Owner, OwnerState  # noqa: E402
from godwit.model.rules import Rules  # noqa: E402
from godwit.model.volume import Volume  # noqa: E402

FOLDER = HERE / "scenarios"


@dataclass
class Scenario:
    """A file, taken apart."""

    name: str
    claim: str = ""
    setup: list[str] = field(default_factory=list)
    script: list[str] = field(default_factory=list)
    log: str = ""

    @staticmethod
    def parse(name: str, text: str) -> Scenario:
        """Sections in their order; ``log:`` may be missing in a new file."""
        head, _, log = text.partition("\nlog:\n")
        head, _, script = head.partition("\nscript:\n")
        claim, *setup = head.splitlines()
        return Scenario(
            name=name,
            claim=claim.removeprefix("claim: "),
            setup=[line for line in setup if line.strip()],
            script=[line for line in script.splitlines() if line.strip()],
            log=log,
        )

    def text(self, log: str) -> str:
        """The file with another log."""
        head = [f"claim: {self.claim}", *self.setup, "script:", *self.script, "log:"]
        return "\n".join(head) + "\n" + log


class Cluster:
    """A world with everything that runs in it."""

    def __init__(self) -> None:
        self.world = World()
        self.guards = Guards(self.world)
        self.agents = Agents(self.world)
        self.transfers = Transfers(self.world, self.agents)
        self.supervisor = Supervisor(self.world, self.guards)
        self.managers: list[Manager] = []
        self.world.reacts = self._react

    def _react(self) -> None:
        for manager in self.managers:
            manager.cycle()

    def begin(self) -> None:
        """Everything is up, every VM that is to run runs."""
        world, store = self.world, self.world.store
        for index, host in enumerate(world.hosts.values()):
            if host.name in world.outsiders:
                continue
            store.leases[host.name] = store.agents[host.name] = 12.0
            world.at(0.1 * index, lambda host=host: self.guards.begin(host))
            world.at(0.1 * index, lambda host=host: self._agent(host))
        store.leader = store.leader or sorted(store.members)[0]
        for index, host in enumerate(h for h in world.hosts.values() if h.manager is not None):
            manager = Manager(world, host, self.agents, self.guards)
            self.managers.append(manager)
            world.at(0.2 + 0.15 * index, manager.forever)

    def _agent(self, host: Host) -> None:
        """Its key in the store, and tidying, once a second."""
        world = self.world
        if host.works and host.agent.alive and world.usable(host.name):
            world.store.agents[host.name] = world.now + 12.0
            self.agents.tidy(host)
        world.at(1.0, lambda: self._agent(host))


class Setup:
    """Reads the lines above the script."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world

    def read(self, lines: list[str]) -> None:
        """All of them; hosts come first."""
        for line in lines:
            word, _, rest = line.partition(" ")
            getattr(self, "_" + word.rstrip(":").replace("-", "_"))(rest.split())
        world = self.world
        if not world.store.members:
            self._store(sorted(world.hosts)[:3])
        if not any(host.manager for host in world.hosts.values()):
            self._managers([h for h in sorted(world.hosts) if h not in world.outsiders][:3])
        world.volumes.setdefault("shared", Volume(name="shared"))

    def _hosts(self, words: list[str]) -> None:
        for number in range(1, int(words[0]) + 1):
            name = f"host{number}"
            self.world.hosts[name] = Host(name=name)

    def _machine(self, words: list[str]) -> None:
        """A machine beside the hosts, for a manager."""
        self.world.hosts[words[0]] = Host(name=words[0], watchdog=False)
        self.world.outsiders.add(words[0])

    def _store(self, words: list[str]) -> None:
        """Members by host; another name is a witness; ``embedded HOST``."""
        store = self.world.store
        if words[0] == "embedded":
            store.embedded, words = True, words[1:]
        for word in words:
            store.members[f"etcd-{word}"] = word if word in self.world.hosts else ""

    def _managers(self, words: list[str]) -> None:
        for word in words:
            self.world.hosts[word].manager = Daemon()

    def _without(self, words: list[str]) -> None:
        """``without watchdog|freezer host1 ...|all``."""
        for host in self._some(words[1:]):
            setattr(host, words[0], False)

    def _with(self, words: list[str]) -> None:
        """``with bmc host1 ...|all``."""
        for host in self._some(words[1:]):
            setattr(host, words[0], True)

    def _some(self, words: list[str]) -> list[Host]:
        if words == ["all"]:
            return list(self.world.hosts.values())
        return [self.world.hosts[word] for word in words]

    def _memory(self, words: list[str]) -> None:
        for word in words:
            name, _, size = word.partition("=")
            self.world.hosts[name].memory = int(size)

    def _clock(self, words: list[str]) -> None:
        """``clock host1 1.05``: a monotonic clock that runs faster."""
        self.world.hosts[words[0]].rate = float(words[1])

    def _cannot_start(self, words: list[str]) -> None:
        self.world.hosts[words[0]].cannot_start.update(words[1:])

    def _cannot_end(self, words: list[str]) -> None:
        """Its QEMUs hang in the kernel: no signal ends them."""
        self.world.hosts[words[0]].cannot_end = True

    def _store_latency(self, words: list[str]) -> None:
        self.world.store.latency = float(words[0])

    def _volume(self, words: list[str]) -> None:
        """``volume shared nfs [uncuttable]``."""
        name, kind = words[:2]
        self.world.volumes[name] = Volume(name=name, kind=kind)  # type: ignore[arg-type]
        if words[2:]:
            self.world.uncuttable[name] = f"the server of {name} cannot cut a client off"

    def _mark(self, words: list[str]) -> None:
        mark = HostMark(state=words[1], since=0.0)  # type: ignore[arg-type]
        self.world.store.marks[words[0]] = mark

    def _vm(self, words: list[str]) -> None:
        """``vm NAME on HOST [stopped|paused|saved] [ha] [key=value ...]``."""
        name, _, where, *rest = words
        given = dict(word.split("=") for word in rest if "=" in word)
        flags = {word for word in rest if "=" not in word}
        rules = Rules(
            priority=int(given.get("priority", 50)),
            order=int(given.get("order", 0)),
            apart=tuple(filter(None, given.get("apart", "").split(","))),
            hosts=tuple(filter(None, given.get("hosts", "").split(","))),
            restarts=int(given.get("restarts", 3)),
            autostart="autostart" in flags,
            on_shutdown="restart" if "restarts-on-shutdown" in flags else "stop",
        )
        self.world.vms[name] = make_vm(
            name,
            ha="ha" in flags,
            memory=int(given.get("memory", 1)),
            volume=given.get("volume", "shared"),
            rules=rules,
            local="local" in flags,
            source="device" if "device" in flags else "image",
        )
        state = next((OwnerState(w) for w in ("stopped", "saved") if w in flags), None)
        owner = Owner(host=where, epoch=1, state=state or OwnerState.RUNNING)
        self.world.store.put_owner(name, owner)
        if state is None:
            host = self.world.hosts[where]
            self.world.qemus.append(Qemu(vm=name, host=host, epoch=1, state="running"))


class Script:
    """The words of a script, each a fault or a wish."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.world = cluster.world

    def read(self, lines: list[str]) -> float:
        """Schedule all lines; the time of ``end``."""
        end = 60.0
        for line in lines:
            first, *words = line.split()
            if first == "end":
                end = float(words[0])
                continue
            self.world.at(float(first), lambda words=words: self._do(words))
        return end

    def _do(self, words: list[str]) -> None:
        self.world.say(f"-- {' '.join(words)}")
        getattr(self, "do_" + words[0].replace("-", "_"))(*words[1:])
        self.world.elect()
        self.world.reacts()

    def do_lose_power(self, *names: str) -> None:
        """At the wall: the power device of the host is dark as well."""
        for name in names:
            self.world.hosts[name].bmc_answers = False
            power_off(self.world, self.world.hosts[name], "its power is lost")

    def do_switch_off(self, *names: str) -> None:
        """The host alone: its power device still answers."""
        for name in names:
            power_off(self.world, self.world.hosts[name], "switched off")

    def do_power_on(self, *names: str) -> None:
        """Boot."""
        for name in names:
            self.world.hosts[name].bmc_answers = True
            power_on(self.world, self.world.hosts[name], self.cluster.guards)

    def do_freeze(self, name: str) -> None:
        """The whole host stands still; its watchdog, which is no part of it, does not."""
        host = self.world.hosts[name]
        host.frozen = True
        self.world.at(12.0, lambda: self._fires(host))

    def _fires(self, host: Host) -> None:
        stands = [q for q in self.world.on(host) if self.world.vms[q.vm].ha]
        if host.frozen and host.powered and host.watchdog and stands:
            power_off(self.world, host, "its watchdog resets it")
            power_on(self.world, host, self.cluster.guards)

    def do_thaw(self, name: str) -> None:
        """It goes on where it stood."""
        host = self.world.hosts[name]
        host.frozen = False
        self.world.at(0.05, lambda: self.cluster.guards.look(host))

    def do_cut(self, name: str, *links: str) -> None:
        """Cables: management, storage, migration."""
        self.world.hosts[name].links -= set(links)

    def do_join(self, name: str, *links: str) -> None:
        """The cables again."""
        self.world.hosts[name].links |= set(links)

    def do_split(self, *names: str) -> None:
        """The management network falls apart: these, and all others."""
        self.world.apart = dict.fromkeys(names, 1)

    def do_heal(self) -> None:
        """One management network again."""
        self.world.apart = {}

    def do_kill(self, which: str, name: str) -> None:
        """``kill guard|agent|manager|etcd|qemu``; daemons are back in a second."""
        self._strike(which, name, "dead")

    def do_lose(self, which: str, name: str) -> None:
        """The same, and nobody brings it back."""
        self._strike(which, name, "dead", held=True)

    def do_hang(self, which: str, name: str) -> None:
        """Frozen: its supervisor needs two seconds to see it."""
        self._strike(which, name, "frozen")

    def do_hold(self, which: str, name: str) -> None:
        """Frozen, and its supervisor does not see it."""
        self._strike(which, name, "frozen", held=True)

    def do_wake(self, which: str, name: str) -> None:
        """A daemon that was held goes on where it stood."""
        host = self.world.hosts[name]
        daemon = getattr(host, which)
        daemon.state = "alive"
        if which == "guard":
            self.cluster.guards.look(host)

    def _strike(self, which: str, name: str, state: str, *, held: bool = False) -> None:
        world = self.world
        if which == "etcd":
            world.store.down.add(f"etcd-{name}")
        elif which == "qemu":
            for qemu in [q for q in world.qemus if q.vm == name and q.could_write]:
                world.end(qemu, "killed", fault=True)
                world.at(0.1, lambda host=qemu.host: self.cluster.agents.died(name, host))
        else:
            self.cluster.supervisor.strike(world.hosts[name], which, state, held=held)

    def do_mend(self, which: str, name: str) -> None:
        """``mend etcd|guard|agent|manager|bmc|storage|qemu``: it works again."""
        world = self.world
        if which == "etcd":
            world.store.down.discard(f"etcd-{name}")
        elif which == "bmc":
            world.hosts[name].bmc_answers = True
        elif which == "storage":
            world.storage_server = True
        elif which == "start":
            world.hosts[name].cannot_start.clear()
        else:
            host = world.hosts[name]
            daemon = getattr(host, which)
            self.cluster.supervisor.back(host, which, daemon)

    def do_break(self, which: str, name: str) -> None:
        """``break bmc|storage|freezer``."""
        if which == "bmc":
            self.world.hosts[name].bmc_answers = False
        elif which == "freezer":
            self.world.hosts[name].freezer = False
        else:
            self.world.storage_server = False

    def do_stall_elections(self) -> None:
        """The store's members live and answer, and elect nobody: their disks are too slow."""
        self.world.stalled = True

    def do_elect(self) -> None:
        """They elect again."""
        self.world.stalled = False

    def do_slow_store(self, seconds: str) -> None:
        """Every answer takes so long."""
        self.world.store.latency = float(seconds)

    def do_wall(self, name: str, seconds: str) -> None:
        """A wall clock jumps."""
        self.world.hosts[name].wall += float(seconds)

    def do_deaf(self, name: str) -> None:
        """The store does not let this host in, as with a certificate that ran out."""
        self.world.deaf.add(name)

    def do_hearing(self, name: str) -> None:
        """It does again."""
        self.world.deaf.discard(name)

    def do_confirm_down(self, name: str) -> None:
        """A person's word about the boot that the store knows."""
        store = self.world.store
        boot = self.world.hosts[name].boot_id
        store.words[name] = ConfirmedDown(boot_id=boot, time=self.world.now, by="ann")

    def do_mark(self, name: str, state: str) -> None:
        """draining, maintenance, quarantined."""
        mark = HostMark(state=state, since=self.world.now)  # type: ignore[arg-type]
        self.world.store.marks[name] = mark

    def do_unmark(self, name: str) -> None:
        """The host takes VMs again."""
        self.world.store.marks.pop(name, None)

    def do_shutdown(self, vm: str) -> None:
        """The guest shuts itself down."""
        self._stop(vm, "guest", "its guest shut down")

    def do_stop(self, vm: str) -> None:
        """A person stops the VM."""
        self._stop(vm, "user", "stopped by ann")

    def _stop(self, vm: str, ended: str, why: str) -> None:
        world = self.world
        for qemu in list(world.running(vm)):
            owner = world.owner(vm)
            if owner.migration is not None or not world.usable(qemu.host.name):
                continue
            world.store.put_owner(vm, ownership.stopped(owner))
            world.store.ended[vm] = ended
            world.end(qemu, why, fault=True)

    def do_double(self, vm: str, name: str) -> None:
        """A planted second QEMU, paused, that no record names."""
        host = self.world.hosts[name]
        epoch = self.world.owner(vm).epoch
        self.world.qemus.append(Qemu(vm=vm, host=host, epoch=epoch, state="paused"))

    def do_move(self, vm: str, to: str, *options: str) -> None:
        """``move VM HOST [hold=STAGE] [precopy=S] [postcopy]``."""
        given = dict(word.split("=") for word in options if "=" in word)
        self.cluster.transfers.begin(
            vm,
            to,
            precopy=float(given.get("precopy", 4)),
            hold=given.get("hold", ""),
            postcopy="postcopy" in options,
        )

    def do_go_on(self, vm: str) -> None:
        """A held move goes on."""
        self.cluster.transfers.release(vm)

    def do_abandon(self, vm: str) -> None:
        """The engine of a move breaks, by a fault of its agent: nobody drives it any more."""
        self.cluster.transfers.abandon(vm)

    def do_cancel(self, vm: str) -> None:
        """A move is called off."""
        self.cluster.transfers.cancel(vm)


def play(scenario: Scenario) -> str:
    """The log that comes out. `sim_world.Violation` when an invariant does not hold."""
    cluster = Cluster()
    Setup(cluster).read(scenario.setup)
    cluster.begin()
    end = Script(cluster).read(scenario.script)
    cluster.world.run(end)
    return "\n".join([*cluster.world.lines, *verdict(cluster.world)]) + "\n"


def verdict(world: World) -> list[str]:
    """How it ends, one line for each VM."""
    lines = []
    for name in sorted(world.vms):
        owner = world.owner(name)
        here = sorted(f"{q.host.name} ({q.state})" for q in world.qemus if q.vm == name)
        lines.append(
            f"    end  {name}: {owner.state.value} on {owner.host} at epoch {owner.epoch}; "
            f"QEMU: {', '.join(here) or 'none'}"
        )
    return lines


def load(path: Path) -> Scenario:
    """One file."""
    return Scenario.parse(path.stem, path.read_text())


def main(names: list[str]) -> None:
    """Write the logs of these files, or of all."""
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.txt")):
        scenario = load(path)
        path.write_text(scenario.text(play(scenario)))


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--write"])
