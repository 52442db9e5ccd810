"""Files that every host sees: boot files by content hash, and the disks of VMs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

from godwit.agent.desk import Desk
from godwit.model.base import check_name
from godwit.model.disks import SEED
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotFound,
    OperationFailed,
    Refused,
)
from godwit.model.vm import Disk
from godwit.storage.images import check_image, create_image
from godwit.storage.places import lun_of, rbd_image
from godwit.storage.served_paths import list_luns, rbd_size

T = TypeVar("T")

LARGEST_BOOT_FILE = 512 << 20


class Files:
    """What the agent writes on the shared volumes for the manager."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @property
    def _boot(self) -> Path:
        return self._desk.config.paths.volumes / "shared" / ".godwit" / "boot"

    async def put_boot_file(self, sha256: str, chunks: AsyncIterator[bytes]) -> dict[str, str]:
        """Store a kernel or initrd under its content hash; one that is there is left alone.

        Refused when the content is not what the name says, or larger than 512 MiB.
        """
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise InvalidRequest(f"{sha256!r} is not a SHA-256", hint="64 hexadecimal digits")
        target = self._boot / sha256
        descriptor, name = tempfile.mkstemp(prefix="boot-", dir=self._desk.config.paths.state)
        digest, size = hashlib.sha256(), 0
        try:
            with os.fdopen(descriptor, "wb") as stream:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > LARGEST_BOOT_FILE:
                        raise Refused("a boot file is at most 512 MiB", hint="use a disk instead")
                    digest.update(chunk)
                    stream.write(chunk)
            if digest.hexdigest() != sha256:
                raise Refused("the file arrived damaged", hint="send it again")
            files = self._desk.catalog.files_at(target)
            await asked(files.make_directories(self._boot), self._boot)
            await asked(files.bring(Path(name), target), target)
        finally:
            Path(name).unlink(missing_ok=True)
        return {"sha256": sha256, "path": str(target)}

    async def publish_image(self, image: str) -> dict[str, str]:
        """Put a named image's kernel and initrd where every host sees them, by content hash."""
        folder = self._desk.config.paths.images / check_name(image, what="image name")
        try:
            manifest = json.loads((folder / "image.json").read_text())
        except FileNotFoundError:
            known = sorted(path.parent.name for path in folder.parent.glob("*/image.json"))
            raise NotFound(
                f"there is no image {image}", hint=f"known: {', '.join(known) or 'none'}"
            ) from None
        answer = {"append": str(manifest.get("append", ""))}
        for kind in ("kernel", "initrd"):
            sha256 = str(manifest[f"{kind}_sha256"])
            target = self._boot / sha256
            files = self._desk.catalog.files_at(target)
            if await asked(files.look(target), target) is None:
                await self.put_boot_file(sha256, _chunks(folder / manifest[kind]))
            answer[kind] = str(target)
        return answer

    async def create_disks(self, disks: list[Disk]) -> None:
        """Make the images of a new VM; on a failure none of them stays."""
        made: list[Disk] = []
        try:
            for disk in images(disks):
                await create_image(
                    self.disk_path(disk),
                    format=disk.format,
                    size_bytes=disk.size_bytes,
                    owner=self._desk.equipment.binary.user,
                    files=self._desk.catalog.files(disk.volume),
                )
                made.append(disk)
        except BaseException:
            for disk in made:
                with contextlib.suppress(GodwitError):
                    await self.remove_image(disk)
            raise

    async def ready_disk(self, disk: Disk) -> bool:
        """See to it that the disk's image is there; whether it was made just now.

        Refused when one is there that is not what the record says. A device or a LUN is what it is.
        """
        if disk.source != "image":
            return False
        path, files = self.disk_path(disk), self._desk.catalog.files(disk.volume)
        if await asked(files.look(path), path) is not None:
            await check_image(disk, files=files)
            return False
        await self.create_disks([disk])
        return True

    async def remove_image(self, disk: Disk) -> None:
        """Delete the disk's image; fine when there is none."""
        path = self.disk_path(disk)
        await asked(self._desk.catalog.files(disk.volume).remove(path), path)

    async def lun_size(self, disk: Disk) -> int:
        """The bytes of a LUN, or of a Ceph pool's image, as its server says."""
        volume = self._desk.catalog.get(disk.volume)
        if volume.kind == "rbd":
            image, access = rbd_image(volume, disk.path), self._desk.catalog.access
            return await asked(rbd_size(volume, image, access), Path(disk.path))
        if volume.kind != "iscsi":
            raise Refused(f"{disk.volume} has no LUNs", hint="see: godwit volume list")
        number = lun_of(volume, disk.path)
        found = await asked(list_luns(volume, self._desk.catalog.access), Path(disk.path))
        if number not in found:
            known = ", ".join(str(lun) for lun in sorted(found)) or "none"
            raise NotFound(
                f"the target of {volume.name} has no disk at LUN {number}",
                hint=f"there are: {known}",
            )
        return found[number]

    async def delete_disks(self, vm: str, disks: list[Disk], *, whole: bool = False) -> None:
        """Delete images of a VM; with ``whole``, which is deleted, what else it has as well.

        Of a VM that runs here only images that are none of its disks any more.
        """
        slot = self._desk.slots.get(vm)
        if slot is not None:
            used = {disk.path for disk in slot.vm.disks} & {disk.path for disk in disks}
            if used or not disks:
                raise Refused(f"{vm} runs here", hint=f"stop it first: godwit vm stop {vm}")
            for disk in images(disks):
                await self.remove_image(disk)
            return
        disks = images(disks)
        folders = {self.disk_path(disk).parent for disk in disks}
        if whole:
            folders.add(self._desk.config.paths.volumes / "shared" / check_name(vm))
        for disk in disks:
            await self.remove_image(disk)
        # Only the VM's own: an image may lie in a folder that others share.
        for folder in (folder for folder in folders if folder.name == vm):
            files = self._desk.catalog.files_at(folder)
            for name in await asked(files.names(folder), folder) if whole else ():
                if name.startswith("saved-") or name == f"{SEED}.iso":
                    await asked(files.remove(folder / name), folder / name)
            await asked(files.remove_directory(folder), folder)

    def disk_path(self, disk: Disk) -> Path:
        """The disk's path, which must lie in its own volume: a record is no reason to leave it."""
        return self._desk.catalog.check_inside(Path(disk.path), disk.volume)


async def asked(question: Awaitable[T], path: Path) -> T:
    """The answer of a volume's files; OperationFailed in place of an OSError."""
    try:
        return await question
    except OSError as error:
        raise OperationFailed(
            f"{path}: {error.strerror or error}", hint="see: godwit volume list"
        ) from error


def images(disks: list[Disk]) -> list[Disk]:
    """The disks that are images of ours: a passed-through device is nobody's to make or delete."""
    return [disk for disk in disks if disk.source == "image"]


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as stream:
        while chunk := await asyncio.to_thread(stream.read, 1 << 20):
            yield chunk
