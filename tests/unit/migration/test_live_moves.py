"""Live moves on fake QEMUs: the good ways, the order of everything that counts, and cancelling."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from move_rig import EPOCH_AT_START, MOVE, Rig, host_info, stage_names
from virtual_time import virtual

from godwit.migration import policy
from godwit.model.errors import Refused
from godwit.model.migration import STAGES, Migration, MoveLimits, Outcome
from godwit.model.ownership import MoveIntent, OwnerState
from godwit.qemu.tree import Device


@virtual
async def test_the_good_way_in_its_order(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        owner = await rig.judge("host2")
        assert owner.epoch == EPOCH_AT_START + 1
        assert owner.migration is None
        rig.order(
            "record: host1 7 running intent",
            "host1: migrate",
            "host1: vcpus stop",
            "record: host1 7 running committing",
            "host1: migrate-continue",
            "host1: gate closes",
            "record: host2 8 running committing",
            "host2: notes epoch 8",
            "host2: gate opens",
            "host2: cont",
            "host2: vcpus run",
            "record: host2 8 running",
        )
        assert stage_names(report) == [stage.value for stage in STAGES]
        assert report.blackout_ms == pytest.approx(2.0, abs=0.5)
        assert report.total_ms == pytest.approx(79.1, abs=1)
        assert report.bytes_transferred == 64 << 20
        assert rig.agent.announced == 1
        rig.nothing_left()


class SlowToTell(Rig):
    """The store takes seconds for each word of progress."""

    async def _publish(self, record: Migration) -> None:
        if record.progress.sentence.startswith("pass "):
            await asyncio.sleep(3.0)
        await super()._publish(record)


@virtual
async def test_a_slow_store_of_progress_keeps_nobody_in_the_dark(tmp_path: Path) -> None:
    async with SlowToTell(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = 50e6
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert report.blackout_ms == pytest.approx(5.0, abs=5.0)
        assert any(one.progress.sentence.startswith("pass ") for one in rig.published)
        assert rig.published[-1].outcome is Outcome.COMPLETED  # nothing older comes later


@virtual
async def test_prepare_begins_only_after_the_intent_is_recorded(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.at("source", "setup", lambda: rig.witness.did("held at setup"))
        await rig.play()
        rig.order("record: host1 7 running intent", "held at setup", "host1: migrate")
        assert rig.agent.calls[0] == "prepare"


@virtual
async def test_the_clock_offset_of_the_hosts_is_taken_out_of_the_blackout(tmp_path: Path) -> None:
    async with Rig(tmp_path, skew=3.0) as rig:
        rig.qemu.migration.link_bytes_per_s = 20e6

        def skewed() -> None:
            assert rig.agent.qemu is not None
            rig.agent.qemu.clock = lambda: rig.clock.realtime() + 3.0

        rig.at("destination", "prepared", skewed)
        report = await rig.play()
        assert report.blackout_ms == pytest.approx(2.0, abs=0.5)


@virtual
async def test_a_paused_vm_arrives_paused(tmp_path: Path) -> None:
    async with Rig(tmp_path, paused=True) as rig:
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        owner = await rig.judge("none")
        assert (owner.host, owner.paused, owner.state) == ("host2", True, OwnerState.RUNNING)
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.run_state == "paused"
        assert "host2: cont" not in rig.witness.effects
        assert report.blackout_ms is None


@virtual
async def test_a_paused_vm_stays_paused_when_the_move_fails(tmp_path: Path) -> None:
    async with Rig(tmp_path, paused=True) as rig:
        rig.at("source", "completed", lambda: rig.move.cancel("ann"))
        report = await rig.play()
        assert report.outcome is Outcome.CANCELLED
        owner = await rig.judge("none")
        assert (owner.host, owner.migration) == ("host1", None)
        assert rig.gate.is_open
        assert "host1: cont" not in rig.witness.effects


@pytest.mark.parametrize("stage", ["setup", "precopy", "pre-switchover", "committing", "completed"])
def test_cancelled_at_each_stage_the_vm_runs_on_here(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.at("source", stage, lambda: rig.move.cancel("ann"))
            report = await rig.play()
            assert (report.outcome, report.reason) == (Outcome.CANCELLED, "cancelled by ann")
            owner = await rig.judge("host1")
            assert (owner.epoch, owner.migration) == (EPOCH_AT_START, None)
            assert rig.gate.is_open
            assert rig.agent.qemu is None or rig.agent.qemu.dead
            rig.nothing_left()

    scenario()


@virtual
async def test_the_record_changes_before_the_vm_runs_again(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.at("source", "completed", lambda: rig.move.cancel("ann"))
        await rig.play()
        rig.order(
            "host1: gate closes",
            "record: host1 7 running",
            "host1: gate opens",
            "host1: cont",
            "host1: vcpus run",
            "host1: announce",
            "host1: announce-self",
        )


@pytest.mark.parametrize("stage", ["swapped", "running"])
def test_after_the_swap_a_cancel_is_refused(tmp_path: Path, stage: str) -> None:
    refused: list[str] = []

    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:

            def cancel() -> None:
                with pytest.raises(Refused, match="too late to cancel") as error:
                    rig.move.cancel("ann")
                refused.append(error.value.hint)

            rig.at("source", stage, cancel)
            report = await rig.play()
            assert report.outcome is Outcome.COMPLETED
            await rig.judge("host2")

    scenario()
    assert refused == ["move it back: godwit vm migrate web --to host1"]


@virtual
async def test_a_deadline_that_passes_in_pre_copy(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(deadline_s=5)) as rig:
        rig.qemu.migration.link_bytes_per_s = 1e6
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert report.reason == "not done within the deadline of 5 s"
        assert report.total_ms == pytest.approx(5000, abs=300)
        await rig.judge("host1")


@virtual
async def test_a_guest_that_shuts_down_ends_its_move(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.qemu.migration.link_bytes_per_s = 1e7
        move = asyncio.create_task(rig.play())
        await asyncio.sleep(1)
        rig.qemu.guest_shutdown()
        report = await move
        assert report.outcome is Outcome.FAILED
        assert report.reason == "the guest shut down during the move"
        owner = await rig.judge("none")
        assert (owner.host, owner.migration) == ("host1", None)
        assert "host1: cont" not in rig.witness.effects  # a guest that is off is not switched on
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.dead


@virtual
async def test_another_move_of_the_vm_is_refused_without_a_trace(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        from godwit.model import keys, ownership
        from godwit.store.records import encode

        other = MoveIntent(id="m-0", method="live", source="host1", destination="host3")
        bound = ownership.begin_move(await rig.owner(), other)
        await rig.store.put(keys.vm_owner("web"), encode(bound))
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert report.reason == "cannot move: the VM is being moved by m-0"
        owner = await rig.judge("host1")
        assert owner == bound
        assert rig.agent.calls == ["abort"] or rig.agent.calls == []


@virtual
async def test_a_different_machine_over_there_is_found_before_a_byte_is_sent(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path) as rig:
        rig.machine.tree = rig.machine.tree.but(
            devices=(Device(id="nic0", driver="virtio-net-pci"),)
        )
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "nic0 (virtio-net-pci) is missing there" in report.reason
        await rig.judge("host1")
        assert "host1: migrate" not in rig.witness.effects
        rig.nothing_left()


@virtual
async def test_capabilities_and_parameters_are_all_set(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await rig.play()
        on = {name for name, state in rig.qemu.migration.capabilities.items() if state}
        assert on == {"events", "return-path", "pause-before-switchover", "validate-uuid"}
        assert rig.qemu.migration.parameters["max-bandwidth"] == 0
        assert rig.qemu.migration.parameters["downtime-limit"] == policy.FIRST_LIMIT_MS
        assert rig.qemu.migration.parameters["avail-switchover-bandwidth"] == 125_000_000
        assert rig.agent.qemu is not None
        theirs = rig.agent.qemu.migration
        assert {n for n, s in theirs.capabilities.items() if s} == {
            "events", "return-path", "validate-uuid", "late-block-activate",
        }  # fmt: skip
        assert theirs.parameters["announce-rounds"] == 1
        assert host_info("host1").migration_rate_bits == 1_000_000_000


@virtual
async def test_a_writer_faster_than_the_link_ends_in_words_or_moves_when_allowed(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = 50e6, 100e6
        guest.working_set_bytes = 48 << 20
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "it does not converge within the budget of 300 ms" in report.reason
        assert "--allow-postcopy or --allow-throttle" in report.reason
        assert report.total_ms is not None
        assert report.total_ms < 60_000
        await rig.judge("host1")
        assert guest.parameters["downtime-limit"] == 220


@virtual
async def test_throttled_until_it_fits(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(allow_throttle=True)) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = 50e6, 100e6
        guest.working_set_bytes = 48 << 20
        throttle = rig.throttle

        def slower(quota: float) -> None:
            throttle(quota)
            guest.dirty_bytes_per_s = 100e6 * quota

        object.__setattr__(rig.move.move.world, "throttle", slower)
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert rig.quotas
        assert rig.quotas[0] < 1.0
        await rig.judge("host2")
        assert any("vCPUs held to" in sentence for sentence in report.log)


@virtual
async def test_post_copy_finishes_what_pre_copy_cannot(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(allow_postcopy=True)) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = 50e6, 100e6
        guest.working_set_bytes = 48 << 20
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        owner = await rig.judge("host2")
        assert owner.migration is None
        rig.order(
            "record: host1 7 running committing",
            "host1: migrate-continue",
            "host1: gate closes",
            "record: host2 8 running page-source",
            "host2: cont",
            "record: host2 8 running",
        )
        assert any("finishing by post-copy" in sentence for sentence in report.log)
        assert report.id == MOVE
