"""Turns in the queue are written down one after the other, whoever decides and on what records."""

from __future__ import annotations

import asyncio
from typing import Any

from godwit.manager.work.queueing import take_turn
from godwit.model import keys
from godwit.model.migration import Migration
from godwit.model.settings import ClusterSettings
from godwit.model.task import Task
from godwit.store.api import put
from godwit.store.records import encode


async def waiting_moves(api: Any, count: int) -> list[str]:
    """So many moves off host1, each carried by a task of a manager that is not this one."""
    store, found = api.store, []
    await store.put(keys.ROOT + "manager/members/m9.1", b"{}")
    for number in range(count):
        move = Migration(id=f"m-{number}", vm=f"vm{number}", source="host1", destination="host2")
        task = Task(
            id=f"t-{number}",
            request={"kind": "vm.migrate", "name": move.vm},
            subject=f"vm/{move.vm}",
            created_at=1.0,
            progress={"migration": move.id},
            worker="m9/1",
        )
        answer = await store.txn(
            [], [put(keys.migration(move.id), encode(move)), put(keys.task(task.id), encode(task))]
        )
        await api.manager.world.cache.reached(answer.revision)
        found.append(move.id)
    return found


async def turns_of(api: Any, moves: list[str]) -> list[str]:
    """Every move asks at one moment, on the same records; those that have their turn."""
    world = api.manager.world
    await asyncio.gather(*(take_turn(world, move) for move in moves))
    records = [await api.records.migration(move) for move in moves]
    return [one.value.id for one in records if one.value.turn_at is not None]


async def test_one_of_many_that_ask_at_once_has_its_turn(api: Any) -> None:
    moves = await waiting_moves(api, 6)
    first = await turns_of(api, moves)
    assert len(first) == 1
    assert await turns_of(api, moves) == first, "as long as it holds its hosts"


async def test_limits_are_settings_and_count_at_once(api: Any) -> None:
    moves = await waiting_moves(api, 6)
    revision = await api.records.cas(keys.CLUSTER, ClusterSettings(moves_per_host=3), 0)
    await api.manager.world.cache.reached(revision)
    for _ in moves:  # one transaction each: who meets another one asks again
        granted = await turns_of(api, moves)
    assert len(granted) == 3


async def test_whoever_decided_before_another_had_its_turn_decides_again(
    api: Any, monkeypatch: Any
) -> None:
    small, large = await waiting_moves(api, 2)
    records, cas = api.manager.world.records, api.manager.world.records.cas

    async def slowly(key: str, *words: Any, **more: Any) -> Any:
        if key == keys.migration(small):
            # Decided, not yet written: meanwhile a larger one comes to the same hosts and goes.
            monkeypatch.undo()
            found = await api.records.migration(large)
            forecast = found.value.forecast.but(bytes=1 << 40)
            revision = await cas(
                key.replace(small, large), found.value.but(forecast=forecast), found.revision
            )
            await api.manager.world.cache.reached(revision)
            assert await take_turn(api.manager.world, large)
        return await cas(key, *words, **more)

    monkeypatch.setattr(records, "cas", slowly)
    assert not await take_turn(api.manager.world, small)
    found = await api.records.migration(small)
    assert found.value.turn_at is None
