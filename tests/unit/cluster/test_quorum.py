"""What is said of the store."""

from __future__ import annotations

import pytest
from cluster_builders import THREE, cluster, host

from godwit.cluster.facts import Member, Snapshot, StoreSeen
from godwit.cluster.quorum import explain, without


def store(*healthy: bool, hosts: int = 3, **changes: object) -> Snapshot:
    members = tuple(Member(name=f"m{n}", healthy=well) for n, well in enumerate(healthy))
    seen = StoreSeen(members=members, **changes)  # type: ignore[arg-type]
    found = cluster(store=seen)
    return Snapshot(
        store=seen, hosts={name: found.hosts[name] for name in sorted(found.hosts)[:hosts]}
    )


def test_three_of_three() -> None:
    said = explain(cluster())
    assert (
        said.sentence == "3 of 3 members of the store are healthy, 2 are needed: 1 more may be lost"
    )
    assert (said.automatic, said.spare, said.next) == (True, 1, "")
    assert explain(store(*[True] * 5)).spare == 2


def test_two_of_three() -> None:
    said = explain(store(True, False, True))
    assert said.sentence == (
        "2 of 3 members of the store are healthy, 2 are needed: losing one more stops all changes"
    )
    assert (said.automatic, said.spare, said.next) == (True, 0, "bring back m1")
    assert explain(store(True, False, False)).next == "bring back m1, m2"
    assert explain(store(True, False, False)).spare == 0


def test_one_of_one() -> None:
    said = explain(store(True))
    assert said.automatic
    assert said.next == "add members, three are the least"
    assert said.sentence.startswith("1 of 1 members of the store are healthy, 1 are needed: losing")


def test_an_even_number() -> None:
    said = explain(store(True, True, True, True))
    assert said.sentence == (
        "4 of 4 members of the store are healthy, 3 are needed: "
        "1 more may be lost (an even number: one less would bear as much)"
    )


@pytest.mark.parametrize("healthy", [(True,), (True, True)])
def test_two_hosts_without_a_witness(healthy: tuple[bool, ...]) -> None:
    said = explain(store(*healthy, hosts=2))
    assert not said.automatic
    assert said.sentence == (
        f"{len(healthy)} of {len(healthy)} members of the store are healthy, {len(healthy)} are "
        "needed; two hosts without a witness: none of them could take over alone"
    )
    assert said.next == (
        "add a third member of the store on any small machine; until then a failover "
        "waits for: godwit host confirm-down"
    )
    assert said.spare == 0
    assert explain(store(*healthy, hosts=3)).automatic
    assert explain(store(*healthy, hosts=1)).automatic


def test_two_hosts_with_a_witness() -> None:
    said = explain(store(True, True, True, hosts=2))
    assert (said.automatic, said.spare) == (True, 1)


def test_embedded() -> None:
    said = explain(store(hosts=1, embedded=True))
    assert (said.automatic, said.spare, said.next) == (True, 0, "")
    assert (
        said.sentence == "the store is a daemon on one machine: while it is away nothing fails over"
    )
    more = "for failover that survives any one machine, use etcd on three"
    assert explain(store(hosts=2, embedded=True)).next == more
    assert explain(store(hosts=2, embedded=True)).automatic


def test_no_leader() -> None:
    said = explain(store(True, True, True, leader=False))
    assert (said.automatic, said.spare) == (False, 0)
    assert said.sentence == "the store has no leader: nothing can be changed, VMs run on"
    assert said.next == (
        "it elects one by itself as soon as a majority of its members see each other"
    )
    assert THREE[0].host == host("h1").name


def test_what_a_host_takes_along() -> None:
    assert without(THREE, "h1") == ""
    assert without(THREE, "h9") == ""
    away = (THREE[0], THREE[1], Member(name="m3", host="h3", healthy=False))
    assert without(away, "h1") == "without h1 1 of 3 members of the store are left, not 2"
    assert without(away, "h3") == ""  # it is away already
    assert without(THREE[:1], "h1") == "the store runs on h1 alone"
    assert without(THREE[:2], "h2") == "without h2 1 of 2 members of the store are left, not 2"
    assert without((), "h1") == ""
    both = (*THREE[:1], Member(name="m2", host="h1"), THREE[2])
    assert without(both, "h1") == "without h1 1 of 3 members of the store are left, not 2"
