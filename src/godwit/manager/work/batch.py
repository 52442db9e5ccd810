"""Parts of a larger piece of work: each a task of its own, a few at a time, watched to their ends.

A part is known by what it is about (a VM, a host). Its task's id is kept in the progress of the
whole, so that whoever adopts the whole finds its parts again; they go on by themselves meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.tasks import TaskRun
from godwit.manager.world import World
from godwit.model.errors import GodwitError
from godwit.model.requests import CancelMigration, Request
from godwit.model.task import Task, TaskState

WINDOW = 8
"""Parts under way at once: enough for the next one to be planned and to wait in line already."""
_STALLED_S = 10.0


class Batch:
    """The parts of one task. ``tasks`` maps what each is about to its last task's id."""

    def __init__(self, world: World, run: TaskRun) -> None:
        self._world = world
        self._run = run
        self.tasks: dict[str, str] = dict(run.task.progress.get("tasks") or {})
        self._called_off: set[str] = set()

    def task(self, snapshot: Snapshot, name: str) -> Task | None:
        """The last task of a part."""
        return snapshot.tasks.get(self.tasks.get(name, ""))

    def active(self, snapshot: Snapshot) -> tuple[Task, ...]:
        """The parts that have not ended."""
        found = (self.task(snapshot, name) for name in self.tasks)
        return tuple(task for task in found if task is not None and not task.state.final)

    def room(self, snapshot: Snapshot) -> int:
        """How many parts may begin now."""
        return max(0, WINDOW - len(self.active(snapshot)))

    async def begin(self, name: str, request: Request) -> str:
        """Begin a part; empty when it has begun, else why it is not admitted now."""
        try:
            task = await self._run.submit(request)
        except GodwitError as error:
            return error.message
        self.tasks[name] = task.id
        return ""

    async def call_off(self) -> None:
        """Ask every move among the parts to stop, and wait until all parts have ended.

        A move that is past its point of no return completes; what is no move is waited for.
        """
        while True:
            snapshot = self._world.cache.snapshot
            active = self.active(snapshot)
            if not active:
                return
            for task in active:
                move = task.progress.get("migration")
                if isinstance(move, str) and move not in self._called_off:
                    self._called_off.add(move)
                    await self._ask_to_stop(move)
            await self._world.cache.until(
                partial(self._changed, seen=_where(active)), timeout=_STALLED_S
            )

    def _changed(self, snapshot: Snapshot, *, seen: object) -> bool | None:
        return True if _where(self.active(snapshot)) != seen else None

    async def ended(self, names: Collection[str]) -> dict[str, Task]:
        """The last tasks of these parts, once all of them have ended."""
        every = await self._world.cache.until(partial(self._final, names=tuple(names)))
        return every or {}

    def _final(self, snapshot: Snapshot, *, names: tuple[str, ...]) -> dict[str, Task] | None:
        found = {name: self.task(snapshot, name) for name in names}
        ends = {name: task for name, task in found.items() if task and task.state.final}
        return ends if len(ends) == len(found) else None

    async def _ask_to_stop(self, move: str) -> None:
        try:
            await self._run.submit(CancelMigration(id=move))
        except GodwitError:
            return  # it has ended, or is about to: its own task tells


def _where(tasks: tuple[Task, ...]) -> Mapping[str, tuple[TaskState, object]]:
    return {task.id: (task.state, task.progress.get("migration")) for task in tasks}
