"""Who coordinates a volume, and who does after it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from manager_disks import snapshot
from manager_fakes import host_info

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.coordinators import Succession, successions
from godwit.manager.work.define_acts import helpers
from godwit.model import keys
from godwit.model.event import Event
from godwit.model.volume import Volume, VolumeOnHost, VolumeState
from godwit.store.records import encode

EVERYWHERE = ("a", "b", "c")


def world(*, up: str = "host1 host2 host3", **volumes: Volume) -> Snapshot:
    """Three hosts that see three volumes; those in ``up`` have a lease and an agent."""
    names = ("host1", "host2", "host3")
    hosts = {name: host_info(name, volumes=EVERYWHERE) for name in names}
    alive = frozenset(up.split())
    return dataclasses.replace(snapshot(hosts=hosts, volumes=volumes), leases=alive, agents=alive)


def by(host: str | None, name: str = "a", **fields: Any) -> Volume:
    return Volume(name=name, coordinator=host, created_at=1.0, **fields)


def test_a_coordinator_that_is_well_stays() -> None:
    assert successions(world(a=by("host3"), b=by("host1", "b"))) == []


def test_the_part_of_a_dead_host_goes_to_the_one_with_the_fewest() -> None:
    found = successions(
        world(up="host2 host3", a=by("host1"), b=by("host1", "b"), c=by("host2", "c"))
    )
    assert [(one.volume, one.before, one.host) for one in found] == [
        ("a", "host1", "host3"),
        ("b", "host1", "host2"),
    ]
    assert found[0].why == "host1 is down"


def test_an_agent_that_only_restarts_keeps_its_part() -> None:
    before = world(a=by("host1"))
    assert successions(dataclasses.replace(before, agents=frozenset({"host2"}))) == []


def test_a_lost_path_and_an_unknown_host_are_reasons() -> None:
    lost = VolumeOnHost(state=VolumeState.REDIRECTED, since=2.0)
    at = dataclasses.replace(world(a=by("host1")), volume_states={"a/host1": lost})
    assert successions(at) == [
        Succession("a", "host1", "host2", "host1 has no path of its own to it")
    ]
    (gone,) = successions(world(a=by("host9")))
    assert gone.why == "host9 is no host any more"


def test_nobody_and_local_volumes_are_left_alone() -> None:
    assert successions(world(up="", a=by("host1"))) == [], "nobody could take it"
    assert successions(world(up="host2", a=by("host1", kind="local"))) == []
    (first,) = successions(world(up="host2", a=by(None)))
    assert (first.before, first.host) == (None, "host2")


def test_the_coordinator_is_asked_first() -> None:
    at = world(a=by("host2"))
    assert [info.name for info in helpers(at, None, volumes={"a"})] == ["host2", "host1", "host3"]
    preferred = helpers(at, None, volumes={"a"}, prefer="host3")
    assert [info.name for info in preferred] == ["host3", "host2", "host1"]


async def test_the_leader_moves_it_and_says_why(api: Any) -> None:
    key = keys.volume("shared")
    await api.store.put(key, encode(by("host2", "shared")))

    async def coordinator() -> str | None:
        found = await api.records.get(key, Volume)
        return found.value.coordinator if found else None

    assert await coordinator() == "host2"
    await api.store.delete(keys.host_agent("host2"))
    await api.store.delete(keys.host_lease("host2"))
    async with asyncio.timeout(10):
        while await coordinator() == "host2":  # noqa: ASYNC110 - the test reads the store itself
            await asyncio.sleep(0.02)
        while True:
            events = [
                Event.model_validate_json(kv.value)
                for kv in (await api.store.range(keys.EVENTS)).kvs
            ]
            said = [one.message for one in events if one.kind == "volume.coordinator"]
            if said:
                break
            await asyncio.sleep(0.02)
    assert await coordinator() == "host1"
    assert said == ["host1 coordinates shared: host2 is down"]
