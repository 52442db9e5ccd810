"""The word that a source has let go, and what the cluster may do with a copy that was told so."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from move_rig import EPOCH_AT_START, MOVE, Rig
from virtual_time import virtual

from godwit.model import keys, ownership
from godwit.model.errors import Refused
from godwit.model.migration import Migration, MoveLimits, Outcome
from godwit.model.ownership import Owner
from godwit.store.records import CasFailed, Versioned

LONG_S = 3.0


def released(rig: Rig) -> bool:
    return rig.agent.qemu is not None and rig.agent.qemu.released


async def hand_over(rig: Rig, found: Versioned[Owner] | None = None) -> None:
    """What a failover writes: the swap of the move, by the record as it was decided on."""
    found = found or await rig.records.owner("web")
    assert found is not None
    after = ownership.swap(found.value, MOVE)
    await rig.records.cas(keys.vm_owner("web"), after, found.revision)


async def source_is_lost(rig: Rig, running: asyncio.Task[Migration]) -> None:
    """Its host: agent and QEMU, at once."""
    await rig.qemu.die()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def held_at_completed(rig: Rig) -> tuple[asyncio.Task[Migration], asyncio.Event]:
    """A move that stands after the proof point, and what lets it go on."""
    there, goes_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        there.set()
        await goes_on.wait()

    rig.at("source", "completed", hold)
    running = asyncio.ensure_future(rig.move.run())
    await there.wait()
    await asyncio.sleep(1.0)
    return running, goes_on


@virtual
async def test_a_swap_in_time_is_all_that_is_said(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        report = await rig.play()
        assert report.outcome is Outcome.COMPLETED
        assert "released" not in rig.agent.calls
        assert not released(rig)


@virtual
async def test_while_the_swap_is_slow_the_destination_knows(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        running, goes_on = await held_at_completed(rig)
        assert rig.agent.calls.count("released") == 1  # it was heard at the first try
        rig.order("host1: gate closes", "host2: notes that it was let go")
        goes_on.set()
        assert (await running).outcome is Outcome.COMPLETED
        await rig.settle()
        await rig.judge("host2")
        rig.nothing_left()


@virtual
async def test_it_is_told_again_until_it_is_heard(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        rig.peer.cut_only.add("released")
        running, goes_on = await held_at_completed(rig)
        assert not released(rig)
        rig.peer.cut_only.clear()
        await asyncio.sleep(LONG_S)
        assert released(rig)
        tries = rig.agent.calls.count("released")
        goes_on.set()
        assert (await running).outcome is Outcome.COMPLETED
        await rig.settle()
        assert rig.agent.calls.count("released") == tries


@virtual
async def test_a_word_too_early_or_too_late_is_refused(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:

        async def early() -> None:
            with pytest.raises(Refused, match="does not hold all of it"):
                await rig.agent.incoming[MOVE].release()
            rig.move.cancel("ann")

        rig.at("source", "precopy", early)
        await rig.play()
        with pytest.raises(Refused, match="was ended"):
            await rig.agent.incoming[MOVE].release()
        assert not released(rig)
        await rig.judge("host1")


@pytest.mark.parametrize("method", ["quick", "postcopy"])
def test_only_a_live_move_whose_memory_is_there_is_told_of(tmp_path: Path, method: str) -> None:
    @virtual
    async def scenario() -> None:
        limits = MoveLimits(allow_postcopy=method == "postcopy")
        async with Rig(tmp_path, method="quick" if method == "quick" else "live") as rig:
            if method == "postcopy":
                rig.limits = limits
                guest = rig.qemu.migration
                guest.link_bytes_per_s, guest.dirty_bytes_per_s = 50e6, 100e6
                guest.working_set_bytes = 48 << 20
                rig.move = rig.make_move()
            rig.at("source", "completed", lambda: asyncio.sleep(LONG_S))
            report = await rig.play()
            assert report.outcome is Outcome.COMPLETED, report.reason
            assert (report.strategy == "postcopy") == (method == "postcopy")
            assert "released" not in rig.agent.calls

    scenario()


@virtual
async def test_the_sources_host_is_lost_and_the_copy_goes_on(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        running, _ = await held_at_completed(rig)
        await source_is_lost(rig, running)
        assert rig.witness.running == set()  # the copy waits: the word alone lets nothing run
        await rig.settle()
        assert rig.witness.running == set()
        await hand_over(rig)
        await rig.settle()
        owner = await rig.judge("host2")
        assert owner.epoch == EPOCH_AT_START + 1
        rig.order(
            f"record: host2 {EPOCH_AT_START + 1} running committing",
            f"host2: notes epoch {EPOCH_AT_START + 1}",
            "host2: gate opens",
            "host2: vcpus run",
        )


@virtual
async def test_the_source_is_there_after_all(tmp_path: Path) -> None:
    """Its own swap comes second, and it takes the record for what it is: its success."""
    async with Rig(tmp_path) as rig:
        running, goes_on = await held_at_completed(rig)
        await hand_over(rig)
        goes_on.set()
        report = await running
        assert report.outcome is Outcome.COMPLETED, report.reason
        await rig.settle()
        owner = await rig.judge("host2")
        assert (owner.epoch, owner.migration) == (EPOCH_AT_START + 1, None)
        assert rig.qemu.dead


@virtual
async def test_a_source_that_was_cancelled_meanwhile_goes_on_by_the_record(tmp_path: Path) -> None:
    """Between the word and the takeover it took its own way back, or comes to it too late."""
    async with Rig(tmp_path) as rig:
        running, goes_on = await held_at_completed(rig)
        found = await rig.records.owner("web")
        rig.move.cancel("ann")
        goes_on.set()
        assert (await running).outcome is Outcome.CANCELLED
        with pytest.raises(CasFailed):
            await hand_over(rig, found)
        await rig.settle()
        await rig.judge("host1")
        assert rig.agent.qemu is not None
        assert rig.agent.qemu.dead
        rig.nothing_left()


@virtual
async def test_a_way_back_that_comes_second_is_none(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        running, goes_on = await held_at_completed(rig)
        await hand_over(rig)
        rig.move.cancel("ann")
        goes_on.set()
        assert (await running).outcome is Outcome.COMPLETED
        await rig.settle()
        await rig.judge("host2")
        assert "host1: vcpus run" not in rig.witness.effects[rig.witness.effects.index(
            "host1: vcpus stop"):]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_destinations_agent_is_restarted(tmp_path: Path, when: str) -> None:
    """Before the record names it or after: the note lies beside the copy, and the copy is kept."""

    @virtual
    async def scenario() -> None:
        async with Rig(tmp_path) as rig:
            running, _ = await held_at_completed(rig)
            await source_is_lost(rig, running)
            await rig.agent.die()
            if when == "after":
                await hand_over(rig)
            assert await rig.agent.restart() == "go-on-as-destination"
            if when == "before":
                await hand_over(rig)
            await rig.settle()
            await rig.judge("host2")

    scenario()


@virtual
async def test_a_copy_that_cannot_start_is_given_back_to_a_host_that_is_gone(
    tmp_path: Path,
) -> None:
    """The record then names the lost host at one epoch more: the cluster goes on from there."""
    async with Rig(tmp_path) as rig:
        running, _ = await held_at_completed(rig)
        await source_is_lost(rig, running)
        assert rig.agent.gate is not None
        rig.agent.gate.broken = True
        await hand_over(rig)
        await rig.settle()
        owner = await rig.judge("none")
        assert (owner.host, owner.epoch, owner.migration) == ("host1", EPOCH_AT_START + 2, None)
