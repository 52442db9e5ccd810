"""Many records as fresh as one that was just read, without reading them all from the store."""

from __future__ import annotations

from collections.abc import Collection

from godwit.manager.world import World
from godwit.model.errors import Unavailable
from godwit.model.vm import Vm

_WATCH_S = 2.0


async def vms_since(world: World, revision: int) -> Collection[Vm]:
    """All definitions, as of ``revision`` or later.

    Making a linked clone writes the owner record of its source. Who has read that record, looks
    here for clones as of its revision, and compares it in what is written then, has missed none.
    TooOld when one of them cannot be read.
    """
    try:
        await world.cache.reached(revision, timeout=_WATCH_S)
    except Unavailable:  # the watch is late; the store takes the longer the more VMs there are
        return (await world.records.vms()).values()
    snapshot = world.cache.snapshot
    snapshot.check_vms_whole()
    return snapshot.vms.values()
