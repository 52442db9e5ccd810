"""Moving a VM away: the sequence on the source, and the way back from every step of it.

    setup      intent -> store; D prepares; device trees compared
    (transfer) a Way: live (pre-copy, maybe post-copy) or quick (save to a file).
               It ends at the *proof point*: S will not run by itself any more.
    handover   gate closed, then one transaction: owner = (D, epoch + 1)
    resume     D sees the record, notes, opens its gate, lets the vCPUs run
    announce   S quits its QEMU, frees the record

Any failure before the swap is known to have succeeded goes through ``_back_out``: the stream is
ended, the record changed so that a late swap must fail, and only then the VM runs here again.
Cancelling the task that runs ``run()`` leaves everything as it is, for an adopter to judge.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from godwit.migration import release
from godwit.migration.handover import OwnerLink, Verdict
from godwit.migration.move import Move, MoveStopped, Stop, fail
from godwit.migration.peer import PeerSilent, PrepareAsk, Prepared, TakenOver
from godwit.migration.stream import announce_self
from godwit.migration.watch import Watchers
from godwit.migration.world import SourceWorld, settle
from godwit.model import keys
from godwit.model.errors import Conflict, GodwitError
from godwit.model.migration import Migration, Outcome, Stage
from godwit.model.ownership import MoveIntent, OwnerState
from godwit.model.vm import Vm
from godwit.qemu.tree import DeviceTree
from godwit.qmp import MonitorError, MonitorLost
from godwit.store.api import put
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed, encode

PREPARE_S = 30.0
SWAP_S = 2.0
TAKE_OVER_S = 5.0
OPEN_PATIENCE_S = 5.0
_FAILURES = (
    MonitorError, PeerSilent, GodwitError, StoreError, CasFailed, TimeoutError, OSError, ValueError
)  # fmt: skip
"""What a step may fail with; anything else is a fault of ours."""
_ENDED_BY_GUEST = frozenset({"shutdown", "guest-panicked", "internal-error"})
"""Run states that no ``cont`` leaves: the VM's owner ends such a QEMU."""
DESTINATION_PATIENCE_S = 120.0
"""Seconds a source keeps its copy for a destination that owns the VM but does not answer."""


class Way(Protocol):
    """How the VM's state gets to the destination."""

    def ask(self) -> PrepareAsk:
        """What the destination must prepare."""
        ...

    async def make_ready(self) -> None:
        """Set up this side; runs while the destination prepares."""
        ...

    async def transfer(self, prepared: Prepared) -> None:
        """Bring everything over, up to the proof point. MoveStopped, MonitorError on failure."""
        ...

    async def end(self) -> str:
        """Stop the transfer: the final stream status, ``gone`` or ``frozen``."""
        ...

    async def drain(self) -> None:
        """After the swap: wait until the destination needs nothing from here any more."""
        ...

    async def adopt(self) -> bool:
        """After an agent's restart: find the transfer again; True when there is no way back."""
        ...

    async def undone(self) -> None:
        """The record says that the VM stays here: remove what was made for the destination."""
        ...

    @property
    def postcopy(self) -> bool:
        """True once the destination runs on pages that are still here."""
        ...


class SourceMove:
    """One move, driven by the source's agent. ``run`` once; ``cancel`` from anywhere."""

    def __init__(self, order: Migration, vm: Vm, world: SourceWorld) -> None:
        from godwit.migration.live import LiveWay
        from godwit.migration.quick import QuickWay

        self.move = Move(order, vm, world)
        intent = MoveIntent(
            id=order.id, method=order.method, source=world.host, destination=order.destination
        )
        self.link = OwnerLink(world.records, world.clock, vm=vm.name, intent=intent)
        self.way: Way = (LiveWay if order.method == "live" else QuickWay)(self.move, self.link)
        self.watchers = Watchers(self.move)
        self._bound = False

    def cancel(self, by: str) -> None:
        """Call the move off; Refused once the owner has changed."""
        self.move.cancel(by)

    async def run(self) -> Migration:
        """Carry the move out. Returns the final record; never raises for a failed move."""
        async with self.watchers:
            try:
                prepared = await self._setup()
                await self.way.transfer(prepared)
                await self._handover()
            except MoveStopped as stopped:
                return await self._back_out(stopped.stop)
            except _FAILURES as error:
                reason = await self._explain(error)
                return await self._back_out(Stop(Outcome.FAILED, reason))
            return await self._conclude()

    async def adopt(self) -> Migration:
        """Take over a move whose agent died: see ``recover`` for what is left to decide."""
        async with self.watchers:
            self._bound = True
            move = self.move
            move.enter_quietly(Stage.SETUP)
            await move.world.guard.arm(move.vm.name, move.order.id, "source")
            verdict = await self.link.adopt()
            one_way = await self.way.adopt()
            if verdict is Verdict.DESTINATION:
                self.move.no_way_back = True
                return await self._conclude()
            self.move.committed = True  # not known, so the careful way back
            if one_way:
                return await self._go_on_forward()
            reason = "the agent of the source was restarted during the move"
            return await self._back_out(Stop(Outcome.FAILED, reason))

    # Forward.

    async def _setup(self) -> Prepared:
        move, world = self.move, self.move.world
        asking = f"{world.host} asks {move.order.destination} to prepare"
        telling = asyncio.ensure_future(move.enter(Stage.SETUP, asking))
        try:
            owner = await self.link.begin(memory_bytes=move.vm.memory_bytes, timeout=5.0)
        finally:
            self._bound = self.link.bound
            await telling
        # A VM that stands paused shows no STOP; it does not run here by itself either.
        self.watchers.resumed_since_stop = not owner.paused
        await world.guard.arm(move.vm.name, move.order.id, "source")
        await move.hold("setup")
        ask = self.way.ask().but(epoch=owner.epoch, paused=owner.paused)
        prepared, tree = await move.until_stopped(self._both_sides(ask), what="prepare")
        if differences := tree.differences(prepared.devices):
            words = "; ".join(differences[:3])
            raise fail(f"the machine on {move.order.destination} differs: {words}")
        self.watchers.watch_peer()
        return prepared

    async def _both_sides(self, ask: PrepareAsk) -> tuple[Prepared, DeviceTree]:
        """Prepare there and here side by side; both are waited for, the first failure counts."""
        world = self.move.world
        there, here, ready = await asyncio.gather(
            world.peer.prepare(ask, timeout=PREPARE_S),
            world.machine.device_tree(),
            self.way.make_ready(),
            return_exceptions=True,
        )
        for result in (there, here, ready):
            if isinstance(result, BaseException):
                raise result
        assert isinstance(there, Prepared)  # noqa: S101 - narrows for the type checker
        assert isinstance(here, DeviceTree)  # noqa: S101
        return there, here

    async def _handover(self) -> None:
        self.move.world.gate.close()
        await self.move.world.disks.close()
        async with release.telling(self.move, whole=not self.way.postcopy):
            await self._swap()

    async def _swap(self) -> None:
        move, world = self.move, self.move.world
        await move.hold("completed")
        move.check()
        move.enter_quietly(Stage.HANDOVER)
        move.no_way_back = True  # from here a cancel is refused; taken back if the swap fails
        verdict = await self.link.swap(postcopy=self.way.postcopy, timeout=SWAP_S)
        waited_since = world.clock.monotonic()
        while verdict is Verdict.SOURCE and self.way.postcopy:
            # There is nothing to go back to, and the destination's lease may return.
            if world.clock.monotonic() - waited_since > DESTINATION_PATIENCE_S:
                break
            await world.clock.sleep(0.5)
            verdict = await self.link.swap(postcopy=True, timeout=SWAP_S)
        if verdict is Verdict.SOURCE:
            move.no_way_back = self.way.postcopy
            raise fail(f"the store did not take the hand-over: {self.link.refusal}")
        if verdict is Verdict.NEITHER:
            move.no_way_back = False
            raise fail("the owner record was changed by somebody else during the move")

    async def _conclude(self) -> Migration:
        move, world = self.move, self.move.world
        await world.holds.reach("swapped", vm=move.vm.name, role="source")
        move.enter_quietly(Stage.RESUME)
        taken = await self._taken_over()
        if isinstance(taken, Stop):
            return await self._not_taken_over(taken)
        if taken.resumed_at is not None:
            move.timeline.resumed_at = taken.resumed_at - self.watchers.clock_offset_s
            move.timeline.clock_error_s = self.watchers.clock_error_s
        move.enter_quietly(Stage.ANNOUNCE)
        await settle(move.vm, world.clock)
        sentence = f"{move.order.destination} runs the VM"
        move.say(sentence)
        telling = asyncio.ensure_future(
            move.tell(move.record.progress.but(stage=Stage.ANNOUNCE, sentence=sentence))
        )
        await world.holds.reach("running", vm=move.vm.name, role="source")
        if self.way.postcopy:
            await telling  # draining takes a while and tells more
        try:
            await self.way.drain()
        except MoveStopped as stopped:
            await telling
            return await self._lost(stopped.stop.reason)
        transferred = move.record.progress.bytes_transferred
        await asyncio.gather(telling, self._end_copy(), world.guard.disarm(move.vm.name))
        reason = f"{move.vm.name} runs on {move.order.destination} at epoch {self.link.epoch + 1}"
        move.say(reason)
        report = move.report(Outcome.COMPLETED, reason).but(bytes_transferred=transferred)
        await self.link.finish(also=(put(keys.migration(report.id), encode(report)),))
        await move.publish(report)
        return report

    async def _taken_over(self) -> TakenOver | Stop:
        """Wait until the destination runs; a Stop means it gave the VM back, or is lost."""
        move, world = self.move, self.move.world
        waited_since = world.clock.monotonic()
        reason = ""
        while True:
            try:
                return await world.peer.take_over(move.order.id, move.vm.name, timeout=TAKE_OVER_S)
            except PeerSilent as error:
                reason = f"{move.order.destination} does not answer: {error}"
            except GodwitError as error:
                reason = error.message
            verdict = await self.link.settle()
            if verdict is Verdict.SOURCE:
                return Stop(Outcome.FAILED, f"{move.order.destination} gave the VM back: {reason}")
            if verdict is Verdict.NEITHER:
                return Stop(Outcome.UNKNOWN, "the owner record was changed by a third hand")
            if self.link.owner.state is OwnerState.STOPPED:
                return Stop(
                    Outcome.FAILED, f"{move.vm.name} ended on {move.order.destination}: {reason}"
                )
            if self.link.owner.migration is None:
                return TakenOver(epoch=self.link.owner.epoch, resumed_at=None, started_at=move.now)
            waited = world.clock.monotonic() - waited_since
            if waited > DESTINATION_PATIENCE_S:
                return Stop(
                    Outcome.UNKNOWN,
                    f"{move.order.destination} owns the VM but has not said for {waited:.0f} s "
                    f"whether it runs ({reason}); the copy here stays paused. A person must look: "
                    f"godwit host show {move.order.destination}",
                )
            move.say(f"waiting for {move.order.destination}: {reason}")
            await world.clock.sleep(0.2)

    async def _not_taken_over(self, stop: Stop) -> Migration:
        """After the swap the VM does not run on the destination: whose is it now?

        Only a record that names the source again lets it run here.
        """
        self.move.say(stop.reason)
        if self.link.verdict is Verdict.SOURCE:
            return await self._run_here(stop)
        ended = self.link.owner.state is OwnerState.STOPPED
        if ended or self.link.verdict is Verdict.NEITHER:
            await self._end_copy()  # void: the VM's disks may have been written by others
        return await self._give_report(stop)

    async def _end_copy(self) -> None:
        """End this host's QEMU, whose vCPUs run no more; one that does not die is only told of.

        At once: it let go of its disks when it was paused, and has nothing left to write.
        """
        try:
            await self.move.world.machine.kill()
        except GodwitError as error:
            self.move.say(f"the copy on {self.move.world.host} does not end: {error}")

    # Back.

    async def _back_out(self, stop: Stop) -> Migration:
        """End the move so that the VM runs here, if it can run anywhere."""
        move = self.move
        move.say(stop.reason)
        if self.way.postcopy and move.no_way_back:
            return await self._lost(stop.reason)
        status = await self.way.end()
        if move.committed and status in ("gone", "frozen") and await self._loaded_there(status):
            return await self._go_on_without_source()
        if status == "completed":
            move.committed = True  # nothing runs here by itself any more: the record comes first
        if not self._bound:
            return await self._give_report(stop)
        verdict = await self.link.roll_back()
        if verdict is Verdict.DESTINATION:
            move.say("the swap had succeeded after all")
            move.no_way_back = True
            return await self._conclude()
        if verdict is Verdict.NEITHER:
            await self._end_copy()
            await self._tell_peer("the owner record names neither of us")
            return await self._give_report(
                Stop(
                    Outcome.UNKNOWN,
                    f"{stop.reason}; the owner record was changed by a third "
                    "hand, so this copy was ended",
                )
            )
        return await self._run_here(stop, status=status)

    async def _run_here(self, stop: Stop, *, status: str = "completed") -> Migration:
        world = self.move.world
        world.throttle(1.0)
        if status not in ("gone", "frozen"):
            try:
                await self._cont_here()
            except (MonitorError, TimeoutError, OSError, GodwitError) as error:
                reason = f"{stop.reason}; then QEMU did not go on here: {error}"
                stop = Stop(Outcome.FAILED, reason)
        elif status == "frozen":
            reason = f"{stop.reason}; this host's QEMU answers nothing: frozen"
            stop = Stop(Outcome.FAILED, reason)
        await self._tell_peer(stop.reason)
        await self.way.undone()  # late: a volume that does not answer must not hold the VM up
        return await self._give_report(stop)

    async def _cont_here(self) -> None:
        move, world = self.move, self.move.world
        gift = self._bound and world.machine.epoch != self.link.owner.epoch
        if gift:
            world.machine.amend(epoch=self.link.owner.epoch)  # it came with a new one
        now = await world.machine.status()
        if now.status in _ENDED_BY_GUEST:
            move.say(f"the guest ended by itself: QEMU says {now.status}")
            return
        world.gate.open()
        await self._open_disks(gift=gift)
        if not now.running and not self.link.owner.paused:
            await world.machine.cont()
        world.gate.announce()
        with contextlib.suppress(MonitorError):
            await announce_self(world.machine.monitor)
        move.say(f"the VM runs on {world.host}")

    async def _open_disks(self, *, gift: bool) -> None:
        """Open them again; while somebody has an image open for a moment, ask again.

        Nothing gets through a gate that stays closed: requests wait, or stop the VM.
        """
        world = self.move.world
        until = world.clock.monotonic() + OPEN_PATIENCE_S
        while True:
            try:
                # A destination that gave the VM back may have been unable to sync them.
                return await world.disks.open(world.machine.epoch, unsynced=gift)
            except GodwitError as error:
                if not isinstance(error, Conflict) or world.clock.monotonic() > until:
                    return self.move.say(f"its disks are not open yet: {error.message}")
            await world.clock.sleep(0.1)  # nothing tells that a lock is free

    async def _loaded_there(self, status: str) -> bool:
        """S's QEMU is gone or frozen after COMMITTING: does D hold the whole VM?

        A frozen one is killed first, so that it can never wake up and run.
        """
        if self.watchers.resumed_since_stop:
            return False
        with contextlib.suppress(PeerSilent, GodwitError):
            state = await self.move.world.peer.ping(self.move.order.id, timeout=2.0)
            if state.stream_status == "completed":
                if status == "frozen":
                    await self.move.world.machine.kill()
                return True
        return False

    async def _go_on_without_source(self) -> Migration:
        self.move.say("the source's QEMU is gone, the destination holds the whole VM: going on")
        return await self._go_on_forward()

    async def _go_on_forward(self) -> Migration:
        """Hand over although something broke: there is nothing here to go back to."""
        self.move.ignore_stops()
        self.move.no_way_back = True
        try:
            await self._handover()
        except MoveStopped as stopped:
            await self.link.roll_back()
            await self._tell_peer(stopped.stop.reason)
            return await self._give_report(stopped.stop)
        return await self._conclude()

    async def _lost(self, reason: str) -> Migration:
        """Post-copy could not be finished: the VM is lost with the link."""
        move = self.move
        await self._end_copy()
        await move.world.guard.disarm(move.vm.name)
        report = move.report(Outcome.FAILED, reason)
        await move.told()
        await self.link.finish(also=(put(keys.migration(report.id), encode(report)),))
        await move.publish(report)
        return report

    async def _tell_peer(self, reason: str) -> None:
        # A courtesy: the destination cleans up by itself when the record no longer names it.
        with contextlib.suppress(PeerSilent, GodwitError):
            await self.move.world.peer.abort(self.move.order.id, reason, timeout=2.0)

    async def _give_report(self, stop: Stop) -> Migration:
        move = self.move
        move.world.throttle(1.0)
        with contextlib.suppress(OSError, GodwitError):
            await move.world.guard.disarm(move.vm.name)
        report = move.report(stop.outcome, stop.reason)
        await move.publish(report)
        return report

    async def _explain(self, error: Exception) -> str:
        if isinstance(error, MonitorLost):
            # The exit follows the lost monitor within moments when QEMU died.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.move.world.machine.exited.wait()
            if self.move.world.machine.exited.is_set():
                return f"the VM's QEMU on {self.move.world.host} died"
        if isinstance(error, PeerSilent):
            return f"{self.move.order.destination} does not answer: {error}"
        return error.message if isinstance(error, GodwitError) else str(error)
