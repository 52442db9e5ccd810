"""The mark that notices a store, or one of its members, that went back in time.

Two things only rise. The revision of *linearizable* answers, whichever member gives them. And the
raft term of *each member*, which it keeps on its disk: one that shows a lower term than it did has
an older disk than it had, and what it promised since (a vote, a write) is forgotten. Terms of
different members are not compared: one that stood for election alone is ahead of the others, and
nothing is wrong.

Answers overtake one another, so each is held against the mark taken before its request was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from godwit.store import codec, errors
from godwit.store.codec import Json


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in a store's history: the newest revision, and the newest term by member id."""

    revision: int = 0
    terms: Mapping[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class High:
    """The newest of everything that a store has shown to this client."""

    cluster: int = 0
    revision: int = 0
    terms: dict[int, int] = field(default_factory=dict)

    def mark(self) -> Mark:
        """Where the store stands as far as we know, taken before a request is sent."""
        return Mark(self.revision, dict(self.terms))

    def check(self, body: Json, floor: Mark, *, ordered: bool) -> None:
        """Note an answer's header; raises StoreRolledBack when it is older than ``floor``.

        ``ordered``: the answer is linearizable, so that its revision may not be older, too.
        """
        cluster = codec.header(body, "cluster_id")
        if not cluster and not ordered:
            return  # not every answer has a whole header
        if self.cluster and cluster != self.cluster:
            raise errors.StoreRolledBack("this is another store than the one first connected to")
        member, term = codec.header(body, "member_id"), codec.header(body, "raft_term")
        known = floor.terms.get(member, 0)
        if term < known:
            raise errors.StoreMemberRolledBack(
                f"member {member:x} of the store went back from term {known} to term {term}"
            )
        revision = codec.header(body)
        if ordered and revision < floor.revision:
            raise errors.StoreRolledBack(
                f"the store went back from revision {floor.revision} to revision {revision}"
            )
        self.cluster = cluster
        self.terms[member] = max(self.terms.get(member, 0), term)
        if ordered:
            self.revision = max(self.revision, revision)
