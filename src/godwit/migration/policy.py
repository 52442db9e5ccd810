"""What to do while memory is copied: a pure function of the samples seen so far.

The contract is the blackout budget. A guest that writes slowly needs no decision at all: the
downtime limit starts small and QEMU switches over when what is left fits into it. Only when the
passes stop shrinking does the policy act, in this order and only as far as the user allowed:

1. raise the downtime limit, stepwise, never above what the budget leaves for memory;
2. throttle the vCPUs (CPU quota), tightened each time the passes do not shrink;
3. finish by post-copy;
4. give up, and say why. A stall never lasts longer than ``STALL_LIMIT_S``.

A stall is: a pass did not begin with less than ``MARGIN`` of what the best one began with, and
``WINDOW_S`` have gone since that one. What remains saw-tooths within a pass, and a pass may take
minutes, so only the largest values of passes are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from godwit.model.migration import MoveLimits
from godwit.model.units import format_duration, format_size

FIRST_LIMIT_MS = 20.0
"""Downtime limit to start with: small, so that an idle guest's pause carries almost no memory."""
RESERVE_MS = 80.0
"""Part of the budget that memory may not use while no move from here was measured: device state,
backlog and hand-over under emulation take 40-60 ms, and a budget is kept, not met on average."""
WINDOW_S = 1.5
MARGIN = 0.9
STALL_LIMIT_S = 20.0
"""Seconds without any allowed means having helped before the move is given up."""
LONGEST_STALL_S = 55.0
"""The same when one pass takes longer than that: then what was done last is not waited for."""
FREEZE_S = 5.0
"""Seconds without a single byte moving before link or peer count as frozen."""
MIN_QUOTA = 0.02
HOPELESS = 0.9
"""Share of the link above which no longer pause helps; post-copy then starts at once."""


@dataclass(frozen=True)
class Sample:
    """One reading of ``query-migrate`` (bytes, seconds on the local monotonic clock)."""

    at: float
    transferred: int
    remaining: int
    dirty_bytes_per_s: float
    link_bytes_per_s: float
    pass_number: int
    postcopy_active: bool = False


@dataclass(frozen=True)
class Knobs:
    """What the policy has set so far."""

    limit_ms: float
    quota: float = 1.0  # share of a core each vCPU may use
    postcopy: bool = False


@dataclass(frozen=True)
class Decision:
    """What to do now, and the sentence that explains it. Empty fields mean: leave it."""

    sentence: str = ""
    limit_ms: float | None = None
    quota: float | None = None
    postcopy: bool = False
    abort: bool = False


NOTHING = Decision()


@dataclass(frozen=True)
class Progressing:
    """What the policy remembers between samples."""

    knobs: Knobs
    pass_number: int = 0
    peak: float = 0.0  # the most that remained in the current pass
    best_peak: float = float("inf")
    best_pass: int = 0
    best_at: float = 0.0
    stalled_since: float | None = None
    moved_at: float = 0.0
    moved_bytes: int = -1
    last_action_pass: int = 0


def overhead(past_ms: Sequence[float]) -> float:
    """Milliseconds of a pause that are not memory: what three in four past moves kept below."""
    if not past_ms:
        return RESERVE_MS
    return sorted(past_ms)[len(past_ms) * 3 // 4]


def largest_limit_ms(limits: MoveLimits, *, overhead_ms: float) -> float:
    """The part of the blackout budget that memory may use; the rest is device state and us."""
    rest = max(FIRST_LIMIT_MS / 2, limits.max_blackout_ms - overhead_ms)
    return min(limits.max_blackout_ms, rest)


def start(limits: MoveLimits, *, overhead_ms: float, now: float) -> Progressing:
    """The state before the first sample."""
    first = min(FIRST_LIMIT_MS, largest_limit_ms(limits, overhead_ms=overhead_ms))
    return Progressing(knobs=Knobs(limit_ms=first), best_at=now, moved_at=now)


def resume(state: Progressing, at: float) -> Progressing:
    """The copy was held up on purpose until now: neither a stall nor a frozen link."""
    return _replace(state, best_at=at, moved_at=at)


def decide(
    state: Progressing, sample: Sample, limits: MoveLimits, *, overhead_ms: float
) -> tuple[Progressing, Decision]:
    """Take one sample into account: the new memory and what to do now."""
    state = _note(state, sample)
    if sample.at - state.moved_at > FREEZE_S:
        return state, Decision(
            abort=True,
            sentence=f"no byte moved for {format_duration(sample.at - state.moved_at)}: "
            "the migration network or the destination is frozen",
        )
    if state.knobs.postcopy or sample.pass_number < 2:
        return state, NOTHING
    if sample.at - state.best_at < WINDOW_S:
        return state, NOTHING
    since = state.stalled_since if state.stalled_since is not None else sample.at
    state = _replace(state, stalled_since=since)
    largest = largest_limit_ms(limits, overhead_ms=overhead_ms)
    if sample.pass_number > state.last_action_pass:
        return _act(state, sample, limits, largest)
    if sample.at - since >= LONGEST_STALL_S and not _means_left(state.knobs, limits, largest):
        return state, _give_up(sample, limits)
    return state, NOTHING


def _means_left(knobs: Knobs, limits: MoveLimits, largest: float) -> bool:
    throttle = limits.allow_throttle and knobs.quota > MIN_QUOTA
    return knobs.limit_ms < largest or throttle or limits.allow_postcopy


def _note(state: Progressing, sample: Sample) -> Progressing:
    if sample.transferred != state.moved_bytes:
        state = _replace(state, moved_at=sample.at, moved_bytes=sample.transferred)
    if sample.pass_number < 2:
        return _replace(state, best_at=sample.at)
    began = sample.pass_number != state.pass_number
    peak = float(sample.remaining) if began else max(state.peak, float(sample.remaining))
    state = _replace(state, pass_number=sample.pass_number, peak=peak)
    if began and peak < state.best_peak * MARGIN:
        state = _replace(state, best_peak=peak, best_pass=sample.pass_number, stalled_since=None)
    if sample.pass_number == state.best_pass:
        state = _replace(state, best_at=sample.at)
    return state


def _act(
    state: Progressing, sample: Sample, limits: MoveLimits, largest: float
) -> tuple[Progressing, Decision]:
    knobs, stalled = state.knobs, _rates(sample)
    stalled_for = sample.at - (state.stalled_since or sample.at)
    hopeless = sample.dirty_bytes_per_s >= HOPELESS * sample.link_bytes_per_s > 0
    if knobs.limit_ms < largest and not (hopeless and limits.allow_postcopy):
        # Doubling is for a guest that nearly fits; one that outruns the link gets all at once.
        outrun = sample.dirty_bytes_per_s >= sample.link_bytes_per_s > 0
        limit = (
            largest if outrun or stalled_for > STALL_LIMIT_S else min(largest, knobs.limit_ms * 2)
        )
        state = _acted(state, sample, Knobs(limit, knobs.quota))
        words = f"{stalled}: the pause may now take {format_duration(limit / 1000)} for memory"
        return state, Decision(limit_ms=limit, sentence=words)
    if limits.allow_throttle and knobs.quota > MIN_QUOTA:
        quota = _next_quota(knobs.quota, sample)
        state = _acted(state, sample, Knobs(knobs.limit_ms, quota))
        return state, Decision(quota=quota, sentence=f"{stalled}: vCPUs held to {quota:.0%}")
    if limits.allow_postcopy:
        state = _acted(state, sample, Knobs(knobs.limit_ms, knobs.quota, postcopy=True))
        return state, Decision(postcopy=True, sentence=f"{stalled}: finishing by post-copy")
    if stalled_for < STALL_LIMIT_S:
        return state, NOTHING
    return state, _give_up(sample, limits)


def _rates(sample: Sample) -> str:
    return (
        f"the guest writes {format_size(sample.dirty_bytes_per_s)}/s, "
        f"the link carries {format_size(sample.link_bytes_per_s)}/s"
    )


def _give_up(sample: Sample, limits: MoveLimits) -> Decision:
    means = [
        word
        for word, allowed in (
            ("--allow-postcopy", limits.allow_postcopy),
            ("--allow-throttle", limits.allow_throttle),
        )
        if not allowed
    ]
    advice = f"; allow it with {' or '.join(means)}" if means else ""
    return Decision(
        abort=True,
        sentence=f"it does not converge within the budget of {limits.max_blackout_ms:.0f} ms: "
        f"{_rates(sample)}{advice}",
    )


def _next_quota(quota: float, sample: Sample) -> float:
    """Aim at two thirds of what the link carries; then halve until the passes shrink."""
    if quota == 1.0 and sample.dirty_bytes_per_s > sample.link_bytes_per_s > 0:
        return max(MIN_QUOTA, round(sample.link_bytes_per_s / sample.dirty_bytes_per_s * 0.6, 3))
    return max(MIN_QUOTA, round(quota * 0.5, 3))


def _acted(state: Progressing, sample: Sample, knobs: Knobs) -> Progressing:
    # Give what was done a whole window and a pass of its own to show its effect.
    return _replace(
        state,
        knobs=knobs,
        best_at=sample.at,
        best_peak=min(state.best_peak, state.peak),
        last_action_pass=sample.pass_number,
    )


def _replace(state: Progressing, **changes: object) -> Progressing:
    return Progressing(**{**state.__dict__, **changes})
