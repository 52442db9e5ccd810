"""What hosts have free right now: their agents are asked when somebody wants to know it.

A few hosts are all asked each time. Of many, a few are asked at once, those with the most memory
unpromised first, and what they said is used again for a moment that grows with their number: so
the calls per second that lists and placements cause are bounded, whatever the size of the cluster.
Whoever asks waits for a bounded time; a host that has not answered by then is asked on, for the
next one who wants to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from typing import Final

from godwit.manager.agents import Agents
from godwit.manager.snapshot import Snapshot
from godwit.model.errors import GodwitError
from godwit.model.host import HostInfo

AT_ONCE = 32  # agents being asked
ANSWER_S = 1.0  # how long an agent has, from when it is asked
LIST_WAIT_S = 0.4
LIST_FRESH_S = 2.0  # how old an answer may be in a list, of a small cluster ...
LIST_CALLS_PER_S = 50  # ... and of a large one, so many hosts are asked a second
PLACE_WAIT_S = 1.0
PLACE_CALLS_PER_S = 500  # a placement decides on newer answers than a list
NEVER: Final[tuple[float, int | None]] = (float("-inf"), None)


class FreeMemory:
    """Bytes free by host. ``now`` is the monotonic clock."""

    def __init__(self, agents: Agents, *, now: Callable[[], float]) -> None:
        self._agents = agents
        self._now = now
        self._said: dict[str, tuple[float, int | None]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def for_list(
        self, snapshot: Snapshot, hosts: Collection[HostInfo] | None = None
    ) -> dict[str, int | None]:
        """For people to see, of all hosts or these; without an answer just now an earlier one."""
        asked = snapshot.hosts.values() if hosts is None else hosts
        fresh_s = LIST_FRESH_S + len(asked) / LIST_CALLS_PER_S
        await self._ask(snapshot, asked, fresh_s=fresh_s, wait_s=LIST_WAIT_S)
        return self._answers(snapshot, asked, fresh_s=10 * fresh_s)

    async def for_placement(self, snapshot: Snapshot) -> dict[str, int | None]:
        """To decide on; None = no answer in time, so nothing is placed there."""
        hosts = snapshot.hosts.values()
        fresh_s = len(hosts) / PLACE_CALLS_PER_S if len(hosts) > AT_ONCE else 0.0
        await self._ask(snapshot, hosts, fresh_s=fresh_s, wait_s=PLACE_WAIT_S)
        return self._answers(snapshot, hosts, fresh_s=fresh_s + PLACE_WAIT_S)

    async def stop(self) -> None:
        """Ask nobody any more."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _answers(
        self, snapshot: Snapshot, hosts: Iterable[HostInfo], *, fresh_s: float
    ) -> dict[str, int | None]:
        since = self._now() - fresh_s
        found: dict[str, int | None] = {}
        for info in hosts:
            if info.name in snapshot.agents:
                at, free = self._said.get(info.name, NEVER)
                found[info.name] = free if at >= since else None
        return found

    async def _ask(
        self, snapshot: Snapshot, hosts: Iterable[HostInfo], *, fresh_s: float, wait_s: float
    ) -> None:
        since = self._now() - fresh_s
        for gone in self._said.keys() - snapshot.hosts.keys():
            del self._said[gone]
        due = [
            info
            for info in hosts
            if info.name in snapshot.agents and self._said.get(info.name, NEVER)[0] <= since
        ]
        if len(due) > AT_ONCE:
            due.sort(key=lambda info: -unpromised(snapshot, info))
        tasks = [self._asking.get(info.name) or self._begin(info) for info in due]
        if tasks:
            await asyncio.wait(tasks, timeout=wait_s)

    def _begin(self, info: HostInfo) -> asyncio.Task[None]:
        name = info.name
        task = asyncio.create_task(self._ask_one(info), name=f"free memory: {name}")
        self._asking[name] = task
        task.add_done_callback(lambda _: self._asking.pop(name, None))
        return task

    async def _ask_one(self, info: HostInfo) -> None:
        async with self._gate:
            try:
                answer = await self._agents.call(info, "GET", "/v1/capacity", deadline_s=ANSWER_S)
            except GodwitError:
                answer = None
        free = answer.get("memory_free_bytes") if isinstance(answer, dict) else None
        self._said[info.name] = (
            self._now(),
            int(free) if isinstance(free, int | float) else None,
        )


def unpromised(snapshot: Snapshot, info: HostInfo) -> int:
    """Bytes of a host's memory that no VM there, or on its way there, may take. Pure."""
    vms = (*snapshot.running_on(info.name), *snapshot.arriving_at(info.name))
    return info.memory_bytes - sum(vm.memory_bytes for vm in vms)
