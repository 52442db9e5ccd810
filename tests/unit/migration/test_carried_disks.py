"""Disks that only the source has: copied first, settled while the VM stands, dropped on any way
back."""

from __future__ import annotations

from pathlib import Path

import pytest
from move_rig import LabCarried, Rig
from virtual_time import virtual

from godwit.migration.plan import check_along
from godwit.model.errors import OperationFailed
from godwit.model.migration import Outcome
from godwit.model.vm import Disk, Pins, Vm


def along(path: Path) -> tuple[Rig, LabCarried]:
    rig = Rig(path, method="live")
    rig.carried = LabCarried(rig.witness)
    return rig, rig.carried


@virtual
async def test_disks_first_then_memory_and_settled_before_the_hand_over(tmp_path: Path) -> None:
    rig, carried = along(tmp_path)
    async with rig:
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        rig.order(
            "disks along: take in",
            "disks along: copy",
            "host1: vcpus stop",
            "disks along: settle",
            "record: host2 8 running committing",
            "host2: notes epoch 8",
            "disks along: taken in",
            "host2: cont",
        )
        assert carried.dropped == 0
        told = [one.progress for one in rig.published if "disks:" in one.progress.sentence]
        assert told, "progress in bytes"
        assert told[0].sentence == "disks: 1 MiB of 4 MiB"
        percents = [one.progress.percent for one in rig.published]
        assert percents == sorted(percents)


@pytest.mark.parametrize("step", ["copy", "settle"])
@virtual
async def test_a_copy_that_fails_is_dropped_and_the_vm_stays(tmp_path: Path, step: str) -> None:
    rig, carried = along(tmp_path)
    carried.refusal[step] = OperationFailed("no byte arrived", hint="")
    async with rig:
        report = await rig.play()
        assert (report.outcome, report.reason) == (Outcome.FAILED, "no byte arrived")
        assert carried.dropped == 1
        assert "disks along: taken in" not in rig.witness.effects


@virtual
async def test_a_cancel_while_disks_are_copied(tmp_path: Path) -> None:
    rig, carried = along(tmp_path)
    carried.arrived.clear()
    async with rig:
        told = rig._publish

        async def publish(record: object) -> None:
            await told(record)  # type: ignore[arg-type]
            if record.progress.sentence.startswith("disks:"):  # type: ignore[attr-defined]
                rig.move.cancel("tester")

        object.__setattr__(rig.move.move.world, "publish", publish)
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        assert carried.dropped == 1
        assert "host1: vcpus stop" not in rig.witness.effects


@pytest.mark.parametrize("point", ["pre-switchover", "committing", "completed"])
@virtual
async def test_called_off_later_the_source_goes_on_with_its_own(tmp_path: Path, point: str) -> None:
    rig, carried = along(tmp_path)
    async with rig:
        rig.at("source", point, lambda: rig.move.cancel("tester"))
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        assert carried.dropped == 1


def test_what_goes_along_is_said_and_what_cannot_is_refused() -> None:
    def vm(**more: object) -> Vm:
        values = {"id": "disk0", "volume": "v", "path": "/clusterstorage/v/web/a", "serial": "s"}
        one = Disk.model_validate({**values, "size_bytes": 2 << 30, "lun": 0, **more})
        pins = Pins(uuid="u", machine="m", cpu_model="c", accelerator="tcg")
        return Vm(name="web", cpus=1, memory_bytes=1 << 28, disks=(one,), pins=pins, created_at=0)

    assert check_along(vm(), method="quick") == []
    (good,) = check_along(vm(local=True), method="live")
    assert (good.result, good.message) == (
        "pass",
        "disk0 (2 GiB) goes along, copied while the VM runs",
    )
    (quick,) = check_along(vm(local=True), method="quick")
    (brokered,) = check_along(vm(local=True, format="vhdx"), method="live")
    assert (quick.result, brokered.result) == ("fail", "fail")
    assert "vm disk move web disk0" in brokered.hint
