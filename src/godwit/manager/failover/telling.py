"""Notes and alarms of the decisions, each told once while it does not change."""

from __future__ import annotations

from godwit.cluster.steps import Alarm, Note, Unplaceable

KEPT_S = 60.0
"""A reading that did not ask the hosts says nothing of what they would tell: a word is new again
only when nothing has repeated it for so long."""


class Told:
    """What people know already."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def news(
        self, steps: tuple[Alarm | Note | Unplaceable, ...], now: float
    ) -> list[Alarm | Note | Unplaceable]:
        """Those that were not told yet."""
        self._last = {key: at for key, at in self._last.items() if now - at < KEPT_S}
        found = [step for step in steps if step.key not in self._last]
        self._last.update({step.key: now for step in steps})
        return found


def words(step: Alarm | Note | Unplaceable) -> tuple[str, str, str]:
    """Kind, subject and sentence of the event that tells it."""
    if isinstance(step, Unplaceable):
        return "vm.unplaceable", f"vm/{step.vm}", f"{step.vm} has no host to go to: {step.why}"
    kind = "vm.alarm" if isinstance(step, Alarm) else "vm.waits"
    return kind, f"vm/{step.subject}", f"{step.subject}: {step.why}"
