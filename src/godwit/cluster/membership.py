"""Who belongs to the cluster right now: host states, from what a manager heard itself.

A host writes a renewal every 3 s. A manager that reads one counts, on its own monotonic clock, how
long the record stays the same. Three things make that count a proof:

- it begins when the *answer* came that first showed the renewal, and ends when the last question
  was *sent*;
- it stands still while the store does not answer. When it answers again, in another term or after a
  pause, at least `Timings.after_gap_s` is left to count: a host's guard takes "no leader", said by
  a majority of the store's members, for a renewal;
- whoever acts on it compares in the same transaction that the record did not change.

A lease that has run out says nothing here: the store's leases are a hint. The renewal itself hangs
on none. Nobody trusts its age: a manager that has just begun to listen counts from its own first
reading. But what it says holds, however old, for nothing came after it (``docs/design/0021``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from godwit.cluster.facts import (
    HOUR_S,
    Heard,
    HostSeen,
    Memory,
    Rung,
    Snapshot,
)
from godwit.model.host import HostState


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A host's state with the sentence that explains it and what happens ``next`` (may be empty).

    ``lost``: its VMs are to be taken over as soon as there is proof. ``fresh``: it has renewed just
    now. ``takes``: it may get VMs.
    """

    state: HostState
    sentence: str
    next: str = ""
    lost: bool = False
    fresh: bool = False
    takes: bool = False


def listen(memory: Memory, snapshot: Snapshot, now: float) -> Memory:
    """Take a reading into account. Every replica of the manager does, whether it leads or not."""
    store = snapshot.store
    if not store.leader:
        return replace(memory, asked_at=None)
    before, left = memory.asked_at, snapshot.timings
    through = (
        before is not None
        and store.term == memory.term
        and store.answered_at - before <= left.gap_s
    )
    latest = store.answered_at - (left.takeover_s - left.after_gap_s)
    hosts, isolations = dict(memory.hosts), dict(memory.isolations)
    answering = {
        name: memory.answering.get(name, now)
        for name, host in snapshot.hosts.items()
        if host.answers
    }
    for name, host in snapshot.hosts.items():
        heard = memory.hosts.get(name)
        if heard is None:
            hosts[name] = replace(_heard(host, store.answered_at), witnessed=False)
        elif _changed(heard, host):
            if _isolated(memory, snapshot, host, heard):
                kept = (at for at in isolations.get(name, ()) if now - at < HOUR_S)
                isolations[name] = (*kept, now)
            hosts[name] = _heard(host, store.answered_at)
        elif not through:
            hosts[name] = replace(heard, since=max(heard.since, latest))
        if host.mark is not None:  # when the mark is taken away the count begins anew
            isolations.pop(name, None)
    for gone in hosts.keys() - snapshot.hosts.keys():
        del hosts[gone]
    return replace(
        memory,
        hosts=hosts,
        isolations=isolations,
        answering=answering,
        term=store.term,
        asked_at=store.asked_at,
    )


def _heard(host: HostSeen, since: float) -> Heard:
    return Heard(host.renewal, host.renewal_revision, since, since)


def _changed(heard: Heard, host: HostSeen) -> bool:
    """A renewal that is gone is no renewal: the store's lease ran out, the count goes on."""
    return host.renewal is not None and host.renewal_revision != heard.revision


def _isolated(memory: Memory, snapshot: Snapshot, host: HostSeen, heard: Heard) -> bool:
    """It was away long enough to freeze its VMs, and is the same boot that comes back."""
    if memory.asked_at is None or heard.renewal is None or host.renewal is None:
        return False
    away = memory.asked_at - heard.since
    return away >= snapshot.timings.freeze_s and host.renewal.boot_id == heard.renewal.boot_id


def recent_isolations(snapshot: Snapshot, host: str, now: float) -> int:
    """How often the host lost the store within the last hour and came back."""
    return sum(now - at < HOUR_S for at in snapshot.heard.isolations.get(host, ()))


def is_off(snapshot: Snapshot, name: str) -> str:
    """Why the host is known to be off in this silence of its; empty when it is not."""
    host, heard = snapshot.hosts[name], snapshot.identity(name)
    for attempt in snapshot.attempts:
        mine = attempt.host == name and attempt.rung is Rung.POWER and attempt.heard == heard
        if mine and attempt.outcome == "confirmed":
            return "its power device says off"
    word, boots = host.confirmed_down, {heard[0] or host.boot_id}
    if not _witnessed(snapshot, name):
        # What the guard of a boot before left; its agent told of a later one, which is meant.
        boots.add(host.boot_id)
    if word is not None and word.boot_id in boots:
        return f"{word.by or 'a person'} confirmed that it is down"
    return ""


def standing(snapshot: Snapshot, name: str) -> Standing:
    """The state of one host. No host is ever lost while the store has no leader."""
    host, timings, silent = snapshot.hosts[name], snapshot.timings, snapshot.silence(name)
    if snapshot.heard.asked_at is None or not snapshot.store.leader:
        return replace(_renewing(host), sentence=_NO_LEADER, fresh=False, takes=False)
    off = is_off(snapshot, name) if silent >= timings.late_s else ""
    if off or silent >= timings.takeover_s:
        return _lost(host, _silence(snapshot, name, silent), off)
    unheard = snapshot.unheard(name)
    if unheard >= timings.freeze_s and silent >= timings.late_s:
        rest = timings.takeover_s - silent
        return Standing(
            state=HostState.ISOLATED,
            sentence=f"{_silence(snapshot, name, unheard)}; {_guard(snapshot, name)}",
            next=f"in {rest:.0f} s it counts as lost",
        )
    if not _witnessed(snapshot, name):
        then = f"in {timings.takeover_s - silent:.0f} s it counts as lost, if it does not renew"
        words = f"this manager listens for {unheard:.0f} s only and has not heard it yet"
        return replace(_renewing(host), sentence=words, next=then, fresh=False, takes=False)
    if unheard >= timings.late_s:
        late = f"its last renewal is {unheard:.0f} s old"
        return replace(_renewing(host), sentence=late, next="", fresh=False, takes=False)
    return _renewing(host)


def _witnessed(snapshot: Snapshot, name: str) -> bool:
    heard = snapshot.heard.hosts.get(name)
    return heard is None or heard.witnessed


def _silence(snapshot: Snapshot, name: str, seconds: float) -> str:
    """How long nothing was heard; what was before this manager listened, it cannot know."""
    if _witnessed(snapshot, name):
        return f"no renewal for {seconds:.0f} s"
    return f"no renewal in the {seconds:.0f} s since this manager listens"


def _guard(snapshot: Snapshot, name: str) -> str:
    heard = snapshot.heard.hosts.get(name)
    if heard is None or heard.renewal is None or heard.renewal.guard != "armed":
        return "its guard was not armed, nothing is known of its VMs"
    return f"its guard, if it lives, froze what has ha at {snapshot.timings.freeze_s:.0f} s"


_NO_LEADER = "the store has no leader: nobody is declared lost, VMs run on"


def _lost(host: HostSeen, silence: str, off: str) -> Standing:
    then = "its highly available VMs start elsewhere once there is proof that they stand still here"
    if off:
        return Standing(state=HostState.DOWN, sentence=off, next=then, lost=True)
    if host.answers:
        return Standing(
            state=HostState.ISOLATED,
            sentence=f"{silence}, but its agent answers",
            next=then,
            lost=True,
        )
    return Standing(
        state=HostState.DOWN,
        sentence=f"{silence} and no answer",
        next=then,
        lost=True,
    )


def _renewing(host: HostSeen) -> Standing:
    mark = host.mark
    if mark is not None:
        by = f" by {mark.by}" if mark.by else ""
        why = f": {mark.reason}" if mark.reason else ""
        ends = {
            "draining": "when it is empty it is in maintenance",
            "maintenance": "it takes VMs again after: godwit host maintenance exit",
            "quarantined": "its VMs run on; it takes new ones after: godwit host maintenance exit",
        }
        return Standing(
            state=HostState(mark.state),
            sentence=f"marked{by}{why}",
            next=ends[mark.state],
            fresh=True,
        )
    if not host.agent:
        return Standing(
            state=HostState.UNMANAGED,
            sentence="its guard renews the lease, its agent is away; its VMs run on",
            next="its agent is started again by its service manager",
            fresh=True,
        )
    return Standing(state=HostState.UP, sentence="it renews its lease", fresh=True, takes=True)


def standings(snapshot: Snapshot) -> Mapping[str, Standing]:
    """All hosts, by name."""
    return {name: standing(snapshot, name) for name in sorted(snapshot.hosts)}
