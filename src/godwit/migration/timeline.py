"""What a move looked like: stages, passes and the blackout, from stamped marks. Pure.

All marks are seconds on the source's clock. The blackout is the source's STOP to the
destination's RESUME by QEMU's own event stamps; the destination's stamp is first brought to the
source's clock with the measured offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from godwit.model.migration import STAGES, Pass, Stage, StageTime


@dataclass
class Timeline:
    """Collects marks during a move; everything asked of it is computed from them."""

    accepted_at: float
    _entered: list[tuple[Stage, float]] = field(default_factory=list)
    _passes: list[tuple[int, float, int, float]] = field(default_factory=list)
    ended_at: float | None = None
    stopped_at: float | None = None
    resumed_at: float | None = None
    clock_error_s: float = 0.0

    def restore(self, stages: Sequence[StageTime]) -> None:
        """Go on with the stages of a record: its driver died and another one took over."""
        self._entered = [(stage.name, self.accepted_at + stage.start_s) for stage in stages]

    def enter(self, stage: Stage, at: float) -> bool:
        """Note that ``stage`` began; False when it (or a later one) had begun before."""
        if self._entered and STAGES.index(stage) <= STAGES.index(self._entered[-1][0]):
            return False
        self._entered.append((stage, at))
        return True

    def pass_began(self, number: int, at: float, *, transferred: int, dirty_rate: float) -> None:
        """Note that QEMU began memory pass ``number`` having sent ``transferred`` bytes so far."""
        if not self._passes or number > self._passes[-1][0]:
            self._passes.append((number, at, transferred, dirty_rate))

    def end(self, at: float) -> None:
        """The move is over."""
        self.ended_at = at

    @property
    def stage(self) -> Stage:
        """The stage the move is in."""
        return self._entered[-1][0] if self._entered else Stage.SETUP

    def stages(self, now: float) -> tuple[StageTime, ...]:
        """The stages so far; the last one lasts until the end, or until ``now``."""
        if not self._entered:
            return ()
        if not self._entered:
            return ()
        until = self.ended_at if self.ended_at is not None else now
        bounds = [at for _, at in self._entered[1:]] + [until]
        return tuple(
            StageTime(
                name=stage,
                start_s=round(max(0.0, at - self.accepted_at), 6),
                duration_ms=round(max(0.0, end - at) * 1000, 3),
            )
            for (stage, at), end in zip(self._entered, bounds, strict=True)
        )

    def passes(self, *, transferred: int, now: float) -> tuple[Pass, ...]:
        """Each pass with its bytes, duration and the dirty rate seen at its end."""
        marks: Sequence[tuple[int, float, int, float]] = [
            *self._passes,
            (0, self.ended_at if self.ended_at is not None else now, transferred, 0.0),
        ]
        return tuple(
            Pass(
                number=number,
                bytes=max(0, after[2] - sent),
                duration_ms=round(max(0.0, after[1] - at) * 1000, 3),
                dirty_bytes_per_s=after[3] or rate,
            )
            for (number, at, sent, rate), after in pairwise(marks)
        )

    @property
    def total_ms(self) -> float | None:
        """Acceptance to end, milliseconds; None while it lasts."""
        return None if self.ended_at is None else (self.ended_at - self.accepted_at) * 1000

    @property
    def blackout_ms(self) -> float | None:
        """STOP to RESUME, milliseconds; None when there was no switchover."""
        if self.stopped_at is None or self.resumed_at is None:
            return None
        return max(0.0, self.resumed_at - self.stopped_at) * 1000
