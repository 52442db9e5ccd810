"""The failure table as data: what may come of each cell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cells import Cell

FILE = Path(__file__).parents[2] / "golden" / "migration" / "failure_table.json"


@dataclass(frozen=True)
class Expected:
    """Outcomes and places that the table allows; an empty set allows any."""

    outcome: frozenset[str] = frozenset()
    runs_on: frozenset[str] = frozenset()

    def differences(self, *, outcome: str, runs_on: str) -> list[str]:
        """What is not as the table says."""
        found = []
        if self.outcome and outcome not in self.outcome:
            found.append(f"the move ended {outcome}, expected: {', '.join(sorted(self.outcome))}")
        if self.runs_on and runs_on not in self.runs_on:
            found.append(f"the VM runs on {runs_on}, expected: {', '.join(sorted(self.runs_on))}")
        return found

    def as_json(self) -> dict[str, Any]:
        """For the raw figures."""
        return {"outcome": sorted(self.outcome), "runs_on": sorted(self.runs_on)}


def expected(cell: Cell) -> Expected:
    """What the table says of a cell."""
    if not FILE.exists():
        return _by_reasoning(cell)
    return _of_rows(json.loads(FILE.read_text()), cell)


def _of_rows(table: Any, cell: Cell) -> Expected:
    raise NotImplementedError


def _by_reasoning(cell: Cell) -> Expected:
    """The invariants alone."""
    return Expected()
