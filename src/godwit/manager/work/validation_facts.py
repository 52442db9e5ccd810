"""Finding out what a validation judges: every host is asked about itself and about the others.

Nothing here fails as a whole: who does not answer is a fact too, with its reason. Hosts are asked
side by side, but for the bandwidth: two transfers at once would each see half.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import all_volumes, host_state
from godwit.manager.work.validation_rungs import rungs_seen
from godwit.manager.work.validation_store import store_seen
from godwit.manager.world import World
from godwit.model.base import Record
from godwit.model.errors import GodwitError
from godwit.model.host import HostInfo
from godwit.model.validation_facts import (
    ClusterFacts,
    FilesSeen,
    HostProbe,
    HostSeen,
    LockSeen,
    LocksSeen,
    PathSeen,
    PathsSeen,
    PeerAt,
    VolumeKnown,
    VolumeSeen,
)

T = TypeVar("T", bound=Record)
Say = Callable[[str], Awaitable[None]]

_FACTS_S = 15.0
_PAIR_S = 15.0
_FILES_S = 30.0
_RATE_BYTES = 64 << 20
_RATE_S = 2.0


async def gather(world: World, say: Say, *, run: str) -> ClusterFacts:
    """Everything about the whole cluster. ``run`` names this validation; ``say`` hears of steps."""
    snapshot = world.cache.snapshot
    await say(f"asking {len(snapshot.hosts)} hosts about themselves")
    hosts = await _probes(world, snapshot, sorted(snapshot.hosts))
    able = [host.probe for host in hosts if host.probe is not None]
    await say(f"measuring {len(able) * (len(able) - 1)} ways between hosts")
    paths = await _paths(world, able)
    for number, (source, destination) in enumerate(ring(able), start=1):
        await say(f"bandwidth {number} of {len(able)}: {source.name} to {destination.name}")
        paths = await _with_rate(world, paths, source, destination)
    volumes = [VolumeKnown(name=v.name, kind=v.kind) for v in all_volumes(snapshot)]
    await say(f"writing to and reading from {len(volumes)} volumes")
    seen, locks = await _volumes(world, able, volumes, run=run)
    await say("asking the store, and trying each way to fence a host")
    return ClusterFacts(
        hosts=hosts,
        paths=tuple(paths),
        volumes=tuple(volumes),
        volumes_seen=tuple(seen),
        locks=tuple(locks),
        networks={name: network.mtu for name, network in snapshot.networks.items()},
        cpu_models=dict(Counter(vm.pins.cpu_model for vm in snapshot.vms.values())),
        cpu_baseline=snapshot.settings.cpu_baseline,
        store=await store_seen(world),
        rungs=await rungs_seen(world, hosts),
    )


async def gather_pair(world: World, names: Sequence[str]) -> ClusterFacts:
    """Network and system of some hosts, in a moment: no bandwidth, no volume, no store."""
    hosts = await _probes(world, world.cache.snapshot, names)
    able = [host.probe for host in hosts if host.probe is not None]
    return ClusterFacts(hosts=hosts, paths=tuple(await _paths(world, able)), partial=True)


async def _ask(
    world: World,
    host: HostInfo,
    path: str,
    kind: type[T],
    body: Mapping[str, Any] | None = None,
    *,
    deadline_s: float,
) -> T:
    method = "GET" if body is None else "POST"
    answer = await world.agents.call(host, method, path, body, deadline_s=deadline_s)
    return kind.model_validate(answer)


async def _probes(world: World, snapshot: Snapshot, names: Sequence[str]) -> tuple[HostSeen, ...]:
    async def ask(name: str) -> HostSeen:
        state, why = host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
        seen = HostSeen(name=name, state=state.value, reason=why)
        if name not in snapshot.agents:
            return seen.but(reason=why or "its agent is away")
        try:
            path = "/v1/validation/facts"
            probe = await _ask(world, snapshot.hosts[name], path, HostProbe, deadline_s=_FACTS_S)
        except GodwitError as error:
            return seen.but(reason=error.message)
        return seen.but(probe=probe)

    return tuple(await asyncio.gather(*(ask(name) for name in names)))


def _peer(world: World, probe: HostProbe) -> PeerAt:
    info = world.cache.snapshot.hosts[probe.name]
    return PeerAt(host=probe.name, agent_url=info.agent_url, address=probe.migration_address)


def ring(probes: Sequence[HostProbe]) -> list[tuple[HostProbe, HostProbe]]:
    """Each host once as source and once as destination; two hosts both ways. Pure."""
    if len(probes) < 2:
        return []
    return list(zip(probes, [*probes[1:], probes[0]], strict=True))


async def _paths(world: World, probes: Sequence[HostProbe]) -> list[PathSeen]:
    """Every host to every other one: packets and clocks."""

    async def ask(source: HostProbe) -> tuple[PathSeen, ...]:
        others = [probe for probe in probes if probe.name != source.name]
        if not others:
            return ()
        body = {"peers": [_peer(world, probe).model_dump(mode="json") for probe in others]}
        host = world.cache.snapshot.hosts[source.name]
        limit = _PAIR_S * len(others)
        try:
            answer = await _ask(
                world, host, "/v1/validation/paths", PathsSeen, body, deadline_s=limit
            )
        except GodwitError as error:
            why = error.message
            return tuple(
                PathSeen(source=source.name, destination=other.name, reason=why, clock_reason=why)
                for other in others
            )
        return answer.paths

    found = await asyncio.gather(*(ask(probe) for probe in probes))
    return [path for paths in found for path in paths]


async def _with_rate(
    world: World, paths: list[PathSeen], source: HostProbe, destination: HostProbe
) -> list[PathSeen]:
    """The same paths, one of them with what a short transfer carried."""
    pair = (source.name, destination.name)
    known = next((path for path in paths if (path.source, path.destination) == pair), None)
    if known is None or known.largest_bytes is None:
        return paths  # nothing arrives there: that is said already
    body = {
        "peers": [_peer(world, destination).model_dump(mode="json")],
        "rate": [destination.name],
        "packets": False,
        "bytes_limit": _RATE_BYTES,
        "seconds_limit": _RATE_S,
    }
    host = world.cache.snapshot.hosts[source.name]
    try:
        answer = await _ask(
            world, host, "/v1/validation/paths", PathsSeen, body, deadline_s=2 * _PAIR_S
        )
        seen = answer.paths[0]
        better = known.but(
            bits_per_s=seen.bits_per_s,
            sent_bytes=seen.sent_bytes,
            sent_s=seen.sent_s,
            rate_reason=seen.rate_reason or ("" if seen.bits_per_s else seen.reason),
        )
    except GodwitError as error:
        better = known.but(rate_reason=error.message)
    return [better if path is known else path for path in paths]


async def _volumes(
    world: World, probes: Sequence[HostProbe], volumes: Sequence[VolumeKnown], *, run: str
) -> tuple[list[VolumeSeen], list[LockSeen]]:
    """What each host writes to each shared directory the others look for; locks likewise."""
    snapshot = world.cache.snapshot
    shared = [volume.name for volume in volumes if volume.kind == "dir"]
    hosts = {probe.name: snapshot.hosts[probe.name] for probe in probes}
    wrote: dict[str, dict[str, VolumeSeen]] = {}
    found: dict[str, dict[str, VolumeSeen]] = {}
    locks: list[LockSeen] = []
    try:
        if shared:
            body = {"run": run, "volumes": shared}
            wrote = await _files(world, hosts, "files/write", body)
            body["hosts"] = sorted(hosts)
            found = await _files(world, hosts, "files/read", body, wrote)
            locks = await _locks(world, hosts, shared, wrote, found, run=run)
    finally:
        if shared:
            await asyncio.gather(
                *(
                    world.agents.call(
                        host,
                        "POST",
                        "/v1/validation/files/clear",
                        {"run": run, "volumes": shared},
                        deadline_s=_FILES_S,
                    )
                    for host in hosts.values()
                ),
                return_exceptions=True,
            )
    seen = []
    for volume in volumes:
        for name in hosts:
            one = wrote.get(name, {}).get(volume.name, VolumeSeen(volume=volume.name, host=name))
            unread = found.get(name, {}).get(volume.name, one).unread
            said = snapshot.seen_volume(volume.name, name)
            if said is None and volume.name not in snapshot.hosts[name].volumes and not one.wrong:
                one = one.but(wrong="the host does not have it")
            if said is not None:
                one = one.but(
                    state=said.state.value, state_reason=said.reason, identity=said.identity
                )
            seen.append(one.but(unread=unread))
    return seen, locks


async def _files(
    world: World,
    hosts: Mapping[str, HostInfo],
    verb: str,
    body: Mapping[str, Any],
    wrote: Mapping[str, Mapping[str, VolumeSeen]] | None = None,
) -> dict[str, dict[str, VolumeSeen]]:
    """What each host says of each volume. With ``wrote``, marks that are not there are not missed,
    and a host that could not write itself is not asked to read."""

    async def ask(name: str) -> dict[str, VolumeSeen]:
        volumes = list(body["volumes"])
        if wrote is not None:
            volumes = [v for v in volumes if not wrote[name][v].wrong]
        try:
            answer = await _ask(
                world,
                hosts[name],
                f"/v1/validation/{verb}",
                FilesSeen,
                {**body, "volumes": volumes},
                deadline_s=_FILES_S,
            )
        except GodwitError as error:
            why = error.message
            return {volume: VolumeSeen(volume=volume, host=name, wrong=why) for volume in volumes}
        return {one.volume: one for one in answer.volumes}

    answers = await asyncio.gather(*(ask(name) for name in hosts))
    found = dict(zip(hosts, answers, strict=True))
    if wrote is None:
        return found
    for name, volumes in found.items():
        for volume, one in volumes.items():
            there = {w for w in one.unread if w in wrote and not wrote[w][volume].wrong}
            unread = {writer: one.unread[writer] for writer in sorted(there - {name})}
            volumes[volume] = one.but(unread=unread)
    return found


async def _locks(
    world: World,
    hosts: Mapping[str, HostInfo],
    shared: Sequence[str],
    wrote: Mapping[str, Mapping[str, VolumeSeen]],
    read: Mapping[str, Mapping[str, VolumeSeen]],
    *,
    run: str,
) -> list[LockSeen]:
    """One host locks, all others look; then a second one locks, and the first looks.

    Only where the observer has just read what the holder wrote: else there is no lock to see.
    """
    good = [name for name in hosts if any(not wrote[name][volume].wrong for volume in shared)]
    if len(good) < 2:
        return []
    found = []
    for holder, observers in ((good[0], good[1:]), (good[1], good[:1])):
        volumes = [volume for volume in shared if not wrote[holder][volume].wrong]
        held = await _lock_answers(world, hosts[holder], "locks/hold", run, volumes, holder)
        for observer in observers:
            there = read.get(observer, {})
            both = [v for v in volumes if v in there and holder not in there[v].unread]
            said = await _lock_answers(world, hosts[observer], "locks/observe", run, both, holder)
            for volume in both:
                why = held.get(volume, "") or said.get(volume, "")
                found.append(
                    LockSeen(
                        volume=volume, holder=holder, observer=observer, seen=not why, reason=why
                    )
                )
    return found


async def _lock_answers(
    world: World, host: HostInfo, verb: str, run: str, volumes: Sequence[str], holder: str
) -> dict[str, str]:
    body = {"run": run, "volumes": list(volumes), "hosts": [holder]}
    try:
        path = f"/v1/validation/{verb}"
        answer = await _ask(world, host, path, LocksSeen, body, deadline_s=_FILES_S)
    except GodwitError as error:
        return dict.fromkeys(volumes, error.message)
    return answer.volumes
