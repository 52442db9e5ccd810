"""Quick moves on fake QEMUs: save, hand over, restore, and the way back from each."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from move_rig import EPOCH_AT_START, Rig, stage_names
from virtual_time import virtual

from godwit.migration import quick
from godwit.model.migration import STAGES, Outcome


def image(rig: Rig) -> Path:
    return quick.image_path(rig.path, rig.vm, epoch=EPOCH_AT_START)


@virtual
async def test_the_good_way_in_its_order(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick") as rig:
        seen: list[bool] = []
        rig.at("destination", "started", lambda: seen.append(image(rig).exists()))
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert (await rig.judge("host2")).epoch == EPOCH_AT_START + 1
        rig.order(
            "record: host1 7 running intent",
            "host1: stop",
            "host1: migrate",
            "record: host1 7 running committing",
            "host1: gate closes",
            "record: host2 8 running committing",
            "host2: notes epoch 8",
            "host2: gate opens",
            "host2: cont",
            "record: host2 8 running",
        )
        assert seen == [True]
        assert not image(rig).exists()  # consumed, never restored twice
        assert stage_names(report) == [stage.value for stage in STAGES]
        assert report.blackout_ms is not None
        assert report.bytes_transferred == 64 << 20
        rig.nothing_left()


@virtual
async def test_return_path_and_pause_are_off_for_a_file(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick") as rig:
        await rig.play()
        assert {n for n, on in rig.qemu.migration.capabilities.items() if on} == {"events"}


@virtual
async def test_the_saved_memory_is_readable_by_its_qemu_alone_and_says_whose_it_is(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path, method="quick") as rig:
        found: list[object] = []

        def look() -> None:
            label = json.loads(image(rig).with_suffix(".json").read_bytes())
            found.extend([image(rig).stat().st_mode & 0o777, label["vm"], label["epoch"]])

        rig.at("source", "completed", look)
        await rig.play()
        assert found == [0o600, "web", EPOCH_AT_START]


@virtual
async def test_a_paused_vm_arrives_paused(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick", paused=True) as rig:
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert (await rig.judge("none")).host == "host2"
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.run_state == "paused"


@pytest.mark.parametrize("stage", ["setup", "precopy", "pre-switchover", "committing", "completed"])
def test_cancelled_at_each_stage_the_vm_runs_on_here(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path, method="quick") as rig:
            rig.at("source", stage, lambda: rig.move.cancel("ann"))
            report = await rig.play()
            assert report.outcome is Outcome.CANCELLED, report.reason
            assert (await rig.judge("host1")).migration is None
            assert not image(rig).exists()
            rig.nothing_left()

    scenario()


@virtual
async def test_a_load_that_fails_over_there_gives_the_vm_back(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick") as rig:

        def spoil() -> None:
            assert rig.agent.qemu is not None
            rig.agent.qemu.fail("migrate-incoming", "not a migration stream")

        rig.at("destination", "take-over", spoil)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "not a migration stream" in report.reason
        assert (await rig.judge("host1")).epoch == EPOCH_AT_START + 2
        assert not image(rig).exists()
        rig.nothing_left()


@virtual
async def test_an_image_of_another_vm_is_not_loaded(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick") as rig:

        def swap_labels() -> None:
            path = image(rig).with_suffix(".json")
            label = json.loads(path.read_bytes())
            path.write_text(json.dumps({**label, "uuid": "another"}))

        rig.at("destination", "take-over", swap_labels)
        report = await rig.play()
        assert "was saved from another VM, epoch or set of disks" in report.reason
        assert (await rig.judge("host1")).epoch == EPOCH_AT_START + 2


@virtual
async def test_a_volume_that_cannot_be_written_leaves_the_vm_running(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick") as rig:
        (tmp_path / "shared").write_text("not a directory")
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "shared" in report.reason
        assert (await rig.judge("host1")).migration is None


@virtual
async def test_a_save_that_fails_leaves_the_vm_running(tmp_path: Path) -> None:
    async with Rig(tmp_path, method="quick") as rig:
        rig.qemu.migration.link_bytes_per_s = 10e6

        async def full_soon() -> None:
            async def fault() -> None:
                await asyncio.sleep(2)
                rig.qemu.migration.break_link("No space left on device")

            rig.fault = asyncio.create_task(fault())  # type: ignore[attr-defined]

        rig.at("source", "pre-switchover", full_soon)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "No space left on device" in report.reason
        await rig.judge("host1")


@virtual
async def test_the_record_changed_by_somebody_else_at_commit(tmp_path: Path) -> None:
    """A lost compare-and-swap is an answer, not a fault of the agent."""
    async with Rig(tmp_path, method="quick") as rig:

        async def meddle() -> None:
            from godwit.model import keys
            from godwit.store.records import encode

            await rig.store.put(keys.vm_owner("web"), encode(await rig.owner()))

        rig.at("source", "pre-switchover", meddle)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert (await rig.judge("host1")).migration is None
        rig.nothing_left()


@pytest.mark.parametrize("stage", ["pre-switchover", "committing", "completed", "swapped"])
def test_the_sources_agent_dies_and_its_successor_adopts(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path, method="quick") as rig:

            async def die() -> None:
                raise asyncio.CancelledError

            rig.at("source", stage, die)
            with pytest.raises(asyncio.CancelledError):
                await rig.move.run()
            await asyncio.sleep(0.5)
            rig.move = rig.make_move()
            report = await rig.move.adopt()
            await rig.settle()
            if stage == "swapped":
                assert report.outcome is Outcome.COMPLETED, report.reason
                await rig.judge("host2")
            else:
                assert report.outcome is Outcome.FAILED
                await rig.judge("host1")
                assert not image(rig).exists()

    scenario()
