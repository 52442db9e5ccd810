"""Post-copy: the VM runs on the destination before all its memory is there.

The proof point differs: the source says ``postcopy-active`` *and* the destination's QEMU has left
``inmigrate`` (it reports ``postcopy-active`` already when it listens, which is too early). From
the swap on the source's QEMU is a page source and nobody may stop it until it says ``completed``.

A cut link leaves both in ``postcopy-paused``; the guest stands still on its next missing page.
A frozen link is not noticed by TCP for minutes, so a drain that moves no byte pauses the stream
itself, out-of-band, and picks it up again on a new port, until the deadline.
"""

from __future__ import annotations

from godwit.migration.move import Move, fail
from godwit.migration.peer import PeerSilent
from godwit.migration.stream import ENDED, Stream, wait_status
from godwit.model.errors import GodwitError
from godwit.qmp import EventStream, MonitorError, MonitorLost

STANDSTILL_S = 1.5
RECOVER_DEADLINE_S = 120.0
LOADED_S = 5.0


async def loaded_there(move: Move) -> None:
    """Wait until the destination's QEMU holds the device state; MoveStopped if it does not."""
    peer, clock = move.world.peer, move.world.clock
    until = clock.monotonic() + LOADED_S
    while clock.monotonic() < until:
        state = await peer.ping(move.order.id, timeout=2.0)
        if state.qemu_status == "paused":
            return
        if state.phase == "gone":
            break
        await clock.sleep(0.002)
    raise fail(f"{move.order.destination} did not take the device state over")


async def drain(move: Move, stream: Stream, events: EventStream) -> None:
    """Serve pages until ``completed``; recover the stream as often as it breaks.

    Raises MoveStopped when the memory left here cannot reach the destination any more.
    """
    clock = move.world.clock
    broken_since: float | None = None
    sent, sent_at = -1, clock.monotonic()
    while True:
        try:
            now = await stream.read(timeout=2.0)
            status, transferred = now.status, now.transferred
        except MonitorLost:
            raise fail("the source's QEMU died with pages the destination still needed") from None
        except MonitorError:
            status, transferred = "silent", sent
        if status == "completed":
            move.record = move.record.but(
                progress=move.record.progress.but(bytes_transferred=transferred)
            )
            return
        if status in ENDED:
            raise fail(f"post-copy ended as {status}: memory left on the source was not taken")
        if transferred != sent:
            sent, sent_at = transferred, clock.monotonic()
            if status == "postcopy-active":
                broken_since = None
        paused = status == "postcopy-paused"
        if paused or clock.monotonic() - sent_at > STANDSTILL_S:
            broken_since = broken_since if broken_since is not None else clock.monotonic()
            if clock.monotonic() - broken_since > RECOVER_DEADLINE_S:
                raise fail(f"the broken stream could not be recovered in {RECOVER_DEADLINE_S:g} s")
            await _recover(move, stream, events, paused=paused)
            sent_at = clock.monotonic()
            continue
        try:
            await wait_status(events, ENDED | {"postcopy-paused"}, timeout=0.2)
        except TimeoutError:
            continue
        except MonitorLost:
            continue


async def _recover(move: Move, stream: Stream, events: EventStream, *, paused: bool) -> None:
    """One attempt to pick the stream up on a new connection; a failed attempt is tried again."""
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
