"""When a VM may be stopped on processors that are not free: a pure function of what was seen.

A hand-over is a chain of some thirty short steps in six processes. Where each of them has to wait
for a processor the VM is dark for several times as long, whatever little memory is left. So while
the processors are strained QEMU is kept from stopping the VM. Memory is copied on; the last of it
trickles until the strain is over, which also takes this move's own share of the strain away.

Moves that wait for the same processors become calm together. Each therefore takes a moment of its
own, by lot, from a spread as wide as the strain was, and looks once more before it goes; if another
one is at it just then it draws again. The wait is bounded: processors that guests keep busy do not
become calm.

Strain is how much longer the threads that carry out the move took than they computed, by the
kernel's scheduler statistics: 1 is a processor of their own. What was measured stands in
``docs/design/0023``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from godwit.model.units import format_duration

HANDOVER_MS = 60.0
"""What a hand-over takes on free processors with an emulated guest (docs/design/0003)."""
SHARE = 0.8
"""Part of the blackout budget that a hand-over may be expected to take."""
LEAST_STRAIN = 2.0
"""Strain below this is nobody's reason to wait: a thread shares its core with one other."""
CALM_SHARE = 0.75
"""Calm is this part of the strain that lets a hand-over wait, or the two would take turns."""
PATIENCE_S = 10.0
"""Seconds that a move waits, all its waits together."""
LAST_S = 2.0
"""Seconds more within which it gives up by lot, or moves that began together would end together."""
GIVES_UP = 0.25
"""Share of the looks in that time that end the wait."""
SPREAD_S = 0.1
"""Seconds of spread for each unit of the worst strain."""
WIDEST_S = 2.5
MISJUDGED = 2.0
"""Times more than the limit that a guest may be expected to have written to count as near."""
RESERVE_S = 0.5
"""What is kept back of the memory, as seconds of the link. Without it QEMU would stop an idle VM
between two looks: when nothing at all is left it stops it whatever the limit says."""


class Step(Enum):
    """What to do now."""

    GO_ON = "go on"
    SHUT = "shut"  # QEMU must not stop the VM
    TRICKLE = "trickle"  # what is left would be gone before the next look: hardly copy on
    OPEN = "open"  # QEMU may stop the VM again, as the policy says


@dataclass(frozen=True)
class Bounds:
    """Strain from which the VM is not stopped, and below which it is again."""

    strained: float
    calm: float


@dataclass(frozen=True)
class Waiting:
    """What is remembered between looks; seconds, or seconds on the local monotonic clock."""

    shut: bool = False
    trickles_since: float | None = None
    go_at: float | None = None
    worst: float = 1.0
    spent: float = 0.0
    over: bool = False  # there is no more time to wait

    @property
    def trickling(self) -> bool:
        """Whether the copy is held up for calm processors."""
        return self.trickles_since is not None


def bounds(max_blackout_ms: float) -> Bounds:
    """The strain at which a hand-over is expected to take more than its share of the budget."""
    strained = max(LEAST_STRAIN, max_blackout_ms * SHARE / HANDOVER_MS)
    return Bounds(strained, strained * CALM_SHARE)


def is_near(
    remaining: int, *, rewritten: float | None, link_bytes_per_s: float, limit_ms: float
) -> bool:
    """Whether QEMU could stop the VM before the next look, if it may.

    ``rewritten`` is what the guest is expected to have written by the end of this pass (bytes): a
    pass that ends with more than the limit is followed by another one. In the first pass nobody
    knows (None), and an idle guest is stopped at its end.
    """
    if remaining > link_bytes_per_s * max(RESERVE_S, limit_ms / 1000):
        return False
    return rewritten is None or rewritten <= MISJUDGED * link_bytes_per_s * limit_ms / 1000


def decide(
    state: Waiting,
    bound: Bounds,
    *,
    at: float,
    strain: float,
    near: bool,
    lot: float,
    patience_s: float = PATIENCE_S,
) -> tuple[Waiting, Step, str]:
    """Take one look into account: the new memory, what to do, and the sentence that explains it.

    ``lot`` is a random number from 0 to 1, a new one each time.
    """
    if state.over:
        return state, Step.GO_ON, ""
    state = replace(state, worst=max(state.worst, strain))
    if state.trickles_since is not None:
        return _wait(state, state.trickles_since, bound, at, strain, lot, patience_s)
    strained = strain >= (bound.calm if state.shut else bound.strained)
    if strained and near:
        words = f"the processors are strained ({strain:.0f} times as long): waiting to stop the VM"
        return replace(state, shut=True, trickles_since=at), Step.TRICKLE, words
    if strained == state.shut:
        return state, Step.GO_ON, ""
    return replace(state, shut=strained), Step.SHUT if strained else Step.OPEN, ""


def _wait(
    state: Waiting,
    since: float,
    bound: Bounds,
    at: float,
    strain: float,
    lot: float,
    patience_s: float,
) -> tuple[Waiting, Step, str]:
    waited = format_duration(at - since)
    spent = state.spent + at - since
    if spent >= patience_s and (lot < GIVES_UP or spent >= patience_s + LAST_S):
        words = f"still strained after {waited}: going on although the VM may be dark for longer"
        return Waiting(over=True), Step.OPEN, words
    if strain >= bound.calm:
        if state.go_at is not None and at >= state.go_at:
            # Somebody else's moment. Whoever missed theirs with this one must not go together.
            state = replace(state, go_at=None, worst=min(strain, bound.strained))
        return state, Step.GO_ON, ""
    if state.go_at is None:
        spread = min(WIDEST_S, SPREAD_S * state.worst)
        state = replace(state, go_at=at + lot * spread)
    if state.go_at is not None and at >= state.go_at:
        words = f"the processors are calm after {waited}"
        return Waiting(spent=spent), Step.OPEN, words
    return state, Step.GO_ON, ""
