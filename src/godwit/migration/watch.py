"""What a source listens to during a move: QEMU's events, its process, the peer, the clock.

Background tasks that turn what they see into the move's stop signal and its timeline. They act
on nothing; all of them end with the move.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from godwit.migration.move import Move
from godwit.migration.peer import PeerSilent
from godwit.model.errors import GodwitError
from godwit.model.migration import Outcome
from godwit.qmp import EventStream, MonitorLost
from godwit.wire.clock import measure_offset

PING_S = 1.0
SILENT_PINGS = 3
CLOCK_EXCHANGES = 8


class Watchers:
    """The background of one move, as an async context manager."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self.clock_offset_s = 0.0
        self.clock_error_s = 0.0
        self.resumed_since_stop = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: EventStream | None = None

    async def __aenter__(self) -> Self:
        self._events = self.move.world.machine.monitor.events(
            "STOP", "RESUME", "SHUTDOWN", "RESET", "MIGRATION_PASS"
        )
        self._spawn(self._watch_events(self._events), "events")
        self._spawn(self._watch_exit(), "exit")
        self._spawn(self._watch_deadline(), "deadline")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._events is not None:
            self._events.close()

    def watch_peer(self) -> None:
        """The destination has prepared: from now on it must stay reachable."""
        self._spawn(self._watch_peer(), "peer")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"move {self.move.order.id}: watch {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            # A watcher that breaks must not leave the move unwatched.
            self.move.stop(Outcome.FAILED, f"internal fault in {task.get_name()}: {error!r}")

    async def _watch_events(self, events: EventStream) -> None:
        timeline = self.move.timeline
        with contextlib.suppress(MonitorLost):
            async for event in events:
                if event.name == "STOP":
                    self.resumed_since_stop = False
                    timeline.stopped_at, timeline.resumed_at = event.timestamp, None
                elif event.name == "RESUME":
                    self.resumed_since_stop = True
                    timeline.resumed_at = event.timestamp
                elif event.name == "MIGRATION_PASS":
                    progress = self.move.record.progress
                    timeline.pass_began(
                        int(event.data.get("pass", 0)),
                        event.timestamp,
                        transferred=progress.bytes_transferred,
                        dirty_rate=progress.dirty_bytes_per_s or 0.0,
                    )
                elif not self.move.committed:
                    what = "shut down" if event.name == "SHUTDOWN" else "was reset"
                    self.move.stop(Outcome.FAILED, f"the guest {what} during the move")

    async def _watch_exit(self) -> None:
        await self.move.world.machine.exited.wait()
        self.move.stop(Outcome.FAILED, f"the VM's QEMU on {self.move.world.host} died")

    async def _watch_deadline(self) -> None:
        move = self.move
        await move.world.clock.sleep(move.seconds_left)
        if not move.committed:
            limit = move.order.limits.deadline_s
            move.stop(Outcome.FAILED, f"not done within the deadline of {limit:g} s")

    async def _watch_peer(self) -> None:
        move, peer = self.move, self.move.world.peer
        await self._measure_clock()
        silent = 0
        while True:
            await move.world.clock.sleep(PING_S)
            try:
                state = await peer.ping(move.order.id, timeout=PING_S)
            except (PeerSilent, GodwitError) as error:
                silent += 1
                reason = str(error)
            else:
                silent = silent + 1 if not state.qemu_status else 0
                move.peer_strain = state.strain
                reason = state.reason or "its QEMU does not answer"
                if state.phase == "gone":
                    silent = SILENT_PINGS
            if silent >= SILENT_PINGS and not move.no_way_back:
                move.stop(Outcome.FAILED, f"{move.order.destination} is lost: {reason}")

    async def _measure_clock(self) -> None:
        """The offset of the peer's wall clock; without an answer the error stays unknown."""
        peer, clock = self.move.world.peer, self.move.world.clock
        # Side by side, so that two connections stand open from now on: the question at
        # pre-switchover must not wait for a handshake while a heartbeat holds the other one.
        with contextlib.suppress(PeerSilent, GodwitError):
            await asyncio.gather(
                peer.ping(self.move.order.id, timeout=PING_S), peer.clock(timeout=PING_S)
            )
        with contextlib.suppress(PeerSilent, GodwitError, ValueError):
            offset = await measure_offset(
                lambda: peer.clock(timeout=1.0), exchanges=CLOCK_EXCHANGES, now=clock.realtime
            )
            self.clock_offset_s, self.clock_error_s = offset.offset_s, offset.error_s
