"""Hold points: only in a lab, known names only, and nobody is held for ever by accident."""

from __future__ import annotations

import asyncio

import pytest

from godwit.agent.holds import LabHolds
from godwit.migration.world import DESTINATION_HOLDS, SOURCE_HOLDS
from godwit.model.errors import InvalidRequest, Refused


def test_outside_a_lab_nothing_can_be_armed() -> None:
    with pytest.raises(Refused, match="only in a lab"):
        LabHolds(enabled=False).arm("precopy", "source")


@pytest.mark.parametrize(
    ("point", "role"), [("nowhere", "source"), ("started", "source"), ("precopy", "witness")]
)
def test_unknown_points_are_refused_with_the_known_ones(point: str, role: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        LabHolds(enabled=True).arm(point, role)
    assert "pre-switchover" in refused.value.hint


async def test_what_is_not_armed_passes_at_once() -> None:
    holds = LabHolds(enabled=True)
    holds.arm("precopy", "source")
    async with asyncio.timeout(1):
        await holds.reach("setup", vm="web", role="source")


@pytest.mark.parametrize(
    ("role", "point"),
    [("source", point) for point in SOURCE_HOLDS]
    + [("destination", point) for point in DESTINATION_HOLDS],
)
async def test_a_move_is_held_seen_and_released(role: str, point: str) -> None:
    holds = LabHolds(enabled=True)
    holds.arm(point, role)
    held = asyncio.create_task(holds.reach(point, vm="web", role=role))
    assert await holds.wait_reached(point, role, timeout=1) == "web"
    assert holds.view()["held"] == [{"point": point, "role": role, "vm": "web"}]
    assert not held.done()
    await holds.release(point)
    async with asyncio.timeout(1):
        await held
    assert holds.view() == {"armed": [], "held": []}


async def test_a_held_move_that_is_stopped_leaves_no_trace() -> None:
    holds = LabHolds(enabled=True)
    holds.arm("precopy", "source")
    held = asyncio.create_task(holds.reach("precopy", vm="web", role="source"))
    await holds.wait_reached("precopy", "source", timeout=1)
    held.cancel()
    await asyncio.wait({held})
    assert holds.view()["held"] == []
    with pytest.raises(TimeoutError):
        await holds.wait_reached("precopy", "source", timeout=0.05)
