"""The failure table as data: what may come of each cell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .judge import NOWHERE

FILE = Path(__file__).parents[2] / "golden" / "migration" / "failure_table.json"
_PLACES = {"none": NOWHERE, "source": "source", "destination": "destination"}


@dataclass(frozen=True)
class Expected:
    """Outcomes and places that the table allows."""

    outcome: tuple[str, ...]
    runs_on: tuple[str, ...]

    def differences(self, *, outcome: str, runs_on: str) -> list[str]:
        """What is not as the table says."""
        found = []
        if outcome not in self.outcome:
            found.append(f"the move ended {outcome}, expected: {', '.join(self.outcome)}")
        if runs_on not in self.runs_on:
            found.append(f"the VM runs on {runs_on}, expected: {', '.join(self.runs_on)}")
        # A move that is said to have completed, or not, must be where that says.
        if (outcome, runs_on) in (("completed", "source"), ("failed", "destination")):
            found.append(f"the move ended {outcome}, and the VM runs on the {runs_on}")
        return found

    def as_json(self) -> dict[str, Any]:
        """For the raw figures."""
        return {"outcome": list(self.outcome), "runs_on": list(self.runs_on)}


@dataclass(frozen=True)
class Row:
    """A row: ``fault`` is like ``kill source-qemu``, ``stage`` a hold point of that ``role``."""

    fault: str
    role: str
    stage: str
    expected: Expected


@cache
def rows() -> tuple[Row, ...]:
    """All rows."""
    return tuple(
        Row(row["fault"], row["role"], row["stage"], _expected(row["expect"]))
        for row in json.loads(FILE.read_text())
    )


def _expected(expect: dict[str, Any]) -> Expected:
    said = expect["runs_on"].replace("either", "source|destination")
    return Expected(tuple(expect["outcome"]), tuple(_PLACES[word] for word in said.split("|")))
