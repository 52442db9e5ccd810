"""What is under way and what came of it: a part of ``nouns``, mirrored with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from godwit.client.api import AsyncClient
    from godwit.client.waiting import OnProgress
    from godwit.model.migration import Migration
    from godwit.model.task import Task


class Migrations:
    """Moves of VMs: under way and past."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Migration]:
        """All moves the cluster remembers."""
        from godwit.model.migration import Migration

        return [Migration.model_validate(row) for row in await self._client.rows("migrations")]

    async def get(self, migration_id: str) -> Migration:
        """One move, with its progress or report. Errors: NotFound."""
        from godwit.model.migration import Migration

        return Migration.model_validate(await self._client.row("migrations", migration_id))

    async def cancel(self, migration_id: str) -> Task:
        """Call a move off. Errors: Refused after the owner has changed."""
        return await self._client.act("migration.cancel", id=migration_id)


class Tasks:
    """Pieces of work that somebody asked for."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Task]:
        """All tasks the cluster remembers."""
        from godwit.model.task import Task

        return [Task.model_validate(row) for row in await self._client.rows("tasks")]

    async def get(self, task_id: str) -> Task:
        """One task. Errors: NotFound."""
        from godwit.model.task import Task

        return Task.model_validate(await self._client.row("tasks", task_id))

    async def wait(self, task: Task | str, *, on_progress: OnProgress | None = None) -> Task:
        """The task when it has completed; what it failed with is raised."""
        return await self._client.wait(task, on_progress=on_progress)

    async def cancel(self, task_id: str) -> Task:
        """Ask a task to stop."""
        return await self._client.act("task.cancel", id=task_id)
