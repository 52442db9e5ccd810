"""How a host is emptied: where each VM goes, in which order, and how long at least. Pure.

A plan is made from facts of one moment; whoever carries it out makes it anew for what has changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from godwit.model.drain import PlannedVm
from godwit.model.settings import ClusterSettings
from godwit.planner.placement import (
    Kind,
    Need,
    Obstacle,
    Room,
    obstacles,
    rank,
    smallest,
)
from godwit.planner.queue import Place, QueuedMove, places


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """A VM that is to leave; ``excluded``: reasons against hosts that placement cannot know."""

    need: Need
    excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a VM goes, None for nowhere, and why."""

    vm: str
    host: str | None
    reason: str


def place_all(rooms: Sequence[Room], leaving: Sequence[Leaving]) -> dict[str, Placed]:
    """A host for as many of these VMs as can be, each seeing those that were placed before it.

    Those that fit on the fewest hosts come first, then the larger ones. They are spread evenly;
    where that leaves one over, they are packed tightly, and what was left over goes first.
    """
    best: dict[str, Placed] = {}
    fewest = len(leaving) + 1
    for tight in (False, True):
        first: set[str] = set()
        for _ in range(3):
            found = _in_turn(rooms, leaving, tight=tight, first=first)
            over = {name for name, one in found.items() if one.host is None}
            if len(over) < fewest:
                best, fewest = found, len(over)
            if not over:
                return best
            first |= over
    return best


def _in_turn(
    rooms: Sequence[Room], leaving: Sequence[Leaving], *, tight: bool, first: set[str]
) -> dict[str, Placed]:
    now = {room.info.name: room for room in rooms}

    def difficulty(one: Leaving) -> tuple[bool, int, int, str]:
        fits = sum(not _against(room, one) for room in rooms)
        return one.need.vm not in first, fits, -one.need.memory_bytes, one.need.vm

    found = {}
    for one in sorted(leaving, key=difficulty):
        placed = _place(now.values(), one, tight=tight)
        found[one.need.vm] = placed
        if placed.host is not None:
            now[placed.host] = now[placed.host].taking(one.need)
    return found


def _against(room: Room, one: Leaving) -> tuple[Obstacle, ...]:
    pair = (Obstacle(Kind.PAIR, text) for text in one.excluded.get(room.info.name, ()))
    return (*pair, *obstacles(room, one.need))


def _place(rooms: Iterable[Room], one: Leaving, *, tight: bool) -> Placed:
    rejected, fit = {}, []
    for room in rooms:
        against = _against(room, one)
        if against:
            rejected[room.info.name] = against
        else:
            fit.append(room)
    if not fit:
        return Placed(vm=one.need.vm, host=None, reason=smallest(rejected))
    choice = max if tight else min
    room = choice(fit, key=lambda entry: rank(entry, one.need))
    reason = "packed tightly, for all to fit" if tight else f"the most room of {len(fit)} hosts"
    return Placed(vm=one.need.vm, host=room.info.name, reason=reason)


def in_order(planned: Iterable[PlannedVm]) -> tuple[PlannedVm, ...]:
    """Moves before shutdowns before what stays; high priority first, then the larger."""
    ways = ("live", "quick", "shutdown", "stay")
    return tuple(
        sorted(
            planned,
            key=lambda one: (
                ways.index(one.way),
                -one.priority,
                -(one.forecast.bytes or one.memory_bytes),
                one.vm,
            ),
        )
    )


def bound(
    host: str,
    planned: Iterable[PlannedVm],
    *,
    limits: ClusterSettings,
    networks: Mapping[str, str] | None = None,
) -> tuple[float | None, str]:
    """The shortest time, in seconds, in which these moves can be done, and what sets it.

    Every limited place takes at least the sum of its moves' times divided by its limit; the
    host's link takes at least all the bytes at its speed; nothing is shorter than its longest move.
    None when a forecast says nothing. ``networks``: the migration network of each host.
    """
    moves = [one for one in planned if one.way in ("live", "quick") and one.destination]
    if not moves:
        return 0.0, "nothing has to move"
    unknown = [one for one in moves if one.forecast.total_ms is None]
    if unknown:
        basis = unknown[0].forecast.basis or "no forecast"
        return None, f"{unknown[0].vm}: {basis}"
    shares: dict[Place, float] = defaultdict(float)
    counts: dict[Place, int] = defaultdict(int)
    capacity: dict[Place, int] = {}
    for one in moves:
        for place, limit in places(_queued(host, one, networks or {}), limits):
            shares[place] += _seconds(one)
            counts[place] += 1
            capacity[place] = limit
    longest = max(moves, key=_seconds)
    found = [(_seconds(longest), f"the move of {longest.vm} alone")]
    for (kind, name), total in shares.items():
        limit, count = capacity[kind, name], counts[kind, name]
        one_by_one = "one at a time" if limit == 1 else f"{limit} at a time"
        over = {"host": "of", "pair": "between", "network": "over"}[kind]
        found.append((total / limit, f"{count} moves {over} {name}, {one_by_one}"))
    if all(one.forecast.bytes and one.forecast.link_bytes_per_s for one in moves):
        wire = sum(
            (one.forecast.bytes or 0) / (one.forecast.link_bytes_per_s or 1) for one in moves
        )
        found.append((wire, f"the link of {host}"))
    seconds, why = max(found, key=lambda entry: entry[0])
    return round(seconds, 3), why


def _queued(host: str, one: PlannedVm, networks: Mapping[str, str]) -> QueuedMove:
    to = one.destination or ""
    used = {networks[name] for name in (host, to) if networks.get(name)}
    return QueuedMove(
        id=one.vm, vm=one.vm, source=host, destination=to, networks=tuple(sorted(used))
    )


def _seconds(one: PlannedVm) -> float:
    return (one.forecast.total_ms or 0.0) / 1000


def _on_the_wire(one: PlannedVm) -> float:
    return (one.forecast.bytes or 0) / (one.forecast.link_bytes_per_s or 1.0)


def time_left(*, elapsed_s: float, bound_s: float | None, left_s: float | None) -> float | None:
    """How long the rest takes: its own bound, stretched as the part before was. Seconds.

    ``bound_s`` is the bound of all, ``left_s`` that of what is left; None when nobody knows.
    """
    if bound_s is None or left_s is None:
        return None
    done_s = bound_s - left_s
    stretch = elapsed_s / done_s if done_s > 0 and elapsed_s > done_s else 1.0
    return round(left_s * stretch, 1)


def settle(
    one: PlannedVm, *, allow_quick: bool, allow_shutdown: bool, force: bool
) -> tuple[PlannedVm, str]:
    """What becomes of a VM under what is allowed, and why that is a refusal (empty: it is none).

    ``one.way`` is the best that is possible at all.
    """
    if one.way == "live":
        return one, ""
    if one.way == "quick" and allow_quick:
        return one.but(needs=""), ""
    if allow_shutdown and one.way in ("quick", "shutdown"):
        return one.but(way="shutdown", destination=None, needs=""), ""
    needs = "--allow-quick" if one.way == "quick" else "--allow-shutdown"
    left = one.but(way="stay", destination=None, needs=needs)
    return left, "" if force else f"{one.vm} cannot move live: {one.reason}"
