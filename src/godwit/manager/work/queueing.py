"""Whose turn it is: the records of moves as `godwit.planner.queue` sees them, and the turn itself.

A turn is written down before the move is launched, by a transaction that also compares the queue's
own key: whoever decided on older records loses and decides again. So the limits hold although
each move's task decides for itself, on whichever replica of the manager it runs.
"""

from __future__ import annotations

from godwit.manager.rooms import waiting_moves
from godwit.manager.snapshot import Snapshot
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.migration import Migration, MoveState
from godwit.planner.queue import QueuedMove, Turns, turns
from godwit.store.api import absent, mod_is, put
from godwit.store.records import CasFailed

_last: tuple[Snapshot, Turns] | None = None


def turns_of(snapshot: Snapshot) -> Turns:
    """The turns of all moves; worked out once for each snapshot."""
    global _last
    if _last is None or _last[0] is not snapshot:
        _last = snapshot, turns(queued_moves(snapshot), limits=snapshot.settings)
    return _last[1]


def queued_moves(snapshot: Snapshot) -> list[QueuedMove]:
    """The moves that count. Pure.

    Not those that nobody works on any more: a record whose source is gone, or whose task has
    ended, must not hold up the queue for ever.
    """
    waiting = {move.id for move in waiting_moves(snapshot)}
    found = []
    for move in snapshot.migrations.values():
        alive = move.id in waiting
        if move.state is MoveState.RUNNING:
            alive = move.source in snapshot.leases
        if alive or (move.state.final and move.turn_at is not None):
            found.append(_queued(snapshot, move))
    return found


def _queued(snapshot: Snapshot, move: Migration) -> QueuedMove:
    hosts = (snapshot.hosts.get(name) for name in (move.source, move.destination))
    networks = {info.migration_subnet for info in hosts if info and info.migration_subnet}
    vm = snapshot.vms.get(move.vm)
    return QueuedMove(
        id=move.id,
        vm=move.vm,
        source=move.source,
        destination=move.destination,
        networks=tuple(sorted(networks)),
        priority=vm.rules.priority if vm else 50,
        size_bytes=move.forecast.bytes or (vm.memory_bytes if vm else 0),
        started=move.turn_at is not None or move.state is not MoveState.WAITING,
        ended=move.state.final,
    )


def waits_for(snapshot: Snapshot, move: Migration) -> str | None:
    """The sentence that says what a waiting move waits for; None when it may go."""
    if move.turn_at is not None:
        return None
    found = turns_of(snapshot)
    if move.id not in found.waits and move.id not in found.go:
        # Its task has not said yet that it carries the move.
        every = [*queued_moves(snapshot), _queued(snapshot, move)]
        found = turns(every, limits=snapshot.settings)
    return found.waits.get(move.id)


async def take_turn(world: World, move_id: str) -> bool:
    """Write down that a move has its turn; False when it has not, or somebody was faster.

    The queue's key is read first: every turn up to that one is in the snapshot that decides.
    """
    store = world.records.store
    seen = await store.get(keys.QUEUE)
    if seen is not None:
        await world.cache.reached(seen.mod_revision)
    found = await world.records.migration(move_id)
    if found is None or found.value.state is not MoveState.WAITING:
        return True  # called off, or gone on: there is nothing to wait for
    if found.value.turn_at is not None:
        return True
    await world.cache.reached(found.revision)
    snapshot = world.cache.snapshot
    if waits_for(snapshot, snapshot.migrations.get(move_id, found.value)):
        return False
    move = found.value.but(turn_at=world.clock.realtime(), reason="")
    guard = absent(keys.QUEUE) if seen is None else mod_is(keys.QUEUE, seen.mod_revision)
    try:
        revision = await world.records.cas(
            keys.migration(move_id),
            move,
            found.revision,
            compare=[guard],
            also=[put(keys.QUEUE, move_id.encode())],
        )
    except CasFailed:
        return False
    await world.cache.reached(revision)
    return True
