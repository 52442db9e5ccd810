"""What `cluster status` says of the store in words, and whether failover may act by itself.

A failover is a write, and a write needs a majority of the store's members. So what survives is
counted in members, not in hosts; and of two hosts none can have a majority alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from godwit.cluster.facts import Member, Snapshot


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """``automatic``: failover acts by itself. ``spare``: members that may still be lost."""

    automatic: bool
    spare: int
    sentence: str
    next: str = ""


def explain(snapshot: Snapshot) -> Quorum:
    """The store's standing, from its members and how many hosts there are."""
    store = snapshot.store
    if not store.leader:
        return Quorum(
            automatic=False,
            spare=0,
            sentence="the store has no leader: nothing can be changed, VMs run on",
            next="it elects one by itself as soon as a majority of its members see each other",
        )
    if store.embedded:
        return Quorum(
            automatic=True,
            spare=0,
            sentence="the store is a daemon on one machine: while it is away nothing fails over",
            next=_hint_embedded(len(snapshot.hosts)),
        )
    return _members(store.members, hosts=len(snapshot.hosts))


def _hint_embedded(hosts: int) -> str:
    return "" if hosts < 2 else "for failover that survives any one machine, use etcd on three"


def _members(members: tuple[Member, ...], *, hosts: int) -> Quorum:
    total, healthy = len(members), sum(member.healthy for member in members)
    majority = total // 2 + 1
    spare = max(0, healthy - majority)
    count = f"{healthy} of {total} members of the store are healthy, {majority} are needed"
    if hosts == 2 and total < 3:
        return Quorum(
            automatic=False,
            spare=spare,
            sentence=f"{count}; two hosts without a witness: none of them could take over alone",
            next="add a third member of the store on any small machine; until then a failover "
            "waits for: godwit host confirm-down",
        )
    if spare == 0:
        away = ", ".join(member.name for member in members if not member.healthy)
        return Quorum(
            automatic=True,
            spare=0,
            sentence=f"{count}: losing one more stops all changes",
            next=f"bring back {away}" if away else "add members, three are the least",
        )
    even = " (an even number: one less would bear as much)" if total % 2 == 0 else ""
    return Quorum(
        automatic=True,
        spare=spare,
        sentence=f"{count}: {spare} more may be lost{even}",
    )


def without(members: tuple[Member, ...], host: str) -> str:
    """Why the store could not be written any more without this host; empty when it could."""
    if not any(member.host == host for member in members):
        return ""
    if len(members) == 1:
        return f"the store runs on {host} alone"
    left = sum(member.healthy for member in members if member.host != host)
    majority = len(members) // 2 + 1
    if left >= majority:
        return ""
    return f"without {host} {left} of {len(members)} members of the store are left, not {majority}"
