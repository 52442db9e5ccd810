"""What a validation asks of the store: votes, disks, how long a write takes."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from godwit.cluster.validation.etcd_metrics import fsync_p99_s
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.validation_facts import StoreMember, StoreSeen
from godwit.store.api import MemberView
from godwit.store.errors import StoreError

_WRITES = 7
_WRITE_S = 10.0
_LOOK_S = 5.0


async def store_seen(world: World) -> StoreSeen:
    """Every member, how long its disk takes, and how long writes take that are safe when answered.

    Only etcd tells how many votes there are: the embedded store has no list of members.
    """
    store, clock = world.records.store, world.clock
    views = await store.members(timeout=_LOOK_S)
    voters = max((view.voters for view in views), default=0)
    members = await asyncio.gather(*(_member(world, view, etcd=voters > 0) for view in views))
    seen = StoreSeen(
        kind="etcd" if voters else "embedded",
        members=tuple(members),
        voters=max(voters, len(members)),
    )
    took = []
    try:
        for number in range(_WRITES):
            began = clock.monotonic()
            await store.put(keys.VALIDATION_TRY, str(number).encode(), timeout=_WRITE_S)
            took.append(clock.monotonic() - began)
        await store.delete(keys.VALIDATION_TRY, timeout=_WRITE_S)
    except StoreError as error:
        return seen.but(reason=str(error), write_s=tuple(took))
    return seen.but(write_s=tuple(took))


async def _member(world: World, view: MemberView, *, etcd: bool) -> StoreMember:
    address = urlsplit(view.endpoint).hostname or ""
    hosts = world.cache.snapshot.hosts.values()
    host = next((one.name for one in hosts if urlsplit(one.agent_url).hostname == address), None)
    reason = view.problem or ("it follows no leader" if view.leaderless else "")
    member = StoreMember(
        name=host or address or view.endpoint,
        endpoint=view.endpoint,
        host=host,
        healthy=not reason,
        reason=reason,
    )
    if not etcd or view.status is None:
        return member
    try:
        metrics = await world.agents.store_metrics(view.endpoint, deadline_s=_LOOK_S)
    except GodwitError:
        return member  # how it is, is said above; its figures are not there
    return member.but(fsync_p99_s=fsync_p99_s(metrics))
