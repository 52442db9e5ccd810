"""Records against reality, row by row, and a start after a loss of all power."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cluster_builders import NOW, Placing, cluster, host, intent, owner, process, states, vm

from godwit.cluster import Memory, coldstart, resolver
from godwit.cluster.coldstart import Cold
from godwit.cluster.facts import ColdStart, HostSeen, Snapshot, StoreSeen, VmSeen
from godwit.cluster.steps import (
    Alarm,
    Conclude,
    Kill,
    Note,
    PowerOn,
    Resume,
    Start,
    Step,
    Stopped,
    Swap,
    Unplaceable,
)
from godwit.model.marks import HostMark
from godwit.model.ownership import MovePhase, Owner, OwnerState

SETTLED = {"bare": {"web": (5, NOW - 2)}}
STARTING = OwnerState.STARTING
PHASE = MovePhase.COMMITTING


def resolve(snapshot: Snapshot, *, cold: Cold | None = None, place: Any = None) -> list[Step]:
    return resolver.resolve(
        snapshot,
        states(snapshot),
        cold=cold or Cold(),
        place=place or Placing(),
        taken={},
        now=NOW,
    )


def kill(where: str, epoch: int, why: str = "the record names h1 at epoch 5") -> Kill:
    return Kill(vm="web", host=where, epoch=epoch, why=why)


def handed(to: str, why: str) -> Swap:
    return Swap(
        vm="web",
        source="h1",
        to=to,
        epoch=6,
        owner_revision=70,
        renewal_revision=None,
        proof=why,
        adopt=True,
        counts=False,
    )


def disk_start(to: str = "h1", *, counts: bool = True, epoch: int = 6) -> Swap:
    return Swap(
        vm="web",
        source="h1",
        to=to,
        epoch=epoch,
        owner_revision=70,
        renewal_revision=None,
        proof="h1 itself says that nothing of it runs",
        counts=counts,
    )


def test_one_on_its_owner() -> None:
    assert resolve(cluster(vm())) == []
    for state in ("starting", "frozen", "paused"):
        assert resolve(cluster(vm(processes=(process(state=state),)))) == []


def test_a_persons_task_is_left_to_it() -> None:
    assert resolve(cluster(vm(processes=(process("h2"),), busy=True))) == []


def test_each_vm_is_looked_at() -> None:
    stray = (process(), process("h2", 4))
    vms = (
        vm("a", processes=stray, busy=True),
        vm("b", owner("h9"), processes=()),
        vm("c", owner("h3"), processes=()),
        vm("d", owner(state=OwnerState.STOPPED), processes=(process("h2", 4),)),
        vm("e", owner(state=OwnerState.STOPPED), processes=(process("h2", 4),)),
        vm("f", processes=stray),
    )
    steps = resolve(cluster(*vms, silent={"h3": 20.0}))
    assert [s.key for s in steps if isinstance(s, Kill)] == [
        "kill d h2 4",
        "kill e h2 4",
        "kill f h2 4",
    ]


def test_an_owner_that_is_no_host() -> None:
    seen = vm(record=owner("h9"), processes=())
    why = "its owner h9 is no host of this cluster: a person must look"
    assert resolve(cluster(seen)) == [Alarm(subject="web", why=why)]


def test_a_lost_owner_is_the_failovers() -> None:
    assert resolve(cluster(vm(processes=()), silent={"h1": 20.0})) == []


def test_what_matters_most_first() -> None:
    vms = [vm(name, processes=(process(), process("h2", 4))) for name in "ab"]
    vms.append(vm("c", processes=(process(), process("h2", 4)), priority=90))
    steps = resolve(cluster(*vms))
    assert [s.key for s in steps if isinstance(s, Kill)] == [
        "kill c h2 4",
        "kill a h2 4",
        "kill b h2 4",
    ]


# --- two


def test_two_run() -> None:
    seen = vm(processes=(process(), process("h2", 4), process("h3", 9, "starting")))
    assert resolve(cluster(seen)) == [
        kill("h2", 4),
        kill("h3", 9),
        Alarm(
            subject="web",
            why="it also ran on h2 at epoch 4, h3 at epoch 9: ended; its disks need a look",
        ),
    ]


def test_an_older_one_on_the_owner_itself() -> None:
    seen = vm(processes=(process(), process("h1", 4)))
    assert resolve(cluster(seen))[0] == kill("h1", 4)


def test_a_frozen_one_and_a_swap_of_just_now_are_no_alarm() -> None:
    assert resolve(cluster(vm(processes=(process(), process("h2", 4, "frozen"))))) == [
        kill("h2", 4)
    ]
    record = owner(migration=intent(phase=PHASE))
    both = (process(driven=True), process("h2", 6, migration="m1", driven=True))
    assert resolve(cluster(vm(record=record, processes=both))) == [kill("h2", 6)]


@pytest.mark.parametrize(
    "stray",
    [
        process("h2", 6, migration="m0"),
        process("h3", 6, migration="m1"),
        process("h2", 5, migration="m1"),
        process("h2", 7, migration="m1"),
    ],
)
def test_what_does_not_match_the_move_is_an_alarm(stray: Any) -> None:
    seen = vm(record=owner(migration=intent(phase=PHASE)), processes=(process(), stray))
    first, second = resolve(cluster(seen))
    assert first == kill(stray.host, stray.epoch)
    assert isinstance(second, Alarm)
    alone = replace(seen, processes=(stray,))
    assert kill(stray.host, stray.epoch) in resolve(cluster(alone, memory=SETTLED))


def test_an_engine_is_left_alone() -> None:
    both = (process(driven=True), process("h2", 6, "incoming", migration="m1", driven=True))
    assert resolve(cluster(vm(record=owner(migration=intent()), processes=both))) == []
    only = vm(record=owner(migration=intent()), processes=both[1:])
    assert resolve(cluster(only, hosts=(host("h1", listed=False),))) == []
    assert resolve(cluster(only)) == [kill("h2", 6)]  # nobody is left who would fill it
    begun = (replace(both[1], state="running"), process())
    assert resolve(cluster(replace(only, processes=begun))) == [
        kill("h2", 6)
    ]  # the record does not say that it may run


def test_copies_beside_the_owner_are_ended() -> None:
    seen = vm(processes=(process(), process("h2", 6, "incoming"), process("h3", 2, "paused")))
    assert resolve(cluster(seen)) == [kill("h2", 6), kill("h3", 2)]


@pytest.mark.parametrize("state", ["postmigrate", "paused", "running", "frozen"])
@pytest.mark.parametrize("phase", [MovePhase.INTENT, PHASE])
@pytest.mark.parametrize("driven", [False, True])
def test_what_nobody_drives_any_more_is_called_off_at_the_owner(
    state: Any, phase: MovePhase, driven: bool
) -> None:
    record = owner(migration=intent(phase=phase))
    copy = process("h2", 6, "incoming", migration="m1", driven=driven)
    resumed = Resume(
        vm="web",
        host="h1",
        migration="m1",
        why="nobody works on m1 any more, and h2 never started it",
    )
    for wanted in (record, record.but(paused=True)):
        for there in ((copy,), ()):
            seen = vm(record=wanted, processes=(process(state=state), *there))
            assert resolve(cluster(seen)) == [resumed]


def test_who_is_not_asked_to_go_on() -> None:
    record = owner(migration=intent(phase=PHASE))
    copy = process("h2", 6, "incoming", migration="m1")
    seen = vm(record=record, processes=(process(driven=True), copy))
    assert resolve(cluster(seen)) == []
    mute = replace(seen, processes=(copy,))
    assert resolve(cluster(mute, hosts=(host("h1", listed=False),))) == []
    silent = replace(seen, processes=(process(known=False), copy))
    why = "its QEMU on h1 does not answer, and m1 binds it"
    assert resolve(cluster(silent)) == [Note(subject="web", why=why)]


SWAPPED = owner("h2", 6, migration=intent(phase=PHASE))


def conclude(why: str) -> Conclude:
    return Conclude(vm="web", migration="m1", owner_revision=70, why=why)


def test_a_move_that_the_destination_has_is_concluded_in_the_sources_place() -> None:
    seen = vm(record=SWAPPED, processes=(process("h2", 6),))
    gone = conclude("h1 has nothing of it left, h2 has it: the move is over")
    lost = conclude("h1 is lost, h2 has it: the move is over")
    assert resolve(cluster(seen)) == [gone]
    assert resolve(cluster(seen, silent={"h1": 20.0})) == [lost]
    removed = replace(seen, owner=SWAPPED.but(migration=intent(source="h9", phase=PHASE)))
    why = "h9 is lost, h2 has it: the move is over"
    assert resolve(cluster(removed)) == [conclude(why)]
    for state in ("paused", "frozen"):
        stands = replace(seen, processes=(process("h2", 6, state),))
        assert resolve(cluster(stands)) == [gone]


def test_a_move_is_not_over_before_the_destination_has_it() -> None:
    for copy in (
        process("h2", 6, "incoming", migration="m1"),
        process("h2", 6, "starting"),
        process("h2", 6, driven=True),
        process("h2", 5),
    ):
        seen = vm(record=SWAPPED, processes=(copy,))
        for silent in ({}, {"h1": 20.0}):
            steps = resolve(cluster(seen, silent=silent))
            assert not any(isinstance(step, Conclude) for step in steps)


def test_a_source_that_may_still_say_so_frees_the_record_itself() -> None:
    there = process("h2", 6)
    seen = vm(record=SWAPPED, processes=(process(state="postmigrate", driven=True), there))
    assert resolve(cluster(seen)) == []
    mute = vm(record=SWAPPED, processes=(there,))
    assert resolve(cluster(mute, hosts=(host("h1", listed=False),))) == []
    paged = SWAPPED.but(migration=intent(phase=MovePhase.PAGE_SOURCE))
    assert resolve(cluster(vm(record=paged, processes=(there,)))) == []


@pytest.mark.parametrize("phase", [PHASE, MovePhase.PAGE_SOURCE])
@pytest.mark.parametrize("state", ["postmigrate", "paused"])
def test_the_end_of_a_move_that_nobody_works_on_is_taken_up(phase: MovePhase, state: Any) -> None:
    record = SWAPPED.but(migration=intent(phase=phase))
    resumed = Resume(vm="web", host="h1", migration="m1", why="nobody works on m1 any more")
    for there in (process("h2", 6), process("h2", 6, "incoming", driven=True)):
        seen = vm(record=record, processes=(process(state=state), there))
        assert resolve(cluster(seen)) == [resumed]
        assert resumed not in resolve(cluster(seen, silent={"h1": 20.0}))


def test_a_source_that_runs_beside_its_destination_is_ended() -> None:
    both = vm(record=SWAPPED, processes=(process(), process("h2", 6)))
    first, second = resolve(cluster(both))
    assert isinstance(first, Kill)
    assert isinstance(second, Alarm)
    assert (first.host, second.why.partition(":")[0]) == ("h1", "it also ran on h1 at epoch 5")


# --- elsewhere


def test_one_that_the_record_meant_to_hand_over_is_adopted() -> None:
    seen = vm(
        record=owner(migration=intent(phase=PHASE)),
        processes=(process("h2", 6, migration="m1"),),
    )
    why = "h1 says that its QEMU is gone; h2 runs what it gave"
    assert resolve(cluster(seen)) == [handed("h2", why)]
    mute = cluster(seen, hosts=(host("h1", listed=False),))
    assert resolve(mute) == [Note(subject="web", why="h1 has not said whether it still has a copy")]
    held = replace(seen, processes=(*seen.processes, process(state="postmigrate")))
    assert resolve(cluster(held)) == [kill("h2", 6)]


def test_one_that_runs_elsewhere_is_ended() -> None:
    seen = vm(processes=(process("h2", 4),))
    assert resolve(cluster(seen, memory=SETTLED)) == [kill("h2", 4)]
    assert resolve(cluster(seen, hosts=(host("h1", listed=False),))) == [kill("h2", 4)]


def test_what_a_takeover_left_frozen_does_not_hold_up_the_start() -> None:
    seen = vm(record=owner(state=STARTING), processes=(process("h2", 4, "frozen"),))
    assert resolve(cluster(seen)) == [kill("h2", 4), Start(vm="web", host="h1", epoch=5)]
    assert resolve(cluster(seen, hosts=(host("h1", listed=False),))) == [kill("h2", 4)]
    refused = replace(seen, refused={"h1": "no"})
    place = Placing()
    steps = resolve(cluster(refused, replace(refused, vm=vm("xyz").vm)), place=place)
    assert next(s for s in steps if isinstance(s, Swap)) == disk_start("h2")
    assert [taken for _, taken, _ in place.asked] == [{}, {"web": "h2"}]
    paused = (process("h2", 4, "frozen"), process(state="paused"))
    assert resolve(cluster(replace(seen, processes=paused))) == [kill("h2", 4)]


# --- none


def test_a_host_that_does_not_say_what_it_runs_is_waited_for() -> None:
    seen = vm(processes=())
    mute = cluster(seen, hosts=(host("h1", listed=False),), memory=SETTLED)
    assert resolve(mute) == []
    due = vm(record=owner(state=STARTING), processes=())
    why = "h1 was to start it and does not say what it runs: waiting for its agent"
    assert resolve(cluster(due, hosts=(host("h1", listed=False),))) == [
        Note(subject="web", why=why)
    ]


def test_none_is_started_by_its_owner() -> None:
    assert resolve(cluster(vm(processes=()), memory=SETTLED)) == [disk_start()]
    auto = vm(processes=(), ha=False, autostart=True)
    assert resolve(cluster(auto, memory=SETTLED)) == [disk_start()]


def test_its_own_agent_comes_first() -> None:
    seen = vm(processes=())
    assert resolve(cluster(seen)) == []
    assert resolve(cluster(seen, memory={"bare": {"web": (5, NOW - 1.9)}})) == []
    assert resolve(cluster(seen, memory={"bare": {"web": (4, NOW - 60)}})) == []


def test_without_ha_it_is_recorded_as_stopped() -> None:
    why = "nothing of it runs on its host, and it is neither highly available nor autostart"
    assert resolve(cluster(vm(processes=(), ha=False), memory=SETTLED)) == [
        Stopped(vm="web", owner_revision=70, why=why)
    ]


def test_none_on_a_host_that_is_late() -> None:
    seen = vm(processes=())
    assert resolve(cluster(seen, silent={"h1": 7.0}, memory=SETTLED)) == []


def test_what_was_to_start_is_started_at_its_epoch() -> None:
    seen = vm(record=owner(state=STARTING), processes=())
    assert resolve(cluster(seen)) == [Start(vm="web", host="h1", epoch=5)]
    bound = vm(record=owner(state=STARTING, migration=intent()), processes=())
    assert resolve(cluster(bound, memory=SETTLED)) == [disk_start()]


def test_what_its_owner_could_not_start_goes_elsewhere() -> None:
    seen = vm(record=owner(state=STARTING), processes=(), refused={"h1": "no"})
    assert resolve(cluster(seen)) == [disk_start("h2")]
    nowhere = replace(seen, refused={"h1": "no", "h2": "no", "h3": "no"})
    (said,) = resolve(cluster(nowhere))
    assert isinstance(said, Unplaceable)
    assert said.why == "h1: it could not start it: no"


def worn(**changes: Any) -> VmSeen:
    seen = vm(processes=(), **changes)
    return replace(seen, restarts=(1e9, 1e9, 1e9))


def test_the_restart_limit_holds_here_too() -> None:
    (said,) = resolve(cluster(worn(), memory=SETTLED))
    assert isinstance(said, Alarm)
    assert said.subject == "web"
    assert said.why.startswith("restarted 3 times within an hour")
    (said,) = resolve(cluster(replace(worn(), refused={"h1": "no"})))
    assert isinstance(said, Alarm)
    assert said.subject == "web"
    assert said.why.startswith("restarted 3 times within an hour")


@pytest.mark.parametrize("mark", ["draining", "maintenance"])
def test_it_does_not_start_again_on_a_host_that_is_emptied(mark: Any) -> None:
    marked = (host("h1", mark=HostMark(state=mark, since=0.0)),)
    assert resolve(cluster(vm(processes=()), hosts=marked, memory=SETTLED)) == [disk_start("h2")]
    auto = vm(processes=(), ha=False, autostart=True)
    assert resolve(cluster(auto, hosts=marked, memory=SETTLED)) == [disk_start()]
    other = (host("h1", mark=HostMark(state="quarantined", since=0.0)),)
    assert resolve(cluster(vm(processes=()), hosts=other, memory=SETTLED)) == [disk_start()]


def test_a_copy_without_its_source() -> None:
    record = owner(migration=intent(phase=PHASE))
    copy = process("h2", 6, "incoming", migration="m1", complete=True, released=True)
    seen = vm(record=record, processes=(copy,))
    why = "h1 had let go of it and its QEMU is gone; h2 holds the whole VM"
    assert resolve(cluster(seen)) == [handed("h2", why)]
    waits = vm(record=record, processes=(replace(copy, driven=True),))
    assert resolve(cluster(waits)) == [handed("h2", why)]
    half = vm(record=record, processes=(replace(copy, complete=False),))
    assert resolve(cluster(half)) == [kill("h2", 6)]
    assert resolve(cluster(half, memory=SETTLED)) == [kill("h2", 6), disk_start()]


def test_the_lost_peer_of_a_move_comes_first() -> None:
    seen = vm(record=owner(migration=intent(phase=PHASE)))
    (said,) = resolve(cluster(seen, silent={"h2": 20.0}))
    assert isinstance(said, Note)
    assert said.why == "h2 is lost: h1 has it and ends the move"


# --- stopped


def test_what_is_stopped_is_ended() -> None:
    for state in (OwnerState.STOPPED, OwnerState.SAVED):
        seen = vm(record=owner(state=state), processes=(process("h2", 4), process()))
        why = f"the record says {state.value}"
        assert resolve(cluster(seen)) == [kill("h2", 4, why), kill("h1", 5, why)]
    saving = vm(record=owner(state=OwnerState.SAVED), processes=(process(driven=True),))
    assert resolve(cluster(saving)) == []


def stopped(ended: str, **changes: Any) -> VmSeen:
    return vm(record=owner(state=OwnerState.STOPPED), ended=ended, **changes)


def on(why: str, where: str = "h1") -> PowerOn:
    return PowerOn(vm="web", host=where, owner_revision=70, why=why)


def test_why_it_stopped() -> None:
    asked = "its guest shut down, and its rules say restart"
    assert resolve(cluster(stopped("guest"))) == []
    assert resolve(cluster(stopped("guest", on_shutdown="restart"))) == [on(asked)]
    assert resolve(cluster(stopped("user", on_shutdown="restart"))) == []
    assert resolve(cluster(stopped("", on_shutdown="restart"))) == []
    assert resolve(cluster(stopped("guest", on_shutdown="restart", ha=False))) == []
    crashed = "its QEMU died and its host gave up"
    assert resolve(cluster(stopped("crash"))) == [on(crashed)]
    place = Placing("h3")
    assert resolve(cluster(stopped("crash")), place=place) == [on(crashed, "h3")]


def test_a_saved_vm_is_not_switched_on() -> None:
    seen = vm(record=owner(state=OwnerState.SAVED), ended="crash")
    assert resolve(cluster(seen)) == []


def test_limits_of_switching_on() -> None:
    spent = replace(stopped("crash"), restarts=(1e9, 1e9, 1e9))
    (said,) = resolve(cluster(spent))
    assert isinstance(said, Alarm)
    assert said.subject == "web"
    assert said.why.startswith("restarted 3 times within an hour")
    (said,) = resolve(cluster(stopped("crash", hosts=("h9",))))
    assert isinstance(said, Unplaceable)


def test_what_was_placed_is_known_to_the_next() -> None:
    place = Placing()
    vms = (replace(stopped("crash"), vm=vm(name).vm) for name in "ab")
    resolve(cluster(*vms), place=place)
    assert [taken for _, taken, _ in place.asked] == [{}, {"a": "h1"}]
    refused = (vm(name, owner(state=STARTING), processes=(), refused={"h1": "no"}) for name in "cd")
    place = Placing()
    resolve(cluster(*refused), place=place)
    assert [taken for _, taken, _ in place.asked] == [{}, {"c": "h2"}]


def test_keys() -> None:
    assert on("x").key == "power-on web"
    assert Start(vm="web", host="h1", epoch=5).key == "start web 5"
    assert Resume(vm="web", host="h1", migration="m", why="x").key == "resume web"
    assert Stopped(vm="web", owner_revision=1, why="x").key == "stopped web"


# --- memory: since when nothing runs


def remember(snapshot: Snapshot, memory: Memory | None = None, now: float = NOW) -> Memory:
    return resolver.remember(memory or Memory(), snapshot, now)


def test_since_when_nothing_runs() -> None:
    seen = vm(processes=())
    first = remember(cluster(seen))
    assert first.bare == {"web": (5, NOW)}
    assert remember(cluster(seen), first, NOW + 1).bare == {"web": (5, NOW)}
    risen = vm(record=owner(epoch=6), processes=())
    assert remember(cluster(risen), first, NOW + 1).bare == {"web": (6, NOW + 1)}
    assert remember(cluster(vm()), first, NOW + 1).bare == {}
    mute = cluster(seen, hosts=(host("h1", listed=False),))
    assert remember(mute, first, NOW + 1).bare == {}
    assert remember(cluster(vm(record=owner("h9"), processes=())), first).bare == {}
    off = vm(record=owner(state=OwnerState.STOPPED))
    assert remember(cluster(off), first).bare == {}
    away = cluster(seen, store=StoreSeen(leader=False))
    assert remember(away, first, NOW + 1) is first


# --- after a loss of all power


def dark(name: str = "web", where: str = "h1", **changes: Any) -> VmSeen:
    return vm(name, owner(where), processes=(), **changes)


BOOTS = {"h1": "h1-old", "h2": "h2-old", "h3": "h3-old"}


def cold(snapshot: Snapshot, boots: dict[str, str] | None = None) -> ColdStart | None:
    memory = Memory(boots=BOOTS if boots is None else boots)
    return coldstart.remember(memory, snapshot, NOW).cold


def test_it_is_recognised() -> None:
    both = cluster(dark(), dark("db", "h2", ha=False))
    assert cold(both) == ColdStart(NOW, frozenset({"web", "db"}))
    assert cold(both, {}) == ColdStart(NOW, frozenset({"web", "db"}))


def test_when_it_is_not() -> None:
    assert cold(cluster()) is None
    assert cold(cluster(vm(record=owner(state=OwnerState.STOPPED)))) is None
    assert cold(cluster(dark(), vm("db", owner("h2")))) is None
    assert cold(cluster(dark()), {"h1": "h1-a"}) is None
    assert cold(cluster(dark(), dark("db", "h2")), {"h2": "h2-a"}) is None
    assert cold(cluster(dark()), {"h2": "h2-a"}) is not None
    assert cold(cluster(dark(where="h9"))) is None
    assert cold(cluster(dark(), hosts=(host("h1", listed=False),))) is None
    assert cold(cluster(dark(), hosts=(host("h1", renewal=None, renewal_revision=0),))) is None
    away = cluster(dark(), store=StoreSeen(leader=False))
    assert coldstart.remember(Memory(boots=BOOTS), away, NOW) == Memory(boots=BOOTS)


def test_one_host_that_is_back_is_enough_to_know() -> None:
    mute = host("h1", listed=False, boot_id="h1-old")
    assert cold(cluster(dark(), dark("db", "h2"), hosts=(mute,))) is not None
    late = host("h1", renewal=None, renewal_revision=0)
    assert cold(cluster(dark(), dark("db", "h2"), hosts=(late,))) is not None
    assert cold(cluster(dark("a", "h2"), dark("b", "h1"), hosts=(late,))) is not None


def test_boots_are_noted_while_something_runs() -> None:
    alive = coldstart.remember(Memory(boots=BOOTS), cluster(vm(), dark("db")), NOW)
    assert alive.boots == {"h1": "h1-a", "h2": "h2-a", "h3": "h3-a"}
    nothing = coldstart.remember(Memory(boots=BOOTS), cluster(), NOW)
    assert nothing.boots == alive.boots
    still = coldstart.remember(Memory(boots=BOOTS), cluster(dark()), NOW)
    assert still.boots == BOOTS


def test_what_runs_is_no_longer_waited_for() -> None:
    memory = Memory(cold=ColdStart(1.0, frozenset({"web", "db", "old"})))
    after = coldstart.remember(memory, cluster(dark(), vm("db"), dark("new")), NOW)
    assert after.cold == ColdStart(1.0, frozenset({"web"}))
    over = coldstart.remember(memory, cluster(vm(), vm("db")), NOW)
    assert over.cold is None


def phase(*vms: VmSeen, since: float = 10.0, hosts: tuple[HostSeen, ...] = ()) -> Cold:
    names = frozenset(one.name for one in vms)
    memory = {"cold": ColdStart(NOW - since, names)}
    return coldstart.phase(cluster(*vms, hosts=hosts, memory=memory), NOW)


def test_group_by_group() -> None:
    vms = (dark("a", order=2), dark("b", "h2", order=1), dark("c", order=1), dark("d", priority=9))
    assert phase(*vms) == Cold(
        held=frozenset({"a", "d"}),
        due=frozenset({"b", "c"}),
        sentence="all power was lost: b, c first",
    )
    assert coldstart.phase(cluster(dark()), NOW) == Cold()


def test_the_last_host_is_waited_for() -> None:
    mute = (host("h2", listed=False),)
    assert phase(dark(), dark("db", "h2"), hosts=mute) == Cold(
        held=frozenset({"web", "db"}),
        sentence="all power was lost: waiting for h2, at most 110 s more",
    )
    assert phase(dark(), dark("db", "h2"), hosts=mute, since=120.0) == Cold(
        held=frozenset(), due=frozenset({"web"}), sentence="all power was lost: web first"
    )
    assert phase(dark(), dark("db", "h2"), hosts=mute, since=119.5).due == frozenset()
    gone = (host("h2", renewal=None, renewal_revision=0),)
    assert phase(dark("db", "h2"), hosts=gone).held == frozenset({"db"})
    many = (dark("a", "h2"), dark("b", "h3"), dark("c", "h9"))
    none = (host("h2", listed=False), host("h3", listed=False))
    assert phase(*many, hosts=none).sentence.startswith(
        "all power was lost: waiting for h2, h3, h9, at most"
    )
    assert phase(*many, hosts=none, since=500.0) == Cold(
        sentence="all power was lost and h2, h3, h9 did not come back"
    )


def test_what_could_not_be_started_holds_nobody_up() -> None:
    failed = replace(dark("a", priority=90), refused={"h1": "no"})
    assert phase(failed, dark("b")).due == frozenset({"b"})
    off = vm("c", owner(state=OwnerState.STOPPED), priority=90)
    assert phase(off, dark("b")).due == frozenset({"b"})
    assert phase(failed) == Cold()
    slow = phase(dark("a", priority=90), dark("b"), since=120.0)
    assert (slow.due, slow.held) == (frozenset({"a", "b"}), frozenset())
    assert phase(dark("a", priority=90), dark("b"), since=119.5).held == frozenset({"b"})
    memory = {"cold": ColdStart(NOW, frozenset({"gone", "web"}))}
    assert coldstart.phase(cluster(dark(), memory=memory), NOW).due == frozenset({"web"})


def test_held_and_due_in_the_resolver() -> None:
    snapshot = cluster(dark(ha=False))
    assert resolve(snapshot, cold=Cold(due=frozenset({"web"}))) == [disk_start(counts=False)]
    assert resolve(cluster(worn()), cold=Cold(due=frozenset({"web"}))) == [disk_start(counts=False)]
    settled = cluster(dark(), memory=SETTLED)
    assert resolve(settled, cold=Cold(held=frozenset({"web"}))) == []
    nobody = Owner(epoch=2, state=OwnerState.RUNNING)
    (said,) = resolve(cluster(vm(record=nobody, processes=())))
    assert isinstance(said, Alarm)
