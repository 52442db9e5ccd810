"""Replicas of the manager in virtual time: all read and listen, the leading one acts.

This is a whole actor on `godwit.cluster.seam`: reads through the network, steps that take time and
may fail, transactions that compare what they have to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sim_daemons import Agents, Guards, power_off
from sim_world import Host, World

from godwit.cluster import Decision, Memory, Placed, Snapshot, decide, listen
from godwit.cluster.facts import Attempt, HostSeen, Process, Rung, StoreSeen, VmSeen
from godwit.cluster.steps import (
    Alarm,
    Conclude,
    Fence,
    Kill,
    Note,
    PowerOn,
    Quarantine,
    Restore,
    Resume,
    Start,
    Step,
    Stopped,
    Swap,
    Unplaceable,
)
from godwit.model import ownership
from godwit.model.errors import GodwitError
from godwit.model.marks import HostMark
from godwit.model.ownership import OwnerState
from godwit.model.vm import Vm

CYCLE_S = 0.5
CHIEF_S = 5.0
TAKEOVER_S, YOUNG_S = 14.4, 2.0
CALL_S = 0.05
CUT_S, CUT_FAILS_S = 1.0, 2.0
POWER_S, POWER_FAILS_S = 2.0, 5.0
GIB = 1 << 30


class Manager:
    """One replica on a host (or on a machine of its own)."""

    def __init__(self, world: World, host: Host, agents: Agents, guards: Guards) -> None:
        self.world, self.host, self.agents, self.guards = world, host, agents, guards
        self.memory = Memory()
        self.attempts: dict[str, Attempt] = {}
        self.busy: set[str] = set()
        self.answered: dict[str, bool] = {}  # a host that is fenced, when that was decided
        self.told: set[str] = set()
        self.states: dict[str, str] = {}
        self.life = self._life()
        self.reading = False
        self.told_leading = False
        self.decision: Decision | None = None

    def _life(self) -> tuple[int, float]:
        assert self.host.manager is not None
        return self.host.boots, self.host.manager.since

    @property
    def alive(self) -> bool:
        """It runs now."""
        return self.host.works and self.host.manager is not None and self.host.manager.alive

    def clock(self) -> float:
        """Its own monotonic clock."""
        return self.world.now * self.host.rate

    def forever(self) -> None:
        """One cycle, and the next."""
        self.cycle()
        self.world.at(CYCLE_S, self.forever)

    def cycle(self) -> None:
        """Ask the store; the answer comes a latency later."""
        if not self.alive or self.reading:
            return
        if self._life() != self.life:  # a new process knows nothing
            self.memory, self.attempts, self.busy = Memory(), {}, set()
            self.told, self.states, self.life = set(), {}, self._life()
            self._give_up()
        self.world.expire()
        if not self.world.usable(self.host.name):
            self._listen(Snapshot(store=StoreSeen(leader=False)))
            return
        self.reading = True
        asked, life = self.clock(), self.life
        self.world.at(self.world.store.latency, lambda: self._answered(asked, life))

    def _answered(self, asked: float, life: tuple[int, float]) -> None:
        self.reading = False
        if not self.alive or life != self._life() or not self.world.usable(self.host.name):
            return
        snapshot = self._snapshot(asked)
        snapshot = replace(snapshot, heard=self._listen(snapshot))
        if not self._lead():
            return
        self.decision = decide(snapshot, self.clock(), place=self._place)
        self._tell_states(self.decision)
        for step in self.decision.steps:
            self._begin(step, life)

    def _listen(self, snapshot: Snapshot) -> Memory:
        self.memory = listen(self.memory, snapshot, self.clock())
        return self.memory

    def _lead(self) -> bool:
        """Take or keep the leadership, a lease of its own in the store."""
        store, world = self.world.store, self.world
        holder, end = store.chief
        if holder != self.session:
            young = self.clock() - self.life[1] < TAKEOVER_S and holder
            if end + (YOUNG_S if young else 0.0) > world.now:
                return False
            world.say(f"the manager on {self.host.name} leads")
        store.chief = (self.session, world.now + CHIEF_S)
        return True

    def _give_up(self) -> None:
        """What an earlier life still holds, where others live who have listened for longer."""
        store, world = self.world.store, self.world
        holder, end = store.chief
        others = any(
            host.works and host.manager is not None and host.manager.alive and host is not self.host
            for host in world.hosts.values()
        )
        if others and world.usable(self.host.name) and holder.startswith(f"{self.host.name} "):
            store.chief = (holder, min(end, world.now))

    @property
    def session(self) -> str:
        """The process that would hold the lease."""
        return f"{self.host.name} {self.life}"

    def _snapshot(self, asked: float) -> Snapshot:
        world, store = self.world, self.world.store
        answers = {
            host.name: self.agents.answers(host, self.host.name) for host in world.hosts.values()
        }
        return Snapshot(
            store=StoreSeen(
                term=store.term,
                asked_at=asked,
                answered_at=self.clock(),
                embedded=store.embedded,
                members=world.members(),
            ),
            hosts={
                name: self._host(host, answers=answers[name])
                for name, host in world.hosts.items()
                if name not in world.outsiders
            },
            vms={name: self._vm(name, answers) for name in world.vms},
            volumes=world.volumes,
            uncuttable=world.uncuttable,
            attempts=tuple(self.attempts.values()),
            wall=1e9 + world.now + self.host.wall,
        )

    def _host(self, host: Host, *, answers: bool) -> HostSeen:
        store = self.world.store
        renewal, revision = store.renewals.get(host.name, (None, 0))
        return HostSeen(
            name=host.name,
            boot_id=host.told_boot or f"{host.name}-boot1",
            renewal=renewal,
            renewal_revision=revision,
            agent=host.name in store.agents,
            answers=answers,
            listed=answers,
            mark=store.marks.get(host.name),
            confirmed_down=store.words.get(host.name),
            power=host.bmc,
        )

    def _vm(self, name: str, answers: Mapping[str, bool]) -> VmSeen:
        store = self.world.store
        owner, revision = store.owners[name]
        return VmSeen(
            vm=self.world.vms[name],
            owner=owner,
            owner_revision=revision,
            processes=tuple(
                Process(
                    host=q.host.name,
                    epoch=q.epoch,
                    state=q.state,  # type: ignore[arg-type]
                    migration=q.migration,
                    driven=q.driven,
                    complete=q.complete,
                    released=q.released,
                )
                for q in self.world.qemus
                if q.vm == name and answers[q.host.name]
            ),
            ended=store.ended.get(name, ""),  # type: ignore[arg-type]
            restarts=store.restarts.get(name, ()),
            refused=store.refused.get(name, {}),
        )

    def _place(
        self, vm: Vm, taken: Mapping[str, str], exclude: Mapping[str, tuple[str, ...]]
    ) -> Placed:
        """By memory alone: the host with most of it left, then by name."""
        left, rejected = {}, {}
        for name, host in self.world.hosts.items():
            if name in exclude or name in self.world.outsiders:
                continue
            free = host.memory - sum(
                self.world.vms[other].memory_bytes // GIB
                for other in self.world.vms
                if other != vm.name and taken.get(other, self._where(other)) == name
            )
            need = vm.memory_bytes // GIB
            if free < need:
                rejected[name] = (f"{free} GiB free, {need} GiB needed",)
            else:
                left[name] = free
        if not left:
            return Placed(host=None, rejected=rejected)
        best = min(left, key=lambda name: (-left[name], name))
        return Placed(host=best, rejected=rejected)

    def _where(self, vm: str) -> str | None:
        owner = self.world.owner(vm)
        return owner.host if owner.state in (OwnerState.RUNNING, OwnerState.STARTING) else None

    # --- acting

    def _tell_states(self, decision: Decision) -> None:
        for name, here in decision.hosts.items():
            before = self.states.get(name)
            text = here.state.value + (" and lost" if here.lost else "")
            if before not in (None, text):
                self.world.say(f"manager: {name} is {text}: {here.sentence}")
            self.states[name] = text

    def _begin(self, step: Step, life: tuple[int, float]) -> None:
        if isinstance(step, Alarm | Note | Unplaceable):
            if step.key not in self.told:
                self.told.add(step.key)
                kind = type(step).__name__.lower()
                subject = step.vm if isinstance(step, Unplaceable) else step.subject
                self.world.say(f"manager: {kind}, {subject}: {step.why}")
            return
        if step.key in self.busy:
            return
        self.busy.add(step.key)
        delay = CALL_S
        if isinstance(step, Fence):
            delay = self._fence_time(step)
            self.answered[step.host] = self.agents.answers(
                self.world.hosts[step.host], self.host.name
            )
            self._attempt(step, "running")
            self.world.say(f"manager: fences {step.host} by {step.rung.value}{_of(step.vm)}")
        self.world.at(delay, lambda: self._arrives(step, life))

    def _arrives(self, step: Step, life: tuple[int, float]) -> None:
        """A request that a frozen manager had in hand arrives when it is thawed."""
        if life != self._life() or not self.host.powered:
            return
        if not self.alive:
            self.world.at(CALL_S, lambda: self._arrives(step, life))
            return
        self.busy.discard(step.key)
        self._act(step)
        self.cycle()

    def _act(self, step: Step) -> None:
        world, store = self.world, self.world.store
        if isinstance(step, Fence):
            self._fence(step)
        elif isinstance(step, Swap):
            self._swap(step)
        elif isinstance(step, Restore):
            self._restore(step)
        elif isinstance(step, Quarantine):
            if world.usable(self.host.name) and step.host not in store.marks:
                mark = HostMark(state="quarantined", since=world.now, reason=step.why)
                store.marks[step.host] = mark
        elif isinstance(step, PowerOn):
            self._power_on(step)
        elif isinstance(step, Stopped):
            owner, revision = store.owners[step.vm]
            if world.usable(self.host.name) and revision == step.owner_revision:
                store.put_owner(step.vm, ownership.stopped(owner))
                world.say(f"manager: {step.vm} is recorded as stopped: {step.why}")
        elif isinstance(step, Conclude):
            self._conclude(step)
        elif isinstance(step, Start | Kill | Resume):
            self._call(step)

    def _call(self, step: Start | Kill | Resume) -> None:
        """To a host's agent, which reads the record itself."""
        world, host = self.world, self.world.hosts[step.host]
        if not self.agents.answers(host, self.host.name) or not world.usable(host.name):
            return
        if isinstance(step, Start):
            self.agents.start(host, step.vm, step.epoch)
        elif isinstance(step, Kill):
            owner, revision = world.store.owners[step.vm]
            named = (owner.host, owner.epoch) == (step.host, step.epoch)
            due = step.own == revision if step.own else not named
            for qemu in world.on(host, step.vm):
                if due and qemu.epoch == step.epoch:
                    world.end(qemu, step.why)
        else:
            owner = world.owner(step.vm)
            if owner.migration is None or owner.migration.id != step.migration:
                return
            world.say(f"manager: {step.host} takes {step.migration} of {step.vm} up: {step.why}")
            self.agents.take_up(step.vm)

    def _conclude(self, step: Conclude) -> None:
        world, store = self.world, self.world.store
        owner, revision = store.owners[step.vm]
        if not world.usable(self.host.name) or revision != step.owner_revision:
            return
        store.put_owner(step.vm, ownership.finished(owner, step.migration))
        world.say(f"manager: {step.vm} is free again: {step.why}")

    # --- fencing

    def _attempt(self, step: Fence, outcome: str, reason: str = "") -> None:
        self.attempts[step.key] = Attempt(
            host=step.host,
            rung=step.rung,
            vm=step.vm,
            heard=step.heard,
            outcome=outcome,  # type: ignore[arg-type]
            ended_at=self.clock(),
            disks=frozenset(step.disks) if outcome == "confirmed" else frozenset(),
            reason=reason,
        )

    def _fence_time(self, step: Fence) -> float:
        if step.rung is Rung.AGENT:
            return CALL_S
        if step.rung is Rung.STORAGE:
            return CUT_S if self._storage_answers() else CUT_FAILS_S
        return POWER_S if self._bmc_answers(step.host) else POWER_FAILS_S

    def _storage_answers(self) -> bool:
        return self.world.storage_server and "storage" in self.host.links

    def _bmc_answers(self, name: str) -> bool:
        return self.world.hosts[name].bmc_answers and "management" in self.host.links

    def _fence(self, step: Fence) -> None:
        world, host = self.world, self.world.hosts[step.host]
        if step.rung is Rung.AGENT:
            done = self.agents.answers(host, self.host.name) and not host.cannot_end
            for qemu in world.on(host, step.vm) if done else []:
                world.end(qemu, "the manager asked for it")
            why = "" if done else "its QEMU does not end"
        elif step.rung is Rung.STORAGE:
            done = self._storage_answers()
            for qemu in world.on(host, step.vm):
                qemu.cut = qemu.cut or done
            why = "" if done else "the storage does not answer"
        else:
            done = self._bmc_answers(step.host)
            why = "" if done else "its power device does not answer"
            if done and host.powered:
                spared = [q for q in world.on(host) if not world.vms[q.vm].ha]
                fault = not (spared and self.answered[step.host])
                power_off(world, host, "its power device was told", fault=fault)
        self._attempt(step, "confirmed" if done else "failed", why)
        result = "confirmed" if done else f"failed: {why}"
        world.say(f"manager: {step.rung.value} of {step.host}{_of(step.vm)} {result}")

    def _restore(self, step: Restore) -> None:
        world = self.world
        if not self._storage_answers() or not world.usable(self.host.name):
            return
        if world.store.owners[step.vm][1] != step.owner_revision:
            return
        for qemu in world.on(world.hosts[step.host], step.vm):
            qemu.cut = False
        for key, attempt in list(self.attempts.items()):
            if (attempt.host, attempt.vm) == (step.host, step.vm):
                del self.attempts[key]
        world.say(f"manager: {step.host} may reach the disks of {step.vm} again")

    # --- the record

    def _swap(self, step: Swap) -> None:
        world, store = self.world, self.world.store
        if not world.usable(self.host.name):
            return
        world.expire()
        owner, revision = store.owners[step.vm]
        renewal = store.renewals.get(step.source, (None, 0))[1]
        held = (
            revision == step.owner_revision
            and store.chief[0] == self.session
            and store.chief[1] > world.now
            and step.to in store.leases
            and step.renewal_revision in (None, renewal)
        )
        if not held:
            world.say(f"manager: the swap of {step.vm} is refused, the facts have changed")
            return
        world.prove(step.vm)
        if step.adopt:
            assert owner.migration is not None
            new = ownership.swap(owner, owner.migration.id)
        else:
            new = ownership.fail_over(owner, host=step.to)
        if step.counts:
            times = store.restarts.get(step.vm, ())
            store.restarts[step.vm] = (*times, 1e9 + world.now + self.host.wall)
        if new.epoch != step.epoch:
            raise AssertionError(f"the step said {step.epoch}, the rule says {new.epoch}")
        store.put_owner(step.vm, new)
        how = "adopts" if step.adopt else "is to start"
        world.say(f"manager: {step.to} {how} {step.vm} at epoch {new.epoch}: {step.proof}")

    def _power_on(self, step: PowerOn) -> None:
        world, store = self.world, self.world.store
        owner, revision = store.owners[step.vm]
        if not world.usable(self.host.name) or revision != step.owner_revision:
            return
        try:
            store.put_owner(step.vm, ownership.power_on(owner, host=step.host))
        except GodwitError:
            return
        store.ended.pop(step.vm, None)
        times = store.restarts.get(step.vm, ())
        store.restarts[step.vm] = (*times, 1e9 + world.now + self.host.wall)
        world.say(f"manager: {step.vm} is switched on at {step.host}: {step.why}")


def _of(vm: str) -> str:
    return f" for {vm}" if vm else ""
