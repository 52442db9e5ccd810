"""The store's rules as a state machine without I/O: compares, puts, deletes, revisions, leases.

The in-memory twin and the daemon both run it; they add waiting, durability and transport.
A call either raises :class:`EngineError` and changes nothing, or is done as a whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, gt, lt, ne
from typing import Any

from godwit.store import errors
from godwit.store.api import MAX_OPS_PER_TXN, CompareResult, CompareTarget

FIRST_REVISION = 1


class EngineError(Exception):
    """A refusal with its gRPC code; nothing was changed."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Record:
    """A key as it stands at one revision. A deleted one has version 0."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class Change:
    """One key's step from ``prev`` to ``record``."""

    record: Record
    prev: Record | None

    @property
    def deleted(self) -> bool:
        """Whether the key is gone after this."""
        return self.record.version == 0


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison; with ``end`` it must hold for every key in the range."""

    key: bytes
    target: CompareTarget
    result: CompareResult
    operand: int | bytes
    end: bytes = b""


@dataclass(frozen=True, slots=True)
class Get:
    """Read ``key``, or the range up to ``end``; ``limit`` 0 means all."""

    key: bytes
    end: bytes = b""
    limit: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    """Write ``key``."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove ``key``, or the range up to ``end``."""

    key: bytes
    end: bytes = b""


Step = Get | Put | Delete


@dataclass(frozen=True, slots=True)
class Found:
    """What a step answered: the keys read, replaced or removed, and how many there are in all."""

    records: tuple[Record, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transaction did: the revision afterwards and the changes it made (often none)."""

    succeeded: bool
    revision: int
    answers: tuple[Found, ...]
    changes: tuple[Change, ...]


_RELATION: dict[CompareResult, Callable[[Any, Any], bool]] = {
    CompareResult.EQUAL: eq,
    CompareResult.NOT_EQUAL: ne,
    CompareResult.GREATER: gt,
    CompareResult.LESS: lt,
}
_ABSENT = Record(b"", b"", 0, 0, 0, 0)


def _side(record: Record, target: CompareTarget) -> int | bytes:
    match target:
        case CompareTarget.VERSION:
            return record.version
        case CompareTarget.CREATE:
            return record.create_revision
        case CompareTarget.MOD:
            return record.mod_revision
        case CompareTarget.LEASE:
            return record.lease
        case CompareTarget.VALUE:
            return record.value


def in_range(key: bytes, start: bytes, end: bytes) -> bool:
    r"""Whether ``key`` lies in the range; an empty end is one key, ``\0`` is no end."""
    if not end:
        return key == start
    return key >= start and (end == b"\0" or key < end)


class Engine:
    """All keys and leases, in memory."""

    def __init__(
        self,
        *,
        revision: int = FIRST_REVISION,
        compact_revision: int = 0,
        records: Iterable[Record] = (),
        leases: Mapping[int, int] | None = None,
    ) -> None:
        self.revision = revision
        self.compact_revision = compact_revision
        self._records = {record.key: record for record in records}
        self._order = sorted(self._records)
        self._ttl = dict(leases or {})
        self._attached: dict[int, set[bytes]] = {lease: set() for lease in self._ttl}
        for record in self._records.values():
            if record.lease in self._attached:
                self._attached[record.lease].add(record.key)

    # -- reading

    def get(self, step: Get) -> Found:
        """The keys of one read, in byte order."""
        if not step.key:
            raise EngineError(errors.INVALID_ARGUMENT, "key is not provided")
        keys = self._keys(step.key, step.end)
        chosen = keys[: step.limit] if step.limit > 0 else keys
        return Found(tuple(self._records[key] for key in chosen), len(keys))

    def lease_ttl(self, lease_id: int) -> int | None:
        """The granted TTL in seconds, None when there is no such lease."""
        return self._ttl.get(lease_id)

    def lease_keys(self, lease_id: int) -> list[bytes]:
        """The keys that die with the lease."""
        return sorted(self._attached.get(lease_id, ()))

    @property
    def leases(self) -> Mapping[int, int]:
        """Every lease and its TTL."""
        return self._ttl

    # -- changing

    def txn(
        self, conditions: Sequence[Condition], then: Sequence[Step], orelse: Sequence[Step] = ()
    ) -> Outcome:
        """Run one branch as a whole, at one revision."""
        if max(len(conditions), len(then), len(orelse)) > MAX_OPS_PER_TXN:
            raise EngineError(errors.INVALID_ARGUMENT, "too many operations in txn request")
        for condition in conditions:
            if not condition.key:
                raise EngineError(errors.INVALID_ARGUMENT, "key is not provided")
        _check_steps(then)
        _check_steps(orelse)
        succeeded = all(self._holds(condition) for condition in conditions)
        branch = then if succeeded else orelse
        for step in branch:
            if isinstance(step, Put) and step.lease and step.lease not in self._ttl:
                raise EngineError(errors.NOT_FOUND, "requested lease not found")
        changes: list[Change] = []
        answers = tuple(self._run(step, self.revision + 1, changes) for step in branch)
        if changes:
            self.revision += 1
        return Outcome(succeeded, self.revision, answers, tuple(changes))

    def grant(self, lease_id: int, ttl_s: int) -> None:
        """Make a lease."""
        if ttl_s <= 0 or lease_id <= 0:
            raise EngineError(errors.INVALID_ARGUMENT, "a lease needs a positive id and TTL")
        if lease_id in self._ttl:
            raise EngineError(errors.FAILED_PRECONDITION, "lease already exists")
        self._ttl[lease_id] = ttl_s
        self._attached[lease_id] = set()

    def revoke(self, lease_id: int) -> tuple[Change, ...]:
        """End a lease; its keys go in one revision."""
        if lease_id not in self._ttl:
            raise EngineError(errors.NOT_FOUND, "requested lease not found")
        changes: list[Change] = []
        for key in self.lease_keys(lease_id):
            self._remove(key, self.revision + 1, changes)
        del self._ttl[lease_id], self._attached[lease_id]
        if changes:
            self.revision += 1
        return tuple(changes)

    def compact(self, revision: int) -> None:
        """Note that history before ``revision`` is forgotten."""
        if revision <= self.compact_revision:
            raise EngineError(errors.OUT_OF_RANGE, "required revision has been compacted")
        if revision > self.revision:
            raise EngineError(errors.OUT_OF_RANGE, "required revision is a future revision")
        self.compact_revision = revision

    # -- inside

    def _keys(self, start: bytes, end: bytes) -> list[bytes]:
        if not end:
            return [start] if start in self._records else []
        first = bisect_left(self._order, start)
        last = len(self._order) if end == b"\0" else bisect_left(self._order, end)
        return self._order[first:last]

    def _holds(self, condition: Condition) -> bool:
        keys = self._keys(condition.key, condition.end)
        relation = _RELATION[condition.result]
        if not keys:
            # etcd: an absent key has no value to compare with, but its counters are zero.
            absent_value = condition.target is CompareTarget.VALUE
            return not absent_value and relation(
                _side(_ABSENT, condition.target), condition.operand
            )
        return all(
            relation(_side(self._records[key], condition.target), condition.operand) for key in keys
        )

    def _run(self, step: Step, revision: int, changes: list[Change]) -> Found:
        match step:
            case Get():
                return self.get(step)
            case Put():
                return self._put(step, revision, changes)
            case Delete():
                keys = self._keys(step.key, step.end)
                gone = tuple(self._remove(key, revision, changes) for key in keys)
                return Found(gone, len(gone))

    def _put(self, step: Put, revision: int, changes: list[Change]) -> Found:
        prev = self._records.get(step.key)
        record = Record(
            key=step.key,
            value=step.value,
            create_revision=prev.create_revision if prev else revision,
            mod_revision=revision,
            version=prev.version + 1 if prev else 1,
            lease=step.lease,
        )
        if prev is None:
            insort(self._order, step.key)
        else:
            self._detach(prev)
        if step.lease:
            self._attached[step.lease].add(step.key)
        self._records[step.key] = record
        changes.append(Change(record, prev))
        return Found((prev,) if prev else (), 1 if prev else 0)

    def _remove(self, key: bytes, revision: int, changes: list[Change]) -> Record:
        prev = self._records.pop(key)
        del self._order[bisect_left(self._order, key)]
        self._detach(prev)
        changes.append(Change(Record(key, b"", 0, revision, 0, 0), prev))
        return prev

    def _detach(self, record: Record) -> None:
        attached = self._attached.get(record.lease)
        if attached is not None:
            attached.discard(record.key)


def _check_steps(steps: Sequence[Step]) -> None:
    """Refuse a branch that would write one key twice: its result would depend on the order."""
    puts: set[bytes] = set()
    for step in steps:
        if not step.key:
            raise EngineError(errors.INVALID_ARGUMENT, "key is not provided")
        if isinstance(step, Put):
            if step.key in puts:
                raise EngineError(errors.INVALID_ARGUMENT, "duplicate key given in txn request")
            puts.add(step.key)
    for step in steps:
        if isinstance(step, Delete) and any(in_range(key, step.key, step.end) for key in puts):
            raise EngineError(errors.INVALID_ARGUMENT, "duplicate key given in txn request")
