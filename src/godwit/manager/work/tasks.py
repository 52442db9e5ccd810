"""Tasks: one typed request each, carried out in the background, every step in the record.

    waiting -> running -> completed | failed | cancelled | unknown

A task's record is written only by its worker, by compare-and-swap; a worker that finds it changed
has been replaced and stops. A manager that ends leaves its tasks as they are: the next one adopts
them, and the records of the VM or the move decide how they go on (see ``work.actions``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import admit
from godwit.manager.world import World, as_godwit_error, new_id
from godwit.model import keys
from godwit.model.errors import (
    Cancelled,
    GodwitError,
    InvalidRequest,
    OperationFailed,
    OutcomeUnknown,
)
from godwit.model.requests import Request, parse_request
from godwit.model.task import Task, TaskState
from godwit.store.api import Compare, Op
from godwit.store.errors import StoreOutcomeUnknown, StoreUnavailable
from godwit.store.records import CasFailed

_LOG = logging.getLogger("godwit.manager")
_RETRY_S = 0.5


Submit = Callable[[Request, str], Awaitable[Task]]


class TaskLost(Exception):
    """Another worker has taken the task over."""


@dataclass(frozen=True)
class Done:
    """A good end: the sentence and what came of it."""

    reason: str
    result: dict[str, Any] = field(default_factory=dict)


class TaskRun:
    """A task in the hands of its worker."""

    def __init__(
        self,
        world: World,
        task: Task,
        revision: int,
        *,
        submit: Submit | None = None,
        adopted: bool = False,
    ) -> None:
        self._world = world
        self._submit = submit
        self.task = task
        self.revision = revision
        self.adopted = adopted

    @property
    def request(self) -> Request:
        """What was asked for."""
        return parse_request(self.task.request)

    async def submit(self, request: Request) -> Task:
        """Begin a task of its own for a part of this one. Refusals raise and leave nothing."""
        if self._submit is None:
            raise OperationFailed("this task cannot have parts", hint="it was begun by itself")
        kind = self.task.request.get("kind", "task")
        return await self._submit(request, f"{self.task.by} ({kind} {self.task.id})")

    async def say(
        self,
        reason: str,
        *,
        state: TaskState = TaskState.RUNNING,
        progress: dict[str, Any] | None = None,
        compare: Sequence[Compare] = (),
        also: Sequence[Op] = (),
    ) -> None:
        """Record where it stands and why; ``also`` is written in the same transaction.

        CasFailed when one of ``compare`` does not hold, TaskLost when it is no longer ours.
        """
        task = self.task.but(
            state=state, reason=reason, progress={**self.task.progress, **(progress or {})}
        )
        _LOG.info("task %s: %s", task.id, reason)
        try:
            self.revision = await self._world.records.cas(
                keys.task(task.id), task, self.revision, compare=compare, also=also
            )
        except CasFailed:
            if await self._still_ours():
                raise
            raise TaskLost(task.id) from None
        self.task = task

    async def finish(
        self,
        state: TaskState,
        reason: str,
        *,
        result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> None:
        """Write the end. A store that is away is waited for: an end must not be lost."""
        task = self.task.but(
            state=state,
            reason=reason,
            result=result,
            error=error,
            ended_at=self._world.clock.realtime(),
        )
        _LOG.info("task %s: %s: %s", task.id, state.value, reason)
        while True:
            try:
                self.revision = await self._world.records.cas(
                    keys.task(task.id), task, self.revision
                )
            except (StoreUnavailable, StoreOutcomeUnknown):
                await self._world.clock.sleep(_RETRY_S)
            except CasFailed:
                found = await self._world.records.task(task.id)
                # Our own write, whose answer was lost; anything else is another worker's.
                if found is None or found.value != task:
                    raise TaskLost(task.id) from None
                return
            else:
                self.task = task
                return

    async def _still_ours(self) -> bool:
        found = await self._world.records.task(self.task.id)
        return found is not None and found.revision == self.revision


Action = Callable[[World, TaskRun], Awaitable[Done]]


class Tasks:
    """Takes requests in, runs them, and picks up what other managers left."""

    def __init__(self, world: World, act: Action) -> None:
        self._world = world
        self._act = act
        self._running: dict[str, asyncio.Task[None]] = {}
        self._admission = asyncio.Lock()
        self._foreign: set[str] = set()  # asked for by a newer manager, in words we do not know

    async def submit(self, request: Request, *, by: str) -> Task:
        """Admit a request and begin. Refusals raise and leave nothing behind."""
        world = self._world
        now = world.clock.realtime()
        # One at a time, each seeing the one before: two moves of one VM cannot both be admitted.
        async with self._admission:
            subject = admit(world.cache.snapshot, request)
            task = Task(
                id=new_id("t", now),
                request=request.model_dump(mode="json"),
                subject=subject,
                state=TaskState.RUNNING,
                reason="accepted",
                by=by,
                created_at=now,
                started_at=now,
                worker=world.worker,
            )
            revision = await self._create(task)
            await world.cache.reached(revision)
        self._start(TaskRun(world, task, revision, submit=self._part))
        return task

    async def _part(self, request: Request, by: str) -> Task:
        return await self.submit(request, by=by)

    async def _create(self, task: Task) -> int:
        try:
            return await self._world.records.cas(keys.task(task.id), task, 0)
        except StoreOutcomeUnknown:
            found = await self._world.records.task(task.id)
            if found is None:
                raise
            return found.revision

    async def ended(self, task_id: str, *, wait_s: float) -> Task:
        """The task, as soon as it is final or ``wait_s`` is over.

        Seen through the cache: once it is final here, lists show everything it did.
        """

        def final(snapshot: Snapshot) -> Task | None:
            task = snapshot.tasks.get(task_id)
            return task if task is not None and task.state.final else None

        cache = self._world.cache
        found = await cache.until(final, timeout=wait_s)
        return found or cache.snapshot.tasks[task_id]

    async def adopt_orphans(self) -> list[str]:
        """Take over every unfinished task whose worker is no longer alive; their ids."""
        snapshot = self._world.cache.snapshot
        adopted = []
        for task in orphans(snapshot, me=self._world.worker, running=set(self._running)):
            if not self._understood(task):
                continue
            found = await self._world.records.task(task.id)
            if found is None or found.value.state.final or found.value.worker != task.worker:
                continue
            mine = found.value.but(worker=self._world.worker)
            try:
                revision = await self._world.records.cas(keys.task(task.id), mine, found.revision)
            except CasFailed:
                continue
            await self._world.cache.reached(revision)
            run = TaskRun(self._world, mine, revision, submit=self._part, adopted=True)
            self._start(run)
            adopted.append(task.id)
        return adopted

    def _understood(self, task: Task) -> bool:
        """Whether this version knows what the task asks for. If not, it is left to one that does:
        failing it would be a guess about what has been done."""
        try:
            parse_request(task.request)
        except InvalidRequest as error:
            if task.id not in self._foreign:
                self._foreign.add(task.id)
                _LOG.warning("task %s is left to a newer manager: %s", task.id, error.message)
            return False
        return True

    async def stop(self) -> None:
        """Let go of all tasks; their records stay unfinished for the next manager."""
        running = list(self._running.values())
        for task in running:
            task.cancel("the manager ends")
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self, run: TaskRun) -> None:
        name = run.task.id
        self._running[name] = asyncio.create_task(self._carry_out(run), name=f"task {name}")
        self._running[name].add_done_callback(lambda _: self._running.pop(name, None))

    async def _carry_out(self, run: TaskRun) -> None:
        try:
            try:
                done = await self._act(self._world, run)
            except TaskLost:
                raise
            except Exception as error:
                await self._fail(run, error)
            else:
                await run.finish(TaskState.COMPLETED, done.reason, result=done.result)
        except TaskLost:
            _LOG.warning("task %s: another manager has taken it over", run.task.id)
        except Exception:
            # The record stays unfinished; whoever leads adopts it.
            _LOG.exception("task %s: cannot be brought to an end", run.task.id)

    async def _fail(self, run: TaskRun, error: Exception) -> None:
        meant = as_godwit_error(error)
        if meant is None:
            _LOG.error("task %s failed unexpectedly", run.task.id, exc_info=error)
            meant = OperationFailed(
                f"the manager failed on this request: {type(error).__name__}: {error}",
                hint="its log says more",
            )
        await run.finish(end_state(meant), meant.message, error=meant.to_problem())


def end_state(error: GodwitError) -> TaskState:
    """How a task ends that met this error."""
    if isinstance(error, Cancelled):
        return TaskState.CANCELLED
    return TaskState.UNKNOWN if isinstance(error, OutcomeUnknown) else TaskState.FAILED


def orphans(snapshot: Snapshot, *, me: str, running: set[str]) -> list[Task]:
    """Unfinished tasks that nobody works on: pure. Workers are ``NAME/NONCE``.

    A worker of our own name with another nonce is an earlier life of ours, so it is dead even
    while its lease has not run out.
    """
    name = me.partition("/")[0]
    found = []
    for task in snapshot.tasks.values():
        if task.state.final or task.id in running:
            continue
        own = task.worker.partition("/")[0] == name
        if own or task.worker.replace("/", ".") not in snapshot.members:
            found.append(task)
    return sorted(found, key=lambda task: task.id)
