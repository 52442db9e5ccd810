"""Post-copy: the VM runs on the destination before all its memory is there.

The proof point differs: the source says ``postcopy-active`` *and* the destination's QEMU has left
``inmigrate`` (it reports ``postcopy-active`` already when it listens, which is too early). From
the swap on the source's QEMU is a page source and nobody may stop it until it says ``completed``.

A cut link leaves both in ``postcopy-paused``; the guest stands still on its next missing page.
A frozen link is not noticed by TCP for minutes, so a drain that moves no byte pauses the stream
itself, out-of-band, and picks it up again on a new port, until the deadline.
"""

from __future__ import annotations

import contextlib

from godwit.migration.handover import OwnerLink
from godwit.migration.move import Move, fail
from godwit.migration.peer import PeerSilent
from godwit.migration.stream import ENDED, Stream, wait_status
from godwit.model.errors import GodwitError
from godwit.qmp import EventStream, MonitorError, MonitorLost

STANDSTILL_S = 1.5
RECOVER_DEADLINE_S = 120.0
LOADED_S = 5.0
LOOK_S = 0.2


async def loaded_there(move: Move) -> None:
    """Wait until the destination's QEMU holds the device state; MoveStopped if it does not."""
    peer, clock = move.world.peer, move.world.clock
    until = clock.monotonic() + LOADED_S
    while clock.monotonic() < until:
        try:
            state = await peer.ping(move.order.id, timeout=2.0)
        except (PeerSilent, GodwitError):
            await clock.sleep(LOOK_S)  # its agent may be on its way back
            continue
        if state.qemu_status == "paused":
            return
        if state.phase == "gone":
            break
        await clock.sleep(0.002)
    raise fail(f"{move.order.destination} did not take the device state over")


async def drain(move: Move, link: OwnerLink, stream: Stream, events: EventStream) -> None:
    """Serve pages until ``completed``; recover the stream as often as it breaks.

    Raises MoveStopped when the memory left here cannot reach the destination any more.
    """
    await Drain(move, link, stream, events).run()


class Drain:
    """The source as a page source: what was sent so far, and since when nothing moves."""

    def __init__(self, move: Move, link: OwnerLink, stream: Stream, events: EventStream) -> None:
        self._move = move
        self._link = link
        self._stream = stream
        self._events = events
        self._sent = -1
        self._sent_at = move.world.clock.monotonic()
        self._broken_since: float | None = None

    async def run(self) -> None:
        """Until everything is over there."""
        while True:
            status = await self._look()
            if status == "completed":
                return
            if status in ENDED:
                raise fail(f"post-copy ended as {status}: memory left on the source was not taken")
            now = self._move.world.clock.monotonic()
            paused = status == "postcopy-paused"
            if paused or now - self._sent_at > STANDSTILL_S:
                await self._mend(now, paused=paused)
                continue
            with contextlib.suppress(TimeoutError, MonitorLost):
                await wait_status(self._events, ENDED | {"postcopy-paused"}, timeout=LOOK_S)

    async def _look(self) -> str:
        """The stream's status; notes whether bytes move. "silent" when QEMU does not answer."""
        move = self._move
        try:
            now = await self._stream.read(timeout=2.0)
        except MonitorLost:
            raise fail("the source's QEMU died with pages the destination still needed") from None
        except MonitorError:
            return "silent"
        if now.transferred != self._sent:
            self._sent, self._sent_at = now.transferred, move.world.clock.monotonic()
            if now.status == "postcopy-active":
                self._broken_since = None
        progress = move.record.progress.but(bytes_transferred=now.transferred)
        move.record = move.record.but(progress=progress)
        return now.status

    async def _mend(self, now: float, *, paused: bool) -> None:
        """The stream stands still: is it still wanted, and for how long is it broken?"""
        self._broken_since = now if self._broken_since is None else self._broken_since
        if now - self._broken_since > RECOVER_DEADLINE_S:
            raise fail(f"the broken stream could not be recovered in {RECOVER_DEADLINE_S:g} s")
        await self._link.settle()
        intent = self._link.owner.migration
        if intent is None or intent.id != self._move.order.id:
            raise fail(f"{self._move.order.destination} ended the VM before all memory was there")
        await self._reconnect(paused=paused)
        self._sent_at = self._move.world.clock.monotonic()

    async def _reconnect(self, *, paused: bool) -> None:
        """One attempt to go on over a new connection; a failed attempt is tried again."""
        move, stream, events = self._move, self._stream, self._events
        move.say("the post-copy stream is broken: the guest waits for pages; reconnecting")
        try:
            if not paused:
                await stream.monitor.execute_oob("migrate-pause", timeout=2.0)
                await wait_status(events, {"postcopy-paused"} | ENDED, timeout=5.0)
            where = await move.world.peer.recover(move.order.id, timeout=5.0)
            if where.tls_hostname:
                await stream.set_parameters(tls_hostname=where.tls_hostname)
            await stream.connect(f"tcp:{where.uri_host}:{where.uri_port}", resume=True)
            await wait_status(events, {"postcopy-active", "postcopy-paused"} | ENDED, timeout=5.0)
            move.say("the post-copy stream goes on")
        except (TimeoutError, MonitorError, PeerSilent, GodwitError) as error:
            move.say(f"reconnecting failed: {error}")
            # The next attempt waits a little: the link itself gives no event when it is back.
            await move.world.clock.sleep(0.3)
