"""What the steps of a live validation work with: requests that are carried out one by one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.tasks import TaskRun
from godwit.manager.world import World
from godwit.model.errors import GodwitError, OperationFailed, from_problem
from godwit.model.requests import MigrateVm, Request
from godwit.model.task import Task, TaskState
from godwit.model.validation import Canary, CanaryStep

Say = Callable[[str], Awaitable[None]]
BLACKOUT_MS = 1000.0
"""Its own budget: the figure is what the report is about, so a long pause must be seen, not
refused."""
SETTLED_S = 10.0
_HELD_S = 30.0


@dataclass(frozen=True)
class Stage:
    """What a step works with."""

    world: World
    run: TaskRun
    say: Say
    failover: str = ""
    """The host that is to lose its power, empty for none."""

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

    async def try_to(self, request: Request) -> str:
        """Carry a request out; what it failed with, empty when it did not."""
        try:
            task = await self.carry_out(request)
        except GodwitError as error:
            return error.message
        return "" if task.state is TaskState.COMPLETED else task.reason

    async def move(self, vm: str, host: str) -> tuple[Task, CanaryStep]:
        """Live, and until its source has cleaned up."""
        # The report is being made at this moment: a refusal for want of one would be circular.
        request = MigrateVm(name=vm, to=host, max_blackout_ms=BLACKOUT_MS, allow_unvalidated=True)
        task, step = await self.do(request, f"moving it live to {host}")
        there = partial(_is_there, vm=vm, host=host)
        await self.world.cache.until(there, timeout=SETTLED_S)
        return task, step


Step = Callable[[Stage, Canary], Awaitable[Canary]]


def _is_there(snapshot: Snapshot, *, vm: str, host: str) -> bool | None:
    """Its source has cleaned up, and its new host's agent has said that it runs there."""
    owner, status = snapshot.owner(vm), snapshot.statuses.get(vm)
    settled = owner.migration is None and status is not None and status.host == host
    return settled or None


def _ended(snapshot: Snapshot, *, task_id: str) -> Task | None:
    task = snapshot.tasks.get(task_id)
    return task if task is not None and task.state.final else None
