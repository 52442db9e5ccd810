"""The failure table on fake QEMUs: who dies, hangs or goes silent, and who runs afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from move_rig import EPOCH_AT_START, MOVE, Rig
from virtual_time import virtual

from godwit.migration.world import PRE_SWITCHOVER_S
from godwit.model import keys
from godwit.model.errors import Refused
from godwit.model.migration import MoveLimits, Outcome
from godwit.model.ownership import Owner, OwnerState
from godwit.store.records import encode

SOURCE_STAGES_BEFORE_SWAP = ("setup", "precopy", "pre-switchover", "committing", "completed")
Act = Callable[[], Awaitable[None] | None]


def destination_qemu(rig: Rig) -> object:
    assert rig.agent.qemu is not None
    return rig.agent.qemu


# The destination's QEMU.


@pytest.mark.parametrize("stage", ["precopy", "pre-switchover", "committing", "completed"])
def test_the_destinations_qemu_dies_before_the_swap(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:

            async def die() -> None:
                assert rig.agent.qemu is not None
                await rig.agent.qemu.die()
                await asyncio.sleep(0 if stage != "completed" else 30)  # held: the watcher notices

            rig.at("source", stage, die)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED, report.reason
            owner = await rig.judge("host1")
            assert (owner.epoch, owner.migration) == (EPOCH_AT_START, None)
            rig.nothing_left()

    scenario()


@pytest.mark.parametrize("stage", ["precopy", "pre-switchover", "committing"])
def test_the_destinations_qemu_freezes_before_the_swap(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:

            def freeze() -> None:
                assert rig.agent.qemu is not None
                rig.agent.qemu.freeze()

            rig.at("source", stage, freeze)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            owner = await rig.judge("host1")
            assert owner.migration is None
            assert rig.agent.qemu is not None
            assert rig.agent.qemu.dead  # killed by its own agent, frozen or not
            rig.nothing_left()

    scenario()


@virtual
async def test_frozen_at_the_last_pages_the_stream_is_cut_out_of_band(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def freeze() -> None:
            assert rig.agent.qemu is not None
            rig.agent.qemu.freeze()

        rig.at("source", "committing", freeze)
        report = await rig.play()
        assert "did not take the last pages within 3 s" in report.reason
        rig.order("host1: migrate-continue", "host1: vcpus run")
        assert report.blackout_ms is not None
        assert report.blackout_ms < 5000


@virtual
async def test_the_copy_dies_after_the_swap_and_is_given_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        async def die() -> None:
            assert rig.agent.qemu is not None
            await rig.agent.qemu.die()
            await asyncio.sleep(0.1)

        rig.at("destination", "take-over", die)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "host2 gave the VM back" in report.reason
        owner = await rig.judge("host1")
        assert (owner.epoch, owner.migration) == (EPOCH_AT_START + 2, None)
        assert rig.gate.is_open
        assert rig.machine.epoch == EPOCH_AT_START + 2  # else a restarted agent would end it
        rig.nothing_left()


@virtual
async def test_cont_refused_over_there_gives_the_vm_back_within_two_seconds(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def refuse() -> None:
            assert rig.agent.qemu is not None
            rig.agent.qemu.fail("cont", 'Failed to get "write" lock')

        rig.at("destination", "take-over", refuse)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "lock" in report.reason
        owner = await rig.judge("host1")
        assert owner.epoch == EPOCH_AT_START + 2
        assert report.blackout_ms is not None
        assert report.blackout_ms < 2000
        rig.order(
            "host2: notes epoch 8",
            "host2: cont",
            "host2: qemu dies",
            "host2: forgets its note",
            "record: host1 9 running",
            "host1: gate opens",
            "host1: cont",
        )


@virtual
async def test_a_gate_that_cannot_open_over_there_gives_the_vm_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def break_gate() -> None:
            assert rig.agent.gate is not None
            rig.agent.gate.broken = True

        rig.at("destination", "take-over", break_gate)
        report = await rig.play()
        assert "no such bridge" in report.reason
        assert (await rig.judge("host1")).epoch == EPOCH_AT_START + 2


@pytest.mark.parametrize("point", ["take-over", "started"])
def test_a_copy_that_freezes_before_cont_is_given_back(tmp_path: Path, point: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:

            def freeze() -> None:
                assert rig.agent.qemu is not None
                rig.agent.qemu.freeze()

            rig.at("destination", point, freeze)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            assert "host2 gave the VM back" in report.reason
            assert (await rig.judge("host1")).epoch == EPOCH_AT_START + 2
            assert rig.agent.qemu is not None
            assert rig.agent.qemu.dead
            assert report.blackout_ms is not None
            assert report.blackout_ms < 6000

    scenario()


@pytest.mark.parametrize("how", ["dies", "freezes", "dies after its answer"])
def test_once_cont_was_sent_nothing_is_given_back(tmp_path: Path, how: str) -> None:
    """A copy that may have run has written to its disks: the source's memory is void."""

    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:

            def arrange() -> None:
                qemu = rig.agent.qemu
                assert qemu is not None
                real = qemu.cmd_cont

                async def cont(args: dict[str, object]) -> object:
                    await real(args)
                    if how == "dies":
                        await qemu.die()
                    elif how == "freezes":
                        qemu.freeze()
                    else:  # the RESUME event is never seen
                        asyncio.get_running_loop().call_soon(
                            qemu.migration.background, qemu.die(), ""
                        )
                    return {}

                qemu._handlers["cont"] = cont

            rig.at("destination", "started", arrange)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED, report.reason
            owner = await rig.judge("none")
            assert (owner.host, owner.epoch) == ("host2", EPOCH_AT_START + 1)
            assert (owner.state, owner.migration) == (OwnerState.STOPPED, None)
            assert "host1: cont" not in rig.witness.effects
            assert rig.qemu.dead
            rig.nothing_left()

    scenario()


@pytest.mark.parametrize("agent", ["alive", "restarted"])
def test_a_swap_to_a_host_whose_copy_had_died_is_given_back(tmp_path: Path, agent: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:

            async def die() -> None:
                assert rig.agent.qemu is not None
                await rig.agent.qemu.die()
                if agent == "restarted":
                    await rig.agent.die()
                    assert await rig.agent.restart() == "nothing"
                await asyncio.sleep(0)

            rig.at("source", "completed", die)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            assert (await rig.judge("host1")).epoch == EPOCH_AT_START + 2

    scenario()


# The destination's agent and the way to it.


@pytest.mark.parametrize("stage", ["setup", "precopy", "pre-switchover"])
def test_the_destinations_agent_dies_before_commit(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.qemu.migration.link_bytes_per_s = 10e6  # longer than three pings
            rig.at("source", stage, rig.agent.die)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            assert "host2" in report.reason
            await rig.judge("host1")
            assert rig.witness.effects.count("record: host1 7 running") == 1
            if rig.agent.qemu is not None:
                await rig.agent.restart()
                await rig.settle()
                assert rig.agent.qemu.dead
            rig.nothing_left()

    scenario()


@virtual
async def test_a_peer_silent_at_pre_switchover_costs_little_darkness(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def cut() -> None:
            rig.peer.cut = True

        rig.at("source", "pre-switchover", cut)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "host2 did not answer in time" in report.reason
        await rig.judge("host1")
        assert report.blackout_ms is not None
        assert report.blackout_ms < 1000 * PRE_SWITCHOVER_S + 150
        assert "host1: migrate-continue" not in rig.witness.effects
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.dead  # without being told: the record no longer names it


@virtual
async def test_a_destination_that_is_only_slow_to_answer_after_the_swap(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.at("destination", "take-over", lambda: asyncio.sleep(17))
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.judge("host2")
        assert any(line.startswith("waiting for host2") for line in report.log)


@virtual
async def test_the_destinations_agent_dies_after_the_swap_and_comes_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.at("source", "completed", rig.agent.die)
        move = asyncio.create_task(rig.play())
        await asyncio.sleep(3.0)
        assert await rig.agent.restart() == "go-on-as-destination"
        report = await move
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.judge("host2")


@virtual
async def test_the_destinations_agent_dies_when_the_vm_already_runs_there(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        async def die() -> None:
            await asyncio.sleep(1)  # the record alone made it run there
            assert rig.witness.running == {"host2"}
            await rig.agent.die()

        rig.at("source", "swapped", die)
        move = asyncio.create_task(rig.play())
        await asyncio.sleep(3.0)
        assert await rig.agent.restart() == "go-on-as-destination"
        report = await move
        assert report.outcome is Outcome.COMPLETED, report.reason
        owner = await rig.judge("host2")
        assert owner.migration is None
        assert rig.witness.effects.count("host2: cont") == 1


@virtual
async def test_a_destination_lost_after_the_swap_leaves_a_paused_copy_and_words(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path) as rig:
        rig.at("source", "completed", rig.agent.die)
        report = await rig.play()
        assert report.outcome is Outcome.UNKNOWN
        assert "the copy here stays paused" in report.reason
        assert "godwit host show host2" in report.reason
        owner = await rig.judge("none")
        assert (owner.host, owner.epoch) == ("host2", EPOCH_AT_START + 1)
        assert not rig.qemu.dead
        assert rig.qemu.run_state == "postmigrate"
        assert not rig.gate.is_open
        assert report.total_ms is not None
        assert 120_000 < report.total_ms < 130_000


# The store.


@pytest.mark.parametrize("applied", [True, False], ids=["happened", "did not happen"])
def test_the_answer_to_the_swap_is_lost(tmp_path: Path, applied: bool) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.at(
                "source",
                "completed",
                lambda: rig.store.faults.outcome_unknown_next(applied=applied),
            )
            report = await rig.play()
            expected = Outcome.COMPLETED if applied else Outcome.FAILED
            assert report.outcome is expected, report.reason
            owner = await rig.judge("host2" if applied else "host1")
            assert owner.epoch == EPOCH_AT_START + (1 if applied else 0)
            rig.nothing_left()

    scenario()


@virtual
async def test_a_swap_that_arrives_late_must_fail(tmp_path: Path) -> None:
    """The lost request reaches the store after the roll-back: its revision is gone."""
    async with Rig(tmp_path) as rig:
        late: list[Owner] = []
        real, wanted = rig.store.txn, []

        async def txn(compare, then, orelse=(), *, timeout=None):  # type: ignore[no-untyped-def]
            for op in then:
                if op.key == keys.vm_owner("web") and b'"host":"host2"' in op.value and not wanted:
                    wanted.append((compare, then))
                    rig.store.faults.outcome_unknown_next(applied=False)
            return await real(compare, then, orelse, timeout=timeout)

        rig.store.txn = txn  # type: ignore[method-assign]
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        answer = await real(*wanted[0])
        late.append(await rig.owner())
        assert not answer.succeeded
        assert late[0].host == "host1"
        await rig.judge("host1")


@virtual
async def test_the_store_away_at_commit_calls_the_move_off(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def away() -> None:
            rig.store.faults.unavailable = True
            asyncio.get_running_loop().call_later(
                4, lambda: setattr(rig.store.faults, "unavailable", False)
            )

        rig.at("source", "pre-switchover", away)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "the hand-over could not be recorded" in report.reason
        await rig.judge("host1")
        assert report.blackout_ms is not None
        assert report.blackout_ms < 500  # the VM runs on at once; the record follows
        rig.nothing_left()


@virtual
async def test_the_store_away_after_the_proof_point_neither_runs_until_it_answers(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path) as rig:

        def away() -> None:
            rig.store.faults.unavailable = True
            asyncio.get_running_loop().call_later(20, back)

        def back() -> None:
            assert rig.witness.running == set()
            rig.store.faults.unavailable = False

        rig.at("source", "completed", away)
        report = await rig.play()
        assert report.outcome in (Outcome.COMPLETED, Outcome.FAILED)
        await rig.judge("host2" if report.outcome is Outcome.COMPLETED else "host1")
        assert report.blackout_ms == pytest.approx(20_000, abs=500)


@virtual
async def test_the_store_away_at_the_start_refuses(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.store.faults.unavailable = True
        report = await rig.move.run()
        rig.store.faults.unavailable = False
        assert report.outcome is Outcome.FAILED
        assert "the store does not answer" in report.reason
        await rig.judge("host1")
        assert rig.witness.epochs == [EPOCH_AT_START]  # nothing was written


@pytest.mark.parametrize("applied", [True, False], ids=["happened", "did not happen"])
def test_an_intent_whose_answer_was_lost_binds_nobody_for_ever(
    tmp_path: Path, applied: bool
) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.store.faults.outcome_unknown_next(applied=applied)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            owner = await rig.judge("host1")
            assert owner.migration is None
            rig.nothing_left()

    scenario()


@virtual
async def test_a_destination_without_a_lease_gets_nothing(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.at("source", "completed", lambda: _forget_lease(rig))
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert report.reason == "the store did not take the hand-over: host2 has no lease"
        owner = await rig.judge("host1")
        assert owner.epoch == EPOCH_AT_START
        rig.nothing_left()


async def _forget_lease(rig: Rig) -> None:
    await rig.store.delete(keys.host_lease("host2"))


@virtual
async def test_a_source_whose_own_lease_is_short_does_not_commit(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.guard.left = 4.0
        report = await rig.play()
        assert report.reason == "host1's own lease lasts only 4.0 s: not committing"
        await rig.judge("host1")
        assert "host1: migrate-continue" not in rig.witness.effects


@virtual
async def test_a_destination_whose_own_lease_is_short_gives_back(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.agent.guard.left = 4.0
        report = await rig.play()
        assert "host2's own lease does not hold" in report.reason
        assert (await rig.judge("host1")).epoch == EPOCH_AT_START + 2


@virtual
async def test_a_third_hand_in_the_record_ends_both_copies(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        async def fenced() -> None:
            third = Owner(host="host3", epoch=EPOCH_AT_START + 5, state=OwnerState.RUNNING)
            await rig.store.put(keys.vm_owner("web"), encode(third))

        rig.at("source", "completed", fenced)
        report = await rig.play()
        assert report.outcome is Outcome.UNKNOWN
        assert "third hand" in report.reason
        await rig.judge("none")
        assert rig.qemu.dead
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.dead


@virtual
async def test_a_third_hand_after_the_swap_ends_the_copy_here(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        async def fenced() -> None:
            await rig.agent.die()
            third = Owner(host="host3", epoch=EPOCH_AT_START + 5, state=OwnerState.RUNNING)
            await rig.store.put(keys.vm_owner("web"), encode(third))

        rig.at("source", "swapped", fenced)
        report = await rig.play()
        assert report.outcome is Outcome.UNKNOWN
        assert rig.qemu.dead
        assert "host1: cont" not in rig.witness.effects


# The source's QEMU.


@pytest.mark.parametrize("stage", ["setup", "precopy", "pre-switchover", "committing"])
def test_the_sources_qemu_dies_before_the_destination_holds_the_vm(
    tmp_path: Path, stage: str
) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.at("source", stage, rig.qemu.die)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            assert report.reason == "the VM's QEMU on host1 died"
            owner = await rig.judge("none")
            assert (owner.host, owner.epoch, owner.migration) == ("host1", EPOCH_AT_START, None)
            assert rig.agent.qemu is None or rig.agent.qemu.dead
            rig.nothing_left()

    scenario()


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
def test_the_sources_qemu_dies_in_device(tmp_path: Path, loaded: bool) -> None:
    """With the whole VM over there the move goes on; else the VM is down and D's copy ended."""

    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            migration = rig.qemu.migration
            migration.device_seconds = 0.5

            async def die_soon() -> None:
                async def fault() -> None:
                    await asyncio.sleep(0.2)
                    if loaded:  # the last byte was sent; only the answer is missing
                        assert rig.agent.qemu is not None
                        rig.agent.qemu.migration._finish()
                    await rig.qemu.die()

                rig.fault = asyncio.create_task(fault())  # type: ignore[attr-defined]

            rig.at("source", "committing", die_soon)
            report = await rig.play()
            if loaded:
                assert report.outcome is Outcome.COMPLETED, report.reason
                assert (await rig.judge("host2")).epoch == EPOCH_AT_START + 1
                assert any("going on" in line for line in report.log)
            else:
                assert report.outcome is Outcome.FAILED
                assert (await rig.judge("none")).host == "host1"
                assert rig.agent.qemu is not None
                assert rig.agent.qemu.dead
            rig.nothing_left()

    scenario()


@virtual
async def test_the_sources_qemu_dies_after_completed(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        async def die() -> None:
            await rig.qemu.die()
            await asyncio.sleep(1)

        rig.at("source", "completed", die)
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.judge("host2")


@pytest.mark.parametrize("stage", ["swapped", "running"])
def test_the_sources_qemu_dies_after_the_swap(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.at("source", stage, rig.qemu.die)
            report = await rig.play()
            assert report.outcome is Outcome.COMPLETED, report.reason
            await rig.judge("host2")
            rig.nothing_left()

    scenario()


@pytest.mark.parametrize("stage", ["precopy", "pre-switchover"])
def test_a_frozen_source_is_reported_and_left_alone(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.at("source", stage, rig.qemu.freeze)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            assert "this host's QEMU answers nothing: frozen" in report.reason
            assert not rig.qemu.dead
            owner = await rig.owner()
            assert (owner.host, owner.migration) == ("host1", None)
            assert rig.agent.qemu is not None
            assert rig.agent.qemu.dead
            rig.qemu.thaw()  # woken up later it simply runs on: it is the owner
            await rig.settle()
            await rig.judge("host1")

    scenario()


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "not loaded"])
def test_a_source_frozen_in_device(tmp_path: Path, loaded: bool) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.qemu.migration.device_seconds = 0.5

            async def freeze_soon() -> None:
                async def fault() -> None:
                    await asyncio.sleep(0.2)
                    if loaded:
                        assert rig.agent.qemu is not None
                        rig.agent.qemu.migration._finish()
                    rig.qemu.freeze()

                rig.fault = asyncio.create_task(fault())  # type: ignore[attr-defined]

            rig.at("source", "committing", freeze_soon)
            report = await rig.play()
            if loaded:
                assert report.outcome is Outcome.COMPLETED, report.reason
                rig.order("host1: qemu dies", "record: host2 8 running committing")
                await rig.judge("host2")
            else:
                assert report.outcome is Outcome.FAILED
                assert "frozen" in report.reason
                assert not rig.qemu.dead
                assert (await rig.owner()).host == "host1"

    scenario()


@virtual
async def test_qemu_refuses_to_go_on_here(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def refuse() -> None:
            rig.qemu.fail("cont", "Block node is read-only")
            rig.move.cancel("ann")

        rig.at("source", "completed", refuse)
        report = await rig.play()
        assert report.outcome is Outcome.FAILED  # not "cancelled": the VM does not run
        assert "then QEMU did not go on here" in report.reason


@virtual
async def test_a_bridge_that_vanished_does_not_hide_the_outcome(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def vanish() -> None:
            rig.gate.broken = True
            rig.move.cancel("ann")

        rig.at("source", "completed", vanish)
        report = await rig.play()
        assert "no such bridge" in report.reason
        assert report.outcome is Outcome.FAILED
        assert (await rig.owner()).migration is None


# The migration network.


@virtual
async def test_a_migration_network_that_leads_nowhere(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.unreachable = True
        report = await rig.play()
        assert report.outcome is Outcome.FAILED
        assert "host2 cannot be reached on the migration network: No route to host" in report.reason
        assert (await rig.judge("host1")).migration is None
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.dead
        rig.nothing_left()


@pytest.mark.parametrize("stage", ["precopy", "committing"])
def test_the_stream_breaks(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            rig.qemu.migration.device_seconds = 0.5

            async def cut_soon() -> None:
                async def fault() -> None:
                    await asyncio.sleep(0.01)
                    rig.qemu.cut_link()

                rig.fault = asyncio.create_task(fault())  # type: ignore[attr-defined]

            rig.at("source", stage, cut_soon)
            report = await rig.play()
            assert report.outcome is Outcome.FAILED
            assert "reset by peer" in report.reason
            await rig.judge("host1")
            assert rig.agent.qemu is not None
            assert rig.agent.qemu.dead

    scenario()


# The source's agent.


@pytest.mark.parametrize("stage", [*SOURCE_STAGES_BEFORE_SWAP, "swapped", "running"])
def test_the_sources_agent_dies_and_its_successor_adopts(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            reached = asyncio.Event()

            async def stay() -> None:
                reached.set()
                await asyncio.Event().wait()

            rig.at("source", stage, stay)
            first = asyncio.create_task(rig.move.run())
            await reached.wait()
            first.cancel()
            await asyncio.wait({first})
            await rig.machine.close()
            await asyncio.sleep(0.5)
            rig.machine = await rig.connect()
            rig.guard.armed.clear()
            rig.move = rig.make_move()
            report = await rig.move.adopt()
            await rig.settle()
            if stage in ("swapped", "running"):
                assert report.outcome is Outcome.COMPLETED, report.reason
                await rig.judge("host2")
            else:
                assert report.outcome is Outcome.FAILED
                owner = await rig.judge("host1")
                assert owner.migration is None
                assert rig.agent.qemu is None or rig.agent.qemu.dead
            rig.nothing_left()

    scenario()


@virtual
async def test_an_adopted_move_is_armed_again(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        armed: list[dict[str, tuple[str, str]]] = []

        async def die() -> None:
            raise asyncio.CancelledError

        rig.at("source", "swapped", die)
        with pytest.raises(asyncio.CancelledError):
            await rig.move.run()
        rig.guard.armed.clear()
        rig.at("source", "swapped", lambda: armed.append(dict(rig.guard.armed)))
        rig.move = rig.make_move()
        await rig.move.adopt()
        assert armed == [{"web": (MOVE, "source")}]


@virtual
async def test_an_adopted_page_source_serves_until_all_is_there(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(allow_postcopy=True)) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = 5e6, 10e6
        guest.working_set_bytes = 48 << 20

        async def die() -> None:
            raise asyncio.CancelledError

        rig.at("source", "running", die)
        with pytest.raises(asyncio.CancelledError):
            await rig.move.run()
        assert guest.status == "postcopy-active"
        assert (await rig.owner()).migration is not None
        rig.move = rig.make_move()
        report = await rig.move.adopt()
        assert guest.status == "completed"  # nobody quit it while pages were left
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.judge("host2")


@pytest.mark.parametrize("stage", ["committing", "completed"])
def test_with_post_copy_running_there_is_no_way_back(tmp_path: Path, stage: str) -> None:
    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path, limits=MoveLimits(allow_postcopy=True)) as rig:
            guest = rig.qemu.migration
            guest.link_bytes_per_s, guest.dirty_bytes_per_s = 50e6, 100e6
            guest.working_set_bytes = 48 << 20

            def cancel() -> None:
                with contextlib.suppress(Refused):
                    rig.move.cancel("ann")

            rig.at("source", stage, cancel)
            report = await rig.play()
            if stage == "committing":  # the last moment
                assert report.outcome is Outcome.CANCELLED
                await rig.judge("host1")
            else:
                assert report.outcome is Outcome.COMPLETED, report.reason
                await rig.judge("host2")

    scenario()


@virtual
async def test_an_agent_that_restarts_in_the_middle_of_post_copy_loses_nothing(
    tmp_path: Path,
) -> None:
    async with Rig(tmp_path, limits=MoveLimits(allow_postcopy=True)) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = 20e6, 40e6
        guest.working_set_bytes = 48 << 20
        seen: list[str] = []

        async def restart() -> None:
            await rig.agent.die()

            async def later() -> None:
                await asyncio.sleep(1)
                seen.append(await rig.agent.restart())

            rig.fault = asyncio.create_task(later())  # type: ignore[attr-defined]

        rig.at("source", "committing", restart)
        report = await rig.play()
        assert seen == ["go-on-as-destination"]
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.judge("host2")


@virtual
async def test_a_cut_post_copy_stream_is_picked_up_again(tmp_path: Path) -> None:
    async with Rig(tmp_path, limits=MoveLimits(allow_postcopy=True)) as rig:
        guest = rig.qemu.migration
        guest.link_bytes_per_s, guest.dirty_bytes_per_s = 20e6, 40e6
        guest.working_set_bytes = 48 << 20

        def cut() -> None:
            assert guest.status == "postcopy-active"
            rig.qemu.cut_link()

        rig.at("source", "running", cut)
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED, report.reason
        assert any("goes on" in line for line in report.log)
        await rig.judge("host2")


# The witness itself.


@virtual
async def test_the_witness_sees_a_planted_double_run(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def plant() -> None:
            rig.qemu.set_run_state("running")

        rig.at("source", "running", plant)
        await rig.play()
        assert any("host1 runs while ['host2'] runs" in line for line in rig.witness.violations)
        with pytest.raises(AssertionError):
            await rig.judge("host2")


@virtual
async def test_the_witness_sees_a_planted_unentitled_run(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        def plant() -> None:
            assert rig.agent.qemu is not None
            rig.agent.qemu.set_run_state("running")

        rig.at("source", "completed", plant)
        await rig.play()
        assert any("host2 runs but the record says" in line for line in rig.witness.violations)
