"""The queue of moves: limits hold, links are kept busy, nobody starves, and each wait is named."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.model.settings import ClusterSettings
from godwit.planner.queue import PATIENCE, Place, QueuedMove, places, turns

ONE = ClusterSettings()
LIMITS = st.builds(
    ClusterSettings,
    moves_per_host=st.integers(0, 3),
    moves_per_pair=st.integers(0, 2),
    moves_per_network=st.integers(0, 4),
)


def move(number: int, source: str, destination: str, *, size: int = 1, **state: bool) -> QueuedMove:
    return QueuedMove(
        id=f"m-{number:04}",
        vm=f"vm{number}",
        source=source,
        destination=destination,
        networks=("10.93.0.0/24",),
        size_bytes=size,
        **state,
    )


HOSTS = [f"host{n}" for n in range(1, 7)]
PAIRS = st.tuples(st.sampled_from(HOSTS), st.sampled_from(HOSTS)).filter(lambda p: p[0] != p[1])
ASKED = st.lists(st.tuples(PAIRS, st.integers(1, 9)), min_size=1, max_size=14)


def held(moves: list[QueuedMove], limits: ClusterSettings) -> Counter[Place]:
    return Counter(
        place for one in moves if one.started and not one.ended for place, _ in places(one, limits)
    )


def within(moves: list[QueuedMove], limits: ClusterSettings) -> bool:
    used = held(moves, limits)
    return all(used[place] <= limit for one in moves for place, limit in places(one, limits))


@settings(deadline=None, max_examples=200)
@given(asked=ASKED, limits=LIMITS, seed=st.integers(0, 999))
def test_limits_hold_and_whoever_waits_waits_for_something(
    asked: list[tuple[tuple[str, str], int]], limits: ClusterSettings, seed: int
) -> None:
    chance = random.Random(seed)
    moves = [move(n, *pair, size=size) for n, (pair, size) in enumerate(asked)]
    ended = 0
    while not all(one.ended for one in moves):
        found = turns(moves, limits=limits)
        assert set(found.go) | set(found.waits) == {
            one.id for one in moves if not (one.started or one.ended)
        }
        moves = [replace(one, started=one.started or one.id in found.go) for one in moves]
        assert within(moves, limits)
        used = held(moves, limits)
        kept = {name for name, why in found.waits.items() if "waited longer" in why}
        for one in moves:
            if one.id in found.waits and one.id not in kept:
                full = any(used[place] >= limit for place, limit in places(one, limits))
                assert full or _overdue(moves, limits), "a link is idle that it could use"
        running = [one for one in moves if one.started and not one.ended]
        assert running, "somebody may always go"
        done = chance.choice(running)
        moves[moves.index(done)] = replace(done, ended=True)
        ended += 1
    assert ended == len(asked)


def _overdue(moves: list[QueuedMove], limits: ClusterSettings) -> bool:
    """Some move has been overtaken as often as it bears."""
    for one in moves:
        if one.started or one.ended:
            continue
        mine = {place for place, _ in places(one, limits)}
        passed = [
            other
            for other in moves
            if other.started
            and other.id > one.id
            and mine & {place for place, _ in places(other, limits)}
        ]
        if len(passed) >= PATIENCE:
            return True
    return False


def test_a_small_move_is_overtaken_a_few_times_and_then_goes() -> None:
    """host1 and host2 are never free at once by themselves: larger moves keep coming to both."""
    small = move(0, "host1", "host2", size=1)
    moves = [
        small,
        move(1, "host1", "host3", size=9, started=True),
        move(2, "host2", "host4", size=9, started=True),
    ]
    passed, number, side = 0, 3, 0
    while True:
        side = 1 - side
        host, busy = (("host1", "host3"), ("host2", "host4"))[side]
        running = next(one for one in moves if one.started and not one.ended and one.source == host)
        moves[moves.index(running)] = replace(running, ended=True)
        moves.append(move(number, host, busy, size=9))
        number += 1
        found = turns(moves, limits=ONE)
        moves = [replace(one, started=one.started or one.id in found.go) for one in moves]
        if small.id in found.go:
            break
        if moves[-1].started:
            passed += 1
        else:
            assert found.waits[moves[-1].id] == (
                f"waits for m-0000 (vm0 from host1 to host2), which has waited longer for {host} "
                "(limit: one move per host at a time)"
            )
            other = ("host1", "host2")[1 - side]
            last = next(
                one for one in moves if one.started and not one.ended and one.source == other
            )
            moves[moves.index(last)] = replace(last, ended=True)
            assert small.id in turns(moves, limits=ONE).go
            break
        assert passed < 50, "it starves"
    assert passed <= PATIENCE


def test_two_go_instead_of_one_that_stands_in_their_way() -> None:
    middle = move(1, "host2", "host3", size=9)
    moves = [middle, move(2, "host1", "host2", size=1), move(3, "host3", "host4", size=1)]
    assert set(turns(moves, limits=ONE).go) == {"m-0002", "m-0003"}


def test_half_the_hosts_times_one_move_go_at_once() -> None:
    names = [f"host{n:02}" for n in range(16)]
    moves = [move(n, names[n], names[n + 8]) for n in range(8)]
    assert len(turns(moves, limits=ONE).go) == 8


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            ClusterSettings(),
            "waits for m-0001 (vm1 from host1 to host2), which uses host1 "
            "(limit: one move per host at a time)",
        ),
        (
            ClusterSettings(moves_per_host=2),
            "waits for m-0001 (vm1 from host1 to host2) and m-0002 (vm2 from host1 to host3), "
            "which use host1 (limit: 2 moves per host at a time)",
        ),
        (
            ClusterSettings(moves_per_host=0, moves_per_pair=1),
            "waits for m-0001 (vm1 from host1 to host2), which uses host1 and host2 "
            "(limit: one move per pair of hosts at a time)",
        ),
        (
            ClusterSettings(moves_per_host=0, moves_per_network=2),
            "waits for m-0001 (vm1 from host1 to host2) and m-0002 (vm2 from host1 to host3), "
            "which use 10.93.0.0/24 (limit: 2 moves per migration network at a time)",
        ),
    ],
)
def test_a_wait_names_the_limit_and_who_holds_it(limits: ClusterSettings, said: str) -> None:
    moves = [
        move(1, "host1", "host2", started=True),
        move(2, "host1", "host3", started=True),
        move(3, "host1", "host2"),
    ]
    if limits == ONE:
        moves.pop(1)
    assert turns(moves, limits=limits).waits == {"m-0003": said}


def test_who_goes_first_is_named_too() -> None:
    moves = [move(1, "host1", "host2", size=2), move(2, "host1", "host3", size=1)]
    found = turns(moves, limits=ONE)
    assert found.go == ("m-0001",)
    assert found.waits["m-0002"].startswith(
        "waits for m-0001 (vm1 from host1 to host2), which goes before on host1"
    )


def makespan(moves: list[QueuedMove]) -> float:
    """How long a batch takes when each move takes its size, one per host."""
    ends: dict[str, float] = {}
    now = 0.0
    while True:
        found = turns(moves, limits=ONE)
        moves = [replace(one, started=one.started or one.id in found.go) for one in moves]
        ends |= {name: now + _size(moves, name) for name in found.go}
        running = {one.id for one in moves if one.started and not one.ended}
        if not running:
            return now
        now = min(ends[name] for name in running)
        moves = [
            replace(one, ended=one.ended or (one.id in running and ends[one.id] <= now))
            for one in moves
        ]


def _size(moves: list[QueuedMove], name: str) -> int:
    return next(one.size_bytes for one in moves if one.id == name)


def test_batches_end_close_to_the_bound() -> None:
    """The bound is the busiest host's share; over many batches the schedule stays near it."""
    ratios = []
    for seed in range(40):
        chance = random.Random(seed)
        names = [f"host{n}" for n in range(8)]
        moves = [
            move(n, *chance.sample(names, 2), size=chance.choice((1, 2, 4, 8))) for n in range(40)
        ]
        load: Counter[str] = Counter()
        for one in moves:
            load[one.source] += one.size_bytes
            load[one.destination] += one.size_bytes
        ratios.append(makespan(moves) / max(load.values()))
    print(f"mean {sum(ratios) / len(ratios):.3f}, worst {max(ratios):.3f}")
    assert sum(ratios) / len(ratios) <= 1.02
    assert max(ratios) <= 1.15
