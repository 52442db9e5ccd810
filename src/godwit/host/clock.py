"""The real clock: time that also passes while the machine is suspended.

``monotonic`` is CLOCK_BOOTTIME, so a lease that ran out during a suspend is out afterwards.
"""

from __future__ import annotations

import asyncio
import time

# The event loop's timers stand still during a suspend.  Long sleeps look at the clock this often,
# so that after a suspend they end late by this much at most.
_LONGEST_NAP = 1.0


class RealClock:
    """Implements the ``Clock`` protocol on this machine's clocks."""

    def monotonic(self) -> float:
        """Seconds since boot; never goes back, counts suspended time."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def realtime(self) -> float:
        """Seconds since the epoch, as people's clocks show it; may be set back."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Return ``seconds`` from now, never earlier by :meth:`monotonic`."""
        until = self.monotonic() + seconds
        left = seconds
        while True:  # once at least, so that sleep(0) lets others run
            await asyncio.sleep(max(0.0, min(left, _LONGEST_NAP)))
            left = until - self.monotonic()
            if left <= 0:
                return
