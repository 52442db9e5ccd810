"""The event log: what happened, to what, in words. One ordered stream for every reader."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from godwit.model.base import Record


class Event(Record):
    """One line of the log. ``id`` sorts by time and resumes a stream."""

    id: str
    time: float
    kind: str  # dotted, for example vm.started, migration.stage, host.down
    subject: str  # kind/name, for example vm/web
    message: str
    level: Literal["info", "warning", "error"] = "info"
    data: dict[str, Any] = Field(default_factory=dict)
