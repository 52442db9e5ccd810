"""The checker is checked: each planted violation must be found, and nothing where all is well."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from godwit.model.migration import Migration, MoveState
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.qemu.intervals import Span

from .kit import handover, judge
from .kit.cells import every, sample
from .kit.judge import Copy, Evidence
from .kit.openings import Openings
from .kit.table import Expected

MOVE = Migration(
    id="m-1",
    vm="web",
    source="host1",
    destination="host2",
    state=MoveState.COMPLETED,
    reason="web runs on host2 at epoch 2",
)
WELL = Evidence(
    vm="web",
    epoch_before=1,
    epochs_seen=(1, 2),
    owner=Owner(host="host2", epoch=2, state=OwnerState.RUNNING),
    migration=MOVE,
    spans=(Span(10.0, 20.0, "host1", 7, 1), Span(20.05, 30.0, "host2", 9, 2)),
    copies=(Copy("host2", 9, "running"),),
    answers=True,
    left=(),
)
INTENT = MoveIntent(id="m-1", method="live", source="host1", destination="host2")


def test_nothing_is_found_where_all_is_well() -> None:
    assert judge.faults(WELL) == []
    assert judge.runs_on(WELL) == "host2"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"spans": (Span(10.0, 20.1, "host1", 7, 1), Span(20.05, 30.0, "host2", 9, 2))},
            "two ran at once for 0.0500 s",
        ),
        ({"epochs_seen": (1, 3, 2)}, "the epoch fell from 3 to 2"),
        ({"epoch_before": 5}, "the epoch fell from 5 to 1"),
        ({"migration": None}, "the move has no record"),
        ({"migration": MOVE.but(state=MoveState.RUNNING)}, "the move did not end"),
        ({"migration": MOVE.but(reason="error")}, "the reason is no sentence"),
        ({"owner": WELL.owner.but(migration=INTENT)}, "still bound by m-1"),
        ({"owner": WELL.owner.but(host="host1")}, "the record names host1, QEMUs are on host2"),
        ({"owner": WELL.owner.but(state=OwnerState.STOPPED)}, "the record says stopped, but"),
        ({"copies": ()}, "QEMUs are on nowhere"),
        ({"copies": (*WELL.copies, Copy("host1", 7, "paused"))}, "QEMUs are on host2, host1"),
        ({"copies": (Copy("host2", 9, "paused"),)}, "is paused"),
        ({"copies": (Copy("host2", 9, "running", True),)}, "stands still by a signal"),
        ({"answers": False}, "does not answer"),
        ({"left": ("host1: tap gw0",)}, "left behind: host1: tap gw0"),
    ],
)
def test_each_planted_violation_is_found(change: dict[str, Any], found: str) -> None:
    seen = judge.faults(dataclasses.replace(WELL, **change))
    assert any(found in line for line in seen), seen


def test_a_vm_that_is_down_runs_nowhere() -> None:
    down = dataclasses.replace(
        WELL,
        owner=WELL.owner.but(state=OwnerState.STOPPED),
        migration=MOVE.but(state=MoveState.FAILED, reason="the VM's QEMU on host1 died"),
        copies=(),
        answers=False,
    )
    assert judge.faults(down) == []
    assert judge.runs_on(down) == judge.NOWHERE


def test_an_outcome_that_the_table_does_not_allow_is_found() -> None:
    want = Expected(("completed", "failed"), ("source", "destination"))
    assert want.differences(outcome="completed", runs_on="destination") == []
    assert want.differences(outcome="unknown", runs_on="source") != []
    assert want.differences(outcome="failed", runs_on="nowhere") != []
    assert want.differences(outcome="completed", runs_on="source") != []


def test_the_matrix_has_every_fault_and_a_sample_each_victim_once() -> None:
    cells = every()
    processes = {cell.victim for cell in cells}
    assert processes == {
        "source-qemu", "destination-qemu", "source-agent", "destination-agent",
        "source-guard", "destination-guard", "manager", "store", "migration-network",
    }  # fmt: skip
    assert {cell.kind for cell in cells if cell.victim == "store"} == {"kill", "freeze"}
    assert sorted(cell.victim for cell in sample(7)) == sorted(processes)
    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(20)}) > 10


def hold_open(image: Path, flags: str) -> subprocess.Popen[str]:
    """Another process that has the file open until it is told to end."""
    program = f"import os; os.open({str(image)!r}, os.{flags}); print('open', flush=True); input()"
    held = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "open\n"
    return held


def release(held: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        held.kill()
    held.communicate("\n")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "disk").write_bytes(b"x")
    return tmp_path / "disk"


def test_two_that_have_an_image_open_for_writing_are_seen(image: Path) -> None:
    with Openings(image) as openings:
        first = hold_open(image, "O_RDWR")
        second = hold_open(image, "O_WRONLY")
        release(second)
        release(first)
    assert openings.judge.together == [tuple(sorted((first.pid, second.pid)))]


def test_one_that_was_there_before_counts(image: Path) -> None:
    first = hold_open(image, "O_RDWR")
    with Openings(image) as openings:
        second = hold_open(image, "O_RDWR")
        release(second)
        release(first)
    assert openings.judge.together == [tuple(sorted((first.pid, second.pid)))]


def test_one_after_the_other_is_well_and_so_is_a_reader(image: Path) -> None:
    with Openings(image) as openings:
        first = hold_open(image, "O_RDWR")
        reader = hold_open(image, "O_RDONLY")
        release(first, kill=True)
        second = hold_open(image, "O_RDWR")
        release(second)
        release(reader)
    assert openings.judge.openings == 2
    assert openings.judge.together == []


def test_the_hand_over_is_sampled_with_every_victim_once() -> None:
    everything = handover.every()
    assert len(set(everything)) == len(everything)
    drawn = handover.sample(7)
    assert drawn == handover.sample(7)
    assert [c.victim for c in drawn] == sorted({c.victim for c in everything})
