"""Keeps QEMU from stopping the VM while processors are strained: does what ``calm`` decides.

QEMU stops the VM by itself once what is left fits into the downtime limit at the bandwidth that
is stated for the switch-over. Both can be set at any time of a copy, so a tiny product of the two
shuts that door; a limit of 0 does not (QEMU 10 then takes an estimate of nothing left for nothing).
"""

from __future__ import annotations

import random

from godwit.migration import calm
from godwit.migration.calm import Step
from godwit.migration.move import Move
from godwit.migration.stream import Reading, Stream

SHUT = {"downtime_limit": 1, "avail_switchover_bandwidth": 4_096_000}
"""Milliseconds and bytes/s: together less than one page."""
TRICKLE_BYTES_PER_S = 10
"""The least QEMU knows (a tenth of a second's share must not be 0): one piece each 100 ms."""
SAMPLE_S = 0.2
DEADLINE_SHARE = 0.25
"""A move waits for at most this part of the time until its deadline."""


class HoldBack:
    """The waiting of one move. ``look`` with every sample of its copy."""

    def __init__(self, move: Move, stream: Stream) -> None:
        self._move = move
        self._stream = stream
        self._state = calm.Waiting()
        self._bounds = calm.bounds(move.order.limits.max_blackout_ms)
        self._rate = move.world.info.migration_rate_bits // 8
        self._pass_number, self._pass_began = 0, 0.0
        move.world.strain()  # what comes later is measured from here

    @property
    def waiting(self) -> bool:
        """Whether the copy is held up."""
        return self._state.trickling

    @property
    def look_s(self) -> float:
        """Seconds until the next look: pages of zeros go by at gigabytes a second."""
        return SAMPLE_S / 2 if self._state.shut and not self._state.trickling else SAMPLE_S

    def stopped(self) -> None:
        """QEMU has stopped the VM."""
        if self._state.trickling:
            self._move.say("nothing was left to copy: the VM is stopped on strained processors")

    async def look(self, now: Reading, *, limit_ms: float) -> str:
        """Take a sample into account; the sentence that others should see, if there is one."""
        move = self._move
        strain = max(move.world.strain(), move.peer_strain)
        at = move.world.clock.monotonic()
        if now.pass_number != self._pass_number:
            self._pass_number, self._pass_began = now.pass_number, at
        near = calm.is_near(
            now.remaining,
            rewritten=self._rewritten(now, at),
            link_bytes_per_s=self._rate or now.link_bytes_per_s,
            limit_ms=limit_ms,
        )
        self._state, step, words = calm.decide(
            self._state,
            self._bounds,
            at=at,
            strain=strain,
            near=near and now.pass_number > 0,
            lot=random.random(),  # noqa: S311 - who goes first is no secret
            patience_s=min(calm.PATIENCE_S, DEADLINE_SHARE * move.seconds_left),
        )
        move.say(words)
        if step is Step.SHUT:
            await self._stream.set_parameters(**SHUT)
        elif step is Step.TRICKLE:
            await self._stream.set_parameters(**SHUT, max_bandwidth=TRICKLE_BYTES_PER_S)
        elif step is Step.OPEN:
            await self._open(limit_ms)
        return words

    async def limit(self, limit_ms: float) -> None:
        """The policy allows a longer pause; while the door is shut that waits."""
        if not self._state.shut:
            await self._stream.set_parameters(downtime_limit=round(limit_ms))

    async def end(self, limit_ms: float) -> None:
        """Do not wait (any more): the move goes another way."""
        if self._state.shut:
            await self._open(limit_ms)
        self._state = calm.Waiting(over=True)

    def _rewritten(self, now: Reading, at: float) -> float | None:
        """What the guest will have written when this pass ends, if it goes on like this."""
        speed = now.link_bytes_per_s or self._rate
        if now.pass_number < 2 or not speed:
            return None
        return now.dirty_bytes_per_s * (at - self._pass_began + now.remaining / speed)

    async def _open(self, limit_ms: float) -> None:
        await self._stream.set_parameters(
            downtime_limit=round(limit_ms),
            avail_switchover_bandwidth=self._rate,
            max_bandwidth=0,
        )


class NoHoldBack(HoldBack):
    """A QEMU that knows no bandwidth for the switch-over (before 8.2) stops the VM as it likes."""

    async def look(self, now: Reading, *, limit_ms: float) -> str:
        """Nothing to do."""
        return ""
