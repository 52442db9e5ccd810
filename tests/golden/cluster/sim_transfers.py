"""A live move in virtual time, in the steps of ``docs/design/0002``; each can be held.

intent - precopy - pre-switchover - committing - completed - swapped - running. Records change by
the real rules of ``godwit.model.ownership``. A step whose daemon is away waits for it, or the move
is called off, as the failure table says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim_daemons import LEFT_S, Agents
from sim_world import LEASE_S, Host, Qemu, World

from godwit.model import ownership
from godwit.model.ownership import MoveIntent

STAGES = ("precopy", "pre-switchover", "committing", "completed", "swapped", "running")
STEP_S = 0.1
SILENT_S = 6.0  # three pings without an answer


@dataclass(eq=False)
class Move:
    """One move on its way."""

    id: str
    vm: str
    source: Host
    destination: Host
    here: Qemu
    there: Qemu
    postcopy: bool
    hold: str
    boots: tuple[int, int]
    agent: object = None
    over: bool = False


class Transfers:
    """All moves of a scenario."""

    def __init__(self, world: World, agents: Agents) -> None:
        self.world, self.agents = world, agents
        self.moves: dict[str, Move] = {}
        agents.take_up = self.take_up

    def begin(
        self, vm: str, to: str, *, precopy: float, hold: str = "", postcopy: bool = False
    ) -> None:
        """The intent, if the VM runs and is free."""
        world = self.world
        owner = world.owner(vm)
        source, destination = world.hosts[owner.host or ""], world.hosts[to]
        found = [q for q in world.on(source, vm) if q.state == "running"]
        ready = (
            found and world.usable(source.name) and self.agents.answers(destination, source.name)
        )
        if not ready or owner.migration is not None or world.on(destination, vm):
            world.say(f"{vm}: the move to {to} is refused")
            return
        name = f"m{len(self.moves) + 1}"
        intent = MoveIntent(id=name, method="live", source=source.name, destination=to)
        world.store.put_owner(vm, ownership.begin_move(owner, intent))
        there = Qemu(
            vm=vm,
            host=destination,
            epoch=owner.epoch + 1,
            state="incoming",
            migration=name,
            driven=True,
        )
        world.qemus.append(there)
        found[0].migration, found[0].driven = name, True
        move = Move(
            id=name,
            vm=vm,
            source=source,
            destination=destination,
            here=found[0],
            there=there,
            postcopy=postcopy,
            hold=hold,
            boots=(source.boots, destination.boots),
            agent=(source.agent, source.agent.since),
        )
        self.moves[vm] = move
        world.say(f"{vm}: {source.name} moves it to {to} ({name})")
        self._next(move, precopy, "precopy", self._switchover)

    def release(self, vm: str) -> None:
        """Go on from where the move is held."""
        move = self.moves.get(vm)
        if move is not None:
            move.hold = ""

    def cancel(self, vm: str) -> None:
        """Before the swap; afterwards it is too late."""
        move = self.moves.get(vm)
        if move is not None and not move.over and self._unswapped(move):
            self._off(move, "cancelled")

    def abandon(self, vm: str) -> None:
        """Nobody works on it at the source any more; what is at the destination waits on."""
        move = self.moves.get(vm)
        if move is not None:
            move.over, move.here.driven = True, False

    def take_up(self, vm: str) -> None:
        """The source's agent goes on by the record: back before the swap, forward after it."""
        move = self.moves[vm]
        move.over, move.here.driven = False, True
        if self._unswapped(move) and not move.postcopy:
            self._off(move, "nobody drove it")
        else:
            self._next(move, STEP_S, "swapped", self._run)

    # --- what each step needs

    def _alive(self, host: Host, boots: int) -> bool:
        return host.powered and host.boots == boots

    def _next(self, move: Move, delay: float, stage: str, then: Callable[[Move], None]) -> None:
        def step(rest: float = 0.0) -> None:
            if move.over or not self._alive(move.source, move.boots[0]):
                self._source_lost(move)
                return
            if move.here not in self.world.qemus:
                self._lost_here(move)
                return
            if not move.source.works or move.hold == stage or move.here.state == "frozen":
                self._stalled(move, stage)
                self.world.at(0.5, step)
                return
            agent = move.source.agent
            if not agent.alive or (agent, agent.since) != move.agent:
                self.world.at(0.5, lambda: self._returned(move))
                return
            if not self._there(move) and self._unswapped(move):
                self._off(move, f"{move.destination.name} does not answer")
                return
            if rest > 0:
                self.world.at(min(1.0, rest), lambda: step(max(0.0, rest - 1.0)))
                return
            then(move)

        self.world.at(min(1.0, delay), lambda: step(max(0.0, delay - 1.0)))

    def _source_lost(self, move: Move) -> None:
        """Without its page source a post-copy destination stands on the next missing page."""
        if move.postcopy and not move.over and move.there.state == "running":
            move.over, move.there.driven = True, False
            move.there.state = "paused"
            self.world.say(f"{move.destination.name}: {move.vm} stands, its pages are gone")

    def _stalled(self, move: Move, stage: str) -> None:
        """A held stage still hears that the destination is gone."""
        if move.source.works and not self._there(move) and self._unswapped(move):
            self._off(move, f"{move.destination.name} does not answer")

    def _there(self, move: Move) -> bool:
        return (
            self._alive(move.destination, move.boots[1])
            and move.there in self.world.qemus
            and move.destination.works
            and self.world.reach(move.source.name, move.destination.name, "migration")
        )

    def _unswapped(self, move: Move) -> bool:
        return self.world.owner(move.vm).host == move.source.name

    def _left(self, host: Host) -> bool:
        return LEASE_S - host.age(self.world.now) >= LEFT_S

    def _mine(self, move: Move) -> bool:
        bound = self.world.owner(move.vm).migration
        return bound is not None and bound.id == move.id

    # --- the steps

    def _switchover(self, move: Move) -> None:
        move.here.state = "paused"
        self.world.say(f"{move.source.name}: {move.vm} is held, pre-switchover")
        self._next(move, STEP_S, "pre-switchover", self._commit)

    def _commit(self, move: Move) -> None:
        world = self.world
        if not world.usable(move.source.name) or not self._left(move.source):
            self._off(move, "the store or the lease does not allow it")
            return
        if not self._mine(move):
            self._off(move, "the record changed")
            return
        world.store.put_owner(move.vm, ownership.committing(world.owner(move.vm), move.id))
        self._next(move, STEP_S, "committing", self._completed)

    def _completed(self, move: Move) -> None:
        move.here.state = "postmigrate"
        move.there.complete = True
        if self.world.reach(move.source.name, move.destination.name):
            move.there.released = True
        self.world.say(f"{move.source.name}: {move.vm} is completed, {move.id}")
        self._next(move, STEP_S, "completed", self._swap)

    def _swap(self, move: Move) -> None:
        world = self.world
        if not world.usable(move.source.name):
            self._next(move, 0.5, "completed", self._swap)
            return
        world.expire()
        if not self._mine(move):
            self._off(move, "the record changed")
            return
        if move.destination.name not in world.store.leases:
            self._off(move, f"{move.destination.name} holds no lease")
            return
        owner = ownership.swap(world.owner(move.vm), move.id, postcopy=move.postcopy)
        world.store.put_owner(move.vm, owner)
        world.say(f"{move.vm}: {move.destination.name} owns it at epoch {owner.epoch}")
        self._next(move, STEP_S, "swapped", self._run)

    def _run(self, move: Move) -> None:
        """The destination's agent reads the record; asked until it runs, for two minutes."""
        if self._there(move) and move.destination.agent.alive:
            self.agents.judge(move.there)
        if move.there.state == "running":
            self._next(move, 2 * STEP_S if not move.postcopy else 5.0, "running", self._finish)
            return
        if move.there not in self.world.qemus and not self._mine(move):
            self._off(move, "the record changed")
            return
        self._next(move, 0.5, "swapped", self._run)

    def _finish(self, move: Move) -> None:
        world = self.world
        if not world.usable(move.source.name):
            self._next(move, 0.5, "running", self._finish)
            return
        move.over = True
        if move.here in world.qemus:
            world.end(move.here, "the move is done")
        move.there.driven = False
        move.there.migration = ""
        if self._mine(move):
            owner = world.owner(move.vm)
            world.store.put_owner(move.vm, ownership.finished(owner, move.id))

    # --- ways back

    def _returned(self, move: Move) -> None:
        """The source's next agent: back before the swap, forward after it."""
        if not move.source.agent.alive:
            self.world.at(0.5, lambda: self._returned(move))
            return
        move.agent = (move.source.agent, move.source.agent.since)
        if self._unswapped(move) and not move.postcopy:
            self._off(move, "the agent of the source was restarted")
        else:
            self._next(move, STEP_S, "swapped", self._run)

    def _off(self, move: Move, why: str) -> None:
        """The record first; then the source's copy runs on, if the record still names it."""
        world = self.world
        if move.over:
            return
        if not world.usable(move.source.name) or not move.source.works:
            world.at(0.5, lambda: self._off(move, why))
            return
        move.over = True
        world.say(f"{move.vm}: {move.id} is called off, {why}")
        owner = world.owner(move.vm)
        if self._mine(move) and owner.host == move.source.name:
            world.store.put_owner(move.vm, ownership.rolled_back(owner, move.id))
        for copy, keep in ((move.here, True), (move.there, False)):
            copy.driven, copy.migration = False, ""
            named = world.owner(move.vm)
            mine = (named.host, named.epoch) == (copy.host.name, copy.epoch)
            if copy not in world.qemus:
                continue
            if keep and mine:
                self._go_on(move, copy)
            elif not mine and self._near(move, copy):
                world.end(copy, "the move was called off")

    def _go_on(self, move: Move, copy: Qemu) -> None:
        """It runs again; without a lease its guard keeps it frozen until there is one."""
        world = self.world
        named = world.owner(move.vm)
        mine = (named.host, named.epoch) == (copy.host.name, copy.epoch)
        if copy not in world.qemus or not mine or copy.state not in ("paused", "postmigrate"):
            return
        if self._left(move.source):
            world.runs(copy)
        else:
            world.at(0.5, lambda: self._go_on(move, copy))

    def _near(self, move: Move, copy: Qemu) -> bool:
        """A copy is ended by its own agent; one that cannot be reached tidies up later."""
        return copy.host.works and copy.host.agent.alive and self.world.usable(copy.host.name)

    def _lost_here(self, move: Move) -> None:
        """The source's QEMU died: before the proof its agent restarts it, after it D goes on."""
        move.over = True
        move.there.driven = False
        if self._unswapped(move):
            self.agents.died(move.vm, move.source)
        elif self._mine(move) and self.world.usable(move.source.name):
            owner = self.world.owner(move.vm)
            self.world.store.put_owner(move.vm, ownership.finished(owner, move.id))
