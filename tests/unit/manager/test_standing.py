"""What ``cluster status`` says, and that it says something of everything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from godwit.cluster.membership import Standing
from godwit.manager.standing import (
    WORDS,
    cluster_status,
    host_standing,
    member_standing,
    store_standing,
)
from godwit.manager.work.mark_rules import check_return
from godwit.model.cluster_status import StoreStanding
from godwit.model.host import HostState, HostView
from godwit.model.maintenance_requests import ExitMaintenance, ReturnHost
from godwit.model.marks import HostMark, MarkState
from godwit.model.skew import Speaks
from godwit.model.trust import ClusterIdentity, IssuedCertificate
from godwit.store.api import MemberView, StoreStatus

ABOUT = ClusterIdentity(name="test", ca_fingerprint="00", created_at=0.0)
YEAR = 365 * 86400.0


def views(*states: str) -> list[MemberView]:
    """Members as the store's client asks them."""
    found = []
    for number, state in enumerate(states, start=1):
        leader = {"leader": number, "follower": 9, "alone": 0}.get(state, 0)
        status = StoreStatus(revision=1, member_id=number, cluster_id=1, leader=leader, raft_term=1)
        answered = state != "silent"
        found.append(
            MemberView(
                f"https://e{number}:2379",
                status=status if answered else None,
                voters=len(states) if answered else 0,
                problem="" if answered else "no answer",
            )
        )
    return found


def standing(*states: str, voters: int = 0) -> StoreStanding:
    found = [member_standing(one) for one in views(*states)]
    assert [one.state for one in found] == list(states)
    return store_standing(found, voters=voters or len(states))


def view(state: HostState = HostState.UP, *, reason: str = "") -> HostView:
    return HostView(
        name="host1",
        state=state,
        vms=2,
        cpus=1,
        memory_bytes=1,
        memory_free_bytes=0,
        reason=reason,
    )


def certificate(*, until: float, revoked: bool = False) -> IssuedCertificate:
    return IssuedCertificate(
        role="host",
        name="host1",
        serial="1",
        issued_at=0.0,
        not_after=until,
        revoked_at=1.0 if revoked else None,
    )


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (("leader",), "one store on one machine"),
        (("silent",), "0 of 1 members answer and 1 have to: nothing can be changed now"),
        (("leader", "follower"), "Add a third on any small machine, as a witness"),
        (("leader", "follower", "follower"), "3 of 3 members answer, 2 have to: 1 may be lost"),
        (("leader", "follower", "silent"), "just as many as have to: no other may be lost"),
        (("alone", "silent", "silent"), "nothing can be changed now; VMs run on. Bring back:"),
        (("follower", "follower", "silent"), "nothing can be changed now"),
        (
            ("leader", "follower", "follower", "follower", "silent"),
            "4 of 5 members answer, 3 have to: 1 more may be lost. Away: https://e5:2379",
        ),
    ],
)
def test_the_store_in_words(states: Sequence[str], words: str) -> None:
    assert words in standing(*states).words


def test_members_that_no_endpoint_names_count_too() -> None:
    found = standing("leader", "follower", voters=5)
    assert found.needed == 3
    assert "2 of 5 members answer and 3 have to" in found.words


NEW, OLD = Speaks(version="0.2.0", level=2), Speaks(version="0.1.0", level=1)


def test_who_is_of_an_older_version_is_named_and_nobody_else() -> None:
    hosts = [
        host_standing(view().but(name=name, **dict(its)), [], now=0.0)
        for name, its in (("host1", NEW), ("host2", OLD), ("host3", Speaks()))
    ]
    found = cluster_status(
        ABOUT,
        members=views("leader"),
        managers={"m1": True, "m2": False},
        hosts=hosts,
        speaks={"m1": NEW, "m2": OLD},
    )
    assert [one.next for one in found.hosts] == [
        "",
        "upgrade Godwit there: it is Godwit 0.1.0, older than Godwit 0.2.0",
        "upgrade Godwit there: it is a Godwit that tells no version, older than Godwit 0.2.0",
    ]
    assert found.words == "look at host2, host3; upgrade the manager of m2"
    assert [(one.version, one.next[:10]) for one in found.managers] == [
        ("0.2.0", ""),
        ("0.1.0", "upgrade it"),
    ]
    assert (found.level, found.hosts[1].version, found.hosts[1].level) == (0, "0.1.0", 1)


def test_records_of_a_newer_version_are_counted() -> None:
    found = cluster_status(
        ABOUT,
        members=views("leader"),
        managers={"m1": True},
        hosts=[],
        unreadable=["/godwit/vms/a/spec"],
    )
    assert "1 records are of a newer version than this manager" in found.words
    assert found.unreadable == ("/godwit/vms/a/spec",)


def test_who_is_away_is_named() -> None:
    found = standing("leader", "follower", "silent")
    assert (found.answering, found.needed) == (2, 2)
    assert "Bring back: https://e3:2379" in found.words


@pytest.mark.parametrize("state", list(HostState))
def test_each_state_of_a_host_has_a_meaning_and_all_but_one_a_next_step(state: HostState) -> None:
    found = host_standing(view(state), [certificate(until=YEAR)], now=0.0)
    assert found.words == WORDS[state][0]
    assert bool(found.next) is (state is not HostState.UP)
    assert "{" not in found.next


@pytest.mark.parametrize("state", ["maintenance", "quarantined"])
def test_what_is_said_to_take_a_mark_away_does(state: MarkState) -> None:
    mark = HostMark(state=state, since=0.0, reason="", by="ann")
    words = {
        "godwit host maintenance exit {name}": ExitMaintenance(name="host1"),
        "godwit host return {name}": ReturnHost(name="host1"),
    }
    [request] = [one for said, one in words.items() if said in WORDS[HostState(state)][1]]
    assert check_return(mark, request) == mark


def test_a_reason_that_is_known_goes_before_the_general_one() -> None:
    assert host_standing(view(HostState.DOWN, reason="burnt"), [], now=0.0).words == "burnt"


def test_a_certificate_that_nobody_renews_is_told_in_time() -> None:
    soon = [certificate(until=30 * 86400.0)]
    assert "ends on 1970-01-31 and is not renewed" in host_standing(view(), soon, now=0.0).next
    renewed = [*soon, certificate(until=YEAR)]
    assert host_standing(view(), renewed, now=0.0).next == ""
    revoked = [*soon, certificate(until=YEAR, revoked=True)]
    assert host_standing(view(), revoked, now=0.0).certificate_until == 30 * 86400.0


def test_all_is_well_only_when_it_is() -> None:
    good, bad = host_standing(view(), [], now=0.0), host_standing(view(HostState.DOWN), [], now=0.0)

    def words(states: Sequence[str], leads: bool, host: object) -> str:
        return cluster_status(
            ABOUT,
            members=views(*states),
            managers={"m1": leads},
            hosts=[host],  # type: ignore[list-item]
        ).words

    assert words(("leader",), True, good) == "all is well"
    assert words(("leader",), True, bad) == "look at host1"
    assert "not whole" in words(("leader",), False, good)
    assert "not whole" in words(("leader", "follower", "silent"), True, good)


def test_a_silent_host_is_what_those_who_decide_think_of_it() -> None:
    heard = Standing(state=HostState.ISOLATED, sentence="silent for 9 s", next="lost in 5 s")
    found = host_standing(view(HostState.DOWN), [], now=0.0, heard=heard)
    assert (found.state, found.words, found.next) == (
        HostState.ISOLATED,
        "silent for 9 s",
        "lost in 5 s",
    )
    assert host_standing(view(), [], now=0.0, heard=heard).state is HostState.UP
    new = Standing(state=HostState.UP, sentence="this manager listens for 3 s", next="in 11 s")
    early = host_standing(view(HostState.DOWN), [], now=0.0, heard=new)
    assert (early.state, early.words, early.next) == (
        HostState.DOWN,
        "this manager listens for 3 s",
        "in 11 s",
    )
