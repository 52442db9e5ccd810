"""What each member of the store says of itself, and whether their majority has no leader; pure.

A cluster without a leader commits nothing, so nobody can take anything over in it. Whoever keeps a
promise for as long as nobody can take over asks every member by itself (``StoreClient.members``)
and counts here. One that does not answer counts for nothing: it may be the leader.
"""

from __future__ import annotations

from collections.abc import Sequence

from godwit.store.api import MemberView


def voters(views: Sequence[MemberView]) -> int:
    """How many voting members the cluster has: the most that anybody knows of or we know of.

    Too many make a majority harder to reach, which is the safe side.
    """
    return max((len(views), *(view.voters for view in views)), default=0)


def members_without_leader(views: Sequence[MemberView]) -> int:
    """How many *different* members answered that they follow no leader."""
    return len({view.status.member_id for view in views if view.status and view.leaderless})


def majority_without_leader(views: Sequence[MemberView]) -> bool:
    """Whether a majority of all voting members answered "no leader".

    Nothing can have been committed from the moment the last of them lost its leader until the
    first of them votes again. The answers come at different moments of one round: count from
    *after* the round what must begin without a leader, and from *before* it what only has to last
    (a renewal that the store could not have refused).
    """
    return 2 * members_without_leader(views) > voters(views)


def leader_of(views: Sequence[MemberView]) -> MemberView | None:
    """The member that a majority of all members takes for the leader, itself included."""
    for view in views:
        if view.status is None or view.status.leader != view.status.member_id:
            continue
        behind = {
            other.status.member_id
            for other in views
            if other.status
            and other.status.leader == view.status.member_id
            and other.status.raft_term == view.status.raft_term
        }
        if 2 * len(behind) > voters(views):
            return view
    return None
