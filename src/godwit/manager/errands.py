"""How one task asks for others: the same requests, the same records, as if a person had asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from godwit.model.errors import Unavailable

if TYPE_CHECKING:
    from godwit.model.requests import Request
    from godwit.model.task import Task

_HELD_S = 30.0


class TakesRequests(Protocol):
    """What `godwit.manager.work.tasks.Tasks` does."""

    async def submit(self, request: Request, *, by: str) -> Task:
        """Admit a request and begin."""
        ...

    async def ended(self, task_id: str, *, wait_s: float) -> Task:
        """The task, as soon as it is final or the time is up."""
        ...


class Errands:
    """Filled in by the manager's tasks when they exist; part of the `World`."""

    def __init__(self) -> None:
        self._tasks: TakesRequests | None = None

    def go_to(self, tasks: TakesRequests) -> None:
        """Say who takes requests."""
        self._tasks = tasks

    async def run(self, request: Request, *, by: str) -> Task:
        """Submit a request and wait for its end, whatever it is; refusals raise at once."""
        if self._tasks is None:
            raise Unavailable("nobody takes requests here", hint="ask the manager that leads")
        task = await self._tasks.submit(request, by=by)
        while not task.state.final:
            task = await self._tasks.ended(task.id, wait_s=_HELD_S)
        return task
