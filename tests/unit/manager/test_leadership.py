"""Who takes the lead: whoever has listened long enough, while anybody has."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.manager.keyspace import MEMBERS
from godwit.manager.leadership import BEAT_S, LEASE_S, YIELD_S, Leadership
from godwit.model import keys
from godwit.store.memory import MemoryStore
from godwit.store.records import Records


class Clock:
    """Moved by the test."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Replicas:
    """Managers on one store; each beats when it is told to."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = MemoryStore(clock=self.clock.monotonic)
        self.young: set[str] = set()

    def make(self, worker: str) -> Leadership:
        cache = SimpleNamespace(
            snapshot=SimpleNamespace(members=frozenset()), ready=asyncio.Event()
        )
        world: Any = SimpleNamespace(
            records=Records(self.store), clock=self.clock, worker=worker, cache=cache
        )
        tasks: Any = None
        return Leadership(world, tasks, young=lambda: worker in self.young)

    async def beat(self, *replicas: Leadership, wait_s: float = 0.0) -> None:
        """Each in turn, with the members as they are in the store."""
        self.clock.now += wait_s
        for one in replicas:
            found = await self.store.range(MEMBERS)
            names = frozenset(kv.key.removeprefix(MEMBERS) for kv in found.kvs)
            one._world.cache.snapshot.members = names
            await one._beat()

    async def leader(self) -> str:
        found = await self.store.get(keys.LEADER)
        return found.value.decode() if found else ""


@pytest.fixture
async def replicas() -> Any:
    made = Replicas()
    yield made
    await made.store.aclose()


async def test_a_lone_manager_leads_at_once_however_young(replicas: Replicas) -> None:
    replicas.young.add("m1/a")
    one = replicas.make("m1/a")
    await replicas.beat(one)
    assert one.leads


async def test_a_lone_manager_that_is_restarted_leads_at_once(replicas: Replicas) -> None:
    """Its earlier life is no other: nobody else could take the lead."""
    await replicas.beat(replicas.make("m1/a"))
    replicas.young.add("m1/b")
    again = replicas.make("m1/b")
    await replicas.beat(again, wait_s=1.0)
    assert again.leads
    assert await replicas.leader() == "m1/b"


async def test_a_restarted_leader_gives_the_lead_to_who_has_listened(replicas: Replicas) -> None:
    first, second = replicas.make("m1/a"), replicas.make("m2/a")
    await replicas.beat(first, second)
    assert (first.leads, second.leads) == (True, False)
    replicas.young.add("m1/b")
    again = replicas.make("m1/b")
    await replicas.beat(again, second, wait_s=1.0)  # long before the lease of the dead one is over
    assert (again.leads, second.leads) == (False, True)
    await replicas.beat(again, second, wait_s=BEAT_S)
    assert (again.leads, second.leads) == (False, True)


async def test_a_young_one_does_not_take_an_open_lead_first(replicas: Replicas) -> None:
    first, second = replicas.make("m1/a"), replicas.make("m2/a")
    await replicas.beat(first, second)
    replicas.young.add("m3/a")
    third = replicas.make("m3/a")
    await replicas.beat(third, second, wait_s=1.0)
    await replicas.beat(third, second, wait_s=LEASE_S - 0.9)  # the first one is dead
    assert (third.leads, second.leads) == (False, True)


async def test_when_all_are_young_one_leads_soon(replicas: Replicas) -> None:
    replicas.young |= {"m1/b", "m2/b"}
    await replicas.beat(replicas.make("m1/a"), replicas.make("m2/a"))
    one, two = replicas.make("m1/b"), replicas.make("m2/b")
    waited = 0.0
    while not (one.leads or two.leads):
        await replicas.beat(two, one, wait_s=BEAT_S)
        waited += BEAT_S
    assert YIELD_S <= waited <= YIELD_S + 2 * BEAT_S
    assert one.leads != two.leads


async def test_who_has_grown_up_takes_what_is_open(replicas: Replicas) -> None:
    replicas.young.add("m2/a")
    first, second = replicas.make("m1/a"), replicas.make("m2/a")
    await replicas.beat(first, second)
    replicas.young.clear()
    await replicas.beat(second, wait_s=LEASE_S + 0.1)
    assert second.leads
