"""Each rung: when it is there, when it is proof, which is next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cluster_builders import NOW, cluster, disk, host, owner, process, renewal, states, vm

from godwit.cluster import fencing
from godwit.cluster.facts import Attempt, HostSeen, Rung, Snapshot, Timings, VmSeen
from godwit.cluster.fencing import Proof, Wait
from godwit.cluster.steps import Fence, Restore
from godwit.model.host import ConfirmedDown
from godwit.model.volume import Volume

LUN = (disk("root", "lun"),)
HEARD = ("h1-a", 50)


def lost(*vms: VmSeen, hosts: tuple[HostSeen, ...] = (), **changes: Any) -> Snapshot:
    """h1 was silent for 20 s; by default its guard was not armed."""
    default = host("h1", renewal=renewal("h1", guard="unarmed"), answers=False, listed=False)
    hosts = hosts if any(one.name == "h1" for one in hosts) else (*hosts, default)
    return cluster(*vms, silent={"h1": 20.0}, hosts=hosts, **changes)


def away(**changes: Any) -> HostSeen:
    return host("h1", **{"answers": False, "listed": False, **changes})


def tried(rung: Rung, outcome: str = "confirmed", **changes: Any) -> Attempt:
    given: dict[str, Any] = {
        "host": "h1",
        "rung": rung,
        "vm": "" if rung is Rung.POWER else "web",
        "heard": HEARD,
        "outcome": outcome,
        "ended_at": NOW - 1,
        "reason": "no answer",
    }
    return Attempt(**{**given, **changes})


def rungs(snapshot: Snapshot, seen: VmSeen) -> list[tuple[str, bool, str]]:
    return [(v.rung.value, v.there, v.why) for v in fencing.ladder(snapshot, seen, "h1")]


def test_the_whole_ladder() -> None:
    seen = vm(disks=(disk("a", "lun"), disk("b", "nfs")))
    volumes = {"lun": Volume(name="lun", kind="iscsi"), "nfs": Volume(name="nfs", kind="nfs")}
    assert rungs(cluster(seen, hosts=(host("h1", power=True),), volumes=volumes), seen) == [
        ("storage", True, "lun, nfs can cut h1 off"),
        ("deadline", True, "the guard of h1 is armed, with a watchdog"),
        ("power", True, "h1 has a power device"),
        ("person", True, "godwit host confirm-down"),
    ]


def storage(seen: VmSeen, **changes: Any) -> tuple[bool, str]:
    _, there, why = rungs(cluster(seen, **changes), seen)[0]
    return there, why


@pytest.mark.parametrize("kind", ["nfs", "iscsi", "rbd"])
def test_what_is_served_can_be_cut(kind: Any) -> None:
    seen = vm(disks=LUN)
    there, why = storage(seen, volumes={"lun": Volume(name="lun", kind=kind)})
    assert there, why


def test_directories_cannot_be_cut() -> None:
    plain = "shared is a plain directory on each host, nothing cuts one off"
    assert storage(vm()) == (False, plain)
    assert storage(vm(), volumes={}) == (False, plain)
    both = vm(disks=(*LUN, disk("b")))
    assert storage(both) == (False, plain)


def test_a_server_that_cannot() -> None:
    assert storage(vm(disks=LUN), uncuttable={"lun": "too old"}) == (False, "too old")
    assert storage(vm(disks=LUN), uncuttable={"other": "too old"})[0]


def test_a_host_that_the_server_does_not_know() -> None:
    seen = vm(disks=LUN)
    assert storage(seen, unbound={("lun", "h1"): "who is h1?"}) == (False, "who is h1?")
    assert storage(seen, unbound={("lun", "h2"): "who is h2?"})[0]


def test_a_broker_would_look_for_another_way() -> None:
    no = "the storage broker of root could reach lun through another host"
    for changes in ({"format": "vhdx"}, {"tier": "brokered"}):
        seen = vm(disks=(disk("a", "lun"), disk("root", "lun", **changes)))
        assert storage(seen) == (False, no)


def test_no_disk_and_a_block_device() -> None:
    seen = vm()
    bare = replace(seen, vm=seen.vm.but(disks=()))
    assert storage(bare) == (False, "it has no disk whose loss would be proof")
    device = vm(disks=(disk("d", "", source="device"),))
    why = "a block device of a host has nothing that cuts it off"
    assert storage(device) == (False, why)


def test_redirected_io_is_cut_at_the_peer() -> None:
    here = host("h1", redirected={"shared": "h2"})
    assert storage(vm(), hosts=(here,)) == (True, "shared can cut h1 off")
    no = "shared is redirected through h2, which does not answer"
    assert storage(vm(), hosts=(here, host("h2", answers=False))) == (False, no)
    gone = host("h1", redirected={"shared": "h9"})
    assert storage(vm(), hosts=(gone,))[0] is False


def deadline(here: HostSeen) -> tuple[bool, str]:
    _, there, why = rungs(cluster(hosts=(here,)), vm())[1]
    return there, why


def test_the_deadline() -> None:
    never = host("h1", renewal=None, renewal_revision=0)
    assert deadline(never) == (False, "h1 has not renewed its lease since this manager listens")
    other = host("h1", boot_id="h1-b")
    why = "h1 was booted since its guard said so, and has not renewed since"
    assert deadline(other) == (False, why)
    unarmed = host("h1", renewal=renewal("h1", guard="unarmed"))
    assert deadline(unarmed) == (False, "the guard of h1 did not keep the deadline (unarmed)")
    bare = host("h1", renewal=renewal("h1", watchdog=False))
    assert deadline(bare) == (False, "h1 has no watchdog, and a guard alone proves nothing")


def test_a_vm_that_is_registered_without_the_deadline() -> None:
    seen = replace(vm(), deadline=False)
    assert rungs(cluster(), seen)[1] == (
        "deadline",
        False,
        "the guard of h1 keeps no deadline for it",
    )
    assert proof(cluster(seen, silent={"h1": 20.0}), seen) is None


def test_power() -> None:
    assert rungs(cluster(), vm())[2] == ("power", False, "no power device is known for h1")


# --- admission


def test_high_availability_needs_a_rung_that_needs_no_person() -> None:
    assert fencing.admission(cluster(), vm()) == ""
    none = tuple(host(n, renewal=renewal(n, watchdog=False)) for n in ("h1", "h2", "h3"))
    assert fencing.admission(cluster(hosts=none), vm()) == (
        "nothing could prove that web stands still on h1 "
        "(storage: shared is a plain directory on each host, nothing cuts one off; "
        "deadline: h1 has no watchdog, and a guard alone proves nothing; "
        "power: no power device is known for h1)"
    )
    assert fencing.admission(cluster(hosts=none), vm(disks=LUN)) == ""
    powered = tuple(replace(one, power=True) for one in none)
    assert fencing.admission(cluster(hosts=powered), vm()) == ""


def test_only_the_hosts_it_may_run_on_count() -> None:
    bad = (host("h1", renewal=renewal("h1", watchdog=False)),)
    assert fencing.admission(cluster(hosts=bad), vm())
    assert fencing.admission(cluster(hosts=bad), vm(hosts=("h2", "h9"))) == ""
    assert "on h1" in fencing.admission(cluster(hosts=bad), vm(hosts=("h9", "h1")))
    assert "on h1" in fencing.admission(cluster(hosts=bad), vm(hosts=("h0", "h1")))


def test_a_local_disk_is_never_highly_available() -> None:
    seen = vm(disks=(disk("root", local=True),))
    assert fencing.admission(cluster(), seen) == "disk root of web lies on its host's own storage"


# --- proof


def proof(snapshot: Snapshot, seen: VmSeen) -> Proof | None:
    return fencing.proof(snapshot, seen, "h1")


def test_nothing_is_proof_by_itself() -> None:
    assert proof(lost(vm()), vm()) is None


def test_the_hosts_own_word() -> None:
    here = host("h1", renewal=renewal("h1", guard="unarmed"))
    gone = vm(processes=())
    said = Proof(Rung.AGENT, "h1 itself says that nothing of it runs")
    assert proof(lost(gone, hosts=(here,)), gone) == said
    assert proof(lost(vm(), hosts=(here,)), vm()) is None
    assert proof(lost(gone), gone) is None
    other = vm(processes=(process("h2"),))
    assert proof(lost(other, hosts=(here,)), other) == said


def test_power_and_person() -> None:
    assert proof(lost(vm(), attempts=(tried(Rung.POWER),)), vm()) == Proof(
        Rung.POWER, "its power device says off"
    )
    word = ConfirmedDown(boot_id="h1-a", time=1.0, by="ann")
    said = away(renewal=renewal("h1", guard="unarmed"), confirmed_down=word)
    assert proof(lost(vm(), hosts=(said,)), vm()) == Proof(
        Rung.PERSON, "ann confirmed that it is down"
    )
    failed = (tried(Rung.POWER, "failed"),)
    assert proof(lost(vm(), hosts=(said,), attempts=failed), vm()).rung is Rung.PERSON  # type: ignore[union-attr]


def test_the_deadline_is_proof_at_the_end_of_the_count() -> None:
    snapshot = cluster(vm(), silent={"h1": 15.0}, timings=Timings(margin=0.25))
    assert proof(snapshot, vm()) == Proof(
        Rung.DEADLINE, "silent for 15.0 s: its guard was armed, with a watchdog"
    )
    early = cluster(vm(), silent={"h1": 14.75}, hosts=(away(),), timings=Timings(margin=0.25))
    assert proof(early, vm()) is None
    for state, still in (
        ("frozen", True),
        ("postmigrate", True),
        ("incoming", True),
        ("running", False),
        ("starting", False),
        ("paused", False),
    ):
        seen = vm(processes=(process(state=state),))
        answering = lost(seen, hosts=(host("h1"),))
        assert (proof(answering, seen) is not None) is still
        assert proof(lost(seen, hosts=(away(),)), seen) is not None
    unwatched = away(renewal=renewal("h1", watchdog=False))
    assert proof(lost(vm(), hosts=(unwatched,)), vm()) is None


def test_every_disk_has_to_confirm() -> None:
    seen = vm(disks=(disk("a", "lun"), disk("b", "lun")))
    one = tried(Rung.STORAGE, disks=frozenset({"a"}))
    two = tried(Rung.STORAGE, disks=frozenset({"b"}))
    assert proof(lost(seen, attempts=(one,)), seen) is None
    assert proof(lost(seen, attempts=(one, two)), seen) == Proof(
        Rung.STORAGE, "h1 is cut off from every disk of web"
    )
    for wrong in (
        replace(two, heard=("h1-a", 49)),
        replace(two, vm="db"),
        replace(two, host="h2"),
        replace(two, rung=Rung.AGENT),
    ):
        assert proof(lost(seen, attempts=(one, wrong)), seen) is None


def test_no_disk_no_proof() -> None:
    seen = vm()
    bare = replace(seen, vm=seen.vm.but(disks=()))
    assert proof(lost(bare, attempts=(tried(Rung.STORAGE),)), bare) is None


# --- the next rung


def step(snapshot: Snapshot, seen: VmSeen) -> Fence | Wait:
    return fencing.next_step(snapshot, seen, "h1", NOW)


def test_storage_first() -> None:
    seen = vm(disks=(disk("a", "lun"), disk("b", "lun")))
    here = away(renewal=renewal("h1", guard="unarmed"), power=True)
    assert step(lost(seen, hosts=(here,)), seen) == Fence(
        host="h1",
        rung=Rung.STORAGE,
        vm="web",
        disks=("a", "b"),
        heard=HEARD,
        why="lun can cut h1 off",
    )


def test_then_power() -> None:
    seen = vm(disks=LUN)
    here = away(renewal=renewal("h1", guard="unarmed"), power=True)
    power = Fence(host="h1", rung=Rung.POWER, heard=HEARD, why="h1 has a power device")
    assert step(lost(vm(), hosts=(here,)), vm()) == power
    failed = (tried(Rung.STORAGE, "failed"),)
    assert step(lost(seen, hosts=(here,), attempts=failed), seen) == power


def test_what_is_under_way_is_waited_for() -> None:
    seen = vm(disks=LUN)
    running = (tried(Rung.STORAGE, "running"),)
    assert step(lost(seen, attempts=running), seen) == Wait("fencing h1 by storage")
    here = away(renewal=renewal("h1", guard="unarmed"), power=True)
    running = (tried(Rung.POWER, "running"),)
    assert step(lost(vm(), hosts=(here,), attempts=running), vm()) == Wait("fencing h1 by power")


def test_what_failed_is_tried_again_after_a_while() -> None:
    seen = vm(disks=LUN)
    ask = "if h1 is down: godwit host confirm-down h1"
    recent = (tried(Rung.STORAGE, "failed", ended_at=NOW - 9.9),)
    wait = step(lost(seen, attempts=recent), seen)
    assert wait == Wait(f"storage failed: no answer; {ask}", person=True)
    old = (tried(Rung.STORAGE, "failed", ended_at=NOW - 10),)
    again = step(lost(seen, attempts=old), seen)
    assert isinstance(again, Fence)
    assert again.rung is Rung.STORAGE
    last = (*old, tried(Rung.STORAGE, "failed", reason="still none"))
    assert step(lost(seen, attempts=last), seen) == Wait(
        f"storage failed: still none; {ask}", person=True
    )


def test_no_rung_at_all() -> None:
    assert step(lost(vm()), vm()) == Wait(
        "no rung can prove that it stands still on h1; if it is down: godwit host confirm-down h1",
        person=True,
    )


def answering(since: float, **changes: Any) -> dict[str, Any]:
    here = host("h1", renewal=renewal("h1", guard="unarmed"), **changes)
    return {"hosts": (here,), "memory": {"answering": {"h1": NOW - since}}}


def test_an_agent_that_answers_is_asked_first_if_it_has_for_a_while() -> None:
    seen = vm(disks=LUN)
    assert step(lost(seen, **answering(6.0)), seen) == Fence(
        host="h1",
        rung=Rung.AGENT,
        vm="web",
        heard=HEARD,
        owner_revision=seen.owner_revision,
        why="h1 answers",
    )
    assert seen.owner_revision > 0
    sooner = step(lost(seen, **answering(5.9)), seen)
    assert isinstance(sooner, Fence)
    assert sooner.rung is Rung.STORAGE
    never = lost(seen, hosts=(host("h1", renewal=renewal("h1", guard="unarmed")),))
    assert step(never, seen).rung is Rung.STORAGE  # type: ignore[union-attr]
    unlisted = lost(seen, **answering(60.0, listed=False))
    assert step(unlisted, seen).rung is Rung.STORAGE  # type: ignore[union-attr]
    running = (tried(Rung.AGENT, "running"),)
    assert step(lost(seen, attempts=running, **answering(60.0)), seen) == Wait(
        "fencing h1 by agent"
    )


def test_power_spares_vms_without_ha_on_a_host_that_answers() -> None:
    other = vm("test", ha=False)
    two = (vm("b", ha=False), vm("a", ha=False))
    wait = step(lost(vm(), *two, **answering(60.0, power=True, listed=False)), vm())
    assert isinstance(wait, Wait)
    assert wait.sentence.startswith("power would also stop a, b, and h1 answers; if h1")
    failed = (tried(Rung.AGENT, "failed"),)
    facts = answering(60.0, power=True)
    assert step(lost(vm(), other, attempts=failed, **facts), vm()) == Wait(
        "agent failed: no answer; power would also stop test, and h1 answers; "
        "if h1 is down: godwit host confirm-down h1",
        person=True,
    )
    assert step(lost(vm(), attempts=failed, **facts), vm()).rung is Rung.POWER  # type: ignore[union-attr]
    silent = away(renewal=renewal("h1", guard="unarmed"), power=True)
    assert step(lost(vm(), other, hosts=(silent,)), vm()).rung is Rung.POWER  # type: ignore[union-attr]


def test_whom_power_spares() -> None:
    vms = (vm("a", ha=False), vm("b", ha=False), vm("c"), vm("d", owner("h2"), ha=False))
    assert fencing.spared(lost(*vms, hosts=(host("h1"),)), "h1") == ("a", "b")
    assert fencing.spared(lost(*vms), "h1") == ()


def test_a_storage_cut_spares_vms_without_ha_on_the_same_volumes() -> None:
    """Only while the host answers: one that answers nobody is cut off with all its VMs."""
    seen, failed = vm(disks=LUN), (tried(Rung.AGENT, "failed"),)
    there, elsewhere = vm("b", ha=False, disks=LUN), vm("a", ha=False)
    both = lost(seen, there, elsewhere, attempts=failed, **answering(60.0))
    assert step(both, seen) == Wait(
        "agent failed: no answer; storage would also stop b, and h1 answers; "
        "if h1 is down: godwit host confirm-down h1",
        person=True,
    )
    one = lost(seen, elsewhere, attempts=failed, **answering(60.0))
    assert step(one, seen).rung is Rung.STORAGE  # type: ignore[union-attr]
    assert step(lost(seen, there), seen).rung is Rung.STORAGE  # type: ignore[union-attr]


# --- cuts that are taken back


def restores(snapshot: Snapshot) -> list[Restore]:
    return fencing.restores(snapshot, states(snapshot))


OLD = tried(Rung.STORAGE, heard=("h1-a", 49))
BACK = Restore(host="h1", vm="web", owner_revision=70)


def test_a_cut_is_taken_back_when_the_host_has_renewed() -> None:
    assert restores(cluster(vm(), attempts=(OLD,))) == [BACK]
    assert restores(cluster(vm(), attempts=(replace(OLD, outcome="failed"), OLD))) == [BACK]
    moved = vm(record=owner("h2"))
    assert restores(cluster(moved, attempts=(OLD,))) == [BACK]


def test_when_a_cut_stays() -> None:
    assert restores(cluster(vm(), attempts=(replace(OLD, outcome="running"),))) == []
    assert restores(cluster(vm(), attempts=(replace(OLD, heard=HEARD),))) == []
    assert restores(cluster(vm(), attempts=(replace(OLD, rung=Rung.AGENT),))) == []
    assert restores(cluster(vm(), attempts=(replace(OLD, host="h9"),))) == []
    assert restores(lost(vm(), attempts=(OLD,))) == []
    mute = host("h1", listed=False)
    assert restores(cluster(vm(), hosts=(mute,), attempts=(OLD,))) == []
    stray = vm(record=owner("h2"), processes=(process("h1"), process("h2")))
    assert restores(cluster(stray, attempts=(OLD,))) == []
    # What stays behind one attempt does not hide the next.
    both = (replace(OLD, host="h9"), replace(OLD, outcome="running"), OLD)
    assert restores(cluster(vm(), attempts=both)) == [BACK]
    assert restores(cluster(vm(), attempts=(replace(OLD, heard=HEARD), OLD))) == [BACK]


def test_a_cut_for_a_vm_that_is_forgotten() -> None:
    gone = Restore(host="h1", vm="web", owner_revision=0)
    assert restores(cluster(vm("db"), attempts=(OLD,))) == [gone]
    left = host("h1", runs=frozenset({"web"}))
    assert restores(cluster(vm("db"), hosts=(left,), attempts=(OLD,))) == []


def test_the_cuts_that_were_seen_are_lifted_and_no_others() -> None:
    told = (replace(OLD, cut="https://san:7102 4"), OLD, replace(OLD, cut="https://nas:7102 9"))
    again = replace(OLD, heard=HEARD, cut="https://san:7102 5")
    cuts = ("https://nas:7102 9", "https://san:7102 4")
    assert restores(cluster(vm(), attempts=(*told, again))) == [replace(BACK, cuts=cuts)]


def test_what_a_server_tells_of_is_no_proof_by_itself() -> None:
    seen = vm(disks=LUN)
    told = (tried(Rung.STORAGE, cut="https://san:7102 4"),)
    assert proof(lost(seen, attempts=told), seen) is None
    assert step(lost(seen, attempts=told), seen).rung is Rung.STORAGE  # type: ignore[union-attr]


def test_keys_are_one_for_each_thing_under_way() -> None:
    assert BACK.key == "restore h1 web"
    assert Fence(host="h1", rung=Rung.POWER).key == "fence h1 power "
    assert Fence(host="h1", rung=Rung.STORAGE, vm="web").key == "fence h1 storage web"
