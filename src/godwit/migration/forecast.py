"""What a move will take: total time and blackout, before it is made. Pure.

Each pre-copy pass must send what was dirtied during the pass before, so the bytes of pass n+1 are
``dirty rate x duration of pass n``: a geometric series with ratio ``r = dirty rate / link``. It
ends when what is left fits into the downtime limit. The blackout is that remainder on the link
plus an overhead (device state, commit, owner swap) learned from past moves. What else a move takes
(set-up before, release and goodbye after) is learned from them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from godwit.model.migration import Forecast, Migration, MoveLimits

DEFAULT_OVERHEAD_MS = 60.0
"""Device state and hand-over under emulation before any move of this VM was measured."""
DEFAULT_REST_MS = 250.0
"""Set-up, release and goodbye before any move of this VM was measured."""
MAX_PASSES = 60


@dataclass(frozen=True)
class Load:
    """What is known of a running VM."""

    used_bytes: int  # resident guest memory; zero pages cost nothing
    dirty_bytes_per_s: float | None  # page-sampled, None = not sampled yet
    link_bytes_per_s: float | None
    overhead_ms: Sequence[float] = ()  # blackout minus memory time of past moves
    rest_ms: Sequence[float] = ()  # all of past moves but memory and blackout
    first_limit_ms: float = 12.0


def rest_ms(past: Migration, link_bytes_per_s: float) -> float | None:
    """What a past move took beside its bytes on this link and its blackout; None: not measured.

    Milliseconds, without those in which it waited for its turn. A guest that could not fill the
    link has that in it, as its next move will.
    """
    if past.total_ms is None or past.blackout_ms is None:
        return None
    waited = 0.0 if past.turn_at is None else (past.turn_at - past.accepted_at) * 1000
    on_the_wire = past.bytes_transferred / link_bytes_per_s * 1000
    return max(0.0, past.total_ms - max(0.0, waited) - past.blackout_ms - on_the_wire)


def predict(load: Load, limits: MoveLimits) -> Forecast:
    """The forecast; unknown inputs leave unknown outputs, said in ``basis``."""
    if not load.link_bytes_per_s:
        return Forecast(basis="the speed of the migration link is not known yet")
    link = load.link_bytes_per_s
    dirty = load.dirty_bytes_per_s or 0.0
    overhead = median(load.overhead_ms) if load.overhead_ms else DEFAULT_OVERHEAD_MS
    rest = median(load.rest_ms) if load.rest_ms else DEFAULT_REST_MS
    budget_s = max(0.0, limits.max_blackout_ms - overhead) / 1000
    fits_s = min(load.first_limit_ms / 1000, budget_s) if dirty < link else budget_s

    left, sent, passes = float(load.used_bytes), 0.0, 0
    while left / link > fits_s and passes < MAX_PASSES:
        sent += left
        left = min(float(load.used_bytes), dirty * (left / link))
        passes += 1
        if dirty >= link:
            break
    converges = left / link <= max(fits_s, budget_s)
    basis = "sampled dirty rate" if load.dirty_bytes_per_s is not None else "no dirty rate yet"
    basis += f", {len(load.overhead_ms)} past moves"
    common = {
        "dirty_bytes_per_s": load.dirty_bytes_per_s,
        "link_bytes_per_s": link,
        "basis": basis,
    }
    if not converges:
        return Forecast(converges=False, **common)
    blackout = left / link * 1000 + overhead
    return Forecast(
        converges=True,
        bytes=int(sent + left),
        total_ms=round(rest + sent / link * 1000 + blackout, 1),
        blackout_ms=round(blackout, 1),
        **common,
    )
