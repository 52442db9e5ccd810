"""Counting a silence, and what is said of a host."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cluster_builders import NOW, cluster, host, owner, renewal, vm

from godwit.cluster import Memory, listen
from godwit.cluster.facts import Attempt, Heard, HostSeen, Rung, Snapshot, StoreSeen, Timings
from godwit.cluster.membership import is_off, recent_isolations, standing, standings
from godwit.model.host import ConfirmedDown, HostState
from godwit.model.marks import HostMark


def reading(at: float, *hosts: HostSeen, asked: float | None = None, **store: object) -> Snapshot:
    """A reading that was answered ``at``."""
    seen = StoreSeen(asked_at=at if asked is None else asked, answered_at=at, **store)  # type: ignore[arg-type]
    return Snapshot(store=seen, hosts={one.name: one for one in hosts})


def hear(*readings: Snapshot, memory: Memory | None = None) -> Memory:
    """Listen to readings one after the other."""
    memory = memory or Memory()
    for one in readings:
        memory = listen(memory, one, one.store.answered_at)
    return memory


def silence(memory: Memory, last: Snapshot) -> float:
    return replace(last, heard=memory).silence("h1")


def steady(start: float, end: float, *hosts: HostSeen, **store: object) -> list[Snapshot]:
    """Readings every half second, ``end`` included."""
    count = int((end - start) * 2) + 1
    return [reading(start + n / 2, *hosts, **store) for n in range(count)]


H = host("h1")


def test_figures_that_follow_from_others() -> None:
    timings = Timings()
    assert (timings.late_s, timings.after_gap_s) == (6.0, 12.0)
    assert timings.takeover_s == pytest.approx(14.4)
    assert Timings(renew_s=1, lease_s=5, reset_s=4, margin=0.5).takeover_s == 7.5
    assert Timings(reset_s=4, margin=0.5).after_gap_s == 6.0


def test_it_counts_from_the_answer_that_showed_the_renewal_to_the_last_question() -> None:
    first = reading(10.4, H, asked=10.0)
    last = reading(11.3, H, asked=11.0)
    assert silence(hear(first, last), last) == pytest.approx(0.6)


def test_a_new_revision_is_a_renewal_even_with_the_same_words() -> None:
    again = replace(H, renewal_revision=51)
    memory = hear(*steady(10, 15, H), *steady(15.5, 16.5, again))
    assert memory.hosts["h1"] == Heard(H.renewal, 51, 15.5, 15.5)


def test_a_key_that_is_gone_is_no_renewal() -> None:
    gone = replace(H, renewal=None, renewal_revision=0)
    memory = hear(*steady(10, 15, H), *steady(15.5, 30, gone))
    assert memory.hosts["h1"].since == 10
    assert memory.hosts["h1"].renewal == H.renewal


def test_a_host_first_seen_without_a_renewal_is_counted_too() -> None:
    gone = replace(H, renewal=None, renewal_revision=0)
    assert hear(*steady(10, 20, gone)).hosts["h1"] == Heard(None, 0, 10, 10, witnessed=False)
    back = hear(*steady(10, 20, gone), reading(20.5, H))
    assert back.hosts["h1"] == Heard(H.renewal, 50, 20.5, 20.5)
    assert back.isolations == {}


def test_what_was_there_before_is_counted_from_the_first_reading_and_not_believed_fresh() -> None:
    """However old: a manager that has just begun knows what it says, and not since when."""
    memory = hear(*steady(10, 13, H))
    assert memory.hosts["h1"] == Heard(H.renewal, 50, 10, 10, witnessed=False)
    seen = replace(reading(13, H), heard=memory)
    early = standing(seen, "h1")
    assert early.state is HostState.UP
    assert (early.fresh, early.takes, early.lost) == (False, False, False)
    assert early.sentence == "this manager listens for 3 s only and has not heard it yet"
    assert early.next == "in 11 s it counts as lost, if it does not renew"
    later = replace(reading(19, H), heard=hear(*steady(10, 19, H)))
    assert standing(later, "h1").sentence.startswith(
        "no renewal in the 9 s since this manager listens; its guard, if it lives"
    )
    last = replace(reading(25, H), heard=hear(*steady(10, 25, H)))
    assert standing(last, "h1").lost
    assert standing(last, "h1").sentence.startswith("no renewal in the 15 s since this manager")
    renewed = replace(H, renewal_revision=51)
    after = hear(*steady(10, 12, H), *steady(12.5, 13, renewed))
    assert after.hosts["h1"] == Heard(H.renewal, 51, 12.5, 12.5)
    assert standing(replace(reading(13, renewed), heard=after), "h1").fresh


@pytest.mark.parametrize("boot", ["h1-a", "h1-b"])
def test_a_guard_of_before_does_not_speak_for_a_boot(boot: str) -> None:
    assert host("h1", boot_id=boot).guarded == (boot == "h1-a")
    assert not host("h1", renewal=None).guarded


def test_a_host_that_is_gone_is_forgotten() -> None:
    memory = hear(reading(10, H, host("h2")), reading(10.5, host("h2")))
    assert set(memory.hosts) == {"h2"}
    assert set(memory.answering) == {"h2"}


def test_without_a_leader_nothing_is_counted() -> None:
    before = steady(10, 20, H)
    away = replace(reading(20.5), store=StoreSeen(leader=False))
    memory = hear(*before, away)
    assert memory.asked_at is None
    assert replace(away, heard=memory).silence("h1") == 0.0
    assert memory.hosts == hear(*before).hosts


@pytest.mark.parametrize("how", ["away", "gap", "term"])
def test_after_a_time_without_leader_twelve_seconds_are_left(how: str) -> None:
    before = steady(10, 23, H)
    between, after = [], reading(23.5, H)
    if how == "away":
        between = [replace(reading(23.2), store=StoreSeen(leader=False))]
    elif how == "gap":
        after = reading(24.1, H)
    else:
        after = reading(23.5, H, term=2)
    memory = hear(*before, *between, after)
    assert memory.hosts["h1"].since == pytest.approx(after.store.answered_at - 2.4)
    assert memory.hosts["h1"].at == 10
    assert replace(after, heard=memory).unheard("h1") == pytest.approx(after.store.asked_at - 10)


def test_a_gap_early_in_a_count_costs_nothing() -> None:
    memory = hear(*steady(10, 11, H), reading(12.2, H))
    assert memory.hosts["h1"].since == 10
    assert memory.term == 1
    assert memory.asked_at == 12.2


def test_readings_a_second_apart_count_through() -> None:
    late = [reading(10 + n, H) for n in range(9)]
    assert hear(*late).hosts["h1"].since == 10


def test_the_gap_is_from_question_to_answer() -> None:
    memory = hear(*steady(10, 20, H), reading(21.1, H, asked=20.5))
    assert memory.hosts["h1"].since == pytest.approx(21.1 - 2.4)


def isolated(times: int, *, apart: float = 20.0, last: HostSeen = H) -> Memory:
    memory, at = Memory(), 100.0
    for number in range(times + 1):
        here = replace(last, renewal=renewal("h1", number), renewal_revision=50 + number)
        memory = hear(*steady(at, at + 8, here), memory=memory)
        at += 8.5 if apart == 20.0 else apart
    return memory


def test_an_isolation_is_eight_seconds_and_the_same_boot() -> None:
    assert len(isolated(2).isolations["h1"]) == 2
    short = hear(*steady(10, 17.5, H), reading(18, replace(H, renewal_revision=51)))
    assert short.isolations == {}
    other = replace(H, renewal=renewal("h1").but(boot_id="h1-b"), renewal_revision=51)
    assert hear(*steady(10, 30, H), reading(30.5, other)).isolations == {}
    exact = hear(*steady(10, 18, H), reading(18.5, replace(H, renewal_revision=51)))
    assert exact.isolations == {"h1": (18.5,)}


def test_what_was_away_with_the_store_was_not_isolated() -> None:
    away = replace(reading(30), store=StoreSeen(leader=False))
    back = reading(30.5, replace(H, renewal_revision=51))
    assert hear(*steady(10, 20, H), away, back).isolations == {}


def test_isolations_of_more_than_an_hour_ago_are_dropped() -> None:
    old = replace(isolated(0), isolations={"h1": (1.0, 3000.0)})
    back = [*steady(4000, 4009, H), reading(4009.5, replace(H, renewal_revision=99))]
    memory = hear(*back, memory=old)
    assert memory.isolations["h1"] == (3000.0, 4009.5)
    snapshot = replace(back[-1], heard=memory)
    assert recent_isolations(snapshot, "h1", 4010.0) == 2
    assert recent_isolations(snapshot, "h1", 6600.0) == 1
    assert recent_isolations(snapshot, "h2", 4010.0) == 0


def test_a_mark_begins_the_count_of_isolations_anew() -> None:
    marked = replace(H, mark=HostMark(state="quarantined", since=0.0), renewal_revision=99)
    memory = hear(reading(200, marked), memory=isolated(2))
    assert memory.isolations == {}
    assert hear(reading(200, marked)).isolations == {}


def test_since_when_an_agent_answers() -> None:
    deaf = replace(H, answers=False)
    memory = hear(reading(10, H), reading(10.5, H))
    assert memory.answering == {"h1": 10}
    memory = hear(reading(11, deaf), reading(11.5, H), memory=memory)
    assert memory.answering == {"h1": 11.5}


# --- states


def test_up() -> None:
    here = standing(cluster(), "h1")
    assert (here.state, here.sentence, here.next) == (HostState.UP, "it renews its lease", "")
    assert here.fresh
    assert here.takes
    assert not here.lost


def test_unmanaged() -> None:
    here = standing(cluster(hosts=(host("h1", agent=False),)), "h1")
    assert here.state is HostState.UNMANAGED
    assert here.sentence == "its guard renews the lease, its agent is away; its VMs run on"
    assert here.next == "its agent is started again by its service manager"
    assert here.fresh
    assert not here.takes
    assert not here.lost


@pytest.mark.parametrize(
    ("mark", "next_"),
    [
        ("draining", "when it is empty it is in maintenance"),
        ("maintenance", "it takes VMs again after: godwit host maintenance exit"),
        (
            "quarantined",
            "its VMs run on; it takes new ones after: godwit host maintenance exit",
        ),
    ],
)
def test_marked(mark: str, next_: str) -> None:
    said = HostMark(state=mark, since=1.0, reason="new disks", by="ann")  # type: ignore[arg-type]
    here = standing(cluster(hosts=(host("h1", mark=said, agent=False),)), "h1")
    assert here.state.value == mark
    assert here.sentence == "marked by ann: new disks"
    assert here.next == next_
    assert here.fresh
    assert not here.takes
    bare = said.but(reason="", by="")
    assert standing(cluster(hosts=(host("h1", mark=bare),)), "h1").sentence == "marked"


def test_late() -> None:
    here = standing(cluster(silent={"h1": 6.0}), "h1")
    assert (here.state, here.sentence) == (HostState.UP, "its last renewal is 6 s old")
    assert not here.takes
    assert not here.fresh
    assert not here.lost
    assert here.next == ""
    assert standing(cluster(silent={"h1": 5.9}), "h1").takes


def test_isolated() -> None:
    here = standing(cluster(silent={"h1": 8.0}), "h1")
    assert here.state is HostState.ISOLATED
    assert here.sentence == "no renewal for 8 s; its guard, if it lives, froze what has ha at 8 s"
    assert here.next == "in 6 s it counts as lost"
    assert not here.lost
    assert not here.takes
    assert standing(cluster(silent={"h1": 7.9}), "h1").state is HostState.UP


def test_isolated_with_an_unarmed_guard() -> None:
    said = host("h1", renewal=renewal("h1", guard="unarmed"))
    here = standing(cluster(hosts=(said,), silent={"h1": 9}), "h1")
    assert (
        here.sentence == "no renewal for 9 s; its guard was not armed, nothing is known of its VMs"
    )
    never = host("h1", renewal=None, renewal_revision=0)
    here = standing(cluster(hosts=(never,), silent={"h1": 9}), "h1")
    assert here.sentence.endswith("nothing is known of its VMs")


def test_isolated_is_not_said_before_it_could_renew_after_a_gap() -> None:
    snapshot = cluster(silent={"h1": 3.0})
    heard = replace(snapshot.heard.hosts["h1"], at=NOW - 60)
    memory = replace(snapshot.heard, hosts={**snapshot.heard.hosts, "h1": heard})
    here = standing(replace(snapshot, heard=memory), "h1")
    assert here.state is HostState.UP
    assert here.sentence == "its last renewal is 60 s old"


def test_lost_and_silent() -> None:
    here = standing(cluster(silent={"h1": 14.5}), "h1")
    assert here.state is HostState.DOWN
    assert here.sentence == "no renewal for 14 s and no answer"
    assert here.next == (
        "its highly available VMs start elsewhere once there is proof that they stand still here"
    )
    assert here.lost
    assert not here.takes
    fifteen = Timings(margin=0.25)
    assert not standing(cluster(silent={"h1": 14.75}, timings=fifteen), "h1").lost
    assert standing(cluster(silent={"h1": 15.0}, timings=fifteen), "h1").lost


def test_lost_and_answering() -> None:
    here = standing(cluster(hosts=(host("h1"),), silent={"h1": 20.0}), "h1")
    assert here.state is HostState.ISOLATED
    assert here.sentence == "no renewal for 20 s, but its agent answers"
    assert here.lost
    assert here.next.startswith("its highly available VMs start elsewhere")


def word(boot: str = "h1-a", by: str = "ann") -> HostSeen:
    said = ConfirmedDown(boot_id=boot, time=1.0, by=by)
    return host("h1", confirmed_down=said, answers=False, listed=False)


def test_a_persons_word_needs_two_missed_renewals() -> None:
    here = standing(cluster(hosts=(word(),), silent={"h1": 6.0}), "h1")
    assert here.lost
    assert here.state is HostState.DOWN
    assert here.sentence == "ann confirmed that it is down"
    assert here.next.startswith("its highly available VMs start elsewhere")
    assert not standing(cluster(hosts=(word(),), silent={"h1": 5.9}), "h1").lost


def test_a_word_is_about_one_boot() -> None:
    assert is_off(cluster(hosts=(word(),)), "h1") == "ann confirmed that it is down"
    assert is_off(cluster(hosts=(word(by=""),)), "h1") == "a person confirmed that it is down"
    assert is_off(cluster(hosts=(word("h1-b"),)), "h1") == ""
    never = replace(word("h1-a"), renewal=None, renewal_revision=0)
    assert is_off(cluster(hosts=(never,)), "h1") == "ann confirmed that it is down"
    assert is_off(cluster(), "h1") == ""


def off(**changes: object) -> Attempt:
    given = {"host": "h1", "rung": Rung.POWER, "heard": ("h1-a", 50), "outcome": "confirmed"}
    return Attempt(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("witnessed", [True, False])
def test_a_word_about_the_boot_that_no_guard_spoke_for(witnessed: bool) -> None:
    """What an earlier boot's guard left does not stand in the way of a person's word."""
    word = ConfirmedDown(boot_id="h1-b", time=0.0, by="ann")
    seen = cluster(hosts=(host("h1", boot_id="h1-b", confirmed_down=word),), silent={"h1": 7.0})
    heard = {"h1": replace(seen.heard.hosts["h1"], witnessed=witnessed)}
    seen = replace(seen, heard=replace(seen.heard, hosts=heard))
    assert bool(is_off(seen, "h1")) is not witnessed


def test_power_is_off_for_this_silence_only() -> None:
    assert is_off(cluster(attempts=(off(),)), "h1") == "its power device says off"
    for other in (
        off(outcome="failed"),
        off(outcome="running"),
        off(heard=("h1-a", 49)),
        off(rung=Rung.STORAGE, vm="web"),
        off(host="h2"),
    ):
        assert is_off(cluster(attempts=(other,)), "h1") == ""


def test_nobody_is_lost_without_a_leader() -> None:
    snapshot = cluster(silent={"h1": 60.0}, store=StoreSeen(leader=False))
    here = standing(snapshot, "h1")
    assert not here.lost
    assert not here.takes
    assert not here.fresh
    assert here.sentence == "the store has no leader: nobody is declared lost, VMs run on"
    unread = replace(cluster(), heard=replace(cluster().heard, asked_at=None))
    assert not standing(unread, "h1").takes


def test_all_by_name() -> None:
    assert list(standings(cluster(hosts=(host("h0"),)))) == ["h0", "h1", "h2", "h3"]


def test_what_runs_where() -> None:
    snapshot = cluster(vm("b"), vm("a"), vm("c", owner("h2")), vm("d", owner(state="stopped")))
    assert [one.name for one in snapshot.owned_by("h1")] == ["a", "b"]
