"""The loops: listen to the store without a pause; and while this manager leads, decide and act.

Every replica listens, so that whoever comes to lead has counted as long as the leader before. A
count goes on only from a reading to one at most a second later (`Timings.gap_s`), so listening
waits for nobody: neither for hosts that do not answer nor for steps, which run beside the loops,
one of each key at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from godwit.cluster import Decision, Memory, Snapshot, decide, membership, remember
from godwit.cluster.failover import Placed
from godwit.cluster.membership import Standing
from godwit.cluster.placing import PlannerPlace
from godwit.cluster.steps import Alarm, Note, Step, Unplaceable
from godwit.manager.cache import Change
from godwit.manager.failover.acting import Actor
from godwit.manager.failover.reading import Reader, agents_s
from godwit.manager.failover.telling import Told, words
from godwit.manager.rooms import rooms_of
from godwit.manager.world import World
from godwit.model.errors import GodwitError
from godwit.model.vm import Vm
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed

LISTEN_S = 0.4
LOOK_S, GATHER_S = 0.5, 0.2
SETTLED_S = 60.0
"""A host that has been lost for so long is looked at as seldom as one that is well."""
_LOG = logging.getLogger("godwit.manager")


class _AsksForRoom(Exception):
    """A decision wants to place something; nobody had asked the hosts for their memory."""


class Failover:
    """Run :meth:`run` in the background; `standings` is what it last thought of the hosts."""

    def __init__(
        self, world: World, reader: Reader, actor: Actor, *, leads: Callable[[], bool]
    ) -> None:
        self._world = world
        self._reader = reader
        self._actor = actor
        self._leads = leads
        self._memory = Memory()
        self._told = Told()
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._said = ""
        self._since: float | None = None  # of the first reading that was answered
        self.standings: Mapping[str, Standing] = {}

    def take(self, changes: tuple[Change, ...]) -> None:
        """The cache's listener: what a decision may rest on has changed."""
        rooms = {change.place.room for change in changes}
        if rooms & {"leases", "agents"}:
            self._reader.restless = True  # a host that comes back may run less than before
        if rooms & {"leases", "agents", "owners", "marks"}:
            self._wake.set()

    @property
    def young(self) -> bool:
        """It has not listened for as long as a host may be silent: others may know more."""
        since, now = self._since, self._world.clock.monotonic()
        return since is None or now - since < self._reader.timings.takeover_s

    async def run(self) -> None:
        """Until cancelled; the steps that are under way are let go of."""
        await self._world.cache.ready.wait()
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._listen(), name="listening")
                loops.create_task(self._decide_on(), name="deciding")
        finally:
            for task in self._under_way.values():
                task.cancel()

    async def _listen(self) -> None:
        while True:
            snapshot = await self._reader.listen()
            now = self._world.clock.monotonic()
            self._memory = membership.listen(self._memory, snapshot, now)
            if self._since is None and snapshot.store.leader:
                self._since = now
            if is_late(replace(snapshot, heard=self._memory)):
                self._reader.restless = True
                self._wake.set()
            await self._world.clock.sleep(LISTEN_S)

    async def _decide_on(self) -> None:
        while True:
            self._wake.clear()
            await self._cycle()
            hosts = len(self._world.cache.snapshot.hosts)
            pause_s = LOOK_S if self._reader.restless else agents_s(hosts)
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            # Many things change at once when one does: look once for all of them.
            await self._world.clock.sleep(GATHER_S)

    async def _cycle(self) -> None:
        snapshot = await self._reader.read()
        now = self._world.clock.monotonic()
        if not self._memory.hosts.keys() >= snapshot.hosts.keys():
            return  # nobody has listened yet
        # What was heard meanwhile is newer than the records: then what is written compares, and
        # fails.
        self._memory = remember(self._memory, snapshot, now)
        snapshot = replace(snapshot, heard=self._memory)
        self._actor.forget(snapshot)
        decision = await self._decide(snapshot, now)
        self.standings = decision.hosts
        self._reader.restless = restless(snapshot, decision, now)
        if not self._leads():
            return
        if decision.sentence != self._said:
            self._said = decision.sentence
            _LOG.info("cluster: %s", decision.sentence)
        for step in decision.steps:
            self._begin(step)
        await self._tell(decision, now)

    async def _decide(self, snapshot: Snapshot, now: float) -> Decision:
        """Decided anew, with the hosts' free memory, when something is to be placed."""

        def unknown(
            vm: Vm, taken: Mapping[str, str], exclude: Mapping[str, tuple[str, ...]]
        ) -> Placed:
            raise _AsksForRoom(vm.name)

        try:
            return decide(snapshot, now, place=unknown)
        except _AsksForRoom:
            records = self._world.cache.snapshot
            free = await self._world.free.for_placement(records)
            place = PlannerPlace(rooms_of(records, free), records.vms)
            return decide(snapshot, now, place=place)

    def _begin(self, step: Step) -> None:
        if isinstance(step, Alarm | Note | Unplaceable) or step.key in self._under_way:
            return
        task = asyncio.create_task(self._carry_out(step), name=step.key)
        self._under_way[step.key] = task
        task.add_done_callback(lambda _: self._under_way.pop(step.key, None))

    async def _carry_out(self, step: Step) -> None:
        try:
            await self._actor.act(step)
        except (GodwitError, StoreError, CasFailed) as error:
            _LOG.info("%s: not done: %s", step.key, error)
        except Exception:
            _LOG.exception("%s", step.key)
        finally:
            self._wake.set()

    async def _tell(self, decision: Decision, now: float) -> None:
        told = tuple(
            step for step in decision.steps if isinstance(step, Alarm | Note | Unplaceable)
        )
        for step in self._told.news(told, now):
            kind, subject, message = words(step)
            await self._actor.tell(kind, subject, message, error=isinstance(step, Alarm))


def restless(snapshot: Snapshot, decision: Decision, now: float) -> bool:
    """Whether the hosts are asked with the next reading: something is out of order.

    That nothing runs of a VM which should is believed only when its host says so again and again.
    """
    acts = any(not isinstance(step, Note | Alarm) for step in decision.steps)
    bare = any(now - since < SETTLED_S for _, since in snapshot.heard.bare.values())
    return is_late(snapshot) or acts or bare


def is_late(snapshot: Snapshot) -> bool:
    """Whether a host has missed its renewal lately, or the store does not answer."""
    late = snapshot.timings.renew_s + snapshot.timings.gap_s
    settled = snapshot.timings.takeover_s + SETTLED_S
    silent = any(late < snapshot.silence(name) < settled for name in snapshot.hosts)
    return silent or not snapshot.store.leader
