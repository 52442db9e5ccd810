"""Faults planted in the decisions: scenarios and invariants have to see each of them.

A planted fault is one wrong rule, as an edit gone wrong would make it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from sim_scenario import FOLDER, load, play
from sim_world import Violation

from godwit.cluster import coldstart, failover, fencing, membership, moves, quorum, resolver
from godwit.cluster.facts import Heard, Rung, Snapshot, Timings, VmSeen
from godwit.cluster.fencing import Proof
from godwit.cluster.quorum import Quorum

Plant = Callable[[pytest.MonkeyPatch], None]


def _believe(patch: pytest.MonkeyPatch) -> None:
    """Skip the fencing: silence alone is taken for proof."""
    patch.setattr(fencing, "proof", lambda *_: Proof(Rung.PERSON, "believed"))


def _no_watchdog_needed(patch: pytest.MonkeyPatch) -> None:
    """An armed guard alone is taken for proof."""
    true = fencing._deadline

    def wrong(snapshot: Snapshot, vm: VmSeen, host: str) -> fencing.RungView:
        view = true(snapshot, vm, host)
        return dataclasses.replace(view, there=view.there or "no watchdog" in view.why)

    patch.setattr(fencing, "_deadline", wrong)


def _unarmed_counts(patch: pytest.MonkeyPatch) -> None:
    """A guard that said unarmed is believed."""
    true = fencing._deadline

    def wrong(snapshot: Snapshot, vm: VmSeen, host: str) -> fencing.RungView:
        view = true(snapshot, vm, host)
        return dataclasses.replace(view, there=view.there or "unarmed" in view.why)

    patch.setattr(fencing, "_deadline", wrong)


def _any_boot(patch: pytest.MonkeyPatch) -> None:
    """What a guard said in an earlier boot of its host counts for the next one."""
    true = fencing._deadline

    def wrong(snapshot: Snapshot, vm: VmSeen, host: str) -> fencing.RungView:
        view = true(snapshot, vm, host)
        return dataclasses.replace(view, there=view.there or "was booted since" in view.why)

    patch.setattr(fencing, "_deadline", wrong)


def _fresh_at_once(patch: pytest.MonkeyPatch) -> None:
    """A manager that has just begun takes an old renewal for a new one."""
    patch.setattr(membership, "_witnessed", lambda *_: True)


def _never_waits(patch: pytest.MonkeyPatch) -> None:
    """A destination that does not say what it holds is not waited for."""
    patch.setattr(moves, "unheard", lambda *_: "")


def _nobody_concludes(patch: pytest.MonkeyPatch) -> None:
    """A move whose source is gone binds the VM for ever."""
    patch.setattr(moves, "over", lambda *_: ())


def _early(patch: pytest.MonkeyPatch) -> None:
    """Six seconds of silence are enough."""
    patch.setattr(Timings, "takeover_s", property(lambda self: self.late_s))


def _no_margin(patch: pytest.MonkeyPatch) -> None:
    """A takeover at the watchdog's own second: nothing is left for a slow clock."""
    patch.setattr(Timings, "takeover_s", property(lambda self: self.reset_s))


def _counts_through(patch: pytest.MonkeyPatch) -> None:
    """Time without a leader counts like any other."""
    true = membership.listen

    def wrong(memory, snapshot, now):  # type: ignore[no-untyped-def]
        after = true(memory, snapshot, now)
        hosts = {
            name: Heard(heard.renewal, heard.revision, heard.at, heard.at)
            for name, heard in after.hosts.items()
        }
        return dataclasses.replace(after, hosts=hosts)

    patch.setattr(membership, "listen", wrong)


def _no_compare(patch: pytest.MonkeyPatch) -> None:
    """The swap does not compare the old host's renewal."""
    true = failover._swap

    def wrong(*args, **kwargs):  # type: ignore[no-untyped-def]
        return dataclasses.replace(true(*args, **kwargs), renewal_revision=None)

    patch.setattr(failover, "_swap", wrong)


def _stale_word(patch: pytest.MonkeyPatch) -> None:
    """A person's word counts for every later boot."""
    true = membership.is_off

    def wrong(snapshot: Snapshot, name: str) -> str:
        word = snapshot.hosts[name].confirmed_down
        return "somebody once said so" if word else true(snapshot, name)

    patch.setattr(membership, "is_off", wrong)
    patch.setattr(fencing, "is_off", wrong)


def _failed_cut_counts(patch: pytest.MonkeyPatch) -> None:
    """An eviction that was tried is taken for one that was confirmed."""
    true = fencing.proof

    def wrong(snapshot: Snapshot, vm: VmSeen, host: str) -> Proof | None:
        tried = any(attempt.vm == vm.name for attempt in snapshot.attempts)
        return Proof(Rung.STORAGE, "tried") if tried else true(snapshot, vm, host)

    patch.setattr(fencing, "proof", wrong)


def _diskless(patch: pytest.MonkeyPatch) -> None:
    """Every disk confirmed, of none."""
    true = fencing.proof

    def wrong(snapshot: Snapshot, vm: VmSeen, host: str) -> Proof | None:
        empty = not vm.vm.written
        return Proof(Rung.STORAGE, "all of none") if empty else true(snapshot, vm, host)

    patch.setattr(fencing, "proof", wrong)


def _power_at_once(patch: pytest.MonkeyPatch) -> None:
    """The host is switched off whoever else runs there."""
    patch.setattr(fencing, "spared", lambda *_, **__: ())


def _any_copy(patch: pytest.MonkeyPatch) -> None:
    """A destination's copy is adopted although nobody saw ``completed``."""

    def wrong(vm, hosts):  # type: ignore[no-untyped-def]
        move = vm.owner.migration
        copies = vm.on(move.destination) if move and vm.owner.host == move.source else ()
        return copies[0] if copies else None

    patch.setattr(moves, "adoptable", wrong)


def _no_witness_needed(patch: pytest.MonkeyPatch) -> None:
    """Two hosts without a witness fail over by themselves."""
    patch.setattr(
        quorum, "explain", lambda _: Quorum(automatic=True, spare=0, sentence="never mind")
    )


def _everybody(patch: pytest.MonkeyPatch) -> None:
    """Who is not highly available fails over as well."""
    patch.setattr(failover, "in_order", lambda vms: [_with_ha(vm) for vm in vms])


def _with_ha(vm: VmSeen) -> VmSeen:
    return dataclasses.replace(vm, vm=vm.vm.but(ha=True))


def _no_hold(patch: pytest.MonkeyPatch) -> None:
    """After a loss of power nobody waits for anybody."""
    patch.setattr(coldstart, "phase", lambda *_: coldstart.Cold())


def _no_order(patch: pytest.MonkeyPatch) -> None:
    """Priorities are forgotten."""
    patch.setattr(failover, "in_order", lambda vms: sorted(vms, key=lambda vm: vm.name))


def _no_limit(patch: pytest.MonkeyPatch) -> None:
    """Nobody counts restarts."""
    patch.setattr(failover, "worn_out", lambda *_: "")


def _together(patch: pytest.MonkeyPatch) -> None:
    """What is to be kept apart is not."""
    patch.setattr(failover, "_apart_from", lambda *_: {})


def _no_kill(patch: pytest.MonkeyPatch) -> None:
    """Copies that no record names are left."""
    patch.setattr(resolver, "_kill", lambda *_: resolver.Note(subject="x", why="left"))


def _anywhere(patch: pytest.MonkeyPatch) -> None:
    """Marks, states and rules are no reason against a host."""
    patch.setattr(failover, "excluded", lambda *_: {})


UNSAFE: dict[str, tuple[Plant, list[str]]] = {
    "silence is proof": (
        _believe,
        ["host-frozen-without-watchdog", "guard-and-agent-lost-no-watchdog"],
    ),
    "no watchdog needed": (_no_watchdog_needed, ["guard-and-agent-lost-no-watchdog"]),
    "too early": (_early, ["management-cut"]),
    "no margin": (_no_margin, ["clock-slow-and-no-freezer"]),
    "counts without a leader": (_counts_through, ["no-leader-does-not-count"]),
    "a failed cut counts": (_failed_cut_counts, ["storage-cut-fails-on-an-isolated-host"]),
    "everybody fails over": (_everybody, ["management-cut"]),
    "power at once": (_power_at_once, ["store-refuses-a-host-that-cannot-end-it"]),
    "no disk, no proof": (_diskless, ["diskless-vm-on-an-isolated-host"]),
}
WRONG: dict[str, tuple[Plant, list[str]]] = {
    "unarmed counts": (_unarmed_counts, ["freezer-fails-unarmed"]),
    "no compare": (_no_compare, ["isolated-back-at-the-last-moment"]),
    "stale word": (_stale_word, ["person-and-next-boot"]),
    "any copy": (_any_copy, ["move-source-dies-committing"]),
    "no witness needed": (_no_witness_needed, ["two-hosts-one-member"]),
    "no hold": (_no_hold, ["cold-start"]),
    "no order": (_no_order, ["priority"]),
    "no limit": (_no_limit, ["restart-limit"]),
    "together": (_together, ["apart"]),
    "anywhere": (_anywhere, ["maintenance-takes-nothing"]),
    "any boot": (_any_boot, ["all-managers-restart-another-boot"]),
    "fresh at once": (_fresh_at_once, ["all-managers-restart"]),
    "never waits": (_never_waits, ["move-source-dies-completed-agent-back"]),
    "nobody concludes": (_nobody_concludes, ["move-source-dies-completed"]),
    "no kill": (_no_kill, ["stray-copy-while-the-agent-is-away"]),
}


@pytest.mark.parametrize("fault", UNSAFE)
def test_an_invariant_breaks(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, names = UNSAFE[fault]
    plant(monkeypatch)
    for name in names:
        with pytest.raises(Violation):
            play(load(FOLDER / f"{name}.txt"))


@pytest.mark.parametrize("fault", WRONG)
def test_a_log_changes(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, names = WRONG[fault]
    plant(monkeypatch)
    for name in names:
        found = load(FOLDER / f"{name}.txt")
        try:
            log = play(found)
        except Violation:
            continue
        assert log != found.log
