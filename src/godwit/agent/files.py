"""Files that every host sees: boot files by content hash, and the disks of VMs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from godwit.agent.desk import Desk
from godwit.host.files import sync_directory
from godwit.model.base import check_name
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.vm import Disk
from godwit.storage.images import check_image, create_image

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
        self._boot.mkdir(parents=True, exist_ok=True)
        target = self._boot / sha256
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=self._boot)
        digest, size = hashlib.sha256(), 0
        try:
            with os.fdopen(descriptor, "wb") as stream:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > LARGEST_BOOT_FILE:
                        raise Refused("a boot file is at most 512 MiB", hint="use a disk instead")
                    digest.update(chunk)
                    stream.write(chunk)
                stream.flush()
                await asyncio.to_thread(os.fsync, stream.fileno())
                os.fchmod(stream.fileno(), 0o444)
            if digest.hexdigest() != sha256:
                raise Refused("the file arrived damaged", hint="send it again")
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
        sync_directory(self._boot)
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
            if not target.exists():
                await self.put_boot_file(sha256, _chunks(folder / manifest[kind]))
            answer[kind] = str(target)
        return answer

    async def create_disks(self, disks: list[Disk]) -> None:
        """Make the images of a new VM; on a failure none of them stays."""
        made: list[Path] = []
        try:
            for disk in images(disks):
                path = self.disk_path(disk)
                path.parent.mkdir(parents=True, exist_ok=True)
                await create_image(
                    path,
                    format=disk.format,
                    size_bytes=disk.size_bytes,
                    owner=self._desk.equipment.binary.user,
                )
                made.append(path)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise

    async def ready_disk(self, disk: Disk) -> bool:
        """See to it that the disk's image is there; whether it was made just now.

        Refused when one is there that is not what the record says. A device is what it is.
        """
        if disk.source == "device":
            return False
        if self.disk_path(disk).exists():
            await check_image(disk)
            return False
        await self.create_disks([disk])
        return True

    async def delete_disks(self, vm: str, disks: list[Disk]) -> None:
        """Delete a VM's images and what else lies in its directory.

        Of a VM that runs here only images that are none of its disks any more.
        """
        slot = self._desk.slots.get(vm)
        if slot is not None:
            used = {disk.path for disk in slot.vm.disks} & {disk.path for disk in disks}
            if used or not disks:
                raise Refused(f"{vm} runs here", hint=f"stop it first: godwit vm stop {vm}")
            for disk in images(disks):
                self.disk_path(disk).unlink(missing_ok=True)
            return
        disks = images(disks)
        folders = {self.disk_path(disk).parent for disk in disks}
        folders.add(self._desk.config.paths.volumes / "shared" / check_name(vm))
        for disk in disks:
            self.disk_path(disk).unlink(missing_ok=True)
        # Only the VM's own: an image may lie in a folder that others share.
        for folder in (folder for folder in folders if folder.name == vm):
            for leftover in folder.glob("saved-*"):
                leftover.unlink()
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def disk_path(self, disk: Disk) -> Path:
        """The disk's path, which must lie in its own volume: a record is no reason to leave it."""
        root = self._desk.config.paths.volumes / disk.volume
        path = Path(disk.path)
        if not root.is_dir():
            raise NotFound(f"{self._desk.host} does not see volume {disk.volume}", hint="see it?")
        if root not in path.parents or ".." in path.parts:
            raise Refused(f"{path} is outside of volume {disk.volume}", hint="correct the record")
        return path


def images(disks: list[Disk]) -> list[Disk]:
    """The disks that are images of ours: a passed-through device is nobody's to make or delete."""
    return [disk for disk in disks if disk.source == "image"]


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as stream:
        while chunk := await asyncio.to_thread(stream.read, 1 << 20):
            yield chunk
