"""A task: a piece of work somebody asked for, with who, why, how far, and what came of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from godwit.model.base import Record


class TaskState(StrEnum):
    """A task ends in exactly one of the last four."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def final(self) -> bool:
        """True when nothing more will happen."""
        return self not in (TaskState.WAITING, TaskState.RUNNING)


class Task(Record):
    """A request on its way. ``request`` is the typed request as JSON, with its ``kind``."""

    id: str
    request: dict[str, Any]
    subject: str
    state: TaskState = TaskState.WAITING
    reason: str = ""  # the sentence that explains the present state
    by: str = ""  # who asked, and through what
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    progress: dict[str, Any] = Field(default_factory=dict)
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None  # problem+json fields
    worker: str = ""  # the manager replica that carries it out
