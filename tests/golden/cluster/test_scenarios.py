"""Whole failovers, second by second: each file is a claim, a script of faults, and the log.

The invariants are judged after every event, whatever a file expects: never two running intervals of
one VM overlap, never a start without proof, nobody without HA is stopped by us, epochs only rise.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sim_scenario
from sim_scenario import FOLDER, Scenario, load, play

FILES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_comes_out_as_written(path: Path) -> None:
    found = load(path)
    assert play(found) == found.log, (
        f"read the difference; to accept it: {sim_scenario.__file__} {path}"
    )


def test_there_are_enough_and_each_has_its_own_claim() -> None:
    claims = [load(path).claim for path in FILES]
    assert len(FILES) >= 100
    assert len(set(claims)) == len(claims)
    assert all(20 < len(claim) < 130 for claim in claims)


# Those in which a host with HA VMs dies and a rung is there that needs no device.
TWENTY = ["power-lost", "leader-of-etcd-dies", "leading-manager-dies", "leader-of-both-dies"]


@pytest.mark.parametrize("name", [*TWENTY, "management-cut", "double-loss", "twenty-vms"])
def test_a_lost_host_costs_at_most_twenty_seconds(name: str) -> None:
    log = load(FOLDER / f"{name}.txt").log
    fault = float(re.search(r"([\d.]+)  -- (?:lose-power|cut)", log)[1])  # type: ignore[index]
    starts = [float(at) for at in re.findall(r"([\d.]+)  host\d: \S+ runs at epoch 2", log)]
    assert starts
    assert max(starts) - fault < 20


def test_a_file_keeps_its_words_when_it_is_written_again() -> None:
    path = FOLDER / "power-lost.txt"
    found = load(path)
    assert found.text(found.log) == path.read_text()
    assert Scenario.parse(found.name, found.text("x\n")).log == "x\n"
