"""What the probe saw, as a few lines of text: a strip of questions answered and lost.

Pure: samples in, lines out. One column stands for a few milliseconds; how many is chosen so that
the longest gap is well to be seen, and its surroundings too.

    ██████████████████████▇·············████████████████████████████
    -115 ms                └── 62 ms ──┘                     +200 ms
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from godwit.lab.probe import Samples
from godwit.model.units import format_duration

WIDTH = 64
ANSWERED = "▁▂▃▄▅▆▇█"  # the share of a column's questions that were answered
LOST, NOT_ASKED = "·", " "
STEPS_MS = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
GAP_COLUMNS = 24  # a gap takes at most so many
NAMED_MS = 5.0  # a shorter one is a hiccup of the machine, and nothing is pointed at


@dataclass(frozen=True, slots=True)
class Gap:
    """The longest time without an answered question, in nanoseconds of the probe's clock."""

    start: int
    end: int

    @property
    def ms(self) -> float:
        """How long."""
        return (self.end - self.start) / 1e6


def longest_gap(samples: Samples) -> Gap | None:
    """Where the longest row of lost questions was; None when every question was answered.

    From when the first lost question was due until the first answered one was sent, which is what
    the probe's report calls the blackout. A silence at the end counts.
    """
    found: Gap | None = None
    last: int | None = None  # when the last answered question was sent
    lost_since: int | None = None
    for sent, arrived in zip(samples.sent, samples.arrived, strict=True):
        if not sent:
            continue
        if not arrived:
            if lost_since is None:
                lost_since = sent if last is None else last + samples.interval_ns
            end = sent
        else:
            end, last = sent, sent
        if lost_since is not None and (found is None or end - lost_since > found.end - found.start):
            found = Gap(min(lost_since, end), end)
        if arrived:
            lost_since = None
    return found


def draw(samples: Samples, *, width: int = WIDTH) -> tuple[str, ...]:
    """The strip, and below it where the gap was and what time it shows."""
    asked = [sent for sent in samples.sent if sent]
    if not asked:
        return ("nothing was asked",)
    gap = longest_gap(samples)
    if gap is None or gap.ms < NAMED_MS:
        return _whole(samples, asked, width)
    step_ms = step_for(gap.ms)
    step = step_ms * 1_000_000
    gap_columns = max(1, -(-(gap.end - gap.start) // step))
    before = max(0, (width - gap_columns) // 2)
    first = gap.start - before * step
    strip = _strip(samples, first, step, width)
    span = (-before * step_ms, (width - before) * step_ms)
    return (strip, _below(span, before, gap_columns, _said(gap.ms), width))


def step_for(gap_ms: float) -> int:
    """Milliseconds of a column."""
    return next((step for step in STEPS_MS if gap_ms / step <= GAP_COLUMNS), STEPS_MS[-1])


def column_ms(samples: Samples, *, width: int = WIDTH) -> float:
    """What one column of the picture stands for, to be told beside it."""
    asked = [sent for sent in samples.sent if sent]
    gap = longest_gap(samples)
    if gap is None or gap.ms < NAMED_MS:
        return (max(asked, default=0) - min(asked, default=0)) / 1e6 / width
    return float(step_for(gap.ms))


def _whole(samples: Samples, asked: Sequence[int], width: int) -> tuple[str, ...]:
    span = asked[-1] - asked[0] + samples.interval_ns
    step = max(1, -(-span // width))
    strip = _strip(samples, asked[0], step, width)
    end = f"+{_said(span / 1e6)}"
    return (strip, "0" + end.rjust(width - 1))


def _strip(samples: Samples, first: int, step: int, width: int) -> str:
    asked, answered = [0] * width, [0] * width
    for sent, arrived in zip(samples.sent, samples.arrived, strict=True):
        column = (sent - first) // step
        if sent and 0 <= column < width:
            asked[column] += 1
            answered[column] += arrived > 0
    return "".join(_cell(a, b) for a, b in zip(asked, answered, strict=True)).rstrip()


def _cell(asked: int, answered: int) -> str:
    if not asked:
        return NOT_ASKED
    if not answered:
        return LOST
    top = len(ANSWERED) - 1
    # Full only when all were answered.
    return ANSWERED[top if answered == asked else min(top - 1, answered * top // asked)]


def _below(span_ms: tuple[int, int], at: int, columns: int, text: str, width: int) -> str:
    """The ruler: its ends, and a bracket under the gap with its length."""
    bracket = f"└{f' {text} ':─^{columns - 2}}┘" if columns >= len(text) + 4 else f"└ {text}"
    ends = (f"-{_said(-span_ms[0])}", f"+{_said(span_ms[1])}")
    line = f"{ends[0]:<{at}}"[: max(at - 1, 0)].ljust(at) + bracket
    room = width - len(line)
    return line + (ends[1].rjust(room) if room > len(ends[1]) else "")


def _said(milliseconds: float) -> str:
    return format_duration(milliseconds / 1000)
