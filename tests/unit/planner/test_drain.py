"""How a host is emptied: where to, in which order, the bound, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_kit import GIB, info, need, room

from godwit.model.drain import DrainPlan, PlannedVm
from godwit.model.migration import Forecast
from godwit.model.settings import ClusterSettings
from godwit.planner.drain import Leaving, bound, in_order, place_all, settle, time_left
from godwit.planner.placement import Need, Room, obstacles
from godwit.planner.queue import QueuedMove, turns

LINK = 125e6


def planned(vm: str, to: str = "host2", *, seconds: float = 1.0, way: str = "live") -> PlannedVm:
    sent = int(max(0.0, seconds - 0.25) * LINK)
    forecast = Forecast(
        converges=True, total_ms=seconds * 1000, bytes=sent or 1, link_bytes_per_s=LINK
    )
    return PlannedVm.model_validate(
        {"vm": vm, "way": way, "destination": to, "memory_bytes": GIB, "forecast": forecast}
    )


needs = st.builds(
    need,
    st.sampled_from(["a", "b", "c", "d", "e"]),
    memory_bytes=st.sampled_from([GIB // 2, GIB, 2 * GIB, 3 * GIB]),
    hosts=st.sampled_from([(), (), ("host1", "host2")]),
    apart=st.sampled_from([(), (), ("x",)]),
)
ROOMS = st.lists(
    st.builds(
        room,
        st.sampled_from(["host1", "host2", "host3"]),
        memory_free_bytes=st.integers(0, 5 * GIB),
    ),
    min_size=1,
    unique_by=lambda entry: entry.info.name,
)


def fits(rooms: dict[str, Room], wanted: list[Need], places: tuple[str, ...]) -> bool:
    now = dict(rooms)
    for one, host in zip(wanted, places, strict=True):
        if obstacles(now[host], one):
            return False
        now[host] = now[host].taking(one)
    return True


@settings(deadline=None, max_examples=150)
@given(found=ROOMS, wanted=st.lists(needs, min_size=1, max_size=5, unique_by=lambda one: one.vm))
def test_places_hold_together_and_few_are_left_over(found: list[Room], wanted: list[Need]) -> None:
    rooms = {one.info.name: one for one in found}
    placed = place_all(found, [Leaving(need=one) for one in wanted])
    assert set(placed) == {one.vm for one in wanted}
    there = [one for one in wanted if placed[one.vm].host is not None]
    places = tuple(placed[one.vm].host or "" for one in there)
    assert fits(rooms, there, places), "two were promised the same room"
    over = [one for one in wanted if placed[one.vm].host is None]
    for one in over:
        assert placed[one.vm].reason
    if over:
        possible = any(fits(rooms, wanted, choice) for choice in product(rooms, repeat=len(wanted)))
        assert not possible or len(over) == 1, "more than one left over where all would fit"


def test_a_tight_fit_is_found() -> None:
    """Spread evenly one is left over, whichever goes first; packed, all fit."""
    half = GIB // 2
    wanted = [need(f"v{n}", memory_bytes=size * half) for n, size in enumerate((2, 3, 3, 2))]
    rooms = [
        room("host1", memory_free_bytes=7 * half),
        room("host2", memory_free_bytes=5 * half),
    ]
    placed = place_all(rooms, [Leaving(need=one) for one in wanted])
    assert [vm for vm, where in placed.items() if where.host is None] == []


def test_what_placement_cannot_know_counts_too() -> None:
    out = {"host1": ("the VM runs there now",)}
    placed = place_all([room("host1"), room("host2")], [Leaving(need=need(), excluded=out)])
    assert placed["web"].host == "host2"
    alone = place_all([room("host1")], [Leaving(need=need(), excluded=out)])
    assert (alone["web"].host, alone["web"].reason) == (None, "the VM runs there now")


def test_the_order_is_moves_by_priority_then_size() -> None:
    found = in_order(
        [
            planned("small", seconds=1),
            planned("large", seconds=9),
            planned("first", seconds=1).but(priority=90),
            planned("off", way="shutdown"),
            planned("stays", way="stay"),
            planned("quick", way="quick"),
        ]
    )
    assert [one.vm for one in found] == ["first", "large", "small", "quick", "off", "stays"]


@pytest.mark.parametrize(
    ("limits", "seconds", "why"),
    [
        (ClusterSettings(), 6.0, "3 moves of host1, one at a time"),
        (ClusterSettings(moves_per_host=2), 5.25, "the link of host1"),
        (ClusterSettings(moves_per_host=0, moves_per_pair=1), 5.25, "the link of host1"),
        (ClusterSettings(moves_per_host=0, moves_per_network=1), 6.0, "3 moves over 10.93.0.0/24"),
    ],
)
def test_the_bound_is_the_narrowest_place(
    limits: ClusterSettings, seconds: float, why: str
) -> None:
    moves = [planned("a", seconds=1), planned("b", "host3", seconds=2), planned("c", seconds=3)]
    networks = dict.fromkeys(("host1", "host2", "host3"), "10.93.0.0/24")
    found, reason = bound("host1", moves, limits=limits, networks=networks)
    assert found == pytest.approx(seconds, abs=0.01)
    assert reason.startswith(why)


def test_the_bound_says_when_it_is_not_known() -> None:
    blind = planned("a").but(forecast=Forecast(basis="the link's speed is not known yet"))
    assert bound("host1", [blind, planned("b")], limits=ClusterSettings()) == (
        None,
        "a: the link's speed is not known yet",
    )
    assert bound("host1", [], limits=ClusterSettings()) == (0.0, "nothing has to move")


@pytest.mark.parametrize(
    ("best", "quick", "shutdown", "force", "way", "refused"),
    [
        ("live", False, False, False, "live", False),
        ("quick", False, False, False, "stay", True),
        ("quick", True, False, False, "quick", False),
        ("quick", True, True, False, "quick", False),
        ("quick", False, True, False, "shutdown", False),
        ("quick", False, False, True, "stay", False),
        ("shutdown", True, False, False, "stay", True),
        ("shutdown", False, True, False, "shutdown", False),
        ("shutdown", True, False, True, "stay", False),
    ],
)
def test_nothing_is_done_to_a_vm_that_was_not_allowed(
    best: str, quick: bool, shutdown: bool, force: bool, way: str, refused: bool
) -> None:
    one = planned("a", way=best).but(reason="a device stays")
    found, why = settle(one, allow_quick=quick, allow_shutdown=shutdown, force=force)
    assert found.way == way
    assert bool(why) == refused
    if refused:
        assert why == "a cannot move live: a device stays"
        assert found.needs == ("--allow-quick" if best == "quick" else "--allow-shutdown")
    assert (found.destination is None) == (way in ("stay", "shutdown"))


def test_time_left_is_stretched_as_the_part_before_was() -> None:
    assert time_left(elapsed_s=0.0, bound_s=10.0, left_s=10.0) == 10.0
    assert time_left(elapsed_s=6.0, bound_s=10.0, left_s=6.0) == 9.0
    assert time_left(elapsed_s=1.0, bound_s=10.0, left_s=6.0) == 6.0, "never better than forecast"
    assert time_left(elapsed_s=1.0, bound_s=None, left_s=6.0) is None


def test_twelve_vms_leave_within_the_bound_and_a_little() -> None:
    """The whole plan and the whole queue, in virtual time, with what a turn costs in a lab."""
    gap_s = 0.05
    for seed in range(30):
        chance = random.Random(seed)
        wanted = [
            need(f"vm{n:02}", memory_bytes=chance.choice((256, 512, 1024)) << 20) for n in range(12)
        ]
        rooms = [room(f"host{n}", memory_free_bytes=6 * GIB) for n in (2, 3, 4)]
        placed = place_all(rooms, [Leaving(need=one) for one in wanted])
        moves = [
            planned(one.vm, placed[one.vm].host or "", seconds=0.5 + one.memory_bytes / GIB)
            for one in wanted
        ]
        assert len({one.destination for one in moves}) == 3, "spread over the other hosts"
        for limits in (ClusterSettings(), ClusterSettings(moves_per_host=2)):
            least, _ = bound("host1", in_order(moves), limits=limits)
            assert least
            assert _makespan(moves, limits, gap_s) <= 1.15 * least


def _makespan(moves: list[PlannedVm], limits: ClusterSettings, gap_s: float) -> float:
    seconds = {one.vm: (one.forecast.total_ms or 0) / 1000 + gap_s for one in moves}
    queue = [
        QueuedMove(
            id=one.vm,
            vm=one.vm,
            source="host1",
            destination=one.destination or "",
            size_bytes=one.forecast.bytes or 0,
        )
        for one in moves
    ]
    now, ends = 0.0, dict[str, float]()
    while True:
        found = turns(queue, limits=limits)
        queue = [replace(one, started=one.started or one.id in found.go) for one in queue]
        ends |= {name: now + seconds[name] for name in found.go}
        running = [one.id for one in queue if one.started and not one.ended]
        if not running:
            return now
        now = min(ends[name] for name in running)
        queue = [
            replace(one, ended=one.ended or (one.id in running and ends[one.id] <= now))
            for one in queue
        ]


def test_a_plan_says_what_leaves() -> None:
    plan = DrainPlan(host="host1", vms=(planned("a"), planned("b", way="stay")), refused=("b",))
    assert [one.vm for one in plan.leaving] == ["a"]
    assert plan.failed == ("b",)
    assert info("host1").name == "host1"
