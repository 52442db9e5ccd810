"""One decision: a snapshot in, steps and a sentence out. Nothing here reads, writes or waits."""

from __future__ import annotations

from collections.abc import Mapping

from godwit.cluster import coldstart, failover, fencing, membership, quorum, resolver
from godwit.cluster.coldstart import Cold
from godwit.cluster.facts import Memory, Snapshot
from godwit.cluster.failover import Place
from godwit.cluster.membership import Standing
from godwit.cluster.steps import Alarm, Decision, Note, Quarantine, Step


def listen(memory: Memory, snapshot: Snapshot, now: float) -> Memory:
    """Take a reading into account. Each replica of the manager does, with each reading.

    Whoever comes to lead then has counted as long as the leader before.
    """
    return remember(membership.listen(memory, snapshot, now), snapshot, now)


def remember(memory: Memory, snapshot: Snapshot, now: float) -> Memory:
    """The part of it that is about VMs, for who listens to the hosts alone more often."""
    memory = coldstart.remember(memory, snapshot, now)
    return resolver.remember(memory, snapshot, now)


def decide(snapshot: Snapshot, now: float, *, place: Place) -> Decision:
    """What to do now. ``snapshot.heard`` is the memory that has listened to this very reading.

    Only the leader's decision is carried out. ``now``: seconds of the monotonic clock that the
    store's reading was timed by.
    """
    hosts = membership.standings(snapshot)
    if not snapshot.store.leader or snapshot.heard.asked_at is None:
        return Decision((), quorum.explain(snapshot).sentence, hosts)
    steps: list[Step] = [*_quarantines(snapshot, now), *fencing.restores(snapshot, hosts)]
    taken: dict[str, str] = {}
    steps += failover.plan(
        snapshot, hosts, quorum=quorum.explain(snapshot), place=place, taken=taken, now=now
    )
    cold = coldstart.phase(snapshot, now)
    steps += resolver.resolve(snapshot, hosts, cold=cold, place=place, taken=taken, now=now)
    return Decision(tuple(steps), _sentence(hosts, steps, cold), hosts)


def _quarantines(snapshot: Snapshot, now: float) -> list[Quarantine]:
    found = []
    for name in sorted(snapshot.hosts):
        times = membership.recent_isolations(snapshot, name, now)
        if snapshot.hosts[name].mark is None and times >= snapshot.timings.isolations:
            why = f"it lost the store {times} times within an hour"
            found.append(Quarantine(host=name, why=why))
    return found


def _sentence(hosts: Mapping[str, Standing], steps: list[Step], cold: Cold) -> str:
    """What stands out, or that nothing does."""
    parts = [f"{name} is lost: {here.sentence}" for name, here in hosts.items() if here.lost]
    if cold.sentence:
        parts.append(cold.sentence)
    acts = [step.key for step in steps if not isinstance(step, Alarm | Note)]
    waits = [step.key for step in steps if isinstance(step, Alarm | Note)]
    parts += [*acts, *waits]
    return "; ".join(parts) or f"{len(hosts)} hosts, nothing to do"
