"""A move of a running VM: six stages, progress, plan, forecast and report."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Record


class Stage(StrEnum):
    """The six stages every user sees, always in this order and under these names."""

    SETUP = "setup"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    HANDOVER = "handover"
    RESUME = "resume"
    ANNOUNCE = "announce"


STAGES: tuple[Stage, ...] = tuple(Stage)


class Outcome(StrEnum):
    """How a move ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNKNOWN = "unknown"


class MoveState(StrEnum):
    """Where a move stands; the last four are the outcomes."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNKNOWN = "unknown"

    @property
    def final(self) -> bool:
        """True when nothing more will happen."""
        return self not in (MoveState.WAITING, MoveState.RUNNING)


class MoveLimits(Record):
    """What matters to the user; the defaults are gentle."""

    max_blackout_ms: float = Field(default=300.0, gt=0)
    deadline_s: float = Field(default=600.0, gt=0)
    allow_postcopy: bool = False
    allow_throttle: bool = False


class StageTime(Record):
    """A stage of the report; times are relative to the acceptance of the request."""

    name: Stage
    start_s: float
    duration_ms: float


class Pass(Record):
    """One pass over the guest's memory."""

    number: int
    bytes: int
    duration_ms: float
    dirty_bytes_per_s: float


class Forecast(Record):
    """What is expected, from the dirty rate and the link; None = not known."""

    converges: bool | None = None
    total_ms: float | None = None
    blackout_ms: float | None = None
    bytes: int | None = None
    dirty_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    basis: str = ""  # what the figures rest on, in words


class Check(Record):
    """One check of the plan; a failed one says what to do."""

    name: str
    result: Literal["pass", "warn", "fail"]
    message: str
    hint: str = ""


class Candidate(Record):
    """A host the VM might go to, and every reason against it."""

    host: Name
    eligible: bool
    reasons: tuple[str, ...] = ()


class MovePlan(Record):
    """The answer to ``--dry-run``: no side effects, every failed check at once."""

    vm: Name
    destination: Name | None
    checks: tuple[Check, ...] = ()
    forecast: Forecast = Forecast()
    candidates: tuple[Candidate, ...] = ()
    strategy: str = "precopy"
    reason: str = ""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that forbid the move."""
        return tuple(check for check in self.checks if check.result == "fail")


class Progress(Record):
    """Live view of a move. ``percent`` and ``stage`` never run backwards."""

    stage: Stage = Stage.SETUP
    percent: float = 0.0
    bytes_transferred: int = 0
    bytes_remaining: int | None = None
    dirty_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    expected_blackout_ms: float | None = None
    pass_number: int = 0
    throttle_percent: int = 0
    sentence: str = ""


class Migration(Record):
    """A move as kept in the store and shown by ``migration show``: request, progress, report.

    ``total_ms`` counts from accepting the request to the VM running and the source released;
    ``blackout_ms`` is the source's STOP to the destination's RESUME by QEMU's own stamps,
    corrected by the measured clock offset, None when there was no switchover.
    """

    id: str
    vm: Name
    source: Name
    destination: Name
    method: Literal["live", "quick"] = "live"
    strategy: str = "precopy"
    state: MoveState = MoveState.WAITING
    outcome: Outcome | None = None
    reason: str = ""
    limits: MoveLimits = MoveLimits()
    accepted_at: float = 0.0
    turn_at: float | None = None  # when the queue let it go; None while it waits in line
    ended_at: float | None = None
    progress: Progress = Progress()
    stages: tuple[StageTime, ...] = ()
    passes: tuple[Pass, ...] = ()
    bytes_transferred: int = 0
    total_ms: float | None = None
    blackout_ms: float | None = None
    clock_error_ms: float | None = None
    forecast: Forecast = Forecast()
    checks: tuple[Check, ...] = ()
    log: tuple[str, ...] = ()  # what was decided and why, one sentence each
