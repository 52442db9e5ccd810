"""The clock offset: the truth is always within the stated error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.wire.clock import ClockSample, Offset, estimate_offset, measure_offset

_DELAY = st.floats(1e-5, 0.5)
_TRIPS = st.lists(st.tuples(_DELAY, _DELAY, _DELAY), min_size=1, max_size=10)
_ROUNDING = 1e-6  # a float of today's time in seconds resolves 0.24 us


def _sample(at: float, offset: float, trip: tuple[float, float, float]) -> ClockSample:
    there, work, back = trip
    return ClockSample(
        sent=at,
        received=at + there + offset,
        answered=at + there + work + offset,
        back=at + there + work + back,
    )


@given(offset=st.floats(-3600, 3600), trips=_TRIPS)
def test_the_truth_lies_within_the_error(
    offset: float, trips: list[tuple[float, float, float]]
) -> None:
    samples = [_sample(1.8e9 + n, offset, trip) for n, trip in enumerate(trips)]
    found = estimate_offset(samples)
    assert abs(found.offset_s - offset) <= found.error_s + _ROUNDING
    shortest = min(there + back for there, _, back in trips)
    assert found.error_s <= shortest / 2 + _ROUNDING
    assert found.to_local(1.8e9 + offset) == pytest.approx(1.8e9, abs=found.error_s + _ROUNDING)


@given(trips=_TRIPS, step=st.floats(5, 60))
def test_after_a_clock_step_the_shortest_trip_decides(
    trips: list[tuple[float, float, float]], step: float
) -> None:
    samples = [_sample(1.8e9, 0.0, trip) for trip in trips]
    quick = _sample(1.8e9, step, (1e-6, 0.0, 1e-6))
    assert estimate_offset([*samples, quick]).offset_s == pytest.approx(step, abs=1e-5)


def test_an_exchange_that_saw_a_step_is_left_out() -> None:
    torn = ClockSample(sent=100.0, received=50.0, answered=51.0, back=99.0)
    good = ClockSample(sent=100.0, received=107.0, answered=107.0, back=102.0)
    assert estimate_offset([torn, good]) == Offset(offset_s=6.0, error_s=1.0)
    with pytest.raises(ValueError, match="stepped"):
        estimate_offset([torn])


async def test_measuring_uses_every_exchange() -> None:
    ours = iter([0.0, 0.4, 1.0, 1.01, 2.0, 2.3])
    theirs = iter([5.1, 6.005, 7.2])

    async def call() -> float:
        return next(theirs)

    found = await measure_offset(call, exchanges=3, now=lambda: next(ours))
    assert found.offset_s == pytest.approx(5.0)
    assert found.error_s == pytest.approx(0.005)
