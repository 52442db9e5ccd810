"""Cluster: the store and its quorum, a witness for two hosts, guards, and ways to fence a host."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Final

from godwit.cluster.validation.findings import Findings, names
from godwit.model.validation import ValidationCheck
from godwit.model.validation_facts import RUNG_WORDS, ClusterFacts, StoreSeen

FSYNC_WARN_S: Final = 0.010
"""etcd's own advice for the 99th percentile of its log's fsync."""
FSYNC_FAIL_S: Final = 0.500
"""Half of the members' election timeout: such a disk loses leaders."""
WRITE_WARN_S: Final = 0.100
WRITE_FAIL_S: Final = 1.0
"""A commit is part of every blackout; a second is the peer's whole time in a hand-over."""


def checks(facts: ClusterFacts) -> list[ValidationCheck]:
    """The checks of this category."""
    found = Findings("cluster")
    if facts.store is None:
        found.warn("store", "nothing is known of the store", "look at the manager's log")
    else:
        _store(found, facts.store)
        _latency(found, facts.store)
        _quorum(found, facts, facts.store)
    _guards(found, facts)
    _fencing(found, facts)
    return found


def _store(found: Findings, store: StoreSeen) -> None:
    ill = [member for member in store.members if not member.healthy]
    for member in ill:
        found.fail(
            "store",
            f"store member {member.name} does not serve: {member.reason or 'no answer'}",
            "look at its log, and bring it back before a second one goes",
            [member.host] if member.host else [],
        )
    if store.reason:
        found.fail("store", f"the store takes no writes: {store.reason}", "look at its log")
    elif not ill:
        found.ok("store", f"the store ({store.kind}) answers, {_count(store)}")


def _count(store: StoreSeen) -> str:
    number = len(store.members)
    return "one member" if number == 1 else f"all {number} members"


def _latency(found: Findings, store: StoreSeen) -> None:
    for member in store.members:
        if member.fsync_p99_s is None:
            if store.kind == "etcd" and member.healthy:
                found.warn(
                    "store-fsync",
                    f"store member {member.name} has not said how long its disk takes",
                    "it has written too little since it started, or its figures cannot be read: "
                    "validate again later",
                    [member.host] if member.host else [],
                )
            continue
        text = f"its disk takes {member.fsync_p99_s * 1000:.1f} ms for a write to be safe (p99)"
        hint = "give the store a disk of its own, an SSD with power-loss protection at best"
        hosts = [member.host] if member.host else []
        if member.fsync_p99_s > FSYNC_FAIL_S:
            found.fail("store-fsync", f"store member {member.name}: {text}", hint, hosts)
        elif member.fsync_p99_s > FSYNC_WARN_S:
            found.warn("store-fsync", f"store member {member.name}: {text}", hint, hosts)
        else:
            found.ok("store-fsync", f"store member {member.name}: {text}")
    if not store.write_s:
        return
    usual = median(store.write_s)
    text = f"a durable write to the store takes {usual * 1000:.1f} ms (median of "
    text += f"{len(store.write_s)}, {max(store.write_s) * 1000:.1f} ms at the most)"
    hint = "every move commits while its VM is paused: look at the store's disk and network"
    if usual > WRITE_FAIL_S:
        found.fail("store-write", text, hint)
    elif usual > WRITE_WARN_S:
        found.warn("store-write", text, hint)
    else:
        found.ok("store-write", text)


def _quorum(found: Findings, facts: ClusterFacts, store: StoreSeen) -> None:
    """Whoever takes over must hold a majority: two hosts alone have none without a third vote."""
    hosts, members = len(facts.hosts), max(store.voters, len(store.members))
    majority = members // 2 + 1
    on_host = Counter(member.host for member in store.members if member.host)
    crowded = [name for name, count in on_host.items() if members - count < majority]
    if store.kind == "embedded":
        say = "two hosts have no witness" if hosts == 2 else "the store has no second member"
        found.warn(
            "witness",
            f"{say}: it runs on one machine, and nothing fails over when that machine dies",
            "form the cluster on etcd with three members; the third may be any small machine",
        )
    elif members < 3 and hosts >= 2:
        say = "two hosts have no witness" if hosts == 2 else "the store cannot lose a member"
        found.fail(
            "witness",
            f"{say}: of {members} store members {majority} must always answer",
            "add a store member until there are three, on any small machine: automatic failover "
            "is refused without one",
        )
    elif crowded:
        found.fail(
            "witness",
            f"{names(crowded)} has so many of the {members} store members that the rest is no "
            "majority: the cluster stands still without it",
            "put each member on a machine of its own; the third may be any small machine",
            crowded,
        )
    elif members % 2 == 0:
        found.warn(
            "witness",
            f"{members} store members bear the loss of {(members - 1) // 2}, as {members - 1} do",
            "an odd number of members is better",
        )
    else:
        bear = (members - 1) // 2
        found.ok("witness", f"{members} store members: the loss of {bear} changes nothing")


def _guards(found: Findings, facts: ClusterFacts) -> None:
    without = [probe.name for probe in facts.probes if not probe.guard]
    if without:
        found.fail(
            "guards",
            f"no guard answers on {names(without)}",
            "start godwit-guard there: without it a hung agent is not noticed",
            without,
        )
    elif facts.probes:
        found.ok("guards", "every host's guard answers its agent")


def _fencing(found: Findings, facts: ClusterFacts) -> None:
    if facts.rungs is None:
        found.warn(
            "fencing",
            "no way to fence a host could be tried",
            "without proof that a dead host is off nothing is started elsewhere by itself",
            [host.name for host in facts.hosts],
        )
        return
    for rung in facts.rungs:
        if not rung.answers:
            found.fail(
                "fencing",
                f"{rung.device or RUNG_WORDS[rung.rung]} is of no use to fence {rung.host}: "
                f"{rung.reason or 'it does not answer'}",
                _RUNG_HINTS[rung.rung],
                [rung.host],
            )
    good = {rung.host for rung in facts.rungs if rung.answers}
    bare = [host.name for host in facts.hosts if host.name not in {r.host for r in facts.rungs}]
    if bare:
        found.warn(
            "fencing",
            f"there is no way to be sure that {names(bare)} is off when it is silent",
            "set a power device (godwit host power set) or arm its watchdog: HA is refused where "
            "no rung exists",
            bare,
        )
    if good and not bare and all(rung.answers for rung in facts.rungs):
        ways = {rung.rung for rung in facts.rungs}
        told = "; ".join(RUNG_WORDS[way] for way in RUNG_WORDS if way in ways)
        found.ok("fencing", f"every host can be fenced, and each way answered: {told}")


_RUNG_HINTS = {
    "storage": "look at the log and the settings of godwit-iofence on the storage server",
    "deadline": "look at the guard's log and at /dev/watchdog on that host",
    "power": "look at the BMC's address, its network and its password: godwit host power show",
}
