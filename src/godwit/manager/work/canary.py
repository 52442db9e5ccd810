"""A live validation: a small VM is made, started, moved live, drained from its host, and removed.

It goes the way of every VM: each step is a request of its own, with its own task and record, and
bound by the same checks and the same queue. It needs two hosts that are up and the demo image on
one of them; the VM has no disk and no network card, so nothing of anybody's is touched.

Its host is drained only when nobody else's VM is there, for a drain would move those, too. Failing
it over is for whoever does that: a step in ``STEPS`` gets the canary as it is and gives it back
with what was seen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.manager.work.drain_plan import vms_on
from godwit.manager.work.tasks import TaskRun
from godwit.manager.world import World
from godwit.model.errors import GodwitError, NotFound, OperationFailed, from_problem
from godwit.model.host import HostState
from godwit.model.requests import (
    CreateVm,
    DeleteVm,
    DrainHost,
    MigrateVm,
    Request,
    ReturnHost,
    StartVm,
    StopVm,
)
from godwit.model.task import Task, TaskState
from godwit.model.validation import Canary, CanaryStep

Say = Callable[[str], Awaitable[None]]
MEMORY_BYTES = 128 << 20
IMAGE = "demo"
_REMOVE_S = 60.0
_AGAIN_S = 2.0
_HELD_S = 30.0
_SETTLED_S = 10.0
_BLACKOUT_MS = 1000.0
"""Its own budget: the figure is what the report is about, so a long pause must be seen, not
refused."""


@dataclass(frozen=True)
class Stage:
    """What a step works with."""

    world: World
    run: TaskRun
    say: Say

    @property
    def mark(self) -> str:
        """What a host's mark says that is ours."""
        return f"validation {self.run.task.id}"

    async def carry_out(self, request: Request) -> Task:
        """A part of this task, to its end, whatever it is; refusals raise at once."""
        task = await self.run.submit(request)
        ended = partial(_ended, task_id=task.id)
        while (found := await self.world.cache.until(ended, timeout=_HELD_S)) is None:
            continue
        return found

    async def do(self, request: Request, what: str) -> tuple[Task, CanaryStep]:
        """Carry a request out as if somebody had asked. Raises what it failed with."""
        await self.say(what)
        began = self.world.clock.monotonic()
        task = await self.carry_out(request)
        if task.state is not TaskState.COMPLETED:
            error = from_problem(task.error) if task.error else OperationFailed(task.reason)
            raise type(error)(f"{what}: {error.message}", hint=error.hint)
        spent = self.world.clock.monotonic() - began
        return task, CanaryStep(name=what, seconds=spent, message=task.reason)


Step = Callable[[Stage, Canary], Awaitable[Canary]]


async def try_canary(world: World, run: TaskRun, say: Say) -> Canary:
    """The canary's whole life; what it could not do is in the result. It leaves no VM behind."""
    snapshot = world.cache.snapshot
    up = [name for name in sorted(snapshot.hosts) if _is_up(world, name)]
    canary = Canary(vm=f"canary-{run.task.id}"[:63])
    if len(up) < 2:
        return canary.but(not_done=("two hosts that are up are needed",))
    stage = Stage(world, run, say)
    canary = canary.but(source=up[0], destination=up[1])
    if run.adopted:  # what the manager before us had begun
        await _give_back(stage)
        await remove(stage, canary.vm)
    try:
        for step in STEPS:
            canary = await step(stage, canary)
    except NotFound as error:
        canary = canary.but(not_done=(f"{error.message}: {error.hint or 'it is needed'}",))
    except GodwitError as error:
        canary = canary.but(failure=f"the canary VM failed: {error.message}")
    left = await remove(stage, canary.vm)
    if left:
        said = f"{canary.vm} could not be removed: {left}"
        canary = canary.but(failure=f"{canary.failure}; {said}" if canary.failure else said)
    return canary


def _is_up(world: World, name: str) -> bool:
    snapshot = world.cache.snapshot
    state, _ = host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
    return state is HostState.UP and name not in snapshot.marks


async def _start(stage: Stage, canary: Canary) -> Canary:
    make = CreateVm(name=canary.vm, memory_bytes=MEMORY_BYTES, image=IMAGE, host=canary.source)
    _, made = await stage.do(make, "making a small VM")
    start = StartVm(name=canary.vm, host=canary.source)
    _, started = await stage.do(start, f"starting it on {canary.source}")
    return canary.but(steps=(*canary.steps, made, started))


async def _move(stage: Stage, canary: Canary) -> Canary:
    # The report is being made at this moment: a refusal for want of one would be circular.
    move = MigrateVm(
        name=canary.vm,
        to=canary.destination,
        max_blackout_ms=_BLACKOUT_MS,
        allow_unvalidated=True,
    )
    task, step = await stage.do(move, f"moving it live to {canary.destination}")
    there = partial(_is_there, vm=canary.vm, host=str(canary.destination))
    await stage.world.cache.until(there, timeout=_SETTLED_S)
    found = await stage.world.records.migration(str(task.progress.get("migration", "")))
    canary = canary.but(steps=(*canary.steps, step))
    if found is None:
        return canary
    report = found.value
    return canary.but(migration=report.id, blackout_ms=report.blackout_ms, total_ms=report.total_ms)


async def _drain(stage: Stage, canary: Canary) -> Canary:
    """Empty the host that it is on now, and let it take VMs again, whatever came of it."""
    host = str(canary.destination)
    snapshot = stage.world.cache.snapshot
    others = sorted(set(vms_on(snapshot, host)) - {canary.vm})
    why = f"{', '.join(others[:3])} would have moved, too" if others else ""
    if mark := snapshot.marks.get(host):
        why = f"{host} is {mark.state} already: {mark.reason}"
    if why:
        return canary.but(not_done=(*canary.not_done, f"a drain was not tried: {why}"))
    drain = DrainHost(name=host, reason=stage.mark, max_blackout_ms=_BLACKOUT_MS)
    try:
        _, step = await stage.do(drain, f"draining {host}")
    finally:
        await _give_back(stage)
    return canary.but(steps=(*canary.steps, step))


async def _give_back(stage: Stage) -> None:
    """Let the hosts take VMs again that we have marked, and nobody else's."""
    for host, mark in sorted(stage.world.cache.snapshot.marks.items()):
        if mark.reason == stage.mark:
            await _try(stage, ReturnHost(name=host))


async def _elsewhere(_stage: Stage, canary: Canary) -> Canary:
    """Say what was left out, so that nobody takes it for tried."""
    return canary.but(not_done=(*canary.not_done, "a failover was not tried"))


STEPS: tuple[Step, ...] = (_start, _move, _drain, _elsewhere)


async def remove(stage: Stage, vm: str) -> str:
    """Stop and forget a VM, whatever state it is in; why it is still there, or nothing.

    A VM that has just moved is busy until its source has cleaned up: that shows in the records, so
    it is tried again when they change.
    """
    world = stage.world
    until, why = world.clock.monotonic() + _REMOVE_S, ""
    while vm in world.cache.snapshot.vms:
        seen = world.cache.revision
        await _try(stage, StopVm(name=vm, force=True))  # refused when it is stopped already
        why = await _try(stage, DeleteVm(name=vm))
        if why and world.clock.monotonic() > until:
            return why
        if why:
            await world.cache.until(partial(_is_news, since=seen), timeout=_AGAIN_S)
    return ""


def _is_there(snapshot: Snapshot, *, vm: str, host: str) -> bool | None:
    """Its source has cleaned up, and its new host's agent has said that it runs there."""
    owner, status = snapshot.owner(vm), snapshot.statuses.get(vm)
    settled = owner.migration is None and status is not None and status.host == host
    return settled or None


def _ended(snapshot: Snapshot, *, task_id: str) -> Task | None:
    task = snapshot.tasks.get(task_id)
    return task if task is not None and task.state.final else None


def _is_news(snapshot: Snapshot, *, since: int) -> bool | None:
    return snapshot.revision > since or None


async def _try(stage: Stage, request: Request) -> str:
    """Carry a request out; what it failed with, empty when it did not."""
    try:
        task = await stage.carry_out(request)
    except GodwitError as error:
        return error.message
    return "" if task.state is TaskState.COMPLETED else task.reason
