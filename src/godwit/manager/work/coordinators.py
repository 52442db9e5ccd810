"""Which host coordinates a volume: its metadata work (create, grow, delete) is asked of it first.

    volume defined          a host that is up and sees it
    its host is down, or
    has lost its path       another one that is up and has a path of its own

The record changes by compare-and-swap, by the leading manager. A host that comes back does not get
the part back: nothing is gained by it. An agent that only restarts keeps it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.define_acts import helpers, lost_path
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.volume import Volume


@dataclass(frozen=True)
class Succession:
    """A volume that gets another coordinator, and the sentence that says why."""

    volume: str
    before: str | None
    host: str
    why: str


def successions(snapshot: Snapshot) -> list[Succession]:
    """What is to change: hosts that coordinate the fewest volumes come first. Pure.

    A volume that no host reaches keeps its coordinator; one of which each host has its own
    (``local``) has no use for any.
    """
    load = Counter(volume.coordinator for volume in snapshot.volumes.values())
    found = []
    for name, volume in sorted(snapshot.volumes.items()):
        why = "" if volume.kind == "local" else _unfit(snapshot, volume)
        able = [info.name for info in helpers(snapshot, None, volumes={name})] if why else []
        if not able:
            continue
        host = min(able, key=lambda one: (load[one], one))
        load[host] += 1
        found.append(Succession(name, volume.coordinator, host, why))
    return found


def _unfit(snapshot: Snapshot, volume: Volume) -> str:
    """Why the coordinator can be that no more; empty when it can."""
    host = volume.coordinator
    if host is None:
        return "it had no coordinator"
    if host not in snapshot.hosts:
        return f"{host} is no host any more"
    if host not in snapshot.leases:
        return f"{host} is down"
    if lost_path(snapshot, volume.name, host):
        return f"{host} has no path of its own to it"
    return ""


async def settle_coordinators(world: World) -> None:
    """Write down who coordinates from now on; StoreError when the store is away."""
    for one in successions(world.cache.snapshot):
        taken = False

        def change(volume: Volume, one: Succession = one) -> Volume:
            nonlocal taken
            taken = volume.coordinator == one.before
            return volume.but(coordinator=one.host) if taken else volume

        await world.records.update(keys.volume(one.volume), Volume, change)
        if taken:
            await world.records.append_event(
                "volume.coordinator",
                f"volume/{one.volume}",
                f"{one.host} coordinates {one.volume}: {one.why}",
                at=world.clock.realtime(),
            )
