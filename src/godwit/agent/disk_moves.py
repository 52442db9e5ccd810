"""Disks on their way to another image or volume, of VMs that run here and of such that do not.

    runs here  image made, broker serves it, QEMU copies it; then, with the VM standing still:
               last bytes -> the VM's record in the store -> QEMU's device -> the VM runs on
    stopped    qemu-img copies and compares; the record is the manager's to write

While it is copied the VM can be paused, resumed and stopped, but not moved, saved or given other
disks. A copy that is called off or fails leaves the disk as it was and deletes the new image.
What a crash leaves is written down first: see `godwit.agent.disk_journal`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from pathlib import Path

from godwit.agent.desk import Desk, Slot
from godwit.agent.disk_journal import Journal, forget_journal, replaced, save_journal
from godwit.agent.disk_record import write_back, write_new
from godwit.agent.files import Files, asked
from godwit.agent.images import TOOL
from godwit.agent.power import Power
from godwit.agent.standing import to_its_end
from godwit.model.diskmove import DiskMove, DiskMoveAsk
from godwit.model.errors import (
    Cancelled,
    Conflict,
    GodwitError,
    NotFound,
    OperationFailed,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from godwit.model.migration import MoveState, Stage
from godwit.model.units import format_size
from godwit.model.vm import Disk
from godwit.qemu.blocks import stored_size
from godwit.qemu.launch import Binary
from godwit.qemu.mirror import Mirror, let_go
from godwit.qmp import MonitorError, MonitorLost
from godwit.storage.convert import convert
from godwit.storage.images import image_info
from godwit.store.errors import StoreError, StoreOutcomeUnknown

_log = logging.getLogger("agent")
KEPT = 32
"""Moves that have ended and can still be asked for."""
END_S = 5.0
"""Seconds for a QEMU whose monitor is gone to end."""


class _Job:
    """One move, as it is told of, and the wish to call it off."""

    def __init__(self, vm: str, ask: DiskMoveAsk) -> None:
        self.ask = ask
        self.vm = vm
        self.now = DiskMove(id=ask.id, vm=vm, total_bytes=stored_size(ask.disk.size_bytes))
        self.cancelled_by = ""
        self.cancelled = asyncio.Event()
        self.ended = asyncio.Event()

    def tell(self, **changes: object) -> None:
        self.now = self.now.but(**changes)

    def heard(self, copied: int, total: int) -> None:
        """What is written meanwhile makes the way longer; it is never told as running back."""
        total = max(total, self.now.total_bytes)
        self.tell(copied_bytes=max(copied, self.now.copied_bytes), total_bytes=total)

    async def unless_cancelled(self, work: Awaitable[object]) -> None:
        """Do the work to its end, or end it and raise Cancelled when somebody calls it off."""
        doing = asyncio.ensure_future(work)
        wish = asyncio.ensure_future(self.cancelled.wait())
        try:
            await asyncio.wait({doing, wish}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wish.cancel()
            if not doing.done():
                doing.cancel()
            await asyncio.wait({doing})
        if doing.cancelled() or (self.cancelled.is_set() and doing.exception() is not None):
            raise Cancelled(f"called off by {self.cancelled_by}")
        doing.result()


class DiskMoves:
    """The moves of disks that this host carries out. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk, power: Power, files: Files) -> None:
        self.desk = desk
        self._power = power
        self._files = files
        self._jobs: dict[str, _Job] = {}

    async def begin(self, vm: str, ask: DiskMoveAsk) -> DiskMove:
        """Accept a move and carry it out in the background; asked twice is done once."""
        target = self._files.disk_path(ask.target)
        there = await asked(self.desk.catalog.files(ask.target.volume).look(target), target)
        if (known := self._jobs.get(ask.id)) is not None:
            return known.now
        desk = self.desk
        if vm in desk.moving:
            raise Conflict(
                f"{vm} is being moved: its disks stay as they are",
                hint="wait for the move to end, or cancel it: godwit migration list",
            )
        if vm in desk.changing:
            raise Conflict(f"the disks of {vm} are being changed", hint="ask again soon")
        self._files.disk_path(ask.disk)
        if there is not None:
            raise Conflict(f"{ask.target.path} exists already", hint="ask again")
        slot = desk.slots.get(vm)
        if slot is not None and ask.disk not in slot.vm.disks:
            raise Conflict(f"{ask.disk.id} of {vm} is not what was asked about", hint="ask again")
        job = self._jobs[ask.id] = _Job(vm, ask)
        desk.changing.add(vm)
        desk.copying.add(vm)
        desk.background(self._run(job, slot), f"disk move {ask.id}")
        return job.now

    async def view(self, move: str, *, wait_s: float = 0.0) -> DiskMove:
        """How far it is; waits so long for its end."""
        job = self._job(move)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await job.ended.wait()
        return job.now

    def cancel(self, move: str, by: str) -> DiskMove:
        """Call it off; Refused once the VM stands still for the switch."""
        job = self._job(move)
        if job.now.stage not in (Stage.SETUP, Stage.PRECOPY) or job.now.state.final:
            raise Refused(
                f"{job.ask.disk.id} of {job.vm} has its new image already",
                hint="move it back if it should not",
            )
        job.cancelled_by = by
        job.cancelled.set()
        return job.now

    def _job(self, move: str) -> _Job:
        job = self._jobs.get(move)
        if job is None:
            raise NotFound(f"{self.desk.host} knows no move {move}", hint="look: godwit task list")
        return job

    async def _run(self, job: _Job, slot: Slot | None) -> None:
        """A move to its end; every end is told."""
        try:
            await (self._copy(job) if slot is None else self._live(job, slot))
        except Exception as error:
            meant = _as_told(error)
            state = MoveState.FAILED
            if isinstance(meant, Cancelled):
                state = MoveState.CANCELLED
            elif isinstance(meant, OutcomeUnknown):
                state = MoveState.UNKNOWN
            job.tell(state=state, reason=meant.message, error=meant.to_problem())
            _log.warning("disk move %s: %s: %s", job.ask.id, state.value, meant.message)
            if not isinstance(error, GodwitError | MonitorError | StoreError | OSError):
                _log.exception("disk move %s", job.ask.id)
        else:
            job.tell(state=MoveState.COMPLETED, copied_bytes=job.now.total_bytes)
        finally:
            self.desk.changing.discard(job.vm)
            self.desk.copying.discard(job.vm)
            job.ended.set()
            ended = [key for key, one in self._jobs.items() if one.ended.is_set()]
            for key in ended[:-KEPT]:
                del self._jobs[key]

    # Of a VM that does not run.

    async def _copy(self, job: _Job) -> None:
        old, new, state = job.ask.disk, job.ask.target, self._state(job.vm)
        source, target = self._files.disk_path(old), self._files.disk_path(new)
        self._note(job, "", keep=True)
        try:
            files = self.desk.catalog.files(new.volume)
            await asked(files.make_directories(target.parent), target.parent)
            job.tell(stage=Stage.PRECOPY)
            total = job.now.total_bytes
            await job.unless_cancelled(
                convert(
                    source,
                    source_format=old.format,
                    target=target,
                    target_format=new.format,
                    owner=self.desk.equipment.binary.user,
                    tool=Binary.named(TOOL, user=self.desk.config.qemu.user),
                    progress=lambda done: job.heard(int(done * total), total),
                    source_files=self.desk.catalog.files(old.volume),
                    target_files=files,
                )
            )
            try:
                await self._check_size(new)
            except BaseException:
                await asyncio.shield(self._files.remove_image(new))
                raise
        finally:
            # Whole, or gone: from here on it is the manager's to use or to delete.
            forget_journal(state)
        job.tell(stage=Stage.HANDOVER, reason=f"{new.path} is a copy of {old.path}")

    # Of a VM that runs here.

    async def _live(self, job: _Job, slot: Slot) -> None:
        old, new = job.ask.disk, job.ask.target
        mirror = Mirror(slot.machine, old, new)
        self._note(job, slot.vm.pins.uuid, keep=job.ask.keep)
        try:
            async with self.desk.lock(job.vm):
                await self._set_up(slot, new, mirror, rate=job.ask.max_bytes_per_s)
            job.tell(stage=Stage.PRECOPY)
            await job.unless_cancelled(mirror.until_ready(job.heard))
            job.tell(stage=Stage.SWITCHOVER)
            await self._hold("copied", job)
            await to_its_end(self._switch_alone(job, slot, mirror))
        except Exception as error:
            if isinstance(error, MonitorLost):
                await _gone(slot)
            if job.now.switched and slot.machine.exited.is_set():
                # Both images were equal, and the record names the new one.
                job.tell(reason=f"{job.vm} ended; {old.id} lies in {new.path} now")
                await self._delete_old(job)
                return
            if not job.now.switched:
                await asyncio.shield(self._back_out(job, slot, mirror))
            if isinstance(error, MonitorLost) and not job.now.switched:
                raise OperationFailed(
                    f"{job.vm} ended while {old.id} was copied; it has its old image",
                    hint="move it again",
                ) from error
            raise
        job.tell(stage=Stage.RESUME)
        await self._hold("switched", job)
        await self._tidy(job, slot, mirror)

    async def _set_up(self, slot: Slot, new: Disk, mirror: Mirror, *, rate: int) -> None:
        self._still_here(slot)
        await self._power.mine(slot)
        await self._files.create_disks([new])
        await self._check_size(new)
        await self.desk.brokers.add(slot.vm, new, epoch=slot.machine.epoch)
        await mirror.begin(self.desk.place(slot.vm.but(disks=(new,))), rate=rate)

    async def _switch_alone(self, job: _Job, slot: Slot, mirror: Mirror) -> None:
        async with self.desk.lock(job.vm):
            await self._switch(job, slot, mirror)

    async def _switch(self, job: _Job, slot: Slot, mirror: Mirror) -> None:
        """The new image becomes the disk's, with the VM standing still.

        The record is written while both images are equal, before QEMU takes to the new one: so
        it is right whoever dies. A write that may have happened is asked about until the store
        answers; the VM stands meanwhile, as it does in a move between hosts.
        """
        desk, machine, old, new = self.desk, slot.machine, job.ask.disk, job.ask.target
        self._still_here(slot)
        owner = await self._power.mine(slot)
        runs = (await machine.status()).running
        desk.standing.add(job.vm)
        stopped_at = resumed_at = 0.0
        try:
            if runs:
                stopped_at = await machine.stop()
            await mirror.complete()
            job.tell(stage=Stage.HANDOVER)
            await self._hold("equal", job)
            await write_new(desk.records, job.vm, old, new, owner=owner.revision)
            job.tell(switched=True)
            await self._hold("recorded", job)
            try:
                await mirror.finalize()
            except OperationFailed:
                await write_back(desk.records, job.vm, old, new)
                job.tell(switched=False)
                raise
            slot.vm = replaced(slot.vm, new)
        except BaseException:
            if not job.now.switched:
                # Before it runs on: a job that is nearly done holds the I/O of its guest.
                await asyncio.shield(let_go(mirror))
            raise
        finally:
            desk.standing.discard(job.vm)
            if runs and not machine.exited.is_set():
                resumed_at = await asyncio.shield(machine.cont())
        if runs:
            job.tell(stood_ms=round((resumed_at - stopped_at) * 1e3, 3))

    async def _tidy(self, job: _Job, slot: Slot, mirror: Mirror) -> None:
        new = job.ask.target
        words = f"{job.ask.disk.id} of {job.vm} lies in {new.path} now"
        try:
            await mirror.close_old()
            await self.desk.brokers.remove(job.vm, job.ask.disk)
        except (MonitorError, GodwitError, OSError) as error:
            await _gone(slot)
            if not slot.machine.exited.is_set():
                # The journal stays: the next agent of this host closes and deletes it.
                job.tell(reason=f"{words}; {job.ask.disk.path} could not be closed: {error}")
                return
        job.tell(reason=words)
        await self._delete_old(job)

    async def _delete_old(self, job: _Job) -> None:
        if not job.ask.keep:
            await self._files.remove_image(job.ask.disk)
        forget_journal(self._state(job.vm))

    async def _back_out(self, job: _Job, slot: Slot, mirror: Mirror) -> None:
        """The disk as it was; what cannot be closed now is closed by the next agent."""
        new, dead = job.ask.target, slot.machine.exited.is_set()
        if not dead and not await let_go(mirror):
            await self.desk.event(
                "vm.disk-move",
                job.vm,
                f"the copy of {job.ask.disk.id} could not be ended; {new.path} stays for now",
                level="warning",
            )
            return
        try:
            await self.desk.brokers.remove(job.vm, new)
        except GodwitError as error:
            if not dead:  # else its broker ends too
                await self.desk.event("vm.disk-move", job.vm, str(error), level="warning")
                return
        await self._files.remove_image(new)
        forget_journal(self._state(job.vm))

    # Steps.

    async def _hold(self, point: str, job: _Job) -> None:
        await self.desk.holds.reach(point, vm=job.vm, role="disk")

    def _still_here(self, slot: Slot) -> None:
        if self.desk.slots.get(slot.vm.name) is not slot or slot.ending:
            raise Conflict(f"{slot.vm.name} does not run here any more", hint="ask again")

    def _note(self, job: _Job, uuid: str, *, keep: bool) -> None:
        journal = Journal(
            id=job.ask.id,
            vm=job.vm,
            uuid=uuid,
            old=job.ask.disk,
            new=job.ask.target,
            keep=keep,
        )
        save_journal(self._state(job.vm), journal)

    async def _check_size(self, new: Disk) -> None:
        """Refused when the format rounded the size: the guest would see another disk."""
        wanted, files = stored_size(new.size_bytes), self.desk.catalog.files(new.volume)
        info = await image_info(Path(new.path), format=new.format, files=files)
        if info.virtual_size != wanted:
            raise Refused(
                f"{new.format} would make {format_size(info.virtual_size)} of {wanted} bytes",
                hint="choose another format",
            )

    def _state(self, vm: str) -> Path:
        return self.desk.config.paths.vm_state(vm)


async def _gone(slot: Slot) -> None:
    """A lost monitor is nearly always a QEMU that is ending."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_S):
            await slot.machine.exited.wait()


def _as_told(error: Exception) -> GodwitError:
    """Whatever ended a move, as people are told of it."""
    if isinstance(error, GodwitError):
        return error
    if isinstance(error, StoreOutcomeUnknown):
        return OutcomeUnknown(f"the store: {error.message}", hint=error.hint)
    if isinstance(error, StoreError):
        return Unavailable(f"the store: {error.message}", hint=error.hint)
    if isinstance(error, MonitorError):
        return OutcomeUnknown(f"the VM's QEMU: {error}", hint="look: godwit vm disk list")
    return OperationFailed(f"{type(error).__name__}: {error}", hint="see the agent's log")
