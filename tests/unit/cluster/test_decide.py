"""The one entry, the baseline, and the reference of host states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster_builders import NOW, Placing, cluster, disk, host, owner, process, vm

from godwit.cluster import Decision, Memory, Snapshot, decide, listen
from godwit.cluster.baseline import Baseline, common_model, joins
from godwit.cluster.facts import Attempt, ColdStart, Rung, StoreSeen
from godwit.cluster.states import MEANINGS, as_markdown
from godwit.cluster.steps import Fence, Kill, Quarantine, Restore, Swap
from godwit.model.host import HostState
from godwit.model.marks import HostMark

REFERENCE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "host-states.md"


def run(snapshot: Snapshot, now: float = NOW) -> Decision:
    return decide(snapshot, now, place=Placing())


def test_nothing_to_do() -> None:
    said = run(cluster(vm()))
    assert said.steps == ()
    assert said.sentence == "3 hosts, nothing to do"
    assert list(said.hosts) == ["h1", "h2", "h3"]


def test_nothing_is_decided_without_a_leader() -> None:
    lost = cluster(vm(processes=()), silent={"h1": 60.0}, store=StoreSeen(leader=False))
    said = run(lost)
    assert said.steps == ()
    assert said.sentence == "the store has no leader: nothing can be changed, VMs run on"
    assert set(said.hosts) == {"h1", "h2", "h3"}
    unread = cluster(vm(processes=()), silent={"h1": 60.0})
    unread = replace(unread, heard=replace(unread.heard, asked_at=None))
    assert run(unread).steps == ()


def test_a_sentence_says_what_and_why() -> None:
    said = run(cluster(vm(processes=()), vm("test", ha=False, processes=()), silent={"h1": 20.0}))
    assert said.sentence == (
        "h1 is lost: no renewal for 20 s and no answer; swap web; "
        "note test it is not highly available and stays with h1"
    )
    assert [step.key for step in said.steps] == [
        "note test it is not highly available and stays with h1",
        "swap web",
    ]


def test_a_loss_of_power_is_said() -> None:
    dark = vm(processes=())
    memory = {"cold": ColdStart(NOW, frozenset({"web"}))}
    said = run(cluster(dark, memory=memory))
    assert said.sentence == "all power was lost: web first; swap web"
    late = run(cluster(dark, hosts=(host("h1", listed=False),), memory=memory), NOW + 20)
    assert late.sentence == "all power was lost: waiting for h1, at most 100 s more"


def test_three_isolations_and_no_mark() -> None:
    times = {"isolations": {"h2": (NOW - 10, NOW - 20, NOW - 3599)}}
    why = "it lost the store 3 times within an hour"
    assert run(cluster(memory=times)).steps == (Quarantine(host="h2", why=why),)
    assert run(cluster(memory=times), NOW + 2).steps == ()
    marked = (host("h2", mark=HostMark(state="draining", since=0.0)),)
    assert run(cluster(memory=times, hosts=marked)).steps == ()
    four = {"isolations": {"h2": (NOW - 1, *times["isolations"]["h2"])}}
    assert run(cluster(memory=four)).steps[0].key == "quarantine h2"


def test_what_comes_first() -> None:
    old = Attempt(host="h3", rung=Rung.STORAGE, vm="db", heard=("x", 1), outcome="confirmed")
    snapshot = cluster(
        vm(processes=()),
        vm("db", owner("h3"), disks=(disk("root", "lun"),)),
        vm("stray", owner("h2"), processes=(process("h2"), process("h3", 2, "paused"))),
        silent={"h1": 20.0},
        attempts=(old,),
        memory={"isolations": {"h2": (NOW, NOW, NOW)}},
    )
    kinds = [type(step) for step in run(snapshot).steps]
    assert kinds == [Quarantine, Restore, Swap, Kill]


def test_what_a_failover_has_placed_the_resolver_knows() -> None:
    place = Placing()
    crashed = vm("db", owner("h2", state="stopped"), ended="crash")
    decide(cluster(vm(processes=()), crashed, silent={"h1": 20.0}), NOW, place=place)
    assert [(name, taken) for name, taken, _ in place.asked] == [("web", {}), ("db", {"web": "h2"})]


def test_retries_go_by_the_clock_of_the_decision() -> None:
    failed = Attempt(host="h1", rung=Rung.POWER, heard=("h1-a", 50), outcome="failed", ended_at=NOW)
    unarmed = host("h1", power=True, answers=False, listed=False)
    unarmed = replace(unarmed, renewal=unarmed.renewal.but(guard="unarmed"))  # type: ignore[union-attr]
    snapshot = cluster(vm(processes=()), silent={"h1": 20.0}, hosts=(unarmed,), attempts=(failed,))
    assert not isinstance(run(snapshot, NOW + 9).steps[0], Fence)
    assert isinstance(run(snapshot, NOW + 10).steps[0], Fence)


def test_listening_remembers_everything() -> None:
    snapshot = cluster(vm(processes=()))
    memory = listen(Memory(), snapshot, NOW)
    assert memory.asked_at == NOW
    assert memory.bare == {"web": (5, NOW)}
    assert memory.cold == ColdStart(NOW, frozenset({"web"}))
    assert memory.hosts["h1"].since == NOW
    later = listen(memory, snapshot, NOW + 1)
    assert later.bare == {"web": (5, NOW)}
    assert later.cold == ColdStart(NOW, frozenset({"web"}))


# --- the CPU baseline


RANKED = ("new", "mid", "old")


def models(**hosts: str) -> dict[str, list[str]]:
    return {name: given.split() for name, given in hosts.items()}


def common(**hosts: str) -> Baseline:
    return common_model(models(**hosts), RANKED)


def test_the_best_that_all_have() -> None:
    assert common(a="old new mid", b="new mid") == Baseline(
        model="new", sentence="new is the best that all hosts can give"
    )
    assert common(a="old").model == "old"


def test_who_holds_it_back() -> None:
    assert common(a="new mid old", b="new mid old", c="old") == Baseline(
        model="old",
        sentence="old is the best that all hosts can give: c cannot give new",
        held_back={"c": ("new", "mid")},
    )
    both = common(a="new mid old", b="new old", c="mid old")
    assert both.held_back == {"b": ("mid",), "c": ("new",)}
    assert both.sentence.endswith(": b cannot give mid; c cannot give new")
    assert common(a="old", b="old").held_back == {}
    assert common(a="old").held_back == {}


def test_none_in_common() -> None:
    said = common(a="new", b="old")
    assert said.model == ""
    assert said.sentence == "the hosts have no CPU model in common that each can give in full"
    assert said.held_back == {"a": ("old",), "b": ("new",)}
    assert common_model({}, RANKED) == Baseline(
        model="", sentence="no host has said which CPU models it can give"
    )


def test_a_host_that_wants_to_join() -> None:
    assert joins("mid", ["mid", "old"]) == ""
    assert joins("", []) == ""
    assert joins("mid", ["old"]) == (
        "it cannot give mid, which the cluster's VMs have: none of them could move there"
    )


# --- the reference


def test_each_state_has_its_row() -> None:
    assert [meaning.state for meaning in MEANINGS] == list(HostState)
    assert [m.state for m in MEANINGS if m.takes == "yes"] == [HostState.UP]


def test_the_reference_is_rendered_from_it() -> None:
    if REFERENCE.exists():  # not where the tests of this package run alone
        assert as_markdown() in REFERENCE.read_text()


def test_the_table() -> None:
    lines = as_markdown().splitlines()
    assert lines[0] == "| state | when | its VMs | takes new ones | what happens next |"
    assert lines[1] == "|---|---|---|---|---|"
    assert len(lines) == 2 + len(MEANINGS)
    assert lines[2] == (
        "| `up` | its guard renews the lease, its agent answers | run | yes | nothing |"
    )


def silent(**changes: Any) -> Snapshot:
    return cluster(silent={"h1": 20.0}, **changes)


def test_keys() -> None:
    assert Quarantine(host="h", why="w").key == "quarantine h"
    assert silent().silence("h1") == 20.0
    assert silent().silence("h9") == 0.0
    assert silent().unheard("h9") == 0.0
    assert silent().identity("h9") == ("", 0)
