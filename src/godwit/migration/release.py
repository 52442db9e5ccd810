"""The word of a source that it has let go: told while its swap is slow, kept beside the copy.

After ``completed``, with gate and disks closed, the source runs the VM again only once it has
changed the owner record. Should its host be lost before the swap, a destination that was told so
holds the VM as it was, and the cluster may hand it over (`godwit.cluster.moves`); one that was not
told cannot know whether the source went on by itself and wrote.

The word grants nothing: the copy runs by the record alone. So one that comes late, or twice, or
after a way back, does no harm; the record names that move no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from godwit.migration.peer import PeerSilent
from godwit.migration.stream import Stream
from godwit.model.errors import GodwitError, Refused
from godwit.qemu.machine import Machine

if TYPE_CHECKING:
    from godwit.migration.move import Move

SLOW_S = 0.1
"""Seconds for which a swap is waited for in silence: what is said meanwhile costs dark time."""
AGAIN_S = 0.5
TELL_S = 1.0
_log = logging.getLogger("migration")


@contextlib.asynccontextmanager
async def telling(move: Move, *, whole: bool) -> AsyncIterator[None]:
    """Around the swap: once that is slow the destination is told, again and again until it knows.

    Only of a live move whose memory is there as a ``whole``. Nothing is sent after this.
    """
    if not whole or move.order.method != "live":
        yield
        return
    task = asyncio.create_task(_tell(move), name=f"move {move.order.id}: let go")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            _log.error("%s: %r", task.get_name(), error, exc_info=error)


async def _tell(move: Move) -> None:
    world = move.world
    await world.clock.sleep(SLOW_S)
    while True:
        try:
            await world.peer.released(move.order.id, timeout=TELL_S)
        except (PeerSilent, GodwitError) as error:  # its agent may be back in a moment
            move.say(f"{move.order.destination} was not told yet that it was let go: {error}")
        else:
            move.say(f"{move.order.destination} knows that {world.host} has let go")
            return
        await world.clock.sleep(AGAIN_S)


async def keep(machine: Machine, *, where: str) -> None:
    """Note the word beside the copy, so that it outlives the agent (not the host).

    Refused unless QEMU itself says that all of the VM came in; post-copy never does before a swap.
    """
    now = await Stream(machine.monitor).read(timeout=1.0)
    if now.status != "completed":
        raise Refused(f"{where} does not hold all of it: the stream is {now.status}", hint="")
    machine.amend(released=True)
