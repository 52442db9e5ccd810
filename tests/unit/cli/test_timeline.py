"""Pictures of moves and plans, and progress that never runs backwards."""

from __future__ import annotations

import io
import random

from hypothesis import given
from hypothesis import strategies as st

from godwit.cli.plan import render_plan
from godwit.cli.progress import PlainTeller, Ratchet, teller
from godwit.cli.timeline import render_timeline
from godwit.model.migration import STAGES, Migration, MovePlan, Progress, StageTime
from godwit.model.task import Task, TaskState

MOVE = Migration.model_validate(
    {
        "id": "m-1",
        "vm": "web",
        "source": "host1",
        "destination": "host2",
        "state": "completed",
        "outcome": "completed",
        "stages": [
            {"name": "setup", "start_s": 0.0, "duration_ms": 120.0},
            {"name": "precopy", "start_s": 0.12, "duration_ms": 640.0},
            {"name": "switchover", "start_s": 0.76, "duration_ms": 38.0},
            {"name": "handover", "start_s": 0.798, "duration_ms": 4.0},
            {"name": "resume", "start_s": 0.802, "duration_ms": 5.0},
            {"name": "announce", "start_s": 0.807, "duration_ms": 63.0},
        ],
        "passes": [
            {"number": 1, "bytes": 38000000, "duration_ms": 600.0, "dirty_bytes_per_s": 1200000.0},
            {"number": 2, "bytes": 700000, "duration_ms": 40.0, "dirty_bytes_per_s": 900000.0},
        ],
        "bytes_transferred": 38900000,
        "total_ms": 870.0,
        "blackout_ms": 47.0,
        "forecast": {"total_ms": 900.0, "blackout_ms": 45.0},
    }
)
PICTURE = """\
web: host1 → host2 (live), completed in 870 ms, dark 47 ms, 37.1 MiB

setup     ███████                                             120 ms
precopy          ███████████████████████████████████          640 ms
switchover                                          ▓▓         38 ms  VM still
handover                                              ▓         4 ms  VM still
resume                                                ▓         5 ms  VM still
announce                                               ███     63 ms
          0                                         870 ms
passes    36.2 MiB in 600 ms · 684 KiB in 40 ms
dirtied   at most 1.14 MiB/s
expected  900 ms in all (was 870 ms), 45 ms dark (was 47 ms)
"""


def test_the_picture_of_a_move() -> None:
    assert render_timeline(MOVE) + "\n" == PICTURE


def test_a_cancelled_move_has_no_dark_part() -> None:
    move = MOVE.but(
        state="cancelled",
        stages=MOVE.stages[:2],
        blackout_ms=None,
        total_ms=None,
        reason="cancelled by ann",
        passes=(),
    )
    picture = render_timeline(move)
    assert "▓" not in picture
    assert "dark" not in picture
    assert picture.endswith("why       cancelled by ann")


times = st.floats(0, 1e6)


@given(st.lists(st.tuples(st.sampled_from(STAGES), times, times), max_size=6), st.integers(8, 100))
def test_every_stage_is_seen_and_stays_inside(
    spans: list[tuple[object, float, float]], width: int
) -> None:
    stages = tuple(StageTime(name=n, start_s=s, duration_ms=d) for n, s, d in spans)
    lines = render_timeline(MOVE.but(stages=stages, passes=()), width=width).splitlines()
    bars = [
        line[10 : 10 + width] for line in lines if line.startswith(tuple(s.value for s in STAGES))
    ]
    assert len(bars) == len(stages)
    for bar in bars:
        assert set(bar.strip()) in ({"█"}, {"▓"})


def test_the_plan() -> None:
    plan = MovePlan.model_validate(
        {
            "vm": "web",
            "destination": "host2",
            "reason": "most free memory",
            "checks": [
                {"name": "memory", "result": "pass", "message": "enough"},
                {"name": "cpu", "result": "fail", "message": "another model", "hint": "pin it"},
            ],
            "candidates": [{"host": "host3", "eligible": False, "reasons": ["it is down"]}],
            "forecast": {"total_ms": 900.0, "blackout_ms": 45.0, "basis": "measured"},
        }
    )
    assert render_plan(plan) == (
        "web → host2 (precopy): most free memory\n"
        "  ✓ memory: enough\n"
        "  ✗ cpu: another model\n"
        "      pin it\n"
        "  ✗ host host3: it is down\n"
        "  expected: 900 ms in all, 45 ms dark (measured)\n"
        "it would be refused"
    )


def _moment(stage: int, percent: float) -> Migration:
    progress = Progress(stage=STAGES[stage], percent=percent, bytes_transferred=int(percent * 1e6))
    return MOVE.but(state="running", progress=progress, bytes_transferred=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100)), max_size=30))
def test_what_is_shown_never_runs_backwards(news: list[tuple[int, float]]) -> None:
    ratchet, last = Ratchet(), (0, 0.0, 0)
    for stage, percent in news:
        seen = ratchet.take(_moment(stage, percent))
        if seen is not None:
            now = (seen.stage_number, seen.percent, seen.bytes_transferred)
            assert all(new >= old for new, old in zip(now, last, strict=True))
            last = now


def test_without_a_terminal_each_stage_is_one_line() -> None:
    out = io.StringIO()
    showing = teller(out)
    assert isinstance(showing, PlainTeller)
    with showing:
        for number in (0, 1, 1, 0, 2, 1, 5):
            showing.tell(_moment(number, random.uniform(0, 100)))
        showing.tell(MOVE)
    assert out.getvalue().splitlines() == [
        "web host1 → host2: setup",
        "web host1 → host2: precopy",
        "web host1 → host2: switchover",
        "web host1 → host2: handover",
        "web host1 → host2: resume",
        "web host1 → host2: announce",
    ]


def test_a_disk_on_its_way_is_shown_in_the_same_stages() -> None:
    def moment(stage: str, copied: int) -> Task:
        return Task(
            id="t-1",
            request={"kind": "vm.disk.move", "name": "web", "disk": "disk0"},
            subject="vm/web",
            state=TaskState.RUNNING,
            created_at=0.0,
            progress={
                "disk": {"volume": "fast", "format": "raw"},
                "stage": stage,
                "copied_bytes": copied,
                "total_bytes": 100,
            },
        )

    out = io.StringIO()
    with teller(out) as showing:
        for stage, copied in (("setup", 0), ("precopy", 10), ("precopy", 60), ("handover", 100)):
            showing.tell(moment(stage, copied))
        showing.tell(moment("handover", 100).but(state=TaskState.COMPLETED))
        showing.tell(moment("handover", 100).but(request={"kind": "vm.start"}))
    assert out.getvalue().splitlines() == [
        "web disk0 → fast/raw: setup",
        "web disk0 → fast/raw: precopy",
        "web disk0 → fast/raw: switchover",
        "web disk0 → fast/raw: handover",
    ]
