"""What is expected of a move, and what it looked like: two pure rooms."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from godwit.migration.forecast import Load, predict, rest_ms
from godwit.migration.timeline import Timeline
from godwit.model.migration import STAGES, Migration, MoveLimits, Stage

MIB = 1 << 20
LIMITS = MoveLimits()
USED = st.integers(1, 64 * 1024).map(lambda mib: mib * MIB)
RATE = st.floats(0.0, 2000.0).map(lambda mib: mib * MIB)
LINK = st.floats(1.0, 2000.0).map(lambda mib: mib * MIB)


def load(used: int, dirty: float | None, link: float | None) -> Load:
    return Load(used_bytes=used, dirty_bytes_per_s=dirty, link_bytes_per_s=link)


def test_an_idle_guest() -> None:
    forecast = predict(load(256 * MIB, 1 * MIB, 119 * MIB), LIMITS)
    assert forecast.converges
    assert forecast.total_ms == pytest.approx(250 + 2151 + 18 + 60, abs=30)
    assert forecast.blackout_ms == pytest.approx(60, abs=12)
    assert forecast.basis == "sampled dirty rate, 0 past moves"


def test_unknown_inputs_leave_unknown_outputs_and_say_so() -> None:
    assert predict(load(1, 1.0, None), LIMITS).converges is None
    assert "not known" in predict(load(1, 1.0, None), LIMITS).basis
    assert "no dirty rate yet" in predict(load(MIB, None, MIB), LIMITS).basis


def test_past_moves_teach_the_overhead() -> None:
    known = Load(
        used_bytes=MIB, dirty_bytes_per_s=0, link_bytes_per_s=MIB, overhead_ms=(20, 90, 30)
    )
    assert predict(known, LIMITS).blackout_ms == 30


def moved(*, total_ms: float | None, blackout_ms: float | None = 50.0) -> Migration:
    return Migration(
        id="m-1", vm="web", source="host1", destination="host2", bytes_transferred=100 * MIB,
        total_ms=total_ms, blackout_ms=blackout_ms,
    )  # fmt: skip


def test_a_move_like_the_last_one_is_forecast_to_take_as_long() -> None:
    """Whatever it was that took the time: nothing of it is left out."""
    link = 200 * MIB
    rest = rest_ms(moved(total_ms=900.0), link)
    assert rest == pytest.approx(350)
    assert rest is not None
    known = Load(
        used_bytes=100 * MIB, dirty_bytes_per_s=0, link_bytes_per_s=link, overhead_ms=(50,),
        rest_ms=(rest, 1e6, 0.0),
    )  # fmt: skip
    assert predict(known, LIMITS).total_ms == pytest.approx(900, abs=1)


def test_a_wait_for_its_turn_is_no_part_of_a_move() -> None:
    waited = moved(total_ms=5900.0).but(accepted_at=100.0, turn_at=105.0)
    assert rest_ms(waited, 200 * MIB) == pytest.approx(350)
    ahead = waited.but(turn_at=99.9)  # a manager's clock is another one
    assert rest_ms(ahead, 200 * MIB) == pytest.approx(5350)


def test_what_was_not_measured_teaches_nothing() -> None:
    assert rest_ms(moved(total_ms=None), MIB) is None
    assert rest_ms(moved(total_ms=900.0, blackout_ms=None), MIB) is None
    assert rest_ms(moved(total_ms=900.0), MIB) == 0.0  # quicker than this link is now


@given(used=USED, dirty=RATE, more=RATE, link=LINK)
def test_more_writing_is_never_quicker(used: int, dirty: float, more: float, link: float) -> None:
    calm, busy = (
        predict(load(used, dirty, link), LIMITS),
        predict(load(used, dirty + more, link), LIMITS),
    )
    if busy.converges and dirty + more < link:
        assert calm.converges
        assert calm.total_ms is not None
        assert busy.total_ms is not None
        assert calm.total_ms <= busy.total_ms + 0.2
        assert (calm.bytes or 0) <= (busy.bytes or 0) + 1


@given(used=USED, more=USED, dirty=RATE, link=LINK)
def test_more_memory_is_never_quicker(used: int, more: int, dirty: float, link: float) -> None:
    small, large = (
        predict(load(used, dirty, link), LIMITS),
        predict(load(used + more, dirty, link), LIMITS),
    )
    if large.converges and small.converges:
        assert small.total_ms is not None
        assert large.total_ms is not None
        assert small.total_ms <= large.total_ms + 0.2


@given(used=USED, dirty=RATE, link=LINK)
def test_when_it_converges(used: int, dirty: float, link: float) -> None:
    """Slower than the link by a fifth it always does; faster only if all of it fits at once."""
    found = predict(load(used, dirty, link), LIMITS)
    fits_at_once = used / link <= 0.240
    if dirty < 0.8 * link:
        assert found.converges
    if dirty >= link:
        assert found.converges == fits_at_once


@given(used=USED, dirty=RATE, link=LINK, budget=st.floats(70, 5000))
def test_a_forecast_blackout_is_within_the_budget(
    used: int, dirty: float, link: float, budget: float
) -> None:
    found = predict(load(used, dirty, link), MoveLimits(max_blackout_ms=budget))
    assume(found.converges)
    assert found.blackout_ms is not None
    assert found.blackout_ms <= budget + 0.1
    assert found.total_ms is not None
    assert found.total_ms >= found.blackout_ms


def test_stages_follow_each_other_without_gaps() -> None:
    timeline = Timeline(accepted_at=100.0)
    for number, stage in enumerate(STAGES):
        assert timeline.enter(stage, 100.5 + number)
    timeline.end(107.0)
    stages = timeline.stages(999.0)
    assert [stage.name for stage in stages] == list(STAGES)
    for before, after in pairwise(stages):
        assert after.start_s == pytest.approx(before.start_s + before.duration_ms / 1000)
    assert stages[-1].duration_ms == pytest.approx(1500)
    assert timeline.total_ms == pytest.approx(7000)


def test_a_stage_never_comes_twice_or_backwards() -> None:
    timeline = Timeline(accepted_at=0.0)
    assert timeline.enter(Stage.SWITCHOVER, 1.0)
    assert not timeline.enter(Stage.SWITCHOVER, 2.0)
    assert not timeline.enter(Stage.PRECOPY, 3.0)
    assert timeline.stage is Stage.SWITCHOVER


def test_a_move_that_never_entered_a_stage_still_has_a_report() -> None:
    timeline = Timeline(accepted_at=5.0)
    timeline.end(6.0)
    assert timeline.stages(7.0) == ()
    assert timeline.stage is Stage.SETUP
    assert timeline.passes(transferred=0, now=7.0) == ()


def test_passes_have_their_own_bytes_and_the_rate_seen_at_their_end() -> None:
    timeline = Timeline(accepted_at=0.0)
    timeline.pass_began(1, 1.0, transferred=0, dirty_rate=0.0)
    timeline.pass_began(2, 3.0, transferred=1000, dirty_rate=50.0)
    timeline.pass_began(2, 3.5, transferred=1100, dirty_rate=50.0)  # told twice
    timeline.pass_began(3, 4.0, transferred=1300, dirty_rate=70.0)
    passes = timeline.passes(transferred=1350, now=4.5)
    assert [(one.number, one.bytes, one.duration_ms) for one in passes] == [
        (1, 1000, 2000.0),
        (2, 300, 1000.0),
        (3, 50, 500.0),
    ]
    assert [one.dirty_bytes_per_s for one in passes] == [50.0, 70.0, 70.0]


@pytest.mark.parametrize(
    ("stopped", "resumed", "blackout"),
    [(10.0, 10.08, 80.0), (10.0, None, None), (None, 10.0, None), (10.0, 9.999, 0.0)],
)
def test_the_blackout(stopped: float | None, resumed: float | None, blackout: float | None) -> None:
    timeline = Timeline(accepted_at=0.0, stopped_at=stopped, resumed_at=resumed)
    assert timeline.blackout_ms == (None if blackout is None else pytest.approx(blackout))
