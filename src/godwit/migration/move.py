"""One move in progress on its source: who asked for what, how far it is, and the stop signal.

Shared by the sequences (live, quick, post-copy). It acts on nothing by itself: it keeps the
timeline, the log of decisions, the record others see, and turns "cancel", "deadline", "the guest
shut down" and "QEMU died" into one signal that every wait listens to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from godwit.migration.timeline import Timeline
from godwit.migration.world import SourceWorld
from godwit.model.errors import Refused
from godwit.model.migration import Migration, MoveState, Outcome, Progress, Stage
from godwit.model.vm import Vm

T = TypeVar("T")


@dataclass(frozen=True)
class Stop:
    """Why a move must end before its swap."""

    outcome: Outcome
    reason: str


class MoveStopped(Exception):
    """Raised out of whatever the move was waiting for."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.reason)
        self.stop = stop


def fail(reason: str) -> MoveStopped:
    """The move cannot go on."""
    return MoveStopped(Stop(Outcome.FAILED, reason))


class Move:
    """State of one move that its steps share; belongs to one task."""

    def __init__(self, order: Migration, vm: Vm, world: SourceWorld) -> None:
        self.order = order
        self.vm = vm
        self.world = world
        self.timeline = Timeline(accepted_at=order.accepted_at)
        self.timeline.restore(order.stages)
        self.record = order.but(state=MoveState.RUNNING)
        self.committed = False
        self.no_way_back = False
        self.peer_strain = 1.0  # the destination's, as it last said
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._log: list[str] = list(order.log)
        self._percent = order.progress.percent
        self._telling: asyncio.Future[None] | None = None

    # The stop signal.

    def stop(self, outcome: Outcome, reason: str) -> None:
        """Ask the move to end; the first reason wins, and none counts after the swap."""
        if not self._stop.done() and not self.no_way_back:
            self._stop.set_result(Stop(outcome, reason))

    def cancel(self, by: str) -> None:
        """A person calls the move off. Refused once the owner has changed."""
        if self.no_way_back:
            raise Refused(
                f"too late to cancel: {self.vm.name} belongs to {self.order.destination}",
                hint=f"move it back: godwit vm migrate {self.vm.name} --to {self.order.source}",
            )
        self.stop(Outcome.CANCELLED, f"cancelled by {by}")

    def ignore_stops(self) -> None:
        """Forget a stop that was asked for: the only way left is forward."""
        if self._stop.done():
            self._stop = asyncio.get_running_loop().create_future()

    @property
    def stopping(self) -> Stop | None:
        """The stop that was asked for, if any."""
        return self._stop.result() if self._stop.done() else None

    def check(self) -> None:
        """Raise MoveStopped if the move was asked to end."""
        if self._stop.done():
            raise MoveStopped(self._stop.result())

    async def until_stopped(self, work: Coroutine[Any, Any, T], *, what: str) -> T:
        """The result of ``work``, unless the move is stopped first (then it is cancelled)."""
        self.check_or_close(work)
        task = asyncio.ensure_future(work)
        task.set_name(f"move {self.order.id}: {what}")
        try:
            waiting: set[asyncio.Future[Any]] = {task, self._stop}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise MoveStopped(self._stop.result())

    def check_or_close(self, work: Coroutine[Any, Any, T]) -> None:
        """Like ``check``, but closes work that will never be awaited."""
        if self._stop.done():
            work.close()
            raise MoveStopped(self._stop.result())

    async def hold(self, point: str) -> None:
        """A named hold point; a held move can still be stopped before its swap."""
        work = self.world.holds.reach(point, vm=self.vm.name, role="source")
        if self.no_way_back:
            await work
        else:
            await self.until_stopped(work, what=f"held at {point}")

    # What others see.

    def say(self, sentence: str) -> None:
        """Note a decision in words, once."""
        if sentence and (not self._log or self._log[-1] != sentence):
            self._log.append(sentence)

    @property
    def now(self) -> float:
        """The source's wall clock."""
        return self.world.clock.realtime()

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return max(0.0, self.order.accepted_at + self.order.limits.deadline_s - self.now)

    async def enter(self, stage: Stage, sentence: str = "") -> None:
        """Begin a stage and tell everybody."""
        if self.timeline.enter(stage, self.now):
            self.say(sentence)
            await self.tell(self.record.progress.but(stage=stage, sentence=sentence))

    def enter_quietly(self, stage: Stage) -> None:
        """Begin a stage without telling: while the VM is dark nothing is published."""
        self.timeline.enter(stage, self.now)

    async def tell(self, progress: Progress) -> None:
        """Publish progress; percent never runs backwards."""
        self._take(progress)
        await self.publish(self.record)

    def tell_beside(self, progress: Progress) -> None:
        """The same without waiting; left out while what was told before is still on its way.

        QEMU may stop the VM at any moment of a copy, and a store that is slow must not be what it
        waits for.
        """
        self._take(progress)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.ensure_future(self.world.publish(self.record))

    async def publish(self, record: Migration) -> None:
        """Publish a record after what is on its way: nothing older comes later."""
        await self.told()
        await self.world.publish(record)

    async def told(self) -> None:
        """Until nothing that was told is on its way any more."""
        if self._telling is not None:
            await asyncio.wait({self._telling})
            self._telling = None

    def _take(self, progress: Progress) -> None:
        self._percent = max(self._percent, min(100.0, progress.percent))
        self.record = self.snapshot(progress.but(percent=round(self._percent, 1)))

    def snapshot(self, progress: Progress) -> Migration:
        """The record as it stands now."""
        now = self.now
        return self.record.but(
            progress=progress,
            stages=self.timeline.stages(now),
            passes=self.timeline.passes(transferred=progress.bytes_transferred, now=now),
            bytes_transferred=progress.bytes_transferred,
            log=tuple(self._log),
        )

    def report(self, outcome: Outcome, reason: str) -> Migration:
        """End the timeline and make the final record."""
        self.timeline.end(self.now)
        blackout = self.timeline.blackout_ms
        total = self.timeline.total_ms
        progress = self.record.progress.but(
            stage=self.timeline.stage,
            percent=100.0 if outcome is Outcome.COMPLETED else self._percent,
            sentence=reason,
        )
        self.record = self.snapshot(progress).but(
            state=MoveState(outcome.value),
            outcome=outcome,
            reason=reason,
            ended_at=self.timeline.ended_at,
            total_ms=round(total, 3) if total is not None else None,
            blackout_ms=round(blackout, 3) if blackout is not None else None,
            clock_error_ms=round(self.timeline.clock_error_s * 1000, 3),
        )
        return self.record
