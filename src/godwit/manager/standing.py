"""How the cluster stands, in words: what each state means and what happens next; pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from godwit.cluster.membership import Standing
from godwit.model.cluster_status import (
    ClusterStatus,
    HostStanding,
    ManagerStanding,
    MemberStanding,
    StoreStanding,
)
from godwit.model.host import HostState, HostView
from godwit.model.skew import Speaks, behind, common_level, newest
from godwit.model.trust import ClusterIdentity, IssuedCertificate
from godwit.store.api import MemberView
from godwit.store.members import voters

# A certificate lives a year and is renewed when a third of that is left: who has less than this
# has not been renewed for two months.
LATE_S = 60 * 86400.0

# What a state means, and what happens next.
WORDS: dict[HostState, tuple[str, str]] = {
    HostState.UP: ("it serves", ""),
    HostState.UNMANAGED: (
        "its guard renews its lease, its agent is away: its VMs run on",
        "its agent is started again by systemd; until then nothing on it can be changed",
    ),
    HostState.ISOLATED: (
        "it has lost the store",
        "its guard holds its highly available VMs until it is back, or ends them if they were "
        "started elsewhere; the others run on",
    ),
    HostState.DOWN: (
        "it renews no lease",
        "its VMs can start elsewhere only once it is proven to be off: by its power device, or by "
        "your word: godwit host confirm-down {name}",
    ),
    HostState.DRAINING: ("its VMs are moving away", "then it is in maintenance"),
    HostState.MAINTENANCE: (
        "no VM is placed on it",
        "when the work is done: godwit host maintenance exit {name}",
    ),
    HostState.QUARANTINED: (
        "it was isolated too often: no new VM is placed on it",
        "find out why; then: godwit host return {name}",
    ),
}

_UNREAD = (
    "{count} records are of a newer version than this manager, which acts as if it did not see "
    "them: upgrade it, or ask a newer one"
)


def member_standing(view: MemberView) -> MemberStanding:
    """What one member says of itself."""
    status = view.status
    if status is None:
        return MemberStanding(endpoint=view.endpoint, state="silent", problem=view.problem)
    if view.leaderless:
        problem = view.problem or "it follows no leader"
        return MemberStanding(endpoint=view.endpoint, state="alone", problem=problem)
    leads = status.leader == status.member_id
    return MemberStanding(endpoint=view.endpoint, state="leader" if leads else "follower")


def store_standing(members: Sequence[MemberStanding], *, voters: int) -> StoreStanding:
    """Count the members that answer against the majority of ``voters`` that has to."""
    answering = sum(one.state in ("leader", "follower") for one in members)
    needed = voters // 2 + 1
    away = ", ".join(one.endpoint for one in members if one.state in ("silent", "alone"))
    spare = answering - needed
    if not any(one.state == "leader" for one in members) or spare < 0:
        words = (
            f"{answering} of {voters} members answer and {needed} have to: nothing can be "
            f"changed now; VMs run on. Bring back: {away or 'a leader'}"
        )
    elif voters == 1:
        words = "one store on one machine: it serves; keep a copy with: godwit cluster export FILE"
    elif voters == 2:
        words = (
            "both members answer, and both have to: without either nothing can be changed, and no "
            "VM starts elsewhere by itself. Add a third on any small machine, as a witness"
        )
    elif spare == 0:
        words = (
            f"{answering} of {voters} members answer, just as many as have to: no other may "
            f"be lost. Bring back: {away}"
        )
    else:
        lost = f"{spare} more may be lost" if away else f"{spare} may be lost"
        words = f"{answering} of {voters} members answer, {needed} have to: {lost}"
        words += f". Away: {away}" if away else ""
    return StoreStanding(members=tuple(members), answering=answering, needed=needed, words=words)


def host_standing(
    view: HostView,
    certificates: Sequence[IssuedCertificate],
    *,
    now: float,
    heard: Standing | None = None,
) -> HostStanding:
    """One host: its state, the reason where one is known, and what comes next.

    ``heard``: of one without a lease those who decide about its VMs know better what it is, but for
    a manager that has just begun to listen: it cannot know yet, and says that.
    """
    words, after = WORDS[view.state]
    if view.state is HostState.DOWN and heard is not None:
        away = heard.state in (HostState.ISOLATED, HostState.DOWN)
        view = view.but(state=heard.state if away else view.state, reason=heard.sentence)
        after = heard.next or after
    until = max((one.not_after for one in certificates if one.revoked_at is None), default=None)
    next_ = after.format(name=view.name)
    if until is not None and until - now < LATE_S:
        day = time.strftime("%Y-%m-%d", time.gmtime(until))
        next_ = f"{next_}; " if next_ else ""
        next_ += (
            f"its certificate ends on {day} and is not renewed: see that its agent runs, and a "
        )
        next_ += "manager with the CA's key"
    return HostStanding(
        name=view.name,
        state=view.state,
        vms=view.vms,
        words=view.reason or words,
        next=next_,
        certificate_until=until,
        version=view.version,
        level=view.level,
    )


def cluster_status(
    about: ClusterIdentity | None,
    *,
    members: Sequence[MemberView],
    managers: Mapping[str, bool],
    hosts: Sequence[HostStanding],
    speaks: Mapping[str, Speaks] | None = None,
    unreadable: Sequence[str] = (),
) -> ClusterStatus:
    """Everything together. ``managers``: name -> whether it leads; ``speaks``: what it says of
    itself. ``unreadable``: keys of records that are of a newer version than we are.
    """
    said = speaks or {}
    everybody = {f"host {one.name}": _of(one) for one in hosts if one.state is not HostState.DOWN}
    everybody |= {f"manager {name}": said.get(name, Speaks()) for name in managers if name in said}
    goal = newest(everybody)
    hosts = [_with_upgrade(one, goal) for one in hosts]
    store = store_standing([member_standing(one) for one in members], voters=voters(members))
    troubled = [one.name for one in hosts if one.next]
    whole = store.answering == voters(members) and any(managers.values())
    old = [name for name in sorted(managers) if name in said and behind(said[name], goal)]
    if whole and not troubled and not old and not unreadable:
        words = "all is well"
    else:
        parts = [] if whole else ["the store or its managers are not whole"]
        parts += [f"look at {', '.join(troubled)}"] if troubled else []
        parts += [f"upgrade the manager of {', '.join(old)}"] if old else []
        parts += [_UNREAD.format(count=len(unreadable))] if unreadable else []
        words = "; ".join(parts)
    return ClusterStatus(
        name=about.name if about else "",
        ca_fingerprint=about.ca_fingerprint if about else "",
        words=words,
        store=store,
        managers=tuple(
            _manager(name, leads, said.get(name, Speaks()), goal if name in said else None)
            for name, leads in sorted(managers.items())
        ),
        hosts=tuple(hosts),
        level=common_level(everybody),
        unreadable=tuple(unreadable),
    )


def _of(host: HostStanding) -> Speaks:
    return Speaks(version=host.version, level=host.level)


def _with_upgrade(host: HostStanding, goal: Speaks) -> HostStanding:
    """A host that is behind is to be upgraded, beside whatever else there is to do."""
    why = behind(_of(host), goal)
    if not why:
        return host
    after = f"upgrade Godwit there: {why}"
    return host.but(next=f"{host.next}; {after}" if host.next else after)


def _manager(name: str, leads: bool, its: Speaks, goal: Speaks | None) -> ManagerStanding:
    why = behind(its, goal) if goal else ""
    after = f"upgrade it: {why}" if why else ""
    return ManagerStanding(name=name, leads=leads, version=its.version, level=its.level, next=after)
