"""Which move may go next: pure. One live move per host at a time, first come, first served."""

from __future__ import annotations

from godwit.manager.snapshot import Snapshot
from godwit.model.migration import Migration, MoveState


def waits_for(snapshot: Snapshot, move: Migration) -> str | None:
    """The sentence that says what a waiting move waits for; None when it may go.

    A move that runs blocks its two hosts. Of the waiting ones the older goes first, so that
    nobody is overtaken for ever; ids sort by time.
    """
    for other in sorted(snapshot.migrations.values(), key=lambda entry: entry.id):
        if other.id == move.id or other.state.final:
            continue
        if other.state is MoveState.WAITING and other.id > move.id:
            continue
        shared = _shared_host(other, move)
        if shared is None or not _is_alive(snapshot, other):
            continue
        verb = "uses" if other.state is MoveState.RUNNING else "is first in the queue for"
        return (
            f"waits for {other.id} ({other.vm} from {other.source} to {other.destination}), "
            f"which {verb} {shared}"
        )
    return None


def _shared_host(one: Migration, two: Migration) -> str | None:
    mine = (two.source, two.destination)
    return next((host for host in (one.source, one.destination) if host in mine), None)


def _is_alive(snapshot: Snapshot, move: Migration) -> bool:
    """False for a record nobody works on any more: it must not hold up the queue for ever."""
    if move.state is MoveState.RUNNING:
        return move.source in snapshot.leases
    return any(
        not task.state.final and task.progress.get("migration") == move.id
        for task in snapshot.tasks.values()
    )
