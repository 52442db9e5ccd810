"""What counts as proof: pure judgements, and a device that a script of readings plays."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from godwit.model.errors import GodwitError
from godwit.model.power import PowerState
from godwit.power.device import AGAIN_S, Confirmed, Wanted, next_step
from godwit.power.errors import (
    PowerDenied,
    PowerFailed,
    PowerNotConfirmed,
    PowerUnavailable,
)

ON, OFF, CHANGING, UNKNOWN = PowerState.ON, PowerState.OFF, PowerState.CHANGING, PowerState.UNKNOWN


class Time:
    """A clock that jumps."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def realtime(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class Scripted:
    """Plays readings, the last for ever; ``takes`` is what becomes of commands."""

    label = "the scripted device"

    def __init__(
        self,
        readings: Iterable[PowerState | GodwitError],
        takes: Callable[[int], GodwitError | None] = lambda _: None,
    ) -> None:
        self._readings = list(readings)
        self._takes = takes
        self.commands: list[PowerState] = []

    async def read(self, *, deadline_s: float) -> PowerState:
        assert deadline_s > 0
        found = self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]
        if isinstance(found, GodwitError):
            raise found
        return found

    async def send(self, wanted: Wanted, *, deadline_s: float) -> None:
        assert deadline_s > 0
        self.commands.append(wanted)
        error = self._takes(len(self.commands))
        if error is not None:
            raise error

    async def aclose(self) -> None:
        """Nothing."""


SILENT = PowerUnavailable("no answer")


@pytest.mark.parametrize(
    ("seen", "told_s", "step"),
    [
        (OFF, None, "done"),  # found off: no command needed
        (OFF, 0.1, "done"),
        (ON, None, "send"),
        (ON, 1.0, "wait"),
        (ON, AGAIN_S, "send"),  # it accepted, and did nothing
        (CHANGING, None, "send"),
        (UNKNOWN, None, "send"),
        (UNKNOWN, 1.0, "wait"),
        (None, None, "wait"),
        (None, 100.0, "wait"),
    ],
)
def test_only_a_reading_of_off_is_done(
    seen: PowerState | None, told_s: float | None, step: str
) -> None:
    assert next_step(OFF, seen, told_s=told_s) == step


async def test_off_is_proven_by_the_reading_after_the_command() -> None:
    device = Scripted([ON, ON, CHANGING, OFF])
    proof = await Confirmed(device, Time()).off(deadline_s=10)
    assert (proof.state, proof.commands, proof.device) == (OFF, 1, device.label)
    assert proof.took_s == pytest.approx(0.75)
    assert device.commands == [OFF]


async def test_a_host_found_off_needs_no_command() -> None:
    device = Scripted([OFF])
    assert (await Confirmed(device, Time()).off(deadline_s=10)).commands == 0
    assert device.commands == []


async def test_a_command_whose_answer_was_lost_may_be_proven_all_the_same() -> None:
    lost = PowerNotConfirmed("no answer to the command")
    device = Scripted([ON, OFF], lambda _: lost)
    assert (await Confirmed(device, Time()).off(deadline_s=10)).state is OFF


@pytest.mark.parametrize("stuck", [ON, CHANGING, UNKNOWN])
async def test_a_state_that_does_not_change_is_no_proof(stuck: PowerState) -> None:
    device = Scripted([stuck])
    with pytest.raises(PowerNotConfirmed, match="was not seen within 12 s") as caught:
        await Confirmed(device, Time()).off(deadline_s=12)
    assert caught.value.exit_code == 6
    assert device.commands == [OFF, OFF, OFF]  # told again every five seconds


async def test_silence_before_any_command_says_that_nothing_was_done() -> None:
    with pytest.raises(PowerUnavailable, match="no answer"):
        await Confirmed(Scripted([SILENT]), Time()).off(deadline_s=3)


async def test_silence_after_the_command_is_no_proof() -> None:
    with pytest.raises(PowerNotConfirmed, match="no answer"):
        await Confirmed(Scripted([ON, SILENT]), Time()).off(deadline_s=3)


async def test_a_command_that_never_left_was_not_given() -> None:
    device = Scripted([ON], lambda _: SILENT)
    with pytest.raises(PowerUnavailable):
        await Confirmed(device, Time()).off(deadline_s=2)


async def test_a_refused_command_is_tried_again_and_told_at_the_end() -> None:
    busy = PowerFailed("it refused")
    device = Scripted([ON, ON, OFF], lambda number: busy if number == 1 else None)
    assert (await Confirmed(device, Time()).off(deadline_s=5)).commands == 2
    with pytest.raises(PowerNotConfirmed, match="it refused"):
        await Confirmed(Scripted([ON], lambda _: busy), Time()).off(deadline_s=2)


async def test_a_wrong_password_is_tried_once() -> None:
    reads = Scripted([PowerDenied("wrong"), OFF])
    with pytest.raises(PowerDenied):
        await Confirmed(reads, Time()).off(deadline_s=60)


async def test_a_reset_is_off_with_proof_and_then_on() -> None:
    device = Scripted([ON, OFF, OFF, ON])
    proof = await Confirmed(device, Time()).reset(deadline_s=10)
    assert proof.state is OFF
    assert device.commands == [OFF, ON]
    stuck = Scripted([ON])
    with pytest.raises(PowerNotConfirmed):
        await Confirmed(stuck, Time()).reset(deadline_s=3)
    assert ON not in stuck.commands
