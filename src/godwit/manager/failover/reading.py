"""One reading of the cluster: records at one revision, timed, and what the hosts say that they run.

The records come from the manager's cache, and are as fresh as a question to the store itself: the
store is asked for its revision, linearizably, and the cache has to have reached that one. So a
reading costs the store one small question, however many hosts and VMs there are.

Agents are asked which QEMUs they have after the records were read. That is asked of all hosts every
`agents_s`, and with each reading while something is out of order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import ValidationError

from godwit.cluster.facts import (
    Attempt,
    HostSeen,
    Memory,
    Process,
    Snapshot,
    StoreSeen,
    Timings,
    VmSeen,
)
from godwit.manager.cache import Renewed
from godwit.manager.snapshot import Snapshot as Records
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.ownership import OwnerState
from godwit.model.processes import HostProcesses
from godwit.model.vm import VmState
from godwit.store.errors import StoreError

Renewals = Mapping[str, Renewed]
AGENTS_S = 5.0
OWN_RESTART_S = 60.0
SHARE_S = 0.02
"""Seconds of that for each host, where there are many: a question costs the manager 2 ms, and all
of 1,000 hosts every 5 s took half of its time from everybody else."""
AT_ONCE = 64
"""Agents asked at one time: what else the manager does comes in between."""
ASK_S = 1.0
"""Seconds an agent may take to say what runs: one that is slower has not said it."""


class StoreLook(Protocol):
    """How the store stands, beside what it answered (`godwit.manager.failover.members`)."""

    async def look(self, *, asked_at: float, answered_at: float) -> StoreSeen:
        """Leader, term and members. StoreError when it does not answer."""
        ...


@dataclass
class Known:
    """What the acting side adds to a reading: fences under way and done, and refused starts."""

    attempts: Callable[[], tuple[Attempt, ...]] = tuple
    refused: Callable[[str], Mapping[str, str]] = lambda _vm: {}
    uncuttable: Callable[[Records], Mapping[str, str]] = lambda _records: {}
    unbound: Callable[[Records], Mapping[tuple[str, str], str]] = lambda _records: {}


class Reader:
    """Makes `godwit.cluster` snapshots for one manager. Belongs to its event loop."""

    def __init__(
        self, world: World, standing: StoreLook, known: Known, *, timings: Timings | None = None
    ) -> None:
        self._world = world
        self._standing = standing
        self._known = known
        self.timings = timings or Timings()
        self._asked_agents = float("-inf")
        self.restless = True
        """Something is out of order: the agents are asked with each reading."""

    async def listen(self) -> Snapshot:
        """The hosts' renewals, as the store has them now, and nothing of VMs.

        A store that does not answer in time is one without a leader.
        """
        found = await self._records()
        if found is None:
            return self._nothing()
        store, records, renewals = found
        hosts = {
            name: _host(records, name, renewals.get(name), {}, asked=False)
            for name in records.hosts
        }
        return Snapshot(store=store, hosts=hosts, timings=self.timings)

    async def read(self) -> Snapshot:
        """That, and what the hosts say that they run, when it is time to ask them."""
        found = await self._records()
        if found is None:
            return self._nothing()
        now = self._world.clock.monotonic()
        due = self.restless or now - self._asked_agents >= agents_s(len(found[1].hosts))
        said: dict[str, HostProcesses] = {}
        if due:
            self._asked_agents = now
            said = await self._processes(found[1])
        return self._assembled(*found, said, asked=due)

    def _assembled(
        self,
        store: StoreSeen,
        records: Records,
        renewals: Renewals,
        said: Mapping[str, HostProcesses],
        *,
        asked: bool,
    ) -> Snapshot:
        return assemble(
            records,
            renewals,
            store,
            said,
            known=self._known,
            timings=self.timings,
            wall=self._world.clock.realtime(),
            asked=asked,
        )

    def _nothing(self) -> Snapshot:
        now = self._world.clock.monotonic()
        missing = StoreSeen(leader=False, asked_at=now, answered_at=now)
        return Snapshot(store=missing, timings=self.timings)

    async def _records(self) -> tuple[StoreSeen, Records, Renewals] | None:
        world = self._world
        asked_at = world.clock.monotonic()
        try:
            async with asyncio.timeout(self.timings.gap_s):
                answer = await world.records.store.range(keys.LEADER, limit=1)
                answered_at = world.clock.monotonic()
                await world.cache.reached(answer.revision, timeout=self.timings.gap_s)
                store = await self._standing.look(asked_at=asked_at, answered_at=answered_at)
        except (TimeoutError, StoreError, GodwitError):
            return None
        return store, world.cache.snapshot, dict(world.cache.renewals)

    async def _processes(self, records: Records) -> dict[str, HostProcesses]:
        """Of each host that answers, also of one that the store says is away."""
        hosts = sorted(records.hosts.values(), key=lambda info: info.name)
        asking = asyncio.Semaphore(AT_ONCE)

        async def ask(name: str) -> HostProcesses | None:
            info = records.hosts[name]
            try:
                async with asking:
                    answer = await self._world.agents.call(
                        info, "GET", "/v1/processes", deadline_s=ASK_S
                    )
                return HostProcesses.model_validate(answer)
            except (GodwitError, ValidationError):
                return None

        found = await asyncio.gather(*(ask(info.name) for info in hosts))
        return {one.host: one for one in found if one is not None}


def agents_s(hosts: int) -> float:
    """Seconds between two rounds of questions to all agents while all is in order."""
    return max(AGENTS_S, SHARE_S * hosts)


def assemble(
    records: Records,
    renewals: Renewals,
    store: StoreSeen,
    said: Mapping[str, HostProcesses],
    *,
    known: Known,
    timings: Timings,
    wall: float,
    asked: bool,
    heard: Memory | None = None,
) -> Snapshot:
    """The decisions' view of what was read. Pure."""
    processes: dict[str, list[Process]] = {}
    for host, answer in said.items():
        for one in answer.processes:
            processes.setdefault(one.vm, []).append(
                Process(
                    host=host,
                    epoch=one.epoch,
                    state=one.state,
                    migration=one.migration,
                    driven=one.driven,
                    complete=one.complete,
                    released=one.released,
                    known=one.known,
                )
            )
    return Snapshot(
        store=store,
        hosts={
            name: _host(records, name, renewals.get(name), said, asked=asked)
            for name in records.hosts
        },
        vms={
            name: VmSeen(
                vm=vm,
                owner=records.owner(name),
                owner_revision=records.owner_revisions.get(name, 0),
                processes=tuple(processes.get(name, ())),
                ended=_ended(records, name, wall),
                restarts=records.restarts[name].times if name in records.restarts else (),
                refused=known.refused(name),
                busy=_busy(records, name),
            )
            for name, vm in records.vms.items()
        },
        volumes=records.volumes,
        uncuttable=known.uncuttable(records),
        unbound=known.unbound(records),
        attempts=known.attempts(),
        wall=wall,
        timings=timings,
        heard=heard or Memory(),
    )


def _host(
    records: Records,
    name: str,
    renewed: Renewed | None,
    said: Mapping[str, HostProcesses],
    *,
    asked: bool,
) -> HostSeen:
    info = records.hosts[name]
    return HostSeen(
        name=name,
        boot_id=info.boot_id,
        renewal=renewed.renewal if renewed else None,
        renewal_revision=renewed.revision if renewed else 0,
        agent=name in records.agents,
        answers=name in said if asked else name in records.agents,
        listed=name in said,
        mark=records.marks.get(name),
        confirmed_down=records.confirmed_down.get(name),
        power=name in records.powers,
        runs=frozenset(one.vm for one in said[name].processes) if name in said else frozenset(),
    )


def _busy(records: Records, name: str) -> bool:
    """A task works on the VM. One that only looks on while agents move it is none.

    It ends when the move does, so the end of a move may not wait for it.
    """
    bound = records.owner(name).migration is not None
    tasks = records.active_tasks(f"vm/{name}")
    return any(not bound or task.request.get("kind") != "vm.migrate" for task in tasks)


def _ended(records: Records, name: str, wall: float) -> Literal["", "guest", "user", "crash"]:
    """Why a VM stands still, as its last host said it at the epoch of the record.

    Its host restarts one whose QEMU died by itself; a host that has not done it does not.
    """
    status, owner = records.statuses.get(name), records.owner(name)
    if owner.state is not OwnerState.STOPPED or status is None or status.epoch != owner.epoch:
        return ""
    if status.state is VmState.FAILED:
        own = status.restarting and 0 <= wall - status.since < OWN_RESTART_S
        return "" if own else "crash"
    return "guest" if status.by_guest else "user"
