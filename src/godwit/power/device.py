"""What a power device is to the rest of the house, and what counts as proof.

A device is asked to switch, and then *read*: only a reading that says ``off``, taken after we
began to ask, is proof that nothing runs on the host. That a command was accepted proves nothing;
a command whose answer was lost may be proven all the same. A host that is found off needs no
command. A device that keeps saying something else, or falls silent, is no proof, and says so
(``PowerNotConfirmed``).

Cancelling leaves the device as it is: perhaps asked, perhaps not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from godwit.model.errors import GodwitError, OutcomeUnknown
from godwit.model.power import PowerState
from godwit.model.world import Clock
from godwit.power.errors import (
    PowerDenied,
    PowerNotConfirmed,
    PowerNotTrusted,
    PowerUnavailable,
)

Wanted = Literal[PowerState.ON, PowerState.OFF]
Step = Literal["done", "send", "wait"]

READ_S = 5.0  # a device that is silent for longer is asked anew, on a new connection
AGAIN_S = 5.0  # a device that accepted and did nothing is told again
PAUSE_S = 0.25  # devices announce nothing, and a slow one needs a second or two for an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A reading of the wanted state: by what device, after how many seconds and commands.

    ``state`` ``off`` proves that at that moment nothing ran on the host.
    """

    state: PowerState
    device: str
    took_s: float
    commands: int = 0


class PowerDevice(Protocol):
    """One host's power. Every call has a deadline in seconds that covers all of it.

    Errors: those of `godwit.power.errors`.
    """

    async def state(self, *, deadline_s: float) -> PowerState:
        """What the device says now; changes nothing."""
        ...

    async def on(self, *, deadline_s: float) -> Proof:
        """Switch on; returns when the device says so."""
        ...

    async def off(self, *, deadline_s: float) -> Proof:
        """Cut the power; returns when the device has said that it is off, which is proof."""
        ...

    async def reset(self, *, deadline_s: float) -> Proof:
        """Off, with proof, then on; the deadline is for each. The proof is that of the off."""
        ...

    async def aclose(self) -> None:
        """Let go of the device: connections, a session."""
        ...


class Driver(Protocol):
    """How a sort of device is spoken to: one reading, one command. Errors as `PowerDevice`."""

    @property
    def label(self) -> str:
        """What and where, for people; without any secret."""
        ...

    async def read(self, *, deadline_s: float) -> PowerState:
        """The state as the device gives it."""
        ...

    async def send(self, wanted: Wanted, *, deadline_s: float) -> None:
        """Ask for a state, at once and without a word to the host's system."""
        ...

    async def aclose(self) -> None:
        """Let go of it."""
        ...


def next_step(wanted: Wanted, seen: PowerState | None, *, told_s: float | None) -> Step:
    """What to do after a reading (None: it failed). Pure.

    ``told_s``: how long ago the device accepted the command, None when it did not.
    """
    if seen is wanted:
        return "done"
    if seen is None:
        return "wait"  # one who does not answer a question would not take a command
    return "send" if told_s is None or told_s >= AGAIN_S else "wait"


class Confirmed:
    """A `PowerDevice` on a driver: commands, readings, and the judgement between them."""

    def __init__(self, driver: Driver, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock

    async def state(self, *, deadline_s: float) -> PowerState:
        """One reading."""
        return await self._driver.read(deadline_s=deadline_s)

    async def on(self, *, deadline_s: float) -> Proof:
        """Ask until it says that it is on."""
        return await self._reach(PowerState.ON, deadline_s)

    async def off(self, *, deadline_s: float) -> Proof:
        """Ask until it says that it is off."""
        return await self._reach(PowerState.OFF, deadline_s)

    async def reset(self, *, deadline_s: float) -> Proof:
        """A device's own reset cannot be proven by reading a state; two halves can."""
        proof = await self.off(deadline_s=deadline_s)
        await self.on(deadline_s=deadline_s)
        return proof

    async def aclose(self) -> None:
        """Let go of the driver."""
        await self._driver.aclose()

    async def _reach(self, wanted: Wanted, deadline_s: float) -> Proof:
        start = self._clock.monotonic()
        told_at: float | None = None
        commands = 0
        trouble: GodwitError | None = None
        while (left := start + deadline_s - self._clock.monotonic()) > 0:
            seen: PowerState | None = None
            try:
                seen = await self._driver.read(deadline_s=min(left, READ_S))
                now = self._clock.monotonic()
                step = next_step(wanted, seen, told_s=None if told_at is None else now - told_at)
                if step == "done":
                    return Proof(
                        state=wanted,
                        device=self._driver.label,
                        took_s=now - start,
                        commands=commands,
                    )
                if step == "send":
                    commands += 1
                    left = start + deadline_s - now
                    await self._driver.send(wanted, deadline_s=max(0.001, min(left, READ_S)))
                    told_at, trouble = self._clock.monotonic(), None
            except (PowerDenied, PowerNotTrusted):
                raise  # asking again would not help, and may lock us out
            except PowerUnavailable as error:
                # Nothing was switched by this attempt.
                commands -= seen is not None
                trouble = error
            except GodwitError as error:
                trouble = error
            await self._clock.sleep(min(PAUSE_S, max(0.0, left)))
        raise self._missed(wanted, deadline_s, commands, trouble)

    def _missed(
        self, wanted: Wanted, deadline_s: float, commands: int, trouble: GodwitError | None
    ) -> GodwitError:
        if commands == 0 and trouble is not None and not isinstance(trouble, OutcomeUnknown):
            return trouble
        why = f": {trouble.message}" if trouble else f", it never said {wanted.value}"
        return PowerNotConfirmed(
            f"{self._driver.label} was asked for {wanted.value}, which was not seen within "
            f"{deadline_s:g} s{why}",
            hint="take nothing for granted; look: godwit host power test HOST",
        )
