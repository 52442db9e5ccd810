"""The store's requests, answered only when what they saw is on disk.

A request runs in memory at once, in the event loop, so requests are strictly ordered. Its answer
waits until every change made before it is durable: what nobody was told of may be lost in a
crash, what somebody saw may not.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil, inf

from godwit.store import errors
from godwit.store.daemon.database import Commit, Database, Loaded
from godwit.store.daemon.feed import Feed
from godwit.store.daemon.writer import Writer
from godwit.store.engine import Change, Condition, EngineError, Found, Get, Outcome, Step
from godwit.store.leases import LeaseClock

DEFAULT_HISTORY = 10_000
_HISTORY_BYTES = 128 << 20
_COMPACT_STRIDE = 500
# While there are leases the daemon looks at the clock this often; a look that comes much too late
# means that the daemon itself stood still, and nobody could renew.
_LOOK_S = 1.0
_STALL_S = 0.5


class Service:
    """One open store. ``on_failure`` is called once when nothing more can be written."""

    def __init__(
        self,
        database: Database,
        loaded: Loaded,
        *,
        on_failure: Callable[[Exception], None],
        history: int = DEFAULT_HISTORY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = loaded.identity
        self.engine = loaded.engine
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._history = history
        self._sizes = deque(loaded.log_sizes)
        self._bytes = sum(size for _, size in loaded.log_sizes)
        self._durable = 0
        self._unpublished: deque[tuple[int, int, tuple[Change, ...]]] = deque()
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._failed: Exception | None = None
        self._on_failure = on_failure
        self.feed = Feed(revision=self.engine.revision, history=database.history)
        self._leases = LeaseClock()
        for lease_id, ttl_s in self.engine.leases.items():
            self._leases.start(lease_id, ttl_s=ttl_s, now=clock())
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._writer = Writer(
            database,
            on_durable=lambda count: self._in_loop(self._advance, count),
            on_failure=lambda error: self._in_loop(self._fail, error),
        )
        self._schedule()

    # -- requests

    async def get(self, step: Get, *, serializable: bool = False) -> tuple[Found, int]:
        """A read, and the revision it is the truth of."""
        found, revision = self.engine.get(step), self.engine.revision
        if not serializable:
            await self._settled()
        return found, revision

    async def txn(
        self, conditions: Sequence[Condition], then: Sequence[Step], orelse: Sequence[Step] = ()
    ) -> Outcome:
        """A transaction."""
        outcome = self.engine.txn(conditions, then, orelse)
        if outcome.changes:
            self._submit(Commit(outcome.revision, outcome.changes))
            self._trim()
        await self._settled()
        return outcome

    async def grant(self, lease_id: int, ttl_s: int) -> int:
        """A new lease; its id."""
        chosen = lease_id or secrets.randbits(62) + 1
        self.engine.grant(chosen, ttl_s)
        self._leases.start(chosen, ttl_s=ttl_s, now=self._clock())
        self._submit(Commit(self.engine.revision, granted=((chosen, ttl_s),)))
        self._schedule()
        await self._settled()
        return chosen

    def keepalive(self, lease_id: int) -> int:
        """Renew a lease; its TTL, 0 when there is no such lease. Not written to disk."""
        return self._leases.renew(lease_id, now=self._clock()) or 0

    def time_to_live(self, lease_id: int) -> tuple[int, int]:
        """Seconds left and seconds granted; -1 and 0 when there is no such lease."""
        left = self._leases.remaining(lease_id, now=self._clock())
        return (-1, 0) if left is None else (ceil(left), self.engine.lease_ttl(lease_id) or 0)

    async def revoke(self, lease_id: int) -> None:
        """End a lease and its keys."""
        self._end_lease(lease_id)
        await self._settled()

    async def compact(self, revision: int) -> None:
        """Forget the history before ``revision``."""
        self._compact(revision)
        await self._settled()

    def size(self) -> int:
        """Bytes on disk."""
        return self._database.size()

    def close(self) -> None:
        """Write what is queued and stop. The database stays open for its owner to close."""
        if self._timer is not None:
            self._timer.cancel()
        self._writer.close()
        self.feed.wake_all()

    # -- durability

    def _in_loop(self, call: Callable[..., None], argument: object) -> None:
        """From the writer's thread; after the loop's end nobody waits any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, argument)

    def _submit(self, commit: Commit) -> None:
        number = self._writer.submit(commit)
        if commit.changes:
            self._unpublished.append((number, commit.revision, commit.changes))
            size = sum(len(c.record.value) + len(c.record.key) for c in commit.changes)
            self._sizes.append((commit.revision, size))
            self._bytes += size

    async def _settled(self) -> None:
        """Wait until everything submitted so far is durable."""
        if self._failed is not None:
            raise EngineError(errors.INTERNAL, f"the store cannot write: {self._failed}")
        if self._durable < self._writer.submitted:
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append((self._writer.submitted, future))
            await future

    def _advance(self, durable: int) -> None:
        self._durable = durable
        while self._unpublished and self._unpublished[0][0] <= durable:
            _, revision, changes = self._unpublished.popleft()
            self.feed.publish(revision, changes)
        while self._waiters and self._waiters[0][0] <= durable:
            future = self._waiters.popleft()[1]
            if not future.done():
                future.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Memory is ahead of the disk for good: answer nobody, and let the daemon end."""
        self._failed = error
        self._on_failure(error)

    # -- history

    def _trim(self) -> None:
        over = len(self._sizes) - self._history
        if over < _COMPACT_STRIDE and self._bytes < _HISTORY_BYTES:
            return
        keep = self._history if self._bytes < _HISTORY_BYTES else max(1, len(self._sizes) // 2)
        revision = self._sizes[len(self._sizes) - keep][0]
        if revision > self.engine.compact_revision:
            self._compact(revision)

    def _compact(self, revision: int) -> None:
        self.engine.compact(revision)
        self._submit(Commit(self.engine.revision, compact_to=revision))
        while self._sizes and self._sizes[0][0] < revision:
            self._bytes -= self._sizes.popleft()[1]
        self.feed.wake_all()

    # -- leases

    def _end_lease(self, lease_id: int) -> None:
        changes = self.engine.revoke(lease_id)
        self._leases.stop(lease_id)
        self._submit(Commit(self.engine.revision, changes, revoked=(lease_id,)))

    def _schedule(self) -> None:
        """One timer, for the lease that runs out first; renewals leave it where it is."""
        now = self._clock()
        at = self._leases.next_deadline()
        if at == inf:
            return
        at = min(at, now + _LOOK_S)
        if at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(0.0, at - now), self._expire)

    def _expire(self) -> None:
        now = self._clock()
        stalled = now - self._timer_at > _STALL_S
        self._timer, self._timer_at = None, inf
        if stalled:
            self._leases.restart(now=now)
        for lease_id in self._leases.due(now):
            self._end_lease(lease_id)
        self._schedule()
