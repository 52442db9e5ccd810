"""A VM is not stopped while processors are strained: what QEMU is told, and every way out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from move_rig import Rig
from virtual_time import virtual

from godwit.migration import calm, holdback, policy
from godwit.model.migration import MoveLimits, Outcome

SLOW = 50e6
"""Bytes/s of the fakes' link: the copy takes 1.3 s and is looked at six times."""


def until(rig: Rig, seconds: float, *, strain: float = 9.0) -> Callable[[], float]:
    """Strained for so long after the copy has begun."""
    end = rig.clock.monotonic() + seconds
    return lambda: strain if rig.clock.monotonic() < end else 1.0


def since(rig: Rig, seconds: float, *, strain: float = 9.0) -> Callable[[], float]:
    """Strained from then on."""
    begin = rig.clock.monotonic() + seconds
    return lambda: strain if rig.clock.monotonic() >= begin else 1.0


def told(rig: Rig, words: str) -> bool:
    return any(words in line for line in rig.published[-1].log)


@virtual
async def test_on_free_processors_nothing_is_held_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert report.total_ms == pytest.approx(1360, abs=50)
        assert not told(rig, "processors")


@pytest.mark.parametrize("host", ["host1", "host2"])
@virtual
async def test_the_vm_runs_on_until_the_processors_are_calm(tmp_path: Path, host: str) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        rig.strain[host] = until(rig, 5.0)
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.judge("host2")
        assert report.total_ms is not None
        assert report.total_ms > 4900
        assert report.blackout_ms is not None
        assert report.blackout_ms < 10
        assert told(rig, "the processors are strained (9 times as long): waiting to stop the VM")
        assert told(rig, "the processors are calm after")
        assert any("waiting to stop" in one.progress.sentence for one in rig.published)
        parameters = rig.qemu.migration.parameters
        assert parameters["max-bandwidth"] == 0
        assert parameters["avail-switchover-bandwidth"] == 125_000_000


@virtual
async def test_strain_that_does_not_end_is_waited_for_as_long_as_is_said(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        rig.strain["host1"] = lambda: 9.0
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert report.total_ms is not None
        least, most = calm.PATIENCE_S, calm.PATIENCE_S + calm.LAST_S + 1.8
        assert least < report.total_ms / 1000 < most
        assert told(rig, "still strained after 1")


@virtual
async def test_the_deadline_is_not_waited_away(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(deadline_s=8.0)) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        rig.strain["host1"] = lambda: 9.0
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert report.total_ms is not None
        assert report.total_ms < 6000


@virtual
async def test_a_larger_budget_takes_more_strain(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(max_blackout_ms=2000)) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        rig.strain["host1"] = lambda: 9.0
        report = await rig.play()
        assert not told(rig, "processors")
        assert report.total_ms == pytest.approx(1360, abs=50)


@virtual
async def test_a_move_that_waits_can_be_cancelled(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        rig.strain["host1"] = lambda: 9.0
        asyncio.get_running_loop().call_later(4.0, lambda: rig.move.cancel("root"))
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        assert told(rig, "waiting to stop the VM")
        await rig.judge("host1")


@virtual
async def test_the_next_move_begins_as_if_nothing_had_been_held_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        rig.strain["host1"] = lambda: 9.0
        asyncio.get_running_loop().call_later(4.0, lambda: rig.move.cancel("root"))
        await rig.play()
        assert rig.qemu.migration.parameters["max-bandwidth"] == holdback.TRICKLE_BYTES_PER_S
        await rig.move.way.make_ready()
        assert rig.qemu.migration.parameters["max-bandwidth"] == 0
        assert rig.qemu.migration.parameters["avail-switchover-bandwidth"] == 125_000_000


@virtual
async def test_a_qemu_without_the_parameter_stops_the_vm_as_it_likes(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = SLOW
        del rig.qemu.migration.parameters["avail-switchover-bandwidth"]
        rig.strain["host1"] = lambda: 9.0
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert report.total_ms == pytest.approx(1360, abs=50)


@pytest.mark.parametrize("means", ["throttle", "postcopy"])
@virtual
async def test_what_it_takes_to_converge_is_not_held_back(tmp_path: Path, means: str) -> None:
    limits = MoveLimits(allow_throttle=means == "throttle", allow_postcopy=means == "postcopy")
    async with Rig(tmp_path, limits=limits) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = SLOW, 2 * SLOW
        guest.ram_bytes, guest.working_set_bytes = 256 << 20, 128 << 20
        rig.strain["host1"] = since(rig, 6.0)
        throttle = rig.throttle

        def slower(quota: float) -> None:
            throttle(quota)
            guest.dirty_bytes_per_s = 2 * SLOW * quota

        object.__setattr__(rig.move.move.world, "throttle", slower)
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert report.strategy == ("postcopy" if means == "postcopy" else "throttled-precopy")
        assert not any("waiting to stop the VM" in line for line in report.log)
        assert guest.parameters["downtime-limit"] > holdback.SHUT["downtime_limit"]


@virtual
async def test_a_longer_pause_waits_for_calm_processors_too(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = SLOW, 0.95 * SLOW
        guest.ram_bytes, guest.working_set_bytes = 256 << 20, 40 << 20
        limits: list[int] = []
        strained, calm_at = since(rig, 6.0), rig.clock.monotonic() + 20.0

        def look() -> float:
            limits.append(guest.parameters["downtime-limit"])
            return strained() if rig.clock.monotonic() < calm_at else 1.0

        rig.strain["host1"] = look
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert any("the pause may now take" in line for line in report.log)
        assert any("the processors are calm after" in line for line in report.log)
        shut = limits.index(holdback.SHUT["downtime_limit"])
        words = [line for line in report.log if "the pause may" in line or "processors" in line]
        assert "the pause may" in words[0], words  # allowed, and waited with
        later = [limit for limit in limits[shut:] if limit != holdback.SHUT["downtime_limit"]]
        assert later[0] > policy.FIRST_LIMIT_MS  # not before the door opened, and then at once
