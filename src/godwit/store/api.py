"""The store as the rest of Godwit sees it: typed values and one protocol.

Keys are text, values are bytes. A *revision* counts the store's changes, starting at 1 for the
empty store; everything one transaction changes shares one revision. A key's *version* counts its
puts since it was created; an absent key has version 0.

Every call takes ``timeout`` in seconds; ``None`` means the store object's own default, never
"for ever". Only a watch waits without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

# Lower-case twins of etcd's limits, refused here before anything is sent.
MAX_OPS_PER_TXN = 128


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it stands: its value and where in the history it was made."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class CompareTarget(StrEnum):
    """What of a key a transaction may ask about."""

    VERSION = "VERSION"
    CREATE = "CREATE"
    MOD = "MOD"
    VALUE = "VALUE"
    LEASE = "LEASE"


class CompareResult(StrEnum):
    """How the key's side must relate to the operand."""

    EQUAL = "EQUAL"
    GREATER = "GREATER"
    LESS = "LESS"
    NOT_EQUAL = "NOT_EQUAL"


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition of a transaction. Make it with the helpers below.

    A comparison of the *value* of an absent key is false, whatever the relation.
    """

    key: str
    target: CompareTarget
    operand: int | bytes
    result: CompareResult = CompareResult.EQUAL


def version_is(key: str, version: int) -> Compare:
    """True when the key was put exactly ``version`` times since its creation."""
    return Compare(key, CompareTarget.VERSION, version)


def mod_is(key: str, revision: int) -> Compare:
    """True when the key last changed at ``revision``: nobody wrote since it was read."""
    return Compare(key, CompareTarget.MOD, revision)


def create_is(key: str, revision: int) -> Compare:
    """True when the key was created at ``revision`` (not deleted and made anew since)."""
    return Compare(key, CompareTarget.CREATE, revision)


def absent(key: str) -> Compare:
    """True when there is no such key."""
    return Compare(key, CompareTarget.VERSION, 0)


def exists(key: str) -> Compare:
    """True when there is such a key."""
    return Compare(key, CompareTarget.VERSION, 0, CompareResult.GREATER)


def value_is(key: str, value: bytes) -> Compare:
    """True when the key exists and holds exactly ``value``."""
    return Compare(key, CompareTarget.VALUE, value)


def lease_is(key: str, lease: int) -> Compare:
    """True when the key hangs on this lease (0: on none)."""
    return Compare(key, CompareTarget.LEASE, lease)


class OpKind(StrEnum):
    """What one step of a transaction does."""

    PUT = "put"
    DELETE = "delete"
    GET = "get"


@dataclass(frozen=True, slots=True)
class Op:
    """One step of a transaction. Make it with the functions below.

    ``prefix`` makes ``key`` stand for every key that starts with it (DELETE and GET only).
    """

    kind: OpKind
    key: str
    value: bytes = b""
    lease: int = 0
    prefix: bool = False


def put(key: str, value: bytes, *, lease: int = 0) -> Op:
    """Write a key; it dies with ``lease`` unless that is 0."""
    return Op(OpKind.PUT, key, value, lease)


def delete(key: str) -> Op:
    """Remove a key; an absent one is no error."""
    return Op(OpKind.DELETE, key)


def delete_prefix(prefix: str) -> Op:
    """Remove every key that starts with ``prefix``."""
    return Op(OpKind.DELETE, prefix, prefix=True)


def get(key: str) -> Op:
    """Read a key as it is at this step of the transaction."""
    return Op(OpKind.GET, key)


def get_prefix(prefix: str) -> Op:
    """Read every key that starts with ``prefix``, as it is at this step."""
    return Op(OpKind.GET, prefix, prefix=True)


@dataclass(frozen=True, slots=True)
class OpResult:
    """What one step answered: ``kvs`` for a GET, ``deleted`` for a DELETE."""

    kind: OpKind
    kvs: tuple[KeyValue, ...] = ()
    deleted: int = 0

    @property
    def kv(self) -> KeyValue | None:
        """The key read by a GET of one key, None when it is absent."""
        return self.kvs[0] if self.kvs else None


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Which branch ran, at which revision the store then stood, and what each step answered."""

    succeeded: bool
    revision: int
    responses: tuple[OpResult, ...] = ()


@dataclass(frozen=True, slots=True)
class RangeResult:
    """Keys in byte order, and the revision at which this list is the truth."""

    kvs: tuple[KeyValue, ...]
    revision: int


class WatchKind(StrEnum):
    """What happened to a key."""

    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. For a delete, ``kv`` has only key and ``mod_revision``.

    ``prev`` is the key as it was before, None for a creation or when no longer known.
    """

    kind: WatchKind
    kv: KeyValue
    prev: KeyValue | None = None


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Everything one revision changed under the prefix.

    With no events it is news of progress: all changes up to and including ``revision`` have been
    handed out. The first batch of every watch is such a one and says that the watch stands.
    """

    revision: int
    events: tuple[WatchEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease; ``ttl_s`` may be longer than asked for, and is a lower bound."""

    id: int
    ttl_s: int


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How the member that answered sees itself and its cluster. ``leader`` 0 means none."""

    revision: int
    member_id: int
    cluster_id: int
    leader: int
    raft_term: int
    version: str = ""
    db_size: int = 0


@dataclass(frozen=True, slots=True)
class MemberView:
    """One endpoint's answer. ``status`` is None when there was none, and ``problem`` says why.

    ``voters`` is how many voting members the cluster has as this one knows it, 0 when it was not
    told.
    """

    endpoint: str
    status: StoreStatus | None = None
    voters: int = 0
    problem: str = ""

    @property
    def leaderless(self) -> bool:
        """It answered, and follows no leader. Silence is not an answer."""
        return self.status is not None and self.status.leader == 0


class Watch(Protocol):
    """Changes under a prefix in order, each revision once, over any number of reconnects.

    Iterate it, and close it (or use it as an async context manager). Waiting for the next batch
    may be cancelled at any time without losing one. Raises Compacted when a gap cannot be
    avoided, StoreDenied, StoreRolledBack; an unreachable store is waited for.
    """

    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> WatchBatch: ...
    async def aclose(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Store(Protocol):
    """A strictly ordered key-value store with transactions, leases and watches.

    Reads are linearizable unless asked otherwise: they see every write that was answered before
    they began. Errors are those of :mod:`godwit.store.errors`.
    """

    async def get(
        self, key: str, *, linearizable: bool = True, timeout: float | None = None
    ) -> KeyValue | None:
        """One key, or None."""

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
        """Every key that starts with ``prefix`` (all keys for an empty one), at most ``limit``.

        ``after``: only those behind this key, which is how a long list is read in pages. Each page
        has a revision of its own. ``keys_only``: without the values.
        """

    async def put(
        self, key: str, value: bytes, *, lease: int = 0, timeout: float | None = None
    ) -> int:
        """Write a key; the revision it was written at."""

    async def delete(self, key: str, *, prefix: bool = False, timeout: float | None = None) -> int:
        """Remove a key (or all under a prefix); how many there were."""

    async def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Op],
        orelse: Sequence[Op] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        """Run ``then`` if every comparison holds, else ``orelse``; all or nothing."""

    async def lease_grant(
        self, ttl_s: int, *, lease_id: int = 0, timeout: float | None = None
    ) -> Lease:
        """A lease that lives ``ttl_s`` without being kept alive; id 0 lets the store choose."""

    async def lease_keepalive(self, lease_id: int, *, timeout: float | None = None) -> int:
        """Start the lease's time anew; its TTL in seconds. LeaseNotFound when it is gone."""

    async def lease_time_to_live(self, lease_id: int, *, timeout: float | None = None) -> int:
        """Seconds left, not renewing it. LeaseNotFound when it is gone."""

    async def lease_revoke(self, lease_id: int, *, timeout: float | None = None) -> None:
        """End a lease and delete its keys, in one revision."""

    def watch(self, prefix: str, *, start_revision: int | None = None) -> Watch:
        """Changes under ``prefix`` from ``start_revision`` on (None: from now on)."""

    async def status(self, *, timeout: float | None = None) -> StoreStatus:
        """The state of the member that answers."""

    async def members(self, *, timeout: float | None = None) -> tuple[MemberView, ...]:
        """What every member says of itself, asked at once and each for itself.

        Needs no majority and raises nothing of the store's: who does not answer within ``timeout``
        seconds has a view that says so. :mod:`godwit.store.members` counts.
        """

    async def without_leader(self) -> bool | None:
        """True when a majority of the members answered, and said that there is no leader.

        Then nobody can write anything, whoever asks. None when too few answered to know.
        """

    async def compact(self, revision: int, *, timeout: float | None = None) -> None:
        """Forget the history before ``revision``."""

    async def aclose(self) -> None:
        """Close connections and watches."""
