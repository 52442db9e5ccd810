"""Checkpoints of this host's VMs, and of stopped ones whose images lie on its volumes.

The images hold them (`godwit.storage.snapshots`); a VM's record says which there are. An agent is
told the record's, and drops what an action that was cut short left besides. A move and a checkpoint
exclude each other as a move and a change of disks do.

While a VM runs, its QEMU takes the snapshots of the images that it has open, and its broker those
of the others. With a broker the VM stands still, so that all are of one instant.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from godwit.agent.desk import Desk, Slot
from godwit.agent.files import Files
from godwit.agent.power import Power
from godwit.agent.standing import standing_still, to_its_end
from godwit.model.disks import tier_of
from godwit.model.errors import Conflict, GodwitError, Refused
from godwit.model.vm import Disk
from godwit.qemu import snapshots as live
from godwit.qemu.layout import broker_id
from godwit.storage import snapshots as still
from godwit.storage.broker import Broker
from godwit.storage.images import check_image, image_info


class Checkpoints:
    """The verbs; each may be asked again."""

    def __init__(self, desk: Desk, power: Power, files: Files) -> None:
        self._desk = desk
        self._power = power
        self._files = files

    async def take(self, name: str, disks: Sequence[Disk], tag: str, known: Sequence[str]) -> None:
        """Hold what the disks of a running VM hold at one instant; all or none."""
        for disk in disks:
            self._on_files(disk)
        async with self._changing(name) as slot, self._images(slot, disks) as images:
            found = await images.look()
            for disk in disks:
                for left in still.leftovers(found[disk.id].tags, [*known, tag]):
                    await images.drop(disk, left)
            there = [disk for disk in disks if tag in found[disk.id].tags]
            if len(there) == len(disks):
                return
            live.check_wait(name, found)
            for disk in there:  # not of one instant with the others
                await images.drop(disk, tag)
            await to_its_end(images.take(tag))

    async def drop(self, name: str, disks: Sequence[Disk], tag: str) -> None:
        """Give back what a checkpoint of a running VM takes."""
        async with self._changing(name) as slot, self._images(slot, disks) as images:
            found = await images.look()
            live.check_wait(name, found)
            for disk in disks:
                if tag in found[disk.id].tags:
                    await images.drop(disk, tag)

    async def take_still(
        self, name: str, disks: Sequence[Disk], tag: str, known: Sequence[str]
    ) -> None:
        """As `take`, of a VM that does not run."""
        await self._check_still(name, disks)
        await still.take_all(disks, tag, known=known, files=self._desk.catalog.local)

    async def drop_still(self, name: str, disks: Sequence[Disk], tag: str) -> None:
        """As `drop`, of a VM that does not run."""
        await self._check_still(name, disks)
        await still.drop_all(disks, tag, files=self._desk.catalog.local)

    async def revert(self, name: str, disks: Sequence[Disk], tag: str) -> dict[str, int]:
        """Let the disks of a stopped VM hold what they held then; their sizes now."""
        # Cut short, it may have left a disk with the size it had then.
        await self._check_still(name, disks, sized=False)
        return await still.revert_all(disks, tag, files=self._desk.catalog.local)

    async def _check_still(self, name: str, disks: Sequence[Disk], *, sized: bool = True) -> None:
        if name in self._desk.slots:
            raise Refused(f"{name} runs here", hint=f"stop it first: godwit vm stop {name}")
        for disk in disks:
            path = self._on_files(disk)
            if not sized:
                info = await image_info(path, format=disk.format, files=self._desk.catalog.local)
                disk = disk.but(size_bytes=info.virtual_size)
            await check_image(disk, files=self._desk.catalog.local)

    def _on_files(self, disk: Disk) -> Path:
        """The image's path; Refused where no host has it as a file, for it could not go back."""
        path = self._files.disk_path(disk)
        if self._desk.catalog.files(disk.volume).node(path) is not None:
            raise Refused(
                f"{disk.path} lies on a volume that is served to QEMU alone",
                hint="move it to a volume that hosts have as a directory: godwit vm disk move",
            )
        return path

    @asynccontextmanager
    async def _images(self, slot: Slot, disks: Sequence[Disk]) -> AsyncIterator[_Images]:
        brokered = [disk for disk in disks if tier_of(disk) == "brokered"]
        if not brokered:
            yield _Images(self._desk, slot, disks, None)
            return
        what = f"{brokered[0].id} of {slot.vm.name} cannot change its checkpoints now"
        async with self._desk.brokers.at_home(slot.vm.name, what) as broker:
            yield _Images(self._desk, slot, disks, broker)

    @asynccontextmanager
    async def _changing(self, name: str) -> AsyncIterator[Slot]:
        """The VM, owned by this host, with no move under way and none able to begin."""
        self._check_unmoved(name)  # a move holds the lock to its end: do not wait for that
        async with self._desk.lock(name):
            self._check_unmoved(name)
            slot = self._desk.slot(name)
            self._desk.changing.add(name)
            try:
                await self._power.mine(slot)
                yield slot
            finally:
                self._desk.changing.discard(name)

    def _check_unmoved(self, name: str) -> None:
        if name in self._desk.changing:
            raise Conflict(f"the disks of {name} are being changed", hint="ask again soon")
        if name in self._desk.moving:
            raise Conflict(
                f"{name} is being moved: its disks stay as they are",
                hint="wait for the move to end, or cancel it: godwit migration list",
            )


class _Images:
    """The images of a running VM's disks, opened by its QEMU or by its broker."""

    def __init__(
        self, desk: Desk, slot: Slot, disks: Sequence[Disk], broker: Broker | None
    ) -> None:
        self._desk = desk
        self._slot = slot
        self._broker = broker
        self._direct = [disk for disk in disks if tier_of(disk) != "brokered"]
        self._brokered = [disk for disk in disks if tier_of(disk) == "brokered"]

    async def look(self) -> dict[str, live.Held]:
        """What each holds."""
        found = await live.look(self._slot.machine, self._direct)
        if self._broker is not None:
            held = await self._broker.held([broker_id(disk) for disk in self._brokered])
            found |= {disk.id: held[broker_id(disk)] for disk in self._brokered}
        return found

    async def take(self, tag: str) -> None:
        """A snapshot in each at one instant, or in none: between QEMU and the broker nothing may
        happen, so the VM stands still meanwhile."""
        machine, broker = self._slot.machine, self._broker
        if broker is None:
            await live.take(machine, self._direct, tag)
            return
        async with standing_still(self._desk, self._slot):
            await broker.take_snapshots([broker_id(disk) for disk in self._brokered], tag)
            try:
                if self._direct:
                    await live.take(machine, self._direct, tag)
            except BaseException:
                with contextlib.suppress(GodwitError):  # the next checkpoint drops it
                    for disk in self._brokered:
                        await self.drop(disk, tag)
                raise

    async def drop(self, disk: Disk, tag: str) -> None:
        """One snapshot of one disk."""
        if self._broker is not None and disk in self._brokered:
            await self._broker.drop_snapshot(broker_id(disk), tag)
        else:
            await live.drop(self._slot.machine, disk, tag)
