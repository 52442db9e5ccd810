"""How far apart two hosts' clocks are, so that a blackout can be measured across them.

Event times come from CLOCK_REALTIME of two machines. One exchange with four stamps (sent,
received, answered, back) bounds the offset without any assumption about the path:

    answered - back  <=  remote - local  <=  received - sent

The estimate is the middle of what all exchanges together allow. Should they contradict each
other (a clock was stepped meanwhile), the exchange with the shortest round trip decides alone.
All times are seconds; nothing here reads a clock by itself except through `now`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSample:
    """One exchange: `sent` and `back` by our clock, `received` and `answered` by the peer's."""

    sent: float
    received: float
    answered: float
    back: float

    @property
    def round_trip_s(self) -> float:
        """Time on the way, without the peer's own."""
        return (self.back - self.sent) - (self.answered - self.received)


@dataclass(frozen=True, slots=True)
class Offset:
    """Peer's clock minus ours, and how wrong that can be: peer = ours + offset_s ± error_s."""

    offset_s: float
    error_s: float

    def to_local(self, remote_s: float) -> float:
        """A time of the peer's clock in ours."""
        return remote_s - self.offset_s


def estimate_offset(samples: Sequence[ClockSample]) -> Offset:
    """The offset all samples allow. Errors: ValueError without a usable sample.

    A sample whose round trip is negative saw a clock step and is left out.
    """
    usable = [sample for sample in samples if sample.round_trip_s >= 0]
    if not usable:
        raise ValueError("no exchange is usable: the clocks were stepped during all of them")
    low = max(sample.answered - sample.back for sample in usable)
    high = min(sample.received - sample.sent for sample in usable)
    if low > high:
        best = min(usable, key=lambda sample: sample.round_trip_s)
        low, high = best.answered - best.back, best.received - best.sent
    return Offset(offset_s=(low + high) / 2, error_s=(high - low) / 2)


async def measure_offset(
    call: Callable[[], Awaitable[float]],
    *,
    exchanges: int = 8,
    now: Callable[[], float] = time.time,
) -> Offset:
    """Ask the peer for its CLOCK_REALTIME `exchanges` times over an open connection.

    `call` answers the peer's clock in seconds. The first exchange may open the connection;
    its long round trip does no harm. Errors: those of `call`; ValueError as above.
    """
    samples = []
    for _ in range(exchanges):
        sent = now()
        remote = await call()
        samples.append(ClockSample(sent=sent, received=remote, answered=remote, back=now()))
    return estimate_offset(samples)
