"""What a host believes of its path to a volume, walked through by its table and at random."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from godwit.model.volume import VolumeOnHost, VolumeState
from godwit.storage.lending import Candidate, rank
from godwit.storage.path_state import (
    DOUBTS,
    HEAL_S,
    LONGEST_HEAL_S,
    QUIET_S,
    TABLE,
    PathStep,
    PathView,
    Seen,
    VmWay,
    read,
    step,
    volume_state,
)
from godwit.storage.paths import PathProbe

PROBES = {
    Seen.GOOD: PathProbe(ok=True),
    Seen.DOUBT: PathProbe(ok=False, firm=False, reason="busy"),
    Seen.FAILED: PathProbe(ok=False, reason="I/O error"),
    Seen.HUNG: PathProbe(ok=False, hung=True, reason="no answer"),
}


def walk(view: PathView, *seen: Seen, every: float = 0.5, start: float = 0.0) -> PathView:
    for number, one in enumerate(seen):
        view = step(view, PROBES[one], now=start + number * every)
    return view


@pytest.mark.parametrize("before", PathStep)
@pytest.mark.parametrize("seen", Seen)
def test_every_cell_of_the_table(before: PathStep, seen: Seen) -> None:
    assert read(PROBES[seen]) is seen
    view = PathView(before, "old", since=10.0)
    after = step(view, PROBES[seen], now=10.1)
    assert after.step is TABLE[before, seen]
    assert (after.since == 10.1) is (after.step is not before)


def test_silence_counts_at_once_and_an_error_the_second_time() -> None:
    good = walk(PathView(), Seen.GOOD)
    assert good.usable
    assert not walk(good, Seen.HUNG).usable
    once = walk(good, Seen.FAILED)
    assert once.usable
    assert once.hurried
    twice = walk(once, Seen.FAILED)
    assert (twice.step, twice.reason) == (PathStep.LOST, "I/O error")


def test_only_many_doubts_in_a_row_count() -> None:
    good = walk(PathView(), Seen.GOOD)
    assert walk(good, *[Seen.DOUBT] * (DOUBTS - 1)).usable
    assert walk(good, *[Seen.DOUBT] * (DOUBTS - 1), Seen.GOOD, Seen.DOUBT).usable
    assert not walk(good, *[Seen.DOUBT] * DOUBTS).usable


def test_a_path_that_is_back_must_hold_and_longer_after_each_relapse() -> None:
    view = walk(PathView(), Seen.GOOD, Seen.HUNG)
    waits = []
    now = 1.0
    for _ in range(8):
        began = now
        view = step(view, PROBES[Seen.GOOD], now=now)
        assert view.step is PathStep.HEALING
        while not view.usable:
            now += 0.5
            view = step(view, PROBES[Seen.GOOD], now=now)
        waits.append(now - began)
        now += 1.0
        view = step(view, PROBES[Seen.HUNG], now=now)
    assert waits[0] >= HEAL_S
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_HEAL_S
    while not view.usable:
        now += 1.0
        view = step(view, PROBES[Seen.GOOD], now=now)
    view = step(view, PROBES[Seen.HUNG], now=now + QUIET_S + 1)
    assert view.heal_s == HEAL_S


def test_an_administrator_says_how_long_at_most() -> None:
    view, now = PathView(step=PathStep.DIRECT), 0.0
    for _ in range(4):
        view = step(view, PROBES[Seen.HUNG], now=now, longest_heal_s=5)
        view = step(view, PROBES[Seen.GOOD], now=now, longest_heal_s=5)
        assert view.step is PathStep.HEALING
        now += view.heal_s
        view = step(view, PROBES[Seen.GOOD], now=now, longest_heal_s=5)
        assert view.usable
    assert view.heal_s == 5


@given(some.lists(some.tuples(some.sampled_from(Seen), some.floats(0.01, 5.0)), max_size=60))
def test_nothing_is_used_that_was_not_seen_good(history: list[tuple[Seen, float]]) -> None:
    view, now = PathView(), 0.0
    good_since: float | None = None
    lost = False
    for seen, wait in history:
        now += wait
        before, view = view, step(view, PROBES[seen], now=now)
        if seen is Seen.GOOD:
            good_since = now if good_since is None else good_since
        elif seen is not Seen.DOUBT:
            good_since = None
        if lost and view.usable:  # it came back: seen good, with no failure, for long enough
            assert seen is Seen.GOOD
            assert good_since is not None
            assert now - good_since >= HEAL_S
        if not view.usable:
            assert view.reason
        assert HEAL_S <= view.heal_s <= LONGEST_HEAL_S
        if before.usable and not view.usable:
            assert seen is not Seen.GOOD
        lost = not view.usable


LOST = PathView(PathStep.LOST, "no answer")
HEALING = PathView(PathStep.HEALING, "no answer")
GOOD = PathView(PathStep.DIRECT)
THROUGH = VmWay("web", "redirected", through="host2")
WAITS = VmWay("db", "waiting", reason="there is no other host")


@pytest.mark.parametrize(
    ("view", "vms", "planned", "state", "words"),
    [
        (GOOD, [VmWay("web", "direct")], False, VolumeState.DIRECT, ""),
        (GOOD, [], False, VolumeState.DIRECT, ""),
        (GOOD, [THROUGH], False, VolumeState.REDIRECTED, "going back from host2"),
        (GOOD, [WAITS], False, VolumeState.PAUSED, "db waits: there is no other host"),
        (LOST, [], False, VolumeState.UNAVAILABLE, "lost path: no answer"),
        (LOST, [THROUGH], False, VolumeState.REDIRECTED, "I/O goes through host2"),
        (LOST, [THROUGH, WAITS], False, VolumeState.PAUSED, "db waits"),
        (LOST, [VmWay("web", "direct")], False, VolumeState.PAUSED, "web waits"),
        (HEALING, [THROUGH], False, VolumeState.REDIRECTED, "the path is back, it must hold"),
        (GOOD, [THROUGH], True, VolumeState.REDIRECTED, "planned; I/O goes through host2"),
        (GOOD, [], True, VolumeState.REDIRECTED, "planned"),
        (LOST, [THROUGH], True, VolumeState.REDIRECTED, "lost path: no answer"),
    ],
)
def test_what_is_told(
    view: PathView, vms: list[VmWay], planned: bool, state: VolumeState, words: str
) -> None:
    told, reason = volume_state(view, vms, planned=planned)
    assert told is state
    assert words in reason
    assert bool(reason) is (state is not VolumeState.DIRECT)


def _host(name: str, state: VolumeState = VolumeState.DIRECT, **more: object) -> Candidate:
    seen = {"shared": VolumeOnHost(state=state, identity="v1")}
    return Candidate(name, **{"up": True, "volumes": seen, **more})  # type: ignore[arg-type]


def test_the_idlest_host_with_the_very_volume_lends_its_path() -> None:
    hosts = [
        _host("h1"),
        _host("h2", load=3),
        _host("h3", load=1),
        _host("h4", VolumeState.REDIRECTED),
        _host("h5", up=False),
        _host("h6", volumes={}),
        _host("h7", volumes={"shared": VolumeOnHost(state=VolumeState.DIRECT, identity="v2")}),
    ]
    order, why = rank(hosts, {"shared": "v1"}, here="h1")
    assert (order, why) == (["h3", "h2"], "")
    order, why = rank(hosts, {"shared": "v1"}, here="h1", not_these={"h2", "h3"})
    assert order == []
    assert why == (
        "h2: it has just failed at it; h3: it has just failed at it; "
        "h4: shared is redirected there; h5: it is not up; h6: it does not see shared; "
        "h7: what it sees as shared is another volume"
    )
    assert rank([_host("h1")], {"shared": ""}, here="h1") == ([], "there is no other host")
