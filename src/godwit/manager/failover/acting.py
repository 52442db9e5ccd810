"""Carries out what a decision asks for. Each step may fail: the next reading tells what came of it.

A fence is remembered as an attempt for as long as its host is silent; a host that could not start a
VM, for `REFUSED_S`, so that the VM does not go round between hosts of which none can. Both are this
manager's own: a leader that comes after it asks again, and asking twice is harmless. What is cut
off from storage is what the storage servers say, so that whoever leads takes it back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from godwit.cluster.facts import Attempt, Rung, Snapshot
from godwit.cluster.steps import (
    Conclude,
    Fence,
    Kill,
    PowerOn,
    Quarantine,
    Restore,
    Resume,
    Start,
    Step,
    Stopped,
    Swap,
)
from godwit.manager.failover.binding import closing, concluding
from godwit.manager.world import World
from godwit.model import keys, ownership
from godwit.model.errors import Conflict, GodwitError, OutcomeUnknown, Refused, Unavailable
from godwit.model.host import HostInfo
from godwit.model.marks import HostMark
from godwit.model.ownership import Owner, Restarts
from godwit.model.vm import VmState, VmStatus
from godwit.store.api import Compare, Op, absent, exists, mod_is, put
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed, Versioned, encode

START_S = 120.0
KILL_S = 20.0
REFUSED_S = 60.0
_LOG = logging.getLogger("godwit.manager")


class Cut(Protocol):
    """What shuts a host out of a VM's volumes; the fencing daemons of storage servers."""

    async def cut(self, step: Fence) -> frozenset[str]:
        """The ids of the disks whose server has confirmed it: all, or an error."""
        ...

    async def lift(self, cuts: tuple[str, ...]) -> None:
        """Take these back, as they were told of (`Attempt.cut`); fine when they stand no more."""
        ...

    def attempts(self) -> tuple[Attempt, ...]:
        """The cuts that stand, as the servers last told of them, whoever asked for them."""
        ...


class Switch(Protocol):
    """What switches a host off for certain; the power devices."""

    async def off(self, host: str) -> str:
        """Switch it off and read the state back: the words of the proof. GodwitError otherwise."""
        ...


class Actor:
    """The steps of one manager. ``proof``: what holds in the store while it leads."""

    def __init__(
        self,
        world: World,
        *,
        proof: Callable[[], Compare],
        switch: Switch | None = None,
        cut: Cut | None = None,
    ) -> None:
        self._world = world
        self._proof = proof
        self._switch = switch
        self._cut = cut
        self._attempts: dict[str, Attempt] = {}
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}
        self._ground: dict[str, Compare] = {}  # of a storage cut: the lead it was asked for in

    def attempts(self) -> tuple[Attempt, ...]:
        """Every fence that is under way or over, and every cut that stands.

        What a storage server confirmed in an earlier lead of ours is left out: another leader may
        have taken it back since.
        """
        standing = () if self._cut is None else self._cut.attempts()
        ground = self._proof()
        mine = (a for key, a in self._attempts.items() if self._ground.get(key, ground) == ground)
        return (*mine, *standing)

    def refused(self, vm: str) -> dict[str, str]:
        """Hosts that lately could not start the VM, with what they said."""
        return {host: why for (name, host), (_, why) in self._refused.items() if name == vm}

    def forget(self, snapshot: Snapshot) -> None:
        """Drop what was about a silence that is over, and refusals that are old."""
        for key, attempt in list(self._attempts.items()):
            if attempt.outcome != "running" and attempt.heard != snapshot.identity(attempt.host):
                self._drop(key)
        now = self._world.clock.monotonic()
        for pair, (at, _) in list(self._refused.items()):
            if now - at > REFUSED_S:
                del self._refused[pair]

    async def act(self, step: Step) -> None:
        """Carry one step out. GodwitError, StoreError or CasFailed: it did not happen, or who
        knows; it is decided anew."""
        match step:
            case Fence():
                await self._fence(step)
            case Swap():
                await self._swap(step)
            case Start():
                await self._start(step)
            case Resume():
                await self._ask(
                    step.host, step.vm, "take-up-move", KILL_S, migration=step.migration
                )
            case Conclude():
                await self._conclude(step)
            case PowerOn():
                await self._power_on(step)
            case Kill() if step.own:
                await self._ask(step.host, step.vm, "end-own", KILL_S, revision=step.own)
            case Kill():
                await self._ask(step.host, step.vm, "end-stray", KILL_S, epoch=step.epoch)
            case Restore():
                await self._restore(step)
            case Stopped():
                await self._stopped(step)
            case Quarantine():
                await self._quarantine(step)

    # Fencing.

    async def _fence(self, step: Fence) -> None:
        attempt = Attempt(
            host=step.host, rung=step.rung, vm=step.vm, heard=step.heard, outcome="running"
        )
        self._attempts[step.key] = attempt
        if step.rung is Rung.STORAGE:
            self._ground[step.key] = self._proof()
        where = f"host/{step.host}"
        await self.tell("host.fencing", where, f"{step.host} is fenced by {step.rung.value}")
        try:
            disks, said = await self._carry_out(step)
        except (GodwitError, StoreError, OSError) as error:
            now = self._world.clock.monotonic()
            self._attempts[step.key] = replace(
                attempt, outcome="failed", ended_at=now, reason=str(error)
            )
            why = f"{step.host} could not be fenced by {step.rung.value}: {error}"
            await self.tell("host.fence-failed", where, why, error=True)
            return
        except BaseException:
            self._drop(step.key)
            raise
        self._attempts[step.key] = replace(
            attempt, outcome="confirmed", ended_at=self._world.clock.monotonic(), disks=disks
        )
        await self.tell("host.fenced", where, f"{step.host} is fenced: {said}")

    async def _restore(self, step: Restore) -> None:
        """By the record of the decision; the servers lift what it saw, and no later cut."""
        found = await self._world.records.owner(step.vm)
        if (found.revision if found else 0) != step.owner_revision:
            raise CasFailed(step.vm)
        if self._cut is not None and step.cuts:
            await self._cut.lift(step.cuts)
            said = f"{step.host} reaches the disks of {step.vm} again"
            await self.tell("host.restored", f"host/{step.host}", said)
        for key, attempt in list(self._attempts.items()):
            mine = attempt.rung is Rung.STORAGE and attempt.outcome != "running"
            if mine and (attempt.host, attempt.vm) == (step.host, step.vm):
                self._drop(key)

    def _drop(self, key: str) -> None:
        self._attempts.pop(key, None)
        self._ground.pop(key, None)

    async def _carry_out(self, step: Fence) -> tuple[frozenset[str], str]:
        if step.rung is Rung.AGENT:
            revision = step.owner_revision
            await self._ask(step.host, step.vm, "end-own", KILL_S, revision=revision)
            return frozenset(), f"its agent ended {step.vm}"
        if step.rung is Rung.POWER and self._switch is not None:
            return frozenset(), await self._switch.off(step.host)
        if step.rung is Rung.STORAGE and self._cut is not None:
            disks = await self._cut.cut(step)
            return disks, f"cut off from {', '.join(sorted(disks))} of {step.vm}"
        raise Refused(f"nothing here can fence by {step.rung.value}", hint="see the ladder")

    # The record.

    async def _swap(self, step: Swap) -> None:
        leads = self._proof()  # of now: what the proof rests on holds in this lead of ours
        world, found = self._world, await self._decided(step)
        owner = found.value
        if step.adopt and owner.migration is not None:
            after = ownership.swap(owner, owner.migration.id)
        else:
            after = ownership.fail_over(owner, host=step.to, unlock=step.unlock)
        compare: list[Compare] = [exists(keys.host_lease(step.to)), leads]
        if step.renewal_revision is not None:
            key = keys.host_renewal(step.source)
            revision = step.renewal_revision
            compare.append(mod_is(key, revision) if revision else absent(key))
        also: list[Op] = []
        if step.counts:
            also = [await self._one_more(step.vm, compare)]
        if owner.migration is not None:
            over = "" if step.adopt else f"{step.source} was lost: {step.vm} starts on {step.to}"
            also += await closing(world, step.vm, owner.migration, compare, over=over)
        await world.records.cas(
            keys.vm_owner(step.vm), after, found.revision, compare=compare, also=also
        )
        verb = "goes on with its memory" if step.adopt else "starts anew"
        await self.tell(
            "vm.failover",
            f"vm/{step.vm}",
            f"{step.vm} {verb} on {step.to} at epoch {after.epoch}: {step.proof}",
            data={"from": step.source, "to": step.to, "epoch": after.epoch, "proof": step.proof},
        )

    async def _conclude(self, step: Conclude) -> None:
        world, found = self._world, await self._decided(step)
        owner = found.value
        if owner.migration is None:
            return
        compare: list[Compare] = [self._proof()]
        also = await concluding(world, step.vm, owner.migration, compare, why=step.why)
        after = ownership.finished(owner, step.migration)
        await world.records.cas(
            keys.vm_owner(step.vm), after, found.revision, compare=compare, also=also
        )
        await self.tell("migration.completed", f"vm/{step.vm}", f"{step.migration}: {step.why}")

    async def _decided(self, step: Swap | Conclude | PowerOn | Stopped) -> Versioned[Owner]:
        """The record that the step was decided on; CasFailed when it has moved on."""
        found = await self._world.records.owner(step.vm)
        if found is None or found.revision != step.owner_revision:
            raise CasFailed(step.vm)
        return found

    async def _one_more(self, vm: str, compare: list[Compare]) -> Op:
        """The write that counts one more restart; ``compare`` gains what it rests on."""
        key, world = keys.vm_restarts(vm), self._world
        found = await world.records.get(key, Restarts)
        compare.append(mod_is(key, found.revision) if found else absent(key))
        times = found.value if found else Restarts()
        return put(key, encode(times.with_one(world.clock.realtime())))

    async def _start(self, step: Start) -> None:
        try:
            await self._ask(step.host, step.vm, "take-over", START_S, epoch=step.epoch)
        except (Conflict, Unavailable, OutcomeUnknown):
            raise  # the record has moved on, or nobody can tell: that is no refusal
        except GodwitError as error:
            now = self._world.clock.monotonic()
            self._refused[step.vm, step.host] = (now, error.message)
            await self.tell(
                "vm.start-failed",
                f"vm/{step.vm}",
                f"{step.host} could not start {step.vm}: {error.message}",
                error=True,
            )

    async def _power_on(self, step: PowerOn) -> None:
        """Through the record, like a failover: the agent then starts what the record gives it."""
        world, found = self._world, await self._decided(step)
        after = ownership.power_on(found.value, host=step.host)
        compare: list[Compare] = [exists(keys.host_lease(step.host)), self._proof()]
        also = [await self._one_more(step.vm, compare)]
        await world.records.cas(
            keys.vm_owner(step.vm), after, found.revision, compare=compare, also=also
        )
        message = f"{step.vm} is switched on at {step.host}: {step.why}"
        await self.tell("vm.failover", f"vm/{step.vm}", message)

    async def _stopped(self, step: Stopped) -> None:
        world, found = self._world, await self._decided(step)
        owner: Owner = found.value
        compare, also = [self._proof()], list[Op]()
        if owner.migration is not None:
            also = await closing(world, step.vm, owner.migration, compare, over=step.why)
        await world.records.cas(
            keys.vm_owner(step.vm),
            ownership.stopped(owner),
            found.revision,
            compare=compare,
            also=also,
        )
        status = VmStatus(
            state=VmState.FAILED,
            host=owner.host,
            epoch=owner.epoch,
            reason=step.why,
            since=world.clock.realtime(),
        )
        await world.records.write_status(step.vm, status)
        await self.tell("vm.failed", f"vm/{step.vm}", step.why, error=True)

    async def _quarantine(self, step: Quarantine) -> None:
        world, key = self._world, keys.host_mark(step.host)
        mark = HostMark(
            state="quarantined", since=world.clock.realtime(), reason=step.why, by="the cluster"
        )
        won = await world.records.store.txn([absent(key), self._proof()], [put(key, encode(mark))])
        if won.succeeded:
            await self.tell("host.quarantined", f"host/{step.host}", step.why, error=True)

    # Others.

    async def _ask(
        self, host: str, vm: str, verb: str, deadline_s: float, **body: int | str
    ) -> None:
        info: HostInfo | None = self._world.cache.snapshot.hosts.get(host)
        if info is None:
            raise Refused(f"{host} is no host any more", hint="look: godwit host list")
        await self._world.agents.call(
            info, "POST", f"/v1/vms/{vm}/{verb}", body, deadline_s=deadline_s
        )

    async def tell(
        self,
        kind: str,
        subject: str,
        message: str,
        *,
        error: bool = False,
        data: dict[str, object] | None = None,
    ) -> None:
        """An event; a store that is away hears nothing, the log does."""
        _LOG.warning("%s", message)
        try:
            await self._world.records.append_event(
                kind,
                subject,
                message,
                at=self._world.clock.realtime(),
                level="error" if error else "warning",
                data=data,
            )
        except StoreError as problem:
            _LOG.info("not in the event log: %s", problem)
