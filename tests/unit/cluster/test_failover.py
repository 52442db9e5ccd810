"""The VMs of a lost host: who is taken over, where, in which order, and why not."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_builders import (
    NOW,
    Placing,
    cluster,
    disk,
    host,
    intent,
    owner,
    process,
    renewal,
    states,
    vm,
)

from godwit.cluster import failover, moves
from godwit.cluster.facts import Attempt, Member, Rung, Snapshot, StoreSeen, VmSeen
from godwit.cluster.failover import Place
from godwit.cluster.quorum import explain
from godwit.cluster.steps import Alarm, Fence, Kill, Note, Step, Swap, Unplaceable
from godwit.model import ownership
from godwit.model.errors import Refused
from godwit.model.host import ConfirmedDown
from godwit.model.marks import HostMark
from godwit.model.ownership import MovePhase, Owner, OwnerState

PROOF = "silent for 20.0 s: its guard was armed, with a watchdog"


def lost(*vms: VmSeen, **changes: Any) -> Snapshot:
    """h1 was silent for 20 s, armed and with a watchdog."""
    return cluster(*vms, silent={"h1": 20.0}, **changes)


def gone(name: str = "web", **changes: Any) -> VmSeen:
    """A VM of h1; nobody answers for it."""
    return vm(name, changes.pop("record", None), **{"processes": (), **changes})


def plan(snapshot: Snapshot, place: Place | None = None) -> list[Step]:
    return failover.plan(
        snapshot,
        states(snapshot),
        quorum=explain(snapshot),
        place=place or Placing(),
        taken={},
        now=NOW,
    )


def swap(name: str = "web", to: str = "h2", **changes: Any) -> Swap:
    given = {
        "source": "h1",
        "epoch": 6,
        "owner_revision": 70,
        "renewal_revision": 50,
        "proof": PROOF,
        "unlock": True,
    }
    return Swap(vm=name, to=to, **{**given, **changes})


def test_taken_over_with_proof() -> None:
    place = Placing()
    assert plan(lost(gone()), place) == [swap()]
    assert place.asked == [("web", {}, {"h1": ("it is down",)})]


def test_the_swap_compares_what_was_read() -> None:
    here = host("h1", renewal_revision=0, answers=False, listed=False)
    assert plan(lost(gone(), hosts=(here,))) == [swap(renewal_revision=0)]


def test_whose_host_is_there_is_left_alone() -> None:
    assert plan(lost(gone(record=owner("h2")))) == []
    assert plan(cluster(gone())) == []
    assert plan(lost(gone(record=Owner(epoch=3, state=OwnerState.RUNNING)))) == []
    assert plan(lost(gone(record=owner("h9")))) == []


@pytest.mark.parametrize("state", [OwnerState.STOPPED, OwnerState.SAVED])
def test_what_does_not_run_is_left_alone(state: OwnerState) -> None:
    assert plan(lost(gone(record=owner(state=state)))) == []


def test_what_was_being_started_counts_as_running() -> None:
    assert plan(lost(gone(record=owner(state=OwnerState.STARTING)))) == [swap()]


def test_without_ha() -> None:
    why = "it is not highly available and stays with h1"
    assert plan(lost(gone(ha=False))) == [Note(subject="web", why=why)]


def test_a_local_disk() -> None:
    why = "disk root lies on the own storage of h1: it waits for that host"
    assert plan(lost(gone(disks=(disk("root", local=True),)))) == [Alarm(subject="web", why=why)]


def test_two_hosts_without_a_witness() -> None:
    store = StoreSeen(asked_at=NOW, answered_at=NOW, members=(Member(name="m"),))
    snapshot = lost(gone(), store=store)
    two = {name: snapshot.hosts[name] for name in ("h1", "h2")}
    snapshot = _but(snapshot, hosts=two)
    (said,) = plan(snapshot)
    assert isinstance(said, Alarm)
    assert said.subject == "web"
    assert said.why.startswith("no automatic failover: 1 of 1 members of the store are healthy")
    word = ConfirmedDown(boot_id="h1-a", time=1.0, by="ann")
    here = host("h1", confirmed_down=word, answers=False, listed=False)
    confirmed = _but(snapshot, hosts={**two, "h1": here})
    assert plan(confirmed) == [swap(proof="ann confirmed that it is down")]


def _but(snapshot: Snapshot, **changes: Any) -> Snapshot:
    from dataclasses import replace

    return replace(snapshot, **changes)


def unarmed(**changes: Any) -> tuple[Any, ...]:
    given = {"answers": False, "listed": False, **changes}
    return (host("h1", renewal=renewal("h1", guard="unarmed"), **given),)


def test_fenced_first() -> None:
    steps = plan(lost(gone(), hosts=unarmed(power=True)))
    assert steps == [
        Fence(host="h1", rung=Rung.POWER, heard=("h1-a", 50), why="h1 has a power device")
    ]


def test_one_host_is_switched_off_once() -> None:
    steps = plan(lost(gone("a"), gone("b"), hosts=unarmed(power=True)))
    assert len(steps) == 1
    lun = (disk("root", "lun"),)
    steps = plan(lost(gone("a", disks=lun), gone("b", disks=lun), hosts=unarmed()))
    assert [step.key for step in steps] == ["fence h1 storage a", "fence h1 storage b"]


def test_waiting_for_a_device_is_a_note_for_a_person_an_alarm() -> None:
    running = Attempt(host="h1", rung=Rung.POWER, heard=("h1-a", 50), outcome="running")
    steps = plan(lost(gone(), hosts=unarmed(power=True), attempts=(running,)))
    assert steps == [Note(subject="web", why="fencing h1 by power")]
    (said,) = plan(lost(gone(), hosts=unarmed()))
    assert isinstance(said, Alarm)
    assert said.subject == "web"
    assert said.why.startswith("no rung can prove")


# --- order and placement


def test_what_matters_most_is_placed_first() -> None:
    place = Placing()
    vms = (
        gone("a", order=2),
        gone("b", order=1),
        gone("c", priority=90, order=9),
        gone("d", order=1),
    )
    steps = plan(lost(*vms), place)
    assert [name for name, _, _ in place.asked] == ["c", "b", "d", "a"]
    assert [step.key for step in steps] == ["swap c", "swap b", "swap d", "swap a"]
    assert place.asked[2][1] == {"c": "h2", "b": "h2"}


def test_no_place() -> None:
    place = Placing(full={"h2": "1 GiB free", "h3": "2 GiB free"})
    assert plan(lost(gone()), place) == [
        Unplaceable(
            vm="web",
            why="h1: it is down",
            rejected={"h2": ("1 GiB free",), "h3": ("2 GiB free",), "h1": ("it is down",)},
        )
    ]


def test_the_smallest_reason() -> None:
    assert failover.smallest({}) == "no host is known"
    found = {"b": ("x", "y"), "c": ("z",), "a": ("p", "q"), "d": ("r",)}
    assert failover.smallest(found) == "c: z"
    assert failover.smallest({"b": ("x", "y"), "a": ("p", "q")}) == "a: p; q"


def test_reasons_of_both_are_joined() -> None:
    place = Placing(full={"h2": "full", "h3": "full", "h1": "it is down"})
    seen = gone(hosts=("h3",))
    (said,) = plan(lost(seen), place)
    assert isinstance(said, Unplaceable)
    assert said.rejected == {
        "h1": ("it is down", "it is not one of h3"),
        "h2": ("it is not one of h3", "full"),
        "h3": ("full",),
    }
    assert said.why == "h3: full"


def test_who_places_may_know_the_smallest_reason() -> None:
    def knows(*_: object) -> failover.Placed:
        return failover.Placed(host=None, why="h3 lacks 1 MiB", rejected={"h3": ("1 MiB",)})

    (said,) = plan(lost(gone()), knows)
    assert isinstance(said, Unplaceable)
    assert said.why == "h3 lacks 1 MiB"


def test_a_place_that_was_excluded_is_not_taken() -> None:
    def stubborn(*_: object) -> failover.Placed:
        return failover.Placed(host="h1")

    (said,) = plan(lost(gone()), stubborn)
    assert isinstance(said, Unplaceable)


def excluded(snapshot: Snapshot, seen: VmSeen, **taken: str) -> dict[str, tuple[str, ...]]:
    return failover.excluded(snapshot, states(snapshot), seen, taken)


def test_marks_and_rules() -> None:
    mark = HostMark(state="maintenance", since=0.0)
    snapshot = lost(hosts=(host("h2", mark=mark),))
    seen = gone(hosts=("h2", "h3"), refused={"h3": "no memory"})
    assert excluded(snapshot, seen) == {
        "h1": ("it is down", "it is not one of h2, h3"),
        "h2": ("it is maintenance",),
        "h3": ("it could not start it: no memory",),
    }
    assert excluded(cluster(), gone()) == {}


def test_kept_apart() -> None:
    near = "db is kept apart from it"
    seen = gone(apart=("x", "y"))
    assert excluded(cluster(vm("db", owner("h2"), apart=("y",))), seen) == {"h2": (near,)}
    assert excluded(cluster(vm("db", owner("h2"), apart=("z",))), seen) == {}
    assert excluded(cluster(vm("db", owner("h2"), apart=("y",))), gone()) == {}
    stopped = gone("db", record=owner("h2", state=OwnerState.STOPPED), apart=("y",))
    assert excluded(cluster(stopped), seen) == {}
    assert excluded(cluster(seen), seen) == {}
    moving = vm("db", owner("h2", migration=intent("h2", "h3")), apart=("y",))
    assert excluded(cluster(moving), seen) == {"h2": (near,), "h3": (near,)}
    placed = gone("db", record=owner("h1"), apart=("y",))
    assert excluded(cluster(placed), seen, db="h3") == {"h3": (near,)}
    plain = vm("aa", owner("h3"))
    assert excluded(cluster(plain, vm("db", owner("h2"), apart=("y",))), seen) == {"h2": (near,)}


# --- restarts


def test_the_restart_limit() -> None:
    why = (
        "restarted 2 times within an hour, its limit: it stays down; "
        "start it by hand: godwit vm start web"
    )
    spent = gone(restarts=2, processes=())
    spent = _restarted(spent, 1e9 - 10, 1e9 - 3599)
    assert plan(lost(spent)) == [Alarm(subject="web", why=why)]
    assert plan(lost(_restarted(gone(restarts=2), 1e9 - 10, 1e9 - 3600))) == [swap()]
    back = _restarted(gone(restarts=1), 1e9 + 5000)
    assert plan(lost(back))[0].key.startswith("alarm web restarted 1 times")
    assert failover.worn_out(lost(), _restarted(gone(restarts=3), 1e9, 1e9)) == ""


def _restarted(seen: VmSeen, *times: float) -> VmSeen:
    from dataclasses import replace

    return replace(seen, restarts=times)


# --- moves


def moving(phase: MovePhase = MovePhase.COMMITTING, where: str = "h1", **more: Any) -> VmSeen:
    copy = process("h2", 6, "incoming", **{"migration": "m1", **more})
    return gone(record=owner(where, migration=intent(phase=phase)), processes=(copy,))


def test_a_released_copy_is_adopted() -> None:
    seen = moving(complete=True, released=True)
    place = Placing()
    adopted = swap(adopt=True, counts=False)
    assert plan(lost(seen), place) == [adopted]
    assert place.asked == []
    worn = _restarted(seen, *[1e9] * 9)
    assert plan(lost(worn)) == [adopted]


@pytest.mark.parametrize(
    "seen",
    [
        moving(complete=True),
        moving(released=True),
        moving(MovePhase.INTENT, complete=True, released=True),
        moving(complete=True, released=True, migration="m0"),
    ],
)
def test_any_other_copy_is_ended(seen: VmSeen) -> None:
    kill, swapped = plan(lost(seen))
    assert swapped == swap(to="h2")
    assert kill == Kill(
        vm="web",
        host="h2",
        epoch=6,
        why="h1 is lost and the VM starts from its disks: this copy is void",
    )


def test_a_copy_on_a_lost_host_is_not_adopted() -> None:
    seen = moving(complete=True, released=True)
    snapshot = cluster(seen, silent={"h1": 20.0, "h2": 20.0})
    assert moves.adoptable(seen, states(snapshot)) is None
    assert moves.adoptable(seen, {}) is None
    assert moves.adoptable(gone(), states(snapshot)) is None


def test_after_the_swap_the_sources_copy_goes() -> None:
    copy = process("h2", 5, "postmigrate", migration="m1")
    record = owner("h1", migration=intent("h2", "h1", MovePhase.COMMITTING))
    seen = gone(record=record, processes=(copy,))
    kill, swapped = plan(lost(seen))
    assert isinstance(kill, Kill)
    assert (kill.host, kill.epoch, kill.own) == ("h2", 5, 0)
    assert swapped == swap()
    assert moves.adoptable(seen, states(lost(seen))) is None


def test_leftovers_keep_what_is_kept() -> None:
    seen = moving()
    assert moves.leftovers(seen, seen.processes[0]) == ()
    assert moves.leftovers(gone()) == ()


def peer(snapshot: Snapshot, seen: VmSeen) -> tuple[Step, ...]:
    return moves.peer_lost(snapshot, seen, states(snapshot))


def test_the_destination_is_lost_before_the_swap() -> None:
    seen = vm(record=owner("h2", migration=intent("h2", "h1")))
    assert peer(lost(seen), seen) == (
        Note(subject="web", why="h1 is lost: h2 has it and ends the move"),
    )
    assert peer(cluster(seen), seen) == ()
    assert peer(lost(vm()), vm()) == ()
    unknown = vm(record=owner("h2", migration=intent("h2", "h9")))
    assert peer(lost(unknown), unknown) == ()


def test_the_source_is_lost_after_the_swap() -> None:
    seen = vm(record=owner("h2", migration=intent("h1", "h2", MovePhase.COMMITTING)))
    assert peer(lost(seen), seen) == (Note(subject="web", why="h1 is lost: h2 has it and goes on"),)


def test_a_destination_that_does_not_say_what_it_holds_is_waited_for() -> None:
    away = (host("h2", answers=False, listed=False),)
    bound = gone(record=owner(migration=intent(phase=MovePhase.COMMITTING)))
    why = "h2 may hold all of it and does not say so: 2 s are its"
    early = cluster(bound, hosts=away, silent={"h1": 16.3})
    assert plan(early) == [Note(subject="web", why=why)]
    late = cluster(bound, hosts=away, silent={"h1": 16.5})
    assert isinstance(plan(late)[0], Swap)
    for other in (
        gone(record=owner(migration=intent(phase=MovePhase.INTENT))),
        gone(record=owner("h1", migration=intent("h2", "h1", MovePhase.COMMITTING))),
        gone(),
    ):
        assert isinstance(plan(cluster(other, hosts=away, silent={"h1": 14.5}))[0], Swap)
    lost_too = cluster(bound, silent={"h1": 14.5, "h2": 14.5})
    assert isinstance(plan(lost_too)[0], Swap)
    listed = cluster(bound, silent={"h1": 14.5})
    assert isinstance(plan(listed)[0], Swap)


def test_a_page_source_is_waited_for_until_it_is_off() -> None:
    seen = vm(record=owner("h2", 6, migration=intent("h1", "h2", MovePhase.PAGE_SOURCE)))
    assert peer(lost(seen), seen) == (
        Note(
            subject="web",
            why="h1 may still serve pages: h2 waits for it, at most two minutes",
        ),
    )
    off = Attempt(host="h1", rung=Rung.POWER, heard=("h1-a", 50), outcome="confirmed")
    assert peer(lost(seen, attempts=(off,)), seen) == (
        Kill(
            vm="web",
            host="h2",
            epoch=6,
            why="the pages that h1 held are gone (its power device says off)",
            own=70,
        ),
    )
    empty = gone(record=seen.owner)
    assert peer(lost(empty, attempts=(off,)), empty) == ()


# --- the record


def test_the_record_of_a_failover() -> None:
    before = owner("h1", 5, migration=intent(), paused=True)
    after = ownership.fail_over(before, host="h2")
    assert after == Owner(host="h2", epoch=6, state=OwnerState.STARTING)
    assert ownership.fail_over(owner(state=OwnerState.STARTING), host="h1").epoch == 6
    for state in (OwnerState.STOPPED, OwnerState.SAVED):
        with pytest.raises(Refused):
            ownership.fail_over(owner(state=state), host="h2")


def test_keys() -> None:
    assert swap().key == "swap web"
    assert Unplaceable(vm="web", why="x").key == "unplaceable web x"
    assert Alarm(subject="a", why="b").key == "alarm a b"
    assert Note(subject="a", why="b").key == "note a b"
    assert Kill(vm="v", host="h", epoch=3, why="w").key == "kill v h 3"
