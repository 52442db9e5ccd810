"""Counting members that have no leader; the mark that notices one that went back."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.store import errors
from godwit.store.api import MemberView, StoreStatus
from godwit.store.etcd import EtcdMember, argv, may_be_lost, quorum_words
from godwit.store.high import High
from godwit.store.members import (
    leader_of,
    majority_without_leader,
    members_without_leader,
    voters,
)
from godwit.store.memory import MemoryStore


def view(member: int, leader: int | None, *, known: int = 3, term: int = 5) -> MemberView:
    """What a member says: its leader, 0 for none; None when it is silent."""
    if leader is None:
        return MemberView(f"m{member}", problem="did not answer in time")
    return MemberView(f"m{member}", StoreStatus(9, member, 1, leader, term), known)


@pytest.mark.parametrize(
    ("leaders", "count", "majority"),
    [
        ((0, 0, 0), 3, True),
        ((0, 0, None), 2, True),
        ((0, 0, 3), 2, True),
        ((0, None, None), 1, False),
        ((0, 2, 2), 1, False),
        ((None, None, None), 0, False),
        ((1, 1, 1), 0, False),
    ],
)
def test_only_a_majority_that_says_so_has_no_leader(
    leaders: tuple[int | None, ...], count: int, majority: bool
) -> None:
    views = [view(number, leader) for number, leader in enumerate(leaders, 1)]
    assert members_without_leader(views) == count
    assert majority_without_leader(views) is majority


def test_a_majority_is_of_all_members_and_not_of_those_we_know_of() -> None:
    assert not majority_without_leader([view(1, 0)])
    assert not majority_without_leader([view(1, 0, known=5), view(2, 0, known=5)])
    assert majority_without_leader([view(1, 0, known=1)])
    assert voters([view(1, None), view(2, None), view(3, 0, known=0)]) == 3


def test_one_member_under_two_addresses_counts_once() -> None:
    assert members_without_leader([view(1, 0), view(1, 0), view(2, None)]) == 1
    assert not majority_without_leader([view(1, 0), view(1, 0), view(2, None)])


def test_nobody_is_nobody() -> None:
    assert voters([]) == 0
    assert not majority_without_leader([])
    assert leader_of([]) is None


def test_a_leader_is_one_whom_a_majority_follows() -> None:
    assert leader_of([view(1, 1), view(2, 1), view(3, None)]) == view(1, 1)
    assert leader_of([view(1, 1), view(2, None), view(3, None)]) is None
    # It has not heard yet that the others chose another one.
    old, new = view(1, 1, term=5), view(2, 2, term=6)
    assert leader_of([old, new, view(3, 2, term=6)]) == new
    assert leader_of([view(1, 1, term=6), view(2, 1, term=5), view(3, None)]) is None


def header(
    *, member: int = 1, term: int = 5, revision: int = 9, cluster: int = 1
) -> dict[str, object]:
    fields = {"cluster_id": cluster, "member_id": member, "raft_term": term, "revision": revision}
    return {"header": {name: str(value) for name, value in fields.items()}}


def test_terms_are_held_against_the_same_member_alone() -> None:
    high = High()
    high.check(header(member=1, term=9), high.mark(), ordered=True)
    high.check(header(member=2, term=5), high.mark(), ordered=True)  # 1 had stood for election
    with pytest.raises(errors.StoreMemberRolledBack):
        high.check(header(member=1, term=8), high.mark(), ordered=False)
    with pytest.raises(errors.StoreMemberRolledBack):
        high.check(header(member=2, term=4), high.mark(), ordered=True)


def test_a_linearizable_answer_is_as_new_as_anything_seen() -> None:
    high = High()
    high.check(header(member=1, revision=9), high.mark(), ordered=True)
    high.check(header(member=2, revision=7), high.mark(), ordered=False)
    with pytest.raises(errors.StoreRolledBack):
        high.check(header(member=2, revision=8), high.mark(), ordered=True)
    with pytest.raises(errors.StoreRolledBack):
        high.check(header(cluster=2), high.mark(), ordered=False)


def test_answers_may_overtake_one_another() -> None:
    high = High()
    sent_before = high.mark()
    high.check(header(term=6, revision=10), high.mark(), ordered=True)
    high.check(header(term=5, revision=9), sent_before, ordered=True)
    assert high.mark().terms == {1: 6}
    assert high.revision == 10


def test_what_the_number_of_members_means() -> None:
    assert [may_be_lost(count) for count in range(6)] == [0, 0, 0, 1, 1, 2]
    assert "when it is gone" in quorum_words(["host1"])
    assert "when any of them is gone" in quorum_words(["a", "b"])
    assert "any one of them may be gone, 2 may not" in quorum_words(["a", "b", "c"])
    assert "any 2 of them may be gone, 3 may not" in quorum_words(["a", "b", "c", "d", "e"])


def test_everything_a_member_says_travels_over_tls() -> None:
    members = [EtcdMember(f"m{n}", f"10.0.0.{n}", peer_address=f"10.0.1.{n}") for n in (1, 2)]
    words = argv(
        members[0],
        members,
        data=Path("/d"),
        tls=Path("/t"),
        member_dns="member.example",
        cluster="c",
    )
    text = " ".join(words)
    assert "http://" not in text
    assert "--initial-cluster m1=https://10.0.1.1:2380,m2=https://10.0.1.2:2380" in text
    for flag in ("--client-cert-auth", "--peer-client-cert-auth", "--pre-vote"):
        assert flag in words
    assert words[words.index("--peer-cert-allowed-hostname") + 1] == "member.example"


async def test_the_twin_can_lose_its_leader() -> None:
    store = MemoryStore()
    assert not majority_without_leader(await store.members())
    store.faults.leaderless = True
    assert majority_without_leader(await store.members())
    with pytest.raises(errors.StoreNoLeader):
        await store.put("k", b"")
    store.faults.leaderless, store.faults.unavailable = False, True
    views = await store.members()
    assert views[0].problem
    assert not majority_without_leader(views)
