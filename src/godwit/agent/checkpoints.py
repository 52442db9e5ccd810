"""Checkpoints of this host's VMs, and of stopped ones whose images lie on its volumes.

The images hold them (`godwit.storage.snapshots`); a VM's record says which there are. An agent is
told the record's, and drops what an action that was cut short left besides. A move and a checkpoint
exclude each other as a move and a change of disks do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from godwit.agent.desk import Desk, Slot
from godwit.agent.files import Files
from godwit.agent.power import Power
from godwit.model.errors import Conflict, Refused
from godwit.model.vm import Disk
from godwit.qemu import snapshots as live
from godwit.storage import snapshots as still
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
        async with self._changing(name) as slot:
            machine, images = slot.machine, await live.look(slot.machine, disks)
            for disk in disks:
                for left in still.leftovers(images[disk.id].tags, [*known, tag]):
                    await live.drop(machine, disk, left)
            there = [disk for disk in disks if tag in images[disk.id].tags]
            if len(there) == len(disks):
                return
            live.check_wait(name, images)
            for disk in there:  # not of one instant with the others
                await live.drop(machine, disk, tag)
            await live.take(machine, disks, tag)

    async def drop(self, name: str, disks: Sequence[Disk], tag: str) -> None:
        """Give back what a checkpoint of a running VM takes."""
        async with self._changing(name) as slot:
            images = await live.look(slot.machine, disks)
            live.check_wait(name, images)
            for disk in disks:
                if tag in images[disk.id].tags:
                    await live.drop(slot.machine, disk, tag)

    async def take_still(
        self, name: str, disks: Sequence[Disk], tag: str, known: Sequence[str]
    ) -> None:
        """As `take`, of a VM that does not run."""
        await self._check_still(name, disks)
        await still.take_all(disks, tag, known=known)

    async def drop_still(self, name: str, disks: Sequence[Disk], tag: str) -> None:
        """As `drop`, of a VM that does not run."""
        await self._check_still(name, disks)
        await still.drop_all(disks, tag)

    async def revert(self, name: str, disks: Sequence[Disk], tag: str) -> dict[str, int]:
        """Let the disks of a stopped VM hold what they held then; their sizes now."""
        # Cut short, it may have left a disk with the size it had then.
        await self._check_still(name, disks, sized=False)
        return await still.revert_all(disks, tag)

    async def _check_still(self, name: str, disks: Sequence[Disk], *, sized: bool = True) -> None:
        if name in self._desk.slots:
            raise Refused(f"{name} runs here", hint=f"stop it first: godwit vm stop {name}")
        for disk in disks:
            path = self._on_files(disk)
            if not sized:
                info = await image_info(path, format=disk.format)
                disk = disk.but(size_bytes=info.virtual_size)
            await check_image(disk)

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
