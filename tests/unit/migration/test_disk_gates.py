"""Brokered disks change hands with the owner record: closed before the swap, opened after it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from move_rig import EPOCH_AT_START, LabDisks, Rig
from virtual_time import virtual

from godwit.model.errors import Conflict, OperationFailed, Unavailable
from godwit.model.migration import Outcome


def gated(path: Path, method: str = "live") -> tuple[Rig, LabDisks, LabDisks]:
    """A rig whose VM has brokered disks, not entered yet."""
    rig = Rig(path, method=method)
    here, there = LabDisks("host1", rig.witness), LabDisks("host2", rig.witness)
    rig.disks = {"host1": here, "host2": there}
    return rig, here, there


@pytest.mark.parametrize("method", ["live", "quick"])
@virtual
async def test_the_source_closes_before_the_swap_and_the_destination_opens_after_its_note(
    tmp_path: Path, method: str
) -> None:
    rig, here, there = gated(tmp_path, method)
    async with rig:
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        rig.order(
            "host1: vcpus stop",
            "host1: disks close",
            "record: host2 8 running committing",
            "host2: notes epoch 8",
            "host2: disks open at 8",
            "host2: cont",
        )
        assert not here.is_open
        assert there.is_open


@virtual
async def test_called_off_after_the_proof_point_the_source_opens_again(tmp_path: Path) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:
        rig.at("source", "completed", lambda: rig.move.cancel("tester"))
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        rig.order("host1: disks close", f"host1: disks open at {EPOCH_AT_START}", "host1: cont")
        assert here.is_open
        assert not there.is_open


@virtual
async def test_a_gate_that_does_not_close_keeps_the_vm_where_it_is(tmp_path: Path) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:
        here.stuck = OperationFailed("its broker does not die", hint="the path hangs")
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "its broker does not die" in report.reason
        assert not there.is_open
        assert not [one for one in rig.witness.effects if one.startswith("record: host2")]


@virtual
async def test_a_destination_that_cannot_open_gives_the_vm_back(tmp_path: Path) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:
        there.refusal = OperationFailed("the image is not there", hint="")
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "gave the VM back" in report.reason
        rig.order(
            "record: host2 8 running committing",
            f"host1: disks open at {EPOCH_AT_START + 2} unsynced",
            "host1: cont",
        )
        assert here.is_open


@virtual
async def test_a_destination_without_a_path_still_gives_the_vm_back(tmp_path: Path) -> None:
    """It cannot sync what its broker left; the source does, when it opens them."""
    rig, here, there = gated(tmp_path)
    async with rig:
        there.refusal = OperationFailed("the path is lost", hint="")
        there.pathless = OperationFailed("nor can it be synced", hint="")
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "gave the VM back" in report.reason
        rig.order(f"host1: disks open at {EPOCH_AT_START + 2} unsynced", "host1: cont")
        assert here.is_open


@virtual
async def test_a_destination_whose_broker_does_not_die_gives_nothing_back_before(
    tmp_path: Path,
) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:
        there.refusal = OperationFailed("the path hangs", hint="")
        there.stuck = OperationFailed("its broker does not die", hint="")

        async def free() -> None:
            await asyncio.sleep(5.0)
            assert not here.is_open
            there.stuck = None

        freeing = asyncio.create_task(free())
        report = await rig.play()
        await freeing
        assert report.outcome is Outcome.FAILED
        assert "gave the VM back" in report.reason
        assert here.is_open


@virtual
async def test_a_destination_closes_what_it_opened_before_it_gives_the_vm_back(
    tmp_path: Path,
) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:
        rig.at("destination", "started", lambda: setattr(rig.agent.gate, "broken", True))
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        rig.order("host2: disks open at 8", "host2: disks close", "record: host1 9 running")
        assert here.is_open
        assert not there.is_open


@virtual
async def test_a_copy_that_died_while_it_was_taken_over_opens_nothing_after_its_gift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:

        async def die_and_linger() -> None:
            assert rig.agent.qemu is not None
            await rig.agent.qemu.die()
            await given.wait()

        async def slow(_vm: str) -> None:  # what is cleaned up after the gift takes its time
            given.set()
            await asyncio.sleep(0.1)

        given = asyncio.Event()
        monkeypatch.setattr(rig.agent.guard, "disarm", slow)
        rig.at("destination", "take-over", die_and_linger)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert here.is_open
        assert not there.is_open
        assert "host2: disks open at 8" not in rig.witness.effects
        assert {incoming.phase for incoming in rig.agent.incoming.values()} == {"gone"}
        await rig.judge("host1")


@virtual
async def test_the_witness_sees_two_open_gates(tmp_path: Path) -> None:
    rig, _here, there = gated(tmp_path)
    async with rig:
        await there.open(8)
        assert rig.witness.violations == ["two hosts may write the brokered disks"]
        rig.witness.violations.clear()


@virtual
async def test_an_image_that_is_looked_at_for_a_moment_is_asked_for_again(tmp_path: Path) -> None:
    rig, here, _there = gated(tmp_path)
    async with rig:

        def back_but_not_at_once() -> None:
            here.refusal = Conflict("the image is in use by another process", hint="wait")
            asyncio.get_running_loop().call_later(1.0, setattr, here, "refusal", None)
            rig.move.cancel("tester")

        rig.at("source", "completed", back_but_not_at_once)
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        assert here.is_open
        await rig.judge("host1")


@virtual
async def test_a_source_whose_disks_do_not_open_yet_goes_on_and_waits_for_them(
    tmp_path: Path,
) -> None:
    rig, here, there = gated(tmp_path)
    async with rig:

        def nobody_lends() -> None:
            here.refusal = Unavailable("host2 was exporting them and is silent", hint="wait")
            rig.move.cancel("tester")

        rig.at("source", "completed", nobody_lends)
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        rig.order("host1: disks close", "host1: cont")
        assert not here.is_open
        assert not there.is_open
        assert any("host2 was exporting them" in line for line in report.log)
