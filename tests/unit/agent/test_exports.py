"""What a host that lends nothing asks of the store."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from godwit.agent.exports import Exports
from godwit.model import keys
from godwit.store.memory import MemoryStore
from godwit.store.records import Records


class Watched(MemoryStore):
    """Notes what is watched and listed."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: list[str] = []
        self.listed: list[str] = []
        self.begun = asyncio.Event()

    def watch(self, prefix: str, *, start_revision: int | None = None) -> Any:
        self.watched.append(prefix)
        self.begun.set()
        return super().watch(prefix, start_revision=start_revision)

    async def range(self, prefix: str, **options: Any) -> Any:
        self.listed.append(prefix)
        return await super().range(prefix, **options)


class Clock:
    """Lets so many sleeps pass, then stands still and says so."""

    def __init__(self, sleeps: int) -> None:
        self.left = sleeps
        self.stands = asyncio.Event()

    async def sleep(self, _seconds: float) -> None:
        if self.left == 0:
            self.stands.set()
            await asyncio.Event().wait()
        self.left -= 1


class Exported:
    """An export as far as its owner's record is concerned."""

    def __init__(self) -> None:
        self.record = SimpleNamespace(lessee="h2", exports={"disk0": 3}, floors={"disk0": 3})
        self.alive = True
        self.gone = asyncio.Event()

    async def ended(self) -> None:
        await self.gone.wait()

    def hold_connections(self) -> None:
        return

    async def answers(self, *, timeout: float) -> bool:
        return True

    async def withdraw(self, _disk: str, *, epoch: int) -> None:
        return

    async def kill(self) -> None:
        self.alive = False
        self.gone.set()

    def discard(self) -> None:
        return


def exports_of(store: MemoryStore, clock: Clock) -> tuple[Exports, set[asyncio.Task[None]]]:
    tasks: set[asyncio.Task[None]] = set()

    def background(work: Any, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        tasks.add(task)
        return task

    desk: Any = SimpleNamespace(
        host="h1",
        records=Records(store),
        clock=clock,
        background=background,
        volumes=SimpleNamespace(wake=lambda: None),
    )
    return Exports(desk), tasks


async def ended(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_host_that_lends_nothing_watches_and_lists_no_vm() -> None:
    """Each change of any VM would go to every host, of which hardly one lends anything."""
    store, clock = Watched(), Clock(3)
    exports, tasks = exports_of(store, clock)
    tasks.add(asyncio.create_task(exports.serve()))
    async with asyncio.timeout(5):
        await clock.stands.wait()
    assert store.watched == []
    assert store.listed == []
    await ended(tasks)


async def test_what_is_lent_is_watched_by_itself_and_no_longer_than_that() -> None:
    store, clock = Watched(), Clock(0)
    exports, tasks = exports_of(store, clock)
    lent: Any = Exported()
    await store.put(keys.vm_owner("web"), b'{"host":"h2","epoch":3,"state":"running"}')
    exports._keep("web", lent)
    async with asyncio.timeout(5):
        await store.begun.wait()
        assert store.watched == [keys.vm_owner("web")]
        await store.put(keys.vm_owner("db"), b'{"host":"h9","epoch":3,"state":"running"}')
        await store.put(keys.vm_owner("web"), b'{"host":"h9","epoch":4,"state":"running"}')
        await lent.gone.wait()
        while running := {task for task in tasks if not task.done()}:
            await asyncio.wait(running)
    assert len(exports) == 0
