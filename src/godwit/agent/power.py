"""Start, stop, pause, resume, save and restore the VMs of this host.

Every verb that makes vCPUs run goes through the owner record first: take it (epoch + 1), note the
epoch durably, then ``cont``. What fails on the way is undone and the record says so.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

from godwit.agent.desk import Desk, Slot
from godwit.agent.facts import memory_free, usable_by
from godwit.agent.files import asked, images
from godwit.agent.firmware import powered_on
from godwit.agent.guest_agents import set_clock_soon
from godwit.agent.leftovers import record_gone
from godwit.agent.power_button import press
from godwit.agent.volumes import volumes_of
from godwit.migration import quick
from godwit.migration.stream import ENDED, wait_status
from godwit.model import keys, ownership
from godwit.model.checkpoints import check_whole
from godwit.model.clones import refuse_if_cloned
from godwit.model.errors import Conflict, GodwitError, NotFound, OperationFailed, Refused
from godwit.model.ownership import Owner, OwnerState, SavedState
from godwit.model.units import format_size
from godwit.model.vm import Vm, VmState, VmStatus
from godwit.qemu.runtime import note_started
from godwit.qemu.start import spawn
from godwit.qmp import MonitorError
from godwit.storage.images import check_image
from godwit.store.api import Compare, mod_is
from godwit.store.records import CasFailed, Versioned

SAVE_S = 600.0


class Power:
    """The verbs; each takes the VM's lock."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._restarts: dict[str, list[float]] = {}
        desk.on_exit = self.ended

    # Verbs.

    async def start(self, name: str, *, restore: bool = False, no_clones_at: int = 0) -> VmStatus:
        """Power on; with ``restore`` go on from the saved memory instead of booting.

        ``no_clones_at``: a store revision at which no linked clone stood on the VM's images.
        """
        async with self.desk.lock(name):
            spec, found = await self.read(name)
            vm, owner = spec.value, found.value
            if restore and owner.state is not OwnerState.SAVED:
                raise Refused(f"{name} has no saved state", hint=f"godwit vm start {name}")
            await self._check(vm)
            # Making a clone writes the owner record, which is compared below: who saw no clone when
            # that record was as it is now, need not look through all VMs once more.
            if no_clones_at < found.revision:
                await self._check_images(vm)
            else:
                check_whole(vm)
            if name in self.desk.slots:
                raise Conflict(f"{name} already runs on {self.desk.host}", hint="nothing to do")
            if not restore:
                vm = await powered_on(self.desk, vm)
            after = ownership.power_on(owner, host=self.desk.host)
            # Whoever changes the definition of a VM that does not run compares the ownership and
            # leaves it as it is; so this compares the definition, or an older one could start.
            unchanged = mod_is(keys.vm_spec(name), spec.revision)
            revision = await self.write(name, after, found.revision, compare=[unchanged])
            image = owner.saved if restore else None
            try:
                unlocked = await self._switch_on(vm, after, image)
            except BaseException:
                back = after.but(state=owner.state if restore else OwnerState.STOPPED)
                await asyncio.shield(self._give_up(name, back, revision))
                raise
            runs = ownership.running(after, paused=bool(image and image.paused))
            await self.write(name, runs.but(unlock=unlocked), revision)
            if owner.saved is not None:
                await self._forget(owner.saved.path)
            if restore:
                set_clock_soon(self.desk, self.desk.slot(name))
            word = "restored" if restore else "started"
            message = f"{word} on {self.desk.host} at epoch {after.epoch}"
            await self.desk.event(f"vm.{word}", name, message)
            return self.status(name)

    async def stop(self, name: str, *, force: bool, timeout_s: float) -> VmStatus:
        """Ask the guest to shut down, or cut its power."""
        async with self.desk.lock(name):
            if name not in self.desk.slots and (status := await record_gone(self.desk, name)):
                return status
            slot = self.desk.slot(name)
            found = await self.mine(slot)
            slot.ending = True
            try:
                if not force:
                    await press(slot.machine, slot.vm.name, timeout_s)
            except BaseException:
                slot.ending = False
                raise
            await self._end(slot, found, "stopped by request")
            return self._gone(slot, VmState.STOPPED)

    async def pause(self, name: str) -> VmStatus:
        """Hold the vCPUs."""
        return await self._hold(name, paused=True)

    async def resume(self, name: str) -> VmStatus:
        """Let them run again."""
        return await self._hold(name, paused=False)

    async def save(self, name: str) -> VmStatus:
        """Write the memory to the VM's volume and end its QEMU."""
        async with self.desk.lock(name):
            slot = self.desk.slot(name)
            if name in self.desk.changing:
                raise Conflict(f"the disks of {name} are being changed", hint="ask again soon")
            found = await self.mine(slot)
            vm, epoch = slot.vm, slot.machine.epoch
            path = quick.image_path(self.desk.config.paths.volumes, vm, epoch=epoch)
            slot.ending = True
            try:
                await slot.machine.stop()
                await self._write_memory(slot, path, epoch)
                image = SavedState(
                    path=str(path),
                    epoch=epoch,
                    disk_ids=tuple(disk.serial for disk in vm.written),
                    paused=found.value.paused,
                )
                after = ownership.saved(found.value, image)
                await self.write(name, after, found.revision)
            except BaseException:
                slot.ending = False
                if not found.value.paused and not slot.machine.exited.is_set():
                    await slot.machine.cont()
                await self._forget(str(path))
                raise
            await slot.machine.quit()
            await self.desk.take(slot)
            await self.desk.event("vm.saved", name, f"saved on {self.desk.host}")
            return self._gone(slot, VmState.SAVED)

    def status(self, name: str) -> VmStatus:
        """What is seen of a VM that runs here."""
        slot = self.desk.slot(name)
        return VmStatus(state=slot.state, host=self.desk.host, epoch=slot.machine.epoch)

    # What a VM does by itself.

    async def ended(self, slot: Slot) -> None:
        """A guest shut itself down, or its QEMU died."""
        name = slot.vm.name
        async with self.desk.lock(name):
            if self.desk.slots.get(name) is not slot or slot.ending:
                return
            slot.ending = True
            died = slot.machine.exited.is_set()
            if not died:
                await slot.machine.quit()
            self.desk.settling[name] = slot.machine.epoch
            try:
                await self.desk.take(slot)
                if not await self._note_end(name, slot.machine.epoch):
                    return
            finally:
                del self.desk.settling[name]
            reason = (
                f"QEMU died (status {slot.machine.exit_status})"
                if died
                else "the guest shut itself down"
            )
            state = VmState.FAILED if died else VmState.STOPPED
            again = died and slot.vm.ha and self._may_restart(slot.vm)
            told = self._gone(slot, state, reason).but(by_guest=not died, restarting=again)
            await self.desk.publish_status(name, told)
            level = "error" if died else "info"
            await self.desk.event("vm.failed" if died else "vm.stopped", name, reason, level=level)
        if again:
            await self.desk.event("vm.restart", name, "highly available: starting it again")
            await self.start(name)

    async def _note_end(self, name: str, epoch: int) -> bool:
        """Record that the VM stands still; False when it is not this host's at this epoch.

        The source of a move that brought it here may be writing the move's end at this moment.
        """
        while True:
            found = await self.desk.records.owner(name)
            if found is None or not self._ours(found.value, epoch):
                return False
            try:
                await self.write(name, ownership.stopped(found.value), found.revision)
            except Conflict:
                continue  # somebody else got on: what they wrote is read anew
            return True

    def _may_restart(self, vm: Vm) -> bool:
        now = self.desk.clock.monotonic()
        recent = [at for at in self._restarts.get(vm.name, []) if now - at < 3600]
        self._restarts[vm.name] = [*recent, now]
        return len(recent) < vm.rules.restarts

    # Steps.

    async def boot(self, vm: Vm, owner: Owner) -> None:
        """Start the VM from its disks at the epoch of a record that names this host.

        The VM's lock is held. After any failure nothing of it runs here.
        """
        await self._check(vm)
        await self._check_images(vm)
        vm = await powered_on(self.desk, vm)
        if owner.unlock:
            await self._without_locks(vm, owner, None)
        else:
            await self._power_on(vm, owner, None)

    async def _switch_on(self, vm: Vm, owner: Owner, image: SavedState | None) -> bool:
        """Start it; where a lost host's locks may be left, without locks if need be: whether so."""
        try:
            await self._power_on(vm, owner, image)
        except OperationFailed:
            if not owner.unlock:
                raise
            await self._without_locks(vm, owner, image)
            return True
        return False

    async def _without_locks(self, vm: Vm, owner: Owner, image: SavedState | None) -> None:
        unlocked = self.desk.unlocked
        unlocked.add(vm.name)
        try:
            await self._power_on(vm, owner, image)
        except BaseException:
            unlocked.discard(vm.name)
            raise
        self.desk.slot(vm.name).machine.amend(unlocked=True)

    async def _power_on(self, vm: Vm, owner: Owner, image: SavedState | None) -> None:
        desk = self.desk
        await desk.catalog.fetch_boot(vm)
        await desk.brokers.start(vm, epoch=owner.epoch)
        try:
            machine = await spawn(vm, desk.place(vm), epoch=owner.epoch, incoming=image is not None)
        except BaseException:
            await desk.brokers.end(vm.name)
            raise
        try:
            if image is not None:
                label = quick.describe(vm, epoch=image.epoch)
                files = desk.catalog.files_at(image.path)
                await quick.load_memory(machine, Path(image.path), label=label, files=files)
            note_started(
                desk.config.paths.vm_state(vm.name),
                uuid=vm.pins.uuid,
                epoch=owner.epoch,
                migration_id=None,
            )
            # Before anything runs: nobody may start it elsewhere while nobody would stop it here.
            await desk.guard.register(machine.runtime, ha=vm.ha)
            gate = desk.gate(vm, machine)
            gate.open()
            paused = bool(image and image.paused)
            if not paused:
                await machine.cont()
            machine.amend(role="started")
        except BaseException as error:
            await desk.guard.forget(vm.name)
            await machine.kill()
            await desk.brokers.end(vm.name)
            await machine.discard()
            if isinstance(error, MonitorError | OSError | ValueError):
                raise OperationFailed(
                    f"{vm.name} did not start on {desk.host}: {error}", hint="see the agent's log"
                ) from error
            raise
        await desk.put(vm, machine, gate, paused=paused)

    async def _end(self, slot: Slot, found: Versioned[Owner], reason: str) -> None:
        await slot.machine.quit()
        await self.desk.take(slot)
        await self.write(slot.vm.name, ownership.stopped(found.value), found.revision)
        status = self._gone(slot, VmState.STOPPED, reason)
        await self.desk.publish_status(slot.vm.name, status)
        await self.desk.event("vm.stopped", slot.vm.name, f"{reason} on {self.desk.host}")

    async def _hold(self, name: str, *, paused: bool) -> VmStatus:
        async with self.desk.lock(name):
            slot = self.desk.slot(name)
            found = await self.mine(slot)
            # What the user wants is recorded first: it must travel along with a move.
            await self.write(name, found.value.but(paused=paused), found.revision)
            if paused:
                await slot.machine.stop()
                slot.state = VmState.PAUSED
                await self.desk.stalls.over(slot)
            else:
                await self._cont(slot)
                set_clock_soon(self.desk, slot)
            slot.paused = paused
            await self.desk.publish(slot)
            return self.status(name)

    async def _cont(self, slot: Slot) -> None:
        # Said first, so that what QEMU tells afterwards has the last word.
        before, slot.state = slot.state, VmState.RUNNING
        try:
            await slot.machine.cont()
        except BaseException:
            slot.state = before
            raise

    async def _write_memory(self, slot: Slot, path: Path, epoch: int) -> None:
        label = quick.describe(slot.vm, epoch=epoch)
        files = self.desk.catalog.files_at(path)
        try:
            saving = await quick.save_memory(slot.machine, path, label=label, files=files)
            try:
                event = await wait_status(saving.events, ENDED, timeout=SAVE_S)
                if event.data["status"] != "completed":
                    raise OSError(errno.EIO, "QEMU gave up")
                await saving.settle()
            finally:
                saving.close()
        except OSError as error:
            raise OperationFailed(
                f"the memory of {slot.vm.name} could not be saved: {error.strerror or error}",
                hint="is the volume full, or away? see: godwit volume list",
            ) from error

    async def _check(self, vm: Vm) -> None:
        free = memory_free(promised_bytes=self.desk.promised_bytes())
        if vm.memory_bytes > free:
            have, need = format_size(free), format_size(vm.memory_bytes)
            raise Refused(
                f"not enough memory on {self.desk.host}: {have} free, {need} needed",
                hint="choose another host, or stop something there",
            )
        for nic in vm.nics:
            if nic.network not in self.desk.networks:
                raise Refused(
                    f"{self.desk.host} has no network {nic.network}", hint="godwit network list"
                )
        for volume in volumes_of(vm):
            if why := self.desk.volumes.why(volume):
                raise Refused(
                    f"{vm.name} cannot start on {self.desk.host}: {why}",
                    hint=f"look: godwit volume show {volume}; start it on another host: --host",
                )
        for disk in images(list(vm.written)):
            # Past the lock: another host may be told to start the VM at this moment, and a look
            # that held a lock would fail the one that wins.
            files = self.desk.catalog.files(disk.volume)
            await check_image(disk, in_use=True, files=files)
        for cdrom in vm.cdroms:
            if why := await self._why_no_cd(Path(cdrom.path)):
                raise Refused(
                    f"{cdrom.path} cannot be put in a CD drive: {why}",
                    hint="put it there, readable for everybody",
                )

    async def _why_no_cd(self, path: Path) -> str:
        files = self.desk.catalog.files_at(path)
        if files.node(path) is not None:
            return "its volume is served to QEMU alone"
        facts = await asked(files.look(path), path)
        if facts is None:
            return "there is no such file"
        uid, gid = self.desk.equipment.binary.user or (0, 0)
        return usable_by(facts, uid, gid, write=False)

    async def _forget(self, saved: str) -> None:
        await quick.discard(Path(saved), files=self.desk.catalog.files_at(saved))

    async def _check_images(self, vm: Vm) -> None:
        """Nobody writes what linked clones stand on, or disks that are of two times.

        Asked after the owner record was read: a clone or a revert that begins meanwhile writes
        that too.
        """
        vms = await self.desk.records.vms()
        check_whole(vms.get(vm.name, vm))
        refuse_if_cloned(vm, vms.values(), "start")

    async def read(self, name: str) -> tuple[Versioned[Vm], Versioned[Owner]]:
        """The VM's definition and ownership; NotFound when there is none."""
        spec, found = await asyncio.gather(
            self.desk.records.vm(name), self.desk.records.owner(name)
        )
        if spec is None or found is None:
            raise NotFound(f"there is no VM {name}", hint="look: godwit vm list")
        return spec, found

    def _ours(self, owner: Owner, epoch: int) -> bool:
        return owner.host == self.desk.host and owner.epoch == epoch

    async def mine(self, slot: Slot) -> Versioned[Owner]:
        """The record of a VM that runs here, free of moves."""
        found = await self.desk.records.owner(slot.vm.name)
        if found is None or not self._ours(found.value, slot.machine.epoch):
            raise Conflict(f"{slot.vm.name} is not owned by {self.desk.host} now", hint="ask again")
        if (move := found.value.migration) is not None:
            raise Conflict(
                f"{slot.vm.name} is being moved by {move.id}",
                hint=f"wait, or: godwit migration cancel {move.id}",
            )
        return found

    async def write(
        self, name: str, owner: Owner, revision: int, *, compare: Sequence[Compare] = ()
    ) -> int:
        """Replace the ownership record of this revision; Conflict when it has another by now."""
        try:
            return await self.desk.records.cas(
                keys.vm_owner(name), owner, revision, compare=compare
            )
        except CasFailed:
            raise Conflict(
                f"{name} was changed by somebody else at this moment", hint="look, and ask again"
            ) from None

    async def _give_up(self, name: str, owner: Owner, revision: int) -> None:
        try:
            await self.write(name, owner, revision)
        except GodwitError:
            return  # whoever changed it knows better
        state = VmState.SAVED if owner.state is OwnerState.SAVED else VmState.STOPPED
        status = VmStatus(state=state, host=self.desk.host, epoch=owner.epoch)
        await self.desk.publish_status(name, status)

    def _gone(self, slot: Slot, state: VmState, reason: str = "") -> VmStatus:
        return VmStatus(
            state=state,
            host=self.desk.host,
            epoch=slot.machine.epoch,
            reason=reason,
            since=self.desk.clock.realtime(),
        )
