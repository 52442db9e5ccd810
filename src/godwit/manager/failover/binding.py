"""What a move holds beside the owner record, freed in the transaction that takes the VM out of it.

Its agents do that in the good case and in most bad ones; this is for a source that is gone. Each
write rests on the record as it was read (``compare`` gains that), so an agent that comes back at
that moment and writes first is not overwritten: the step fails then, and is decided anew.
"""

from __future__ import annotations

from godwit.manager.world import World
from godwit.model import keys
from godwit.model.migration import Migration, MoveState, Outcome
from godwit.model.ownership import MoveIntent
from godwit.store.api import Compare, Op, delete, mod_is, put
from godwit.store.records import encode


async def closing(
    world: World, vm: str, move: MoveIntent, compare: list[Compare], *, over: str
) -> list[Op]:
    """The memory kept for it goes; with ``over``, why it is over, its record is closed as failed.

    Without, the move goes on: its destination has the VM from here, and its record stays open.
    """
    ops = [delete(keys.host_reservation(move.destination, vm))]
    if over:
        ops += await _end(world, move, compare, Outcome.FAILED, over)
    return ops


async def concluding(
    world: World, vm: str, move: MoveIntent, compare: list[Compare], *, why: str
) -> list[Op]:
    """The same for one whose destination has the VM: its record says so."""
    ops = [delete(keys.host_reservation(move.destination, vm))]
    return ops + await _end(world, move, compare, Outcome.COMPLETED, why)


async def _end(
    world: World, move: MoveIntent, compare: list[Compare], outcome: Outcome, why: str
) -> list[Op]:
    """The last word of a move's own record, unless it has one already."""
    key = keys.migration(move.id)
    found = await world.records.get(key, Migration)
    if found is None or found.value.state.final:
        return []
    compare.append(mod_is(key, found.revision))
    now, record = world.clock.realtime(), found.value
    ended = record.but(
        state=MoveState(outcome.value),
        outcome=outcome,
        reason=why,
        ended_at=now,
        progress=record.progress.but(sentence=why),
        log=(*record.log, why),
    )
    return [put(key, encode(ended))]
