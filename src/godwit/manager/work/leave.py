"""A host leaves the cluster: off the list, looked at once more, its certificates revoked.

The list of revoked certificates reaches every daemon through the store. From then on agents,
managers and an embedded store refuse the host and hang up on it. etcd reads the list (as its
`--client-crl-file`) when a connection begins and keeps those that are open: the host's own daemons
end them, and the task says so when the host goes on renewing its lease nevertheless.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from godwit.manager.leave_rules import check_empty
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World, authority
from godwit.model import keys
from godwit.model.errors import GodwitError, NotFound, Refused
from godwit.model.host import HostInfo
from godwit.model.requests import RemoveHost
from godwit.store.api import delete, delete_prefix, put
from godwit.store.records import encode, new_event
from godwit.wire.identity import STORE

_GONE_S = 20.0  # longer than any lease of a host lives


async def remove(world: World, run: TaskRun, request: RemoveHost) -> Done:
    """Take the host out. Nothing is revoked when it turns out that a VM needs it."""
    name, signs = request.name, authority(world)
    if world.worker.partition("/")[0] == name:
        raise Refused(
            f"the manager that would do it runs on {name}", hint="ask a manager on another host"
        )
    found = await world.records.get(keys.host_info(name), HostInfo)
    if found is None and not run.adopted:
        raise NotFound(f"no host {name}", hint="look with: godwit host list")
    if not request.store and await signs.lists.live(name, STORE):
        raise Refused(
            f"a member of the store is on {name}, too (store/{name})",
            hint="take it out first, with: etcdctl member remove; then add --store here",
        )
    if found is not None:
        await _off_the_list(world, name, found.value)
    now = world.clock.realtime()
    message = f"{name} was removed from the cluster by {run.task.by}"
    event = new_event("cluster.removed", f"host/{name}", message, at=now)
    count = await signs.lists.revoke(name, also=[put(keys.event(event.id), encode(event))])
    await run.say(f"{count} certificates revoked; waits until {name} has lost the store")
    silent = await _await_silence(world, name)
    await world.records.store.txn([], [delete_prefix(f"{keys.HOSTS}{name}/")])
    await _forget_volumes(world, name)
    if silent:
        return Done(f"{name} is out of the cluster; {count} certificates were revoked")
    return Done(
        f"{name} is out of the list and {count} certificates were revoked, but it still renews its "
        "lease: it holds a connection that etcd opened before. Stop its godwit-guard and "
        "godwit-agent, or restart the etcd members one after the other",
        {"still_connected": True},
    )


async def _off_the_list(world: World, name: str, info: HostInfo) -> None:
    """No VM is placed there from here on; then look once more whether one was in between."""
    store = world.records.store
    revision = (await store.txn([], [delete(keys.host_info(name))])).revision
    await world.cache.reached(revision)
    snapshot = world.cache.snapshot
    try:
        check_empty(replace(snapshot, hosts={**snapshot.hosts, name: info}), name)
    except GodwitError:
        await store.put(keys.host_info(name), encode(info))
        raise


async def _await_silence(world: World, name: str) -> bool:
    """Whether the host stops renewing its lease in time."""
    store, lease = world.records.store, keys.host_lease(name)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GONE_S), store.watch(f"{keys.HOSTS}{name}/") as watch:
            async for _ in watch:
                # Its keys go with its leases, once the store does not let it renew them.
                if (
                    await store.get(lease) is None
                    and await store.get(keys.host_agent(name)) is None
                ):
                    return True
    return False


async def _forget_volumes(world: World, name: str) -> None:
    found = await world.records.store.range(keys.VOLUME_STATES)
    for kv in found.kvs:
        if kv.key.rpartition("/")[2] == name:
            await world.records.store.delete(kv.key)
