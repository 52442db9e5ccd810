"""Whole scenarios as people read them: the report's sentences and every effect with its time.

``tests/golden/migration/<name>.txt`` holds what is expected. With GODWIT_GOLDEN=write the files are
written anew; read the difference before committing it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from move_rig import Rig
from virtual_time import run

from godwit.model.migration import MoveLimits

GOLDEN = Path(__file__).parents[2] / "golden" / "migration"
Arrange = Callable[[Rig], Awaitable[None] | None]


def _nothing(rig: Rig) -> None:
    """The good way."""


def _outrun(rig: Rig) -> None:
    guest = rig.qemu.migration
    guest.link_bytes_per_s, guest.dirty_bytes_per_s = 50e6, 100e6
    guest.working_set_bytes = 48 << 20


def _cancel_at(stage: str) -> Arrange:
    return lambda rig: rig.at("source", stage, lambda: rig.move.cancel("ann"))


def _refuse_cont(rig: Rig) -> None:
    def refuse() -> None:
        assert rig.agent.qemu is not None
        rig.agent.qemu.fail("cont", 'Failed to get "write" lock')

    rig.at("destination", "take-over", refuse)


def _freeze_destination(rig: Rig) -> None:
    def freeze() -> None:
        assert rig.agent.qemu is not None
        rig.agent.qemu.freeze()

    rig.at("source", "committing", freeze)


def _lose_destination(rig: Rig) -> None:
    rig.at("source", "completed", rig.agent.die)


def _lose_store(rig: Rig) -> None:
    def away() -> None:
        rig.store.faults.unavailable = True
        asyncio.get_running_loop().call_later(
            20, lambda: setattr(rig.store.faults, "unavailable", False)
        )

    rig.at("source", "completed", away)


def _source_dies_loaded(rig: Rig) -> None:
    rig.at("source", "completed", rig.qemu.die)


SCENARIOS: dict[str, tuple[Arrange, str, MoveLimits, str]] = {
    "live": (_nothing, "live", MoveLimits(), "host2"),
    "quick": (_nothing, "quick", MoveLimits(), "host2"),
    "postcopy": (_outrun, "live", MoveLimits(allow_postcopy=True), "host2"),
    "does-not-converge": (_outrun, "live", MoveLimits(), "host1"),
    "cancelled-in-precopy": (_cancel_at("precopy"), "live", MoveLimits(), "host1"),
    "cancelled-after-the-proof-point": (_cancel_at("completed"), "live", MoveLimits(), "host1"),
    "given-back": (_refuse_cont, "live", MoveLimits(), "host1"),
    "destination-qemu-frozen": (_freeze_destination, "live", MoveLimits(), "host1"),
    "destination-lost-after-the-swap": (_lose_destination, "live", MoveLimits(), "none"),
    "store-away-before-the-swap": (_lose_store, "live", MoveLimits(), "host1"),
    "source-qemu-dies-after-completed": (_source_dies_loaded, "live", MoveLimits(), "host2"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_reads_as_before(tmp_path: Path, name: str) -> None:
    arrange, method, limits, runs_on = SCENARIOS[name]

    async def scenario() -> str:
        async with Rig(tmp_path, method=method, limits=limits) as rig:
            began = rig.clock.monotonic()
            rig.witness.clock = lambda: rig.clock.monotonic() - began
            result = arrange(rig)
            if result is not None:
                await result
            report = await rig.play()
            await rig.judge(runs_on)
            outcome = report.outcome.value if report.outcome else "none"
            lines = [f"outcome: {outcome}", f"reason: {report.reason}", "", "log:"]
            lines += [f"  {line}" for line in report.log]
            lines += ["", "effects (seconds):"]
            lines += [f"  {at:9.3f}  {what}" for at, what in rig.witness.timed]
            return "\n".join(lines).replace(str(tmp_path), "TMP") + "\n"

    found = run(scenario())
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GODWIT_GOLDEN") == "write":
        path.write_text(found)
    assert found == path.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(SCENARIOS)
