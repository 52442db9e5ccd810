"""What a section of the proof says: raw figures, and criteria that hold or do not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Say = Callable[[str], None]


@dataclass(frozen=True)
class Criterion:
    """One promise, with the figure it was judged by.

    ``timing``: it counts milliseconds, which a machine that is busy with other things can spoil.
    """

    text: str
    passed: bool
    figure: Any
    timing: bool = False

    def as_json(self) -> dict[str, Any]:
        """As in ``docs/proof``."""
        return {"text": self.text, "pass": self.passed, "figure": self.figure}


@dataclass
class Section:
    """What one part of the proof found."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    criteria: list[Criterion] = field(default_factory=list)

    def judge(self, text: str, passed: bool, figure: Any, *, timing: bool = False) -> None:
        """Add a criterion."""
        self.criteria.append(Criterion(text, bool(passed), figure, timing))

    @property
    def failed(self) -> list[str]:
        """The criteria that do not hold, one line each."""
        return [f"{c.text}: {c.figure}" for c in self.criteria if not c.passed]

    @property
    def broken(self) -> list[str]:
        """The same without those that count milliseconds."""
        return [f"{c.text}: {c.figure}" for c in self.criteria if not (c.passed or c.timing)]


def tell(line: str) -> None:
    """A line of progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value below or at which this share of the values lies; None when there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]
