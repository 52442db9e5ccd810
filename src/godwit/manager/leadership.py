"""Which manager replicas are alive, and which one of them leads.

Each replica keeps a key under a lease; one of them also holds the leader key. The leader adopts
the tasks of dead replicas, notes what happens to hosts in the event log, gives volumes whose
coordinator is lost another one, and prunes history.
Losing the lead costs nothing: every write of these duties is harmless when done twice. What must
not be done by two adds :meth:`Leadership.proof` to its transaction: the store then carries it out
only while the leader's key hangs on our lease.

A leader that was killed is replaced when its lease is over: 3.5 to 5 s after, for it renews every
1.5 s, and up to half a second more until etcd looks. When the store's own leader went with it, the
new one first gives every lease its whole time again.

Every replica listens to the hosts' renewals, leading or not, so the next leader has counted as long
as the one before. One that has just begun has not: while others live it leaves them the lead for
`YIELD_S`, and gives up at once what an earlier life of its own still holds. Alone, or if nobody
takes the lead, it leads and counts from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from godwit.manager.cache import Cache, Change
from godwit.manager.keyspace import MEMBERS
from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.manager.work.coordinators import settle_coordinators
from godwit.manager.work.tasks import Tasks
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.host import HostState
from godwit.model.skew import our_own
from godwit.store.api import Compare, absent, delete, lease_is, put, value_is
from godwit.store.errors import LeaseNotFound, StoreError
from godwit.store.records import CasFailed, encode

_LOG = logging.getLogger("godwit.manager")
LEASE_S = 5
BEAT_S = 1.5
YIELD_S = 2.0
"""Longer than a beat: whoever listened longer has tried to take the lead meanwhile."""
PRUNE_S = 600.0
KEPT_EVENTS, KEPT_TASKS, KEPT_MIGRATIONS = 10_000, 1_000, 1_000
_DELETES_AT_ONCE = 100


class Leadership:
    """Run :meth:`run` in the background; :attr:`leads` says whether the duties are ours.

    ``young``: whether this replica has listened for a shorter time than a host may be silent.
    """

    def __init__(
        self, world: World, tasks: Tasks, *, young: Callable[[], bool] = lambda: False
    ) -> None:
        self._world = world
        self._tasks = tasks
        self._young = young
        self._open_since: float | None = None  # nobody has led since then, as far as we saw
        self._lease = 0
        self._until = 0.0  # from then on our lease may be over, whatever we believe
        self._won = False
        self._hosts: dict[str, HostState] | None = None
        self._pruned_at = float("-inf")
        self._wake = asyncio.Event()

    @property
    def leads(self) -> bool:
        """Whether the duties are ours: won, and renewed less than a lease ago."""
        return self._won and self._world.clock.monotonic() < self._until

    def proof(self) -> Compare:
        """For a transaction that only the leader may do: fails once another one may lead."""
        return lease_is(keys.LEADER, self._lease)

    def take(self, changes: tuple[Change, ...]) -> None:
        """The cache's listener: hosts and members that come and go are dealt with at once."""
        if any(change.place.room in ("leases", "agents", "members") for change in changes):
            self._wake.set()

    async def run(self) -> None:
        """Renew, elect and do the leader's duties until cancelled."""
        await self._world.cache.ready.wait()
        while True:
            try:
                await self._beat()
                if self.leads:
                    await self._duties()
            except (StoreError, CasFailed) as error:
                self._won = False
                _LOG.info("the lead is open: %s", error)
            self._wake.clear()
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def resign(self) -> None:
        """Give the lease back, so that another replica need not wait for its end."""
        self._won = False
        if self._lease:
            try:
                await self._world.records.store.lease_revoke(self._lease, timeout=1.0)
            except StoreError as error:
                _LOG.info("the lease runs out by itself: %s", error)

    async def _beat(self) -> None:
        store, now = self._world.records.store, self._world.clock.monotonic
        sent = now()
        try:
            if self._lease:
                await store.lease_keepalive(self._lease, timeout=2 * BEAT_S)
        except LeaseNotFound:
            self._lease, self._won = 0, False
        if not self._lease:
            sent = now()
            self._lease = (await store.lease_grant(LEASE_S, timeout=2 * BEAT_S)).id
            member = MEMBERS + self._world.worker.replace("/", ".")
            await store.put(member, encode(our_own()), lease=self._lease)
        self._until = sent + LEASE_S
        if not self._won:
            self._won = await self._stand()

    async def _stand(self) -> bool:
        """Take the lead if nobody holds it, or if an earlier life of ours does; see the module."""
        store, me = self._world.records.store, self._world.worker
        held = await store.get(keys.LEADER)
        if held is None:
            guard: Compare = absent(keys.LEADER)
        elif held.value.decode().partition("/")[0] == me.partition("/")[0]:
            guard = value_is(keys.LEADER, held.value)
        else:
            self._open_since = None
            return False
        if self._young() and self._others():
            now = self._world.clock.monotonic()
            self._open_since = now if self._open_since is None else self._open_since
            if held is not None:
                await store.txn([guard], [delete(keys.LEADER)])
            if held is not None or now - self._open_since < YIELD_S:
                return False
        won = await store.txn([guard], [put(keys.LEADER, me.encode(), lease=self._lease)])
        if won.succeeded:
            _LOG.info("%s leads", me)
        return won.succeeded

    def _others(self) -> bool:
        """Whether another replica lives; a member's key is NAME.LIFE."""
        mine = self._world.worker.partition("/")[0]
        return any(one.partition(".")[0] != mine for one in self._world.cache.snapshot.members)

    async def _duties(self) -> None:
        world, snapshot = self._world, self._world.cache.snapshot
        for task_id in await self._tasks.adopt_orphans():
            _LOG.info("adopted task %s", task_id)
        before, self._hosts = self._hosts, states_of(snapshot)
        for host, state, reason in transitions(before, snapshot):
            message = f"{host} is {state.value}" + (f": {reason}" if reason else "")
            level = "info" if state is HostState.UP else "warning"
            await world.records.append_event(
                f"host.{state.value}",
                f"host/{host}",
                message,
                at=world.clock.realtime(),
                level=level,  # type: ignore[arg-type]
            )
        await settle_coordinators(world)
        now = world.clock.monotonic()
        if now - self._pruned_at > PRUNE_S:
            self._pruned_at = now
            await prune(world, world.cache)


def states_of(snapshot: Snapshot) -> dict[str, HostState]:
    """The membership state of every known host."""
    return {
        name: host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)[0]
        for name in snapshot.hosts
    }


def transitions(
    before: dict[str, HostState] | None, snapshot: Snapshot
) -> list[tuple[str, HostState, str]]:
    """Hosts whose state is another than ``before``; none for the first look. Pure."""
    if before is None:
        return []
    found = []
    for name in sorted(snapshot.hosts):
        state, reason = host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
        if before.get(name) is not state:
            found.append((name, state, reason))
    return found


async def prune(world: World, cache: Cache) -> int:
    """Delete the oldest finished history beyond what is kept; how many records went."""
    snapshot = cache.snapshot
    final_tasks = sorted(task.id for task in snapshot.tasks.values() if task.state.final)
    final_moves = sorted(move.id for move in snapshot.migrations.values() if move.state.final)
    old = [
        *cache.keys_in("events")[:-KEPT_EVENTS],
        *(keys.task(name) for name in final_tasks[:-KEPT_TASKS]),
        *(keys.migration(name) for name in final_moves[:-KEPT_MIGRATIONS]),
    ]
    for start in range(0, len(old), _DELETES_AT_ONCE):
        batch = old[start : start + _DELETES_AT_ONCE]
        await world.records.store.txn([], [delete(key) for key in batch])
    return len(old)
