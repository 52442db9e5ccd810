"""Look at the cluster as a whole, for ``cluster status``: each member of the store by itself."""

from __future__ import annotations

from collections.abc import Mapping

from godwit.cluster.membership import Standing
from godwit.manager import views
from godwit.manager.keyspace import MEMBERS
from godwit.manager.standing import cluster_status, host_standing
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.cluster_status import ClusterStatus
from godwit.model.skew import Speaks
from godwit.model.trust import ClusterIdentity, IssuedCertificate
from godwit.store.errors import StoreError
from godwit.store.records import decode

_MEMBER_S = 1.0


async def look(world: World, heard: Mapping[str, Standing]) -> ClusterStatus:
    """How it stands now. A store that does not answer is told, not raised.

    ``heard``: what this manager thinks of hosts that do not renew their lease.
    """
    members = await world.records.store.members(timeout=_MEMBER_S)
    about, leader = await _about(world)
    snapshot = world.cache.snapshot
    certificates = await _certificates(world)
    now = world.clock.realtime()
    hosts = [
        host_standing(
            views.view_host(snapshot, info),
            certificates.get(name, []),
            now=now,
            heard=heard.get(name),
        )
        for name, info in sorted(snapshot.hosts.items())
    ]
    # A manager's key is NAME.LIFE; the leader's record says NAME/LIFE.
    alive = {member.partition(".")[0]: False for member in snapshot.members}
    if leader:
        alive[leader.partition("/")[0]] = True
    said = await _managers(world)
    return cluster_status(
        about,
        members=members,
        managers=alive,
        hosts=hosts,
        speaks={name: said.get(name, Speaks()) for name in alive},
        unreadable=sorted(snapshot.unreadable),
    )


async def _about(world: World) -> tuple[ClusterIdentity | None, str]:
    store = world.records.store
    try:
        found = await store.get(keys.TRUST_CLUSTER, linearizable=False, timeout=_MEMBER_S)
        leader = await store.get(keys.LEADER, linearizable=False, timeout=_MEMBER_S)
    except StoreError:
        return None, ""
    about = decode(found, ClusterIdentity).value if found else None
    return about, leader.value.decode() if leader else ""


async def _managers(world: World) -> dict[str, Speaks]:
    """What each manager says of itself; of one that started twice what it said last."""
    try:
        listed = await world.records.store.range(MEMBERS, linearizable=False, timeout=_MEMBER_S)
    except StoreError:
        return {}
    found: dict[str, Speaks] = {}
    for kv in sorted(listed.kvs, key=lambda kv: kv.mod_revision):
        name = kv.key.removeprefix(MEMBERS).partition(".")[0]
        found[name] = decode(kv, Speaks).value
    return found


async def _certificates(world: World) -> dict[str, list[IssuedCertificate]]:
    prefix = f"{keys.TRUST_ISSUED}host/"
    try:
        listed = await world.records.store.range(prefix, linearizable=False, timeout=_MEMBER_S)
    except StoreError:
        return {}
    found: dict[str, list[IssuedCertificate]] = {}
    for kv in listed.kvs:
        one = decode(kv, IssuedCertificate).value
        found.setdefault(one.name, []).append(one)
    return found
