"""What the guard does about a move whose agent is gone: a pure table.

The rule behind it: a VM may stay dark for at most ``DARK_LIMIT_S`` because of our own daemons, and
nothing may be done that the owner record could contradict. At ``pre-switchover`` no hand-over has
been sent, so the VM may run on here. In ``device`` QEMU itself decides: cut the stream and it
either has completed or runs again by itself. After ``completed`` only the record may speak.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

AGENT_SILENCE_S = 2.0
"""Seconds without a beat after which the agent counts as hung."""

DEVICE_PATIENCE_S = 2.0
"""Seconds a source may stay in ``device`` without an agent before its stream is cut."""

DARK_LIMIT_S = 5.0


class Act(StrEnum):
    """What to do on the spare monitor."""

    NOTHING = "nothing"
    WAIT = "wait"  # look again soon
    CANCEL = "cancel"
    YANK = "yank"


@dataclass(frozen=True)
class Watch:
    """An armed VM as the guard sees it. Times are seconds of one monotonic clock."""

    role: str  # "source" or "destination"
    status: str  # the last migration status QEMU announced; "" = none yet
    status_since: float


@dataclass(frozen=True)
class Decision:
    """The act, and the sentence that goes to the log."""

    act: Act
    sentence: str = ""


def decide(watch: Watch, *, agent_gone_for: float, now: float) -> Decision:
    """``agent_gone_for`` is 0 while the agent lives and beats."""
    if agent_gone_for <= 0 or watch.role != "source":
        return Decision(Act.NOTHING)
    if watch.status == "pre-switchover":
        return Decision(
            Act.CANCEL,
            f"the agent is gone for {agent_gone_for:.1f} s and the VM is held before its "
            "switch-over: cancelled, it runs on here",
        )
    if watch.status == "device":
        dark = now - watch.status_since
        if dark < DEVICE_PATIENCE_S:
            return Decision(Act.WAIT)
        return Decision(
            Act.YANK,
            f"the agent is gone and the last pages are on their way for {dark:.1f} s: "
            "the stream was cut",
        )
    return Decision(Act.NOTHING)
