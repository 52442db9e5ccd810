"""Which moves may go now: pure. Limits per host, pair and network; links kept busy; nobody starves.

    running ones hold their places
    overdue ones (overtaken ``PATIENCE`` times) go first, oldest first, or keep what is free for
        them: nobody else gets it
    of the others the set that keeps most links busy: VMs of high priority first, then those of
        the host that has most left to send or take, of these the larger first

So a move waits only while a limit it needs is held by moves that run or by an overdue one, and it
can be overtaken by some younger ones, never for ever. A batch ends no sooner than its busiest host
does, so that host must never stand idle; far fewer overtakings than ``PATIENCE`` would make batches
longer (`tests/unit/planner/test_queue.py` has some).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from godwit.model.settings import ClusterSettings

PATIENCE = 16
Place = tuple[str, str]  # what is limited: ("host", "host1"), ("pair", "host1 and host2"), ...
_WORDS = {"host": "per host", "pair": "per pair of hosts", "network": "per migration network"}


@dataclass(frozen=True, kw_only=True)
class QueuedMove:
    """A move that wants to go, has had its turn (``started``), or is over (``ended``).

    Ids sort by time. Those that are over count only as ones that may have overtaken others.
    ``networks``: the migration networks it uses; ``size_bytes``: what it is expected to send;
    ``priority``: that of its VM's rules.
    """

    id: str
    vm: str
    source: str
    destination: str
    networks: tuple[str, ...] = ()
    size_bytes: int = 0
    priority: int = 50
    started: bool = False
    ended: bool = False

    @property
    def route(self) -> str:
        """The move as people read it."""
        return f"{self.id} ({self.vm} from {self.source} to {self.destination})"


@dataclass(frozen=True)
class Turns:
    """The moves that may go now, and for each of the others the sentence that says why not."""

    go: tuple[str, ...] = ()
    waits: Mapping[str, str] = field(default_factory=dict)


def places(move: QueuedMove, limits: ClusterSettings) -> tuple[tuple[Place, int], ...]:
    """Everything limited that a move takes one of, with its limit."""
    pair = " and ".join(sorted((move.source, move.destination)))
    found = [
        (("host", move.source), limits.moves_per_host),
        (("host", move.destination), limits.moves_per_host),
        (("pair", pair), limits.moves_per_pair),
        *((("network", name), limits.moves_per_network) for name in sorted(set(move.networks))),
    ]
    return tuple((place, limit) for place, limit in found if limit)


class _Board:
    """Who holds what while the turns are decided."""

    def __init__(self, limits: ClusterSettings) -> None:
        self._limits = limits
        self._places: dict[str, tuple[tuple[Place, int], ...]] = {}
        self.holders: dict[Place, list[QueuedMove]] = defaultdict(list)
        self.kept: dict[Place, list[QueuedMove]] = defaultdict(list)

    def places(self, move: QueuedMove) -> tuple[tuple[Place, int], ...]:
        """The move's places; worked out once."""
        found = self._places.get(move.id)
        if found is None:
            found = self._places[move.id] = places(move, self._limits)
        return found

    def full(self, move: QueuedMove) -> tuple[Place, int] | None:
        """The first place that has none left for this move."""
        for place, limit in self.places(move):
            if len(self.holders[place]) + len(self.kept[place]) >= limit:
                return place, limit
        return None

    def take(self, move: QueuedMove) -> None:
        """The move goes."""
        for place, _ in self.places(move):
            self.holders[place].append(move)

    def give(self, move: QueuedMove) -> None:
        """It does not go after all."""
        for place, _ in self.places(move):
            self.holders[place].remove(move)

    def keep(self, move: QueuedMove) -> None:
        """What is free of what an overdue move needs is kept for it."""
        for place, limit in self.places(move):
            if len(self.holders[place]) + len(self.kept[place]) < limit:
                self.kept[place].append(move)


def turns(moves: Iterable[QueuedMove], *, limits: ClusterSettings) -> Turns:
    """Decide over all moves; those ``started`` and not ``ended`` hold their places already."""
    every = sorted(moves, key=lambda move: move.id)
    board = _Board(limits)
    for move in every:
        if move.started and not move.ended:
            board.take(move)
    waiting = [move for move in every if not (move.started or move.ended)]
    overtaken = _overtaken(every, board)
    go: list[QueuedMove] = []
    for move in waiting:
        if overtaken[move.id] >= PATIENCE:
            if board.full(move) is None:
                board.take(move)
                go.append(move)
            else:
                board.keep(move)
    others = [move for move in waiting if overtaken[move.id] < PATIENCE]
    go += _busiest(others, board)
    gone = {move.id for move in go}
    waits = {move.id: _why(move, board) for move in waiting if move.id not in gone}
    return Turns(tuple(move.id for move in go), waits)


def _overtaken(every: Sequence[QueuedMove], board: _Board) -> Counter[str]:
    """How many younger moves have had their turn at something that an older one waits for."""
    started: dict[Place, set[str]] = defaultdict(set)
    for move in every:
        if move.started:
            for place, _ in board.places(move):
                started[place].add(move.id)
    found: Counter[str] = Counter()
    for move in every:
        if not (move.started or move.ended):
            passed = {other for place, _ in board.places(move) for other in started[place]}
            found[move.id] = sum(other > move.id for other in passed)
    return found


def _busiest(waiting: Sequence[QueuedMove], board: _Board) -> list[QueuedMove]:
    """As many as possible, those of the busiest host first; taken on the board."""
    load: Counter[str] = Counter()
    for move in waiting:
        load[move.source] += move.size_bytes
        load[move.destination] += move.size_bytes

    def first(move: QueuedMove) -> tuple[int, int, int, str]:
        busiest = max(load[move.source], load[move.destination])
        return -move.priority, -busiest, -move.size_bytes, move.id

    order = sorted(waiting, key=first)
    chosen = {move.id: move for move in order if _try(move, board)}
    at: dict[Place, list[QueuedMove]] = defaultdict(list)
    for move in order:
        for place, _ in board.places(move):
            at[place].append(move)
    # One that goes may stand in the way of two: then the two go instead, as often as that helps.
    better = True
    while better:
        better = False
        for single in list(chosen.values()):
            rivals = {
                move.id: move
                for place, _ in board.places(single)
                for move in at[place]
                if move.id not in chosen
            }
            if len(rivals) > 1 and _exchange(single, list(rivals.values()), chosen, board):
                better = True
    # What an exchange has freed beside its own places.
    chosen |= {move.id: move for move in order if move.id not in chosen and _try(move, board)}
    return sorted(chosen.values(), key=first)


def _exchange(
    single: QueuedMove,
    rivals: Sequence[QueuedMove],
    chosen: dict[str, QueuedMove],
    board: _Board,
) -> bool:
    """Let two or more of the rivals go instead of one move, if they can."""
    board.give(single)
    instead = [move for move in rivals if _try(move, board)]
    if len(instead) > 1:
        del chosen[single.id]
        chosen |= {move.id: move for move in instead}
        return True
    for move in instead:
        board.give(move)
    board.take(single)
    return False


def _try(move: QueuedMove, board: _Board) -> bool:
    if board.full(move) is not None:
        return False
    board.take(move)
    return True


def _why(move: QueuedMove, board: _Board) -> str:
    """Which limit a move waits for, and who holds it."""
    found = board.full(move)
    if found is None:
        return "its turn is next"
    (kind, name), limit = found
    holders = board.holders[kind, name] or board.kept[kind, name]
    said = " and ".join(holder.route for holder in holders[:3])
    if len(holders) > 3:
        said += f" and {len(holders) - 3} more"
    if not board.holders[kind, name]:
        verb = "has waited longer for"
    elif all(holder.started for holder in holders):
        verb = "uses" if len(holders) == 1 else "use"
    else:
        verb = "goes before on" if len(holders) == 1 else "go before on"
    count = "one move" if limit == 1 else f"{limit} moves"
    return f"waits for {said}, which {verb} {name} (limit: {count} {_WORDS[kind]} at a time)"
