"""The world behind a small interface, with a real and a simulated twin."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Time as the decisions see it; the real one is ``godwit.host.clock``."""

    def monotonic(self) -> float:
        """Seconds that never go back and count suspended time (CLOCK_BOOTTIME)."""
        ...

    def realtime(self) -> float:
        """Seconds since the epoch; only for showing and for comparing hosts' event stamps."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let the given seconds pass."""
        ...
