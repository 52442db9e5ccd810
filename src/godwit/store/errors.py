"""What can go wrong with the store, grouped by what the caller should do about it.

::

    StoreError
    ├── StoreUnavailable        nothing was done: try again, perhaps elsewhere
    │   ├── StoreTimeout        … the deadline passed before anything was done
    │   └── StoreNoLeader       … a member answered, but the cluster has no leader now
    ├── StoreOutcomeUnknown     a write may or may not have happened: read, then decide
    ├── Compacted               the history asked for is gone: list again, then watch from there
    ├── StoreDenied             this identity may not: a person must look
    ├── StoreFull               no room for the write; nothing was done
    ├── StoreRolledBack         the store went back in time: stop and let a person look
    │   └── StoreMemberRolledBack   … one member did: what it says is not used
    └── StoreRefused            the request itself is wrong; the same request fails again
        ├── LeaseNotFound
        └── LeaseExists
"""

from __future__ import annotations


class StoreError(Exception):
    """Any failure of the store; ``hint`` says in one line what to do."""

    code = "store-error"
    default_hint = "See the log of the store."

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint


class StoreUnavailable(StoreError):
    """No member could be asked. Nothing was done, so a retry is safe."""

    code = "store-unavailable"
    default_hint = "Nothing was done; try again."


class StoreTimeout(StoreUnavailable):
    """The deadline passed. Only for reads, and for writes that were never sent."""

    code = "store-timeout"


class StoreNoLeader(StoreUnavailable):
    """A member answered that its cluster has no leader at the moment."""

    code = "store-no-leader"
    default_hint = "The store has lost its majority; see which members are down."


class StoreOutcomeUnknown(StoreError):
    """A write was sent and its answer never came. It may have happened."""

    code = "store-outcome-unknown"
    default_hint = "Read the record to learn whether the write happened."


class Compacted(StoreError):
    """The revision asked for is older than the kept history.

    ``compact_revision`` is the oldest revision still watchable, 0 where the store did not say.
    """

    code = "store-compacted"
    default_hint = "List again and watch from the revision of the list."

    def __init__(self, message: str, *, compact_revision: int = 0) -> None:
        super().__init__(message)
        self.compact_revision = compact_revision


class StoreDenied(StoreError):
    """Certificate or permission refused. Nothing was done."""

    code = "store-denied"
    default_hint = "Check this host's certificate and the store's certificate authority."


class StoreFull(StoreError):
    """The store has no room for the write. Nothing was done."""

    code = "store-full"
    default_hint = "Make room on the store's disk."


class StoreRolledBack(StoreError):
    """The store answered with an older term or revision than it already showed us."""

    code = "store-rolled-back"
    default_hint = "The store was restored from a copy; raise all epochs before going on."


class StoreMemberRolledBack(StoreRolledBack):
    """A member's own raft term went backwards: its disk was put back, it may have voted twice."""

    code = "store-member-rolled-back"
    default_hint = "Remove this member from the store and add it anew with an empty disk."


class StoreRefused(StoreError):
    """The request is wrong in itself. Nothing was done."""

    code = "store-refused"
    default_hint = "The same request will fail again."


class LeaseNotFound(StoreRefused):
    """The lease has expired, was revoked, or never was."""

    code = "store-lease-not-found"
    default_hint = "Grant a new lease."


class LeaseExists(StoreRefused):
    """A lease with this id exists already."""

    code = "store-lease-exists"


# gRPC status codes, as far as the gateway uses them.
CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 1, 2, 3, 4, 5
ALREADY_EXISTS, PERMISSION_DENIED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION = 6, 7, 8, 9
OUT_OF_RANGE, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, UNAUTHENTICATED = 11, 12, 13, 14, 16


def from_status(code: int, message: str, *, write: bool) -> StoreError:
    """The error for a gRPC status that a member answered with.

    A write that a member gave up on (no quorum in time, leader lost) may still be committed
    later, so unless the message proves otherwise such a write has an unknown outcome.
    """
    text = message.lower()
    refusals: dict[int, type[StoreError]] = {
        PERMISSION_DENIED: StoreDenied,
        UNAUTHENTICATED: StoreDenied,
        INVALID_ARGUMENT: StoreRefused,
        UNIMPLEMENTED: StoreRefused,
        NOT_FOUND: LeaseNotFound if "lease" in text else StoreRefused,
        ALREADY_EXISTS: StoreRefused,
        FAILED_PRECONDITION: LeaseExists if "lease already exists" in text else StoreRefused,
    }
    if "compacted" in text:
        return Compacted(message)
    if code in refusals:
        return refusals[code](message)
    if code == RESOURCE_EXHAUSTED:
        full = "space" in text or "quota" in text
        return StoreFull(message) if full else StoreUnavailable(message)
    if code == OUT_OF_RANGE:
        return StoreRefused(message)
    if "no leader" in text:
        return StoreNoLeader(message)
    if write:
        return StoreOutcomeUnknown(message)
    return StoreTimeout(message) if code == DEADLINE_EXCEEDED else StoreUnavailable(message)
