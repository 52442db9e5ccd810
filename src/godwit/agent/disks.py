"""Disks of a VM that runs here: added, removed and grown while it runs.

    add     image made (or checked) -> broker serves it -> QEMU has it -> the slot's record
    remove  QEMU lets go -> broker lets go -> the slot's record; the image stays
    resize  see `godwit.agent.growth`

The slot's record is what the next move carries to the destination; the VM's record in the store,
and the event that tells of it, are the manager's to write (a growth is written by both). Whatever
fails half-way is undone in reverse. A move and a change of disks exclude each other: each refuses
while the other runs, so that no move starts from an old record.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.agent.desk import Desk, Slot
from godwit.agent.files import Files
from godwit.agent.growth import Growth
from godwit.agent.guest_agents import mounted
from godwit.agent.power import Power
from godwit.model.errors import Conflict, NotFound, Refused
from godwit.model.units import format_size
from godwit.model.vm import Disk
from godwit.qemu import hotplug
from godwit.qemu.devices import device_size
from godwit.qmp import MonitorError

_log = logging.getLogger("agent")


class Disks:
    """The verbs; each takes the VM's lock."""

    def __init__(self, desk: Desk, power: Power, files: Files) -> None:
        self.desk = desk
        self._power = power
        self._files = files
        self._growth = Growth(desk, files)

    async def show(self, name: str) -> dict[str, Any]:
        """The disks QEMU really has, and where they differ from the record, in words."""
        slot = self.desk.slot(name)
        plugged = await hotplug.list_disks(slot.machine)
        return {
            "disks": [asdict(disk) for disk in plugged],
            "differences": list(hotplug.differences(slot.vm.disks, plugged)),
        }

    async def add(self, name: str, disk: Disk) -> Disk:
        """Give the running VM a disk; the disk as it is now (a device has its own size).

        An image that is not there is made, one that is there must be what the record says. Doing
        it again is no fault. On a failure nothing of it stays; a MonitorError leaves the outcome
        open, and image and broker as they are.
        """
        async with self._changing(name) as slot:
            disk = await self._measured(disk)
            if await self._has(slot, disk):
                _put(slot, disk)
                return disk
            async with AsyncExitStack() as undo:
                if await self._files.ready_disk(disk):
                    undo.push_async_callback(self._files.remove_image, disk)
                await self.desk.brokers.add(slot.vm, disk, epoch=slot.machine.epoch)
                undo.push_async_callback(self.desk.brokers.remove, name, disk)
                after = slot.vm.but(disks=(*_others(slot, disk.id), disk))
                try:
                    await hotplug.add_disk(slot.machine, disk, self.desk.place(after))
                except MonitorError:
                    undo.pop_all()  # QEMU may have it open: asked again, this finds out
                    raise
                undo.pop_all()
            _put(slot, disk)
            _log.info("%s: disk %s added: %s", name, disk.id, format_size(disk.size_bytes))
            return disk

    async def remove(self, name: str, disk_id: str, *, force: bool) -> Disk:
        """Take a disk from the running VM; its image stays. What was the disk is the answer.

        Refused, unless ``force``, while the guest writes to it, or says that it has it mounted.
        """
        async with self._changing(name) as slot:
            disk = _find(slot, disk_id)
            if not force and (used := await mounted(slot, disk)):
                points = ", ".join(mount.point for mount in used)
                raise Refused(
                    f"the guest of {name} has {disk_id} mounted at {points}",
                    hint="unmount it there first, or use --force",
                )
            # The machine may have lost it in a removal that was cut short: then finish that.
            with suppress(NotFound):
                await hotplug.remove_disk(slot.machine, disk, force=force)
            await asyncio.shield(self.desk.brokers.remove(name, disk))
            slot.vm = slot.vm.but(disks=_others(slot, disk_id))
            _log.info("%s: disk %s removed", name, disk_id)
            return disk

    async def resize(self, name: str, disk_id: str, size_bytes: int) -> Disk:
        """Grow a disk of the running VM; the disk with the size it has now."""
        async with self._changing(name) as slot:
            grown = await self._growth.grow(slot, _find(slot, disk_id), size_bytes)
            _log.info("%s: disk %s has %s now", name, disk_id, format_size(grown.size_bytes))
            return grown

    @asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[Slot]:
        """The VM, owned by this host, with no move under way and none able to begin."""
        self._check_still(name)  # a move holds the lock to its end: do not wait for that
        async with self.desk.lock(name):
            self._check_still(name)
            slot = self.desk.slot(name)
            self.desk.changing.add(name)
            try:
                await self._power.mine(slot)
                yield slot
            finally:
                self.desk.changing.discard(name)

    def _check_still(self, name: str) -> None:
        if name in self.desk.moving:
            raise Conflict(
                f"{name} is being moved: its disks stay as they are",
                hint="wait for the move to end, or cancel it: godwit migration list",
            )
        if name in self.desk.copying:
            raise Conflict(
                f"a disk of {name} is on its way to another image",
                hint="wait for it, or cancel its task: godwit task list",
            )

    async def _measured(self, disk: Disk) -> Disk:
        if disk.source == "image":
            return disk
        if disk.source == "lun":
            return disk.but(size_bytes=await self._files.lun_size(disk))
        size = await asyncio.to_thread(device_size, Path(disk.path))
        return disk.but(size_bytes=size)

    async def _has(self, slot: Slot, disk: Disk) -> bool:
        """Whether the machine has this very disk already; Conflict when it has another one."""
        plugged = await hotplug.list_disks(slot.machine)
        here = [one for one in plugged if one.id == disk.id]
        if here and (words := hotplug.differences([disk], here)):
            raise Conflict(
                f"{slot.vm.name} has another disk {disk.id}: {words[0]}", hint="take another id"
            )
        return bool(here)


def _find(slot: Slot, disk_id: str) -> Disk:
    for disk in slot.vm.disks:
        if disk.id == disk_id:
            return disk
    raise NotFound(
        f"{slot.vm.name} has no disk {disk_id!r}", hint=f"look: godwit vm disk list {slot.vm.name}"
    )


def _others(slot: Slot, disk_id: str) -> tuple[Disk, ...]:
    return tuple(disk for disk in slot.vm.disks if disk.id != disk_id)


def _put(slot: Slot, disk: Disk) -> None:
    """The disk in the slot's record, in its old place if it had one: order is boot order."""
    if any(one.id == disk.id for one in slot.vm.disks):
        disks = tuple(disk if one.id == disk.id else one for one in slot.vm.disks)
    else:
        disks = (*slot.vm.disks, disk)
    slot.vm = slot.vm.but(disks=disks)
