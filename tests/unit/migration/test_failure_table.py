"""The failure table as data: complete, in known words, and nowhere against the fakes' findings."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from godwit.migration.world import DESTINATION_HOLDS, SOURCE_HOLDS
from godwit.model.migration import Outcome

FILE = Path(__file__).parents[2] / "golden" / "migration" / "failure_table.json"
ROWS: list[dict[str, Any]] = json.loads(FILE.read_text())
VICTIMS = (
    "source-qemu", "destination-qemu", "source-agent", "destination-agent", "source-guard",
    "destination-guard", "manager", "store",
)  # fmt: skip
POINTS = [("source", point) for point in SOURCE_HOLDS] + [
    ("destination", point) for point in DESTINATION_HOLDS
]
NO_TARGET = {(how, "destination-qemu", "setup") for how in ("kill", "freeze")}


def cell(fault: str, stage: str) -> dict[str, Any]:
    (found,) = (row for row in ROWS if (row["fault"], row["stage"]) == (fault, stage))
    expect: dict[str, Any] = found["expect"]
    return expect


def test_every_cell_is_there_once() -> None:
    wanted = {
        (f"{how} {victim}", role, point)
        for how, victim, (role, point) in product(("kill", "freeze"), VICTIMS, POINTS)
        if (how, victim, point) not in NO_TARGET
    } | {("cut migration-network", role, point) for role, point in POINTS}
    found = [(row["fault"], row["role"], row["stage"]) for row in ROWS]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_every_cell_speaks_in_known_words() -> None:
    for row in ROWS:
        expect = row["expect"]
        assert expect["outcome"]
        assert set(expect["outcome"]) <= {outcome.value for outcome in Outcome}
        assert set(expect["runs_on"].split("|")) <= {"source", "destination", "none", "either"}
        assert len(expect["note"]) > 10


def test_the_place_fits_the_outcome() -> None:
    """Completed means that the source has it no more; failed, that the destination has it not."""
    for row in ROWS:
        outcome, place = set(row["expect"]["outcome"]), row["expect"]["runs_on"]
        if outcome == {"completed"}:
            assert place in ("destination", "none"), row
        if outcome == {"failed"}:
            assert place in ("source", "none"), row
        if outcome == {"completed", "failed"}:
            assert place in ("either", "either|none", "none|source"), row


@pytest.mark.parametrize("victim", ["source-guard", "destination-guard", "manager"])
def test_who_only_watches_costs_nothing(victim: str) -> None:
    for how, (_, point) in product(("kill", "freeze"), POINTS):
        assert cell(f"{how} {victim}", point)["outcome"] == ["completed"]


def test_after_the_swap_a_fault_of_the_source_changes_nothing() -> None:
    for how, victim in product(("kill", "freeze"), ("source-qemu", "source-agent")):
        for point in ("swapped", "running", "take-over", "started"):
            assert cell(f"{how} {victim}", point)["runs_on"] == "destination"
