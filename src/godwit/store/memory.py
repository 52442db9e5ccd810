"""The store's in-memory twin: same rules, no disk, no network; for tests and simulations.

With an injected clock no real time passes: leases run out when an operation or ``expire_due``
looks at the clock. ``faults`` makes the next operations fail the way a real store does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import ceil, inf
from types import TracebackType
from typing import Self

from godwit.store import errors
from godwit.store.api import (
    Compare,
    KeyValue,
    Lease,
    MemberView,
    Op,
    OpKind,
    OpResult,
    RangeResult,
    StoreStatus,
    TxnResult,
    Watch,
    WatchBatch,
    WatchEvent,
    WatchKind,
)
from godwit.store.api import delete as delete_op
from godwit.store.api import delete_prefix as delete_prefix_op
from godwit.store.api import put as put_op
from godwit.store.codec import key_bytes, key_text, prefix_range
from godwit.store.engine import (
    Change,
    Condition,
    Delete,
    Engine,
    EngineError,
    Found,
    Get,
    Put,
    Record,
    Step,
    in_range,
)
from godwit.store.leases import LeaseClock


@dataclass(slots=True)
class Faults:
    """What the next operations meet. Counters run down as operations use them up."""

    unavailable: bool = False
    leaderless: bool = False  # it answers, and says that it follows no leader
    refuse_next: int = 0
    lose_request_next: int = 0
    lose_answer_next: int = 0

    def fail_next(self, times: int = 1) -> None:
        """The next operations find no store: StoreUnavailable, nothing done."""
        self.refuse_next += times

    def outcome_unknown_next(self, times: int = 1, *, applied: bool) -> None:
        """The next writes end in StoreOutcomeUnknown, having happened or not."""
        if applied:
            self.lose_answer_next += times
        else:
            self.lose_request_next += times


class MemoryStore:
    """Implements :class:`godwit.store.api.Store`. One event loop only."""

    def __init__(self, *, clock: Callable[[], float] | None = None) -> None:
        self.faults = Faults()
        self._engine = Engine()
        self._leases = LeaseClock()
        self._clock = clock or time.monotonic
        self._timed = clock is None
        self._timer: asyncio.TimerHandle | None = None
        self._lease_ids = count(1)
        self._log: list[tuple[int, tuple[Change, ...]]] = []
        self._watches: set[MemoryWatch] = set()

    # -- keys

    async def get(
        self, key: str, *, linearizable: bool = True, timeout: float | None = None
    ) -> KeyValue | None:
        self._begin()
        found = self._engine.get(Get(_checked(key)))
        return _kv(found.records[0]) if found.records else None

    async def range(
        self,
        prefix: str,
        *,
        linearizable: bool = True,
        limit: int = 0,
        after: str = "",
        keys_only: bool = False,
        timeout: float | None = None,
    ) -> RangeResult:
        self._begin()
        found = self._engine.get(Get(*prefix_range(key_bytes(prefix), key_bytes(after)), limit))
        kvs = tuple(_kv(record) for record in found.records)
        if keys_only:
            kvs = tuple(replace(kv, value=b"") for kv in kvs)
        return RangeResult(kvs, self._engine.revision)

    async def put(
        self, key: str, value: bytes, *, lease: int = 0, timeout: float | None = None
    ) -> int:
        return (await self.txn((), (put_op(key, value, lease=lease),))).revision

    async def delete(self, key: str, *, prefix: bool = False, timeout: float | None = None) -> int:
        op = delete_prefix_op(key) if prefix else delete_op(key)
        return (await self.txn((), (op,))).responses[0].deleted

    async def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Op],
        orelse: Sequence[Op] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        self._begin(write=True)
        try:
            outcome = self._engine.txn(
                [Condition(key_bytes(c.key), c.target, c.result, c.operand) for c in compare],
                [_step(op) for op in then],
                [_step(op) for op in orelse],
            )
        except EngineError as error:
            raise errors.from_status(error.code, error.message, write=True) from error
        self._publish(outcome.changes)
        self._end_write()
        branch = then if outcome.succeeded else orelse
        answers = zip(branch, outcome.answers, strict=True)
        return TxnResult(
            outcome.succeeded,
            outcome.revision,
            tuple(_result(op, found) for op, found in answers),
        )

    # -- leases

    async def lease_grant(
        self, ttl_s: int, *, lease_id: int = 0, timeout: float | None = None
    ) -> Lease:
        self._begin(write=True)
        chosen = lease_id or next(
            number for number in self._lease_ids if self._engine.lease_ttl(number) is None
        )
        try:
            self._engine.grant(chosen, ttl_s)
        except EngineError as error:
            raise errors.from_status(error.code, error.message, write=True) from error
        self._leases.start(chosen, ttl_s=ttl_s, now=self._clock())
        self._schedule()
        self._end_write()
        return Lease(chosen, ttl_s)

    async def lease_keepalive(self, lease_id: int, *, timeout: float | None = None) -> int:
        self._begin(write=True)
        ttl = self._leases.renew(lease_id, now=self._clock())
        self._end_write()
        if ttl is None:
            raise errors.LeaseNotFound(f"lease {lease_id} is gone")
        return ttl

    async def lease_time_to_live(self, lease_id: int, *, timeout: float | None = None) -> int:
        self._begin()
        left = self._leases.remaining(lease_id, now=self._clock())
        if left is None:
            raise errors.LeaseNotFound(f"lease {lease_id} is gone")
        return ceil(left)

    async def lease_revoke(self, lease_id: int, *, timeout: float | None = None) -> None:
        self._begin(write=True)
        self._revoke(lease_id)
        self._end_write()

    def expire_due(self) -> None:
        """End every lease whose time is over; an injected clock's owner calls this."""
        for lease_id in self._leases.due(self._clock()):
            self._revoke(lease_id)
        self._schedule()

    # -- the rest

    def watch(self, prefix: str, *, start_revision: int | None = None) -> Watch:
        start = self._engine.revision + 1 if start_revision is None else start_revision
        watch = MemoryWatch(self, prefix, start)
        self._watches.add(watch)
        return watch

    async def status(self, *, timeout: float | None = None) -> StoreStatus:
        if not self.faults.leaderless:
            self._begin()
        return StoreStatus(
            revision=self._engine.revision,
            member_id=1,
            cluster_id=1,
            leader=0 if self.faults.leaderless else 1,
            raft_term=1,
            version="memory",
        )

    async def members(self, *, timeout: float | None = None) -> tuple[MemberView, ...]:
        try:
            return (MemberView("memory", await self.status(timeout=timeout), 1),)
        except errors.StoreError as error:
            return (MemberView("memory", problem=error.message),)

    async def without_leader(self) -> bool | None:
        return None if self.faults.unavailable else self.faults.leaderless

    async def compact(self, revision: int, *, timeout: float | None = None) -> None:
        self._begin(write=True)
        try:
            self._engine.compact(revision)
        except EngineError as error:
            raise errors.from_status(error.code, error.message, write=True) from error
        self._log = [entry for entry in self._log if entry[0] >= revision]
        self._wake()
        self._end_write()

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for watch in list(self._watches):
            await watch.aclose()

    # -- inside

    def _begin(self, *, write: bool = False) -> None:
        faults = self.faults
        if faults.unavailable or faults.refuse_next:
            faults.refuse_next = max(0, faults.refuse_next - 1)
            raise errors.StoreUnavailable("the store does not answer (injected)")
        if faults.leaderless:
            raise errors.StoreNoLeader("the store has no leader (injected)")
        if write and faults.lose_request_next:
            faults.lose_request_next -= 1
            raise errors.StoreOutcomeUnknown("the answer was lost (injected)")
        self.expire_due()

    def _end_write(self) -> None:
        if self.faults.lose_answer_next:
            self.faults.lose_answer_next -= 1
            raise errors.StoreOutcomeUnknown("the answer was lost (injected)")

    def _publish(self, changes: tuple[Change, ...]) -> None:
        if changes:
            self._log.append((self._engine.revision, changes))
            self._wake()

    def _wake(self) -> None:
        for watch in self._watches:
            watch.wake.set()

    def _revoke(self, lease_id: int) -> None:
        try:
            changes = self._engine.revoke(lease_id)
        except EngineError as error:
            raise errors.from_status(error.code, error.message, write=True) from error
        self._leases.stop(lease_id)
        self._publish(changes)

    def _schedule(self) -> None:
        """Wake up for the next lease, when time is real."""
        if not self._timed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._leases.next_deadline()
        if at != inf:
            delay = max(0.0, at - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self.expire_due)

    def _since(self, revision: int) -> tuple[list[tuple[int, tuple[Change, ...]]], int]:
        """Log entries from ``revision`` on, and the revision that follows them."""
        if revision < self._engine.compact_revision:
            raise errors.Compacted(
                f"revision {revision} is compacted", compact_revision=self._engine.compact_revision
            )
        if self.faults.unavailable:
            return [], revision
        return [e for e in self._log if e[0] >= revision], max(revision, self._engine.revision + 1)


class MemoryWatch:
    """Implements :class:`godwit.store.api.Watch` over the twin's log."""

    def __init__(self, store: MemoryStore, prefix: str, start: int) -> None:
        self.wake = asyncio.Event()
        self._store = store
        self._span = prefix_range(key_bytes(prefix))
        self._next = start
        self._ready: deque[WatchBatch] = deque()
        self._closed = False
        self._begun = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        while not self._closed:
            self.wake.clear()
            if not self._ready:
                self._collect()
            if self._ready:
                return self._ready.popleft()
            await self.wake.wait()
        raise StopAsyncIteration

    def _collect(self) -> None:
        if not self._begun:
            if self._next < self._store._engine.compact_revision:
                self._store._since(self._next)
            self._begun = True
            self._ready.append(WatchBatch(self._next - 1))
            return
        entries, self._next = self._store._since(self._next)
        for revision, changes in entries:
            events = tuple(
                _event(change) for change in changes if in_range(change.record.key, *self._span)
            )
            if events:
                self._ready.append(WatchBatch(revision, events))

    async def aclose(self) -> None:
        self._closed = True
        self._store._watches.discard(self)
        self.wake.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def _checked(key: str) -> bytes:
    if not key:
        raise errors.StoreRefused("key is not provided")
    return key_bytes(key)


def _kv(record: Record) -> KeyValue:
    return KeyValue(
        key_text(record.key),
        record.value,
        record.create_revision,
        record.mod_revision,
        record.version,
        record.lease,
    )


def _event(change: Change) -> WatchEvent:
    return WatchEvent(
        WatchKind.DELETE if change.deleted else WatchKind.PUT,
        _kv(change.record),
        None if change.prev is None else _kv(change.prev),
    )


def _step(op: Op) -> Step:
    key = key_bytes(op.key)
    if op.kind is OpKind.PUT:
        return Put(key, op.value, op.lease)
    start, end = prefix_range(key) if op.prefix else (key, b"")
    return Get(start, end) if op.kind is OpKind.GET else Delete(start, end)


def _result(op: Op, found: Found) -> OpResult:
    if op.kind is OpKind.GET:
        return OpResult(op.kind, kvs=tuple(_kv(record) for record in found.records))
    return OpResult(op.kind, deleted=found.count if op.kind is OpKind.DELETE else 0)
