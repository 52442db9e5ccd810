"""Work on images that no VM uses: measured, grown, brought in, copied out. For the manager.

Every path has to lie in a volume of this host; what is not Godwit's own work is looked at as the
QEMU user, who can read no more than any VM could.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import cast, get_args

from godwit.agent.desk import Desk
from godwit.agent.files import Files, asked
from godwit.model.disks import volume_of
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.vm import Disk, DiskFormat
from godwit.model.volume import SERVED
from godwit.qemu.devices import device_size
from godwit.qemu.launch import Binary
from godwit.storage import convert, images, imports
from godwit.storage.fetch import is_url
from godwit.storage.formats import SourceFormat
from godwit.storage.growth import grow

TOOL = "qemu-img"


class Images:
    """The verbs; each answers when it is done, and leaves nothing when it fails."""

    def __init__(self, desk: Desk, files: Files) -> None:
        self._desk = desk
        self._files = files

    async def inspect(self, disk: Disk) -> dict[str, int]:
        """The size of an image or device that is to become a VM's disk."""
        if disk.source == "device":
            return {"size_bytes": await asyncio.to_thread(device_size, Path(disk.path))}
        if disk.source == "lun":
            return {"size_bytes": await self._files.lun_size(disk)}
        path = self._files.disk_path(disk)
        files = self._desk.catalog.files(disk.volume)
        found = await asked(files.look(path), path)
        if found is None or not found.is_file:
            raise NotFound(f"there is no image {path}", hint="look what the volume holds")
        info = await images.image_info(path, format=disk.format, files=files)
        await images.check_image(disk.but(size_bytes=info.virtual_size), files=files)
        return {"size_bytes": info.virtual_size}

    async def grow(self, disk: Disk, size_bytes: int) -> dict[str, int]:
        """Let the image of a stopped VM grow."""
        if disk.source != "image":
            raise Refused(f"{disk.path} is a {disk.source}", hint="grow it where it comes from")
        files = self._desk.catalog.files(disk.volume)
        if disk.backing is not None:  # a name in it leads on: it has to be the one on record
            await images.check_image(disk, files=files)
        grown = await grow(
            self._files.disk_path(disk),
            format=disk.format,
            size_bytes=size_bytes,
            tool=self._tool(),
            files=files,
        )
        return {"size_bytes": grown.virtual_size}

    async def export(self, disk: Disk, target: str, format: str) -> dict[str, int]:  # noqa: A002
        """Copy a stopped VM's disk to a new file in a volume."""
        if disk.source != "image":
            raise Refused(
                f"{disk.path} is a {disk.source}, which is not copied yet",
                hint="copy it where it comes from",
            )
        place = self._inside(target)
        info = await convert.export_image(
            self._files.disk_path(disk),
            source_format=disk.format,
            backing=images.backing_of(disk),
            target=place,
            target_format=_format(format),
            tool=self._tool(),
            source_files=self._desk.catalog.files(disk.volume),
            target_files=self._desk.catalog.files_at(place),
        )
        return {"size_bytes": info.virtual_size}

    async def clone(self, source: Disk, target: Disk) -> dict[str, int]:
        """Make one VM's image out of a stopped one's: a copy, or (``target.backing``) a link."""
        path, files = self._files.disk_path(target), self._desk.catalog.files(target.volume)
        if target.backing is not None and files.node(path) is not None:
            raise Refused(
                f"{source.path} lies on a volume that is served to QEMU alone, where no linked "
                "clone can stand on it",
                hint="leave --linked out: a full clone has images of its own",
            )
        await asked(files.make_directories(path.parent), path.parent)
        await images.check_image(source, files=files)
        made = await convert.clone_image(
            self._files.disk_path(source),
            format=source.format,
            target=path,
            target_format=target.format,
            linked=target.backing is not None,
            backing=images.backing_of(source),
            owner=self._desk.equipment.binary.user,
            files=files,
        )
        if made.backing != images.backing_of(target):
            await asked(files.remove(path), path)
            raise Refused(f"{path} does not stand on what its record says", hint="report this")
        return {"size_bytes": made.info.virtual_size}

    async def discard(self, disk: Disk) -> None:
        """Delete an image that no VM has, and nothing else."""
        await self._files.remove_image(disk)
        folder = self._files.disk_path(disk).parent
        with contextlib.suppress(OSError):  # other images lie there
            await self._desk.catalog.files(disk.volume).remove_directory(folder)

    async def bring_in(
        self,
        path: str,
        source: str,
        format: str,  # noqa: A002
        target_format: str,
    ) -> dict[str, int]:
        """Import an image from a URL or a volume; refused in one line when it is not sound."""
        catalog = self._desk.catalog
        origin = source if is_url(source) else str(self._inside(source))
        source_files = catalog.local if is_url(source) else catalog.files_at(origin)
        target = self._inside(path)
        files = catalog.files_at(target)
        await asked(files.make_directories(target.parent), target.parent)
        here = files.node(target) is None
        info = await imports.import_image(
            origin,
            source_format="vmdk" if format == "vmdk" else cast("SourceFormat", _format(format)),
            target=target,
            target_format=_format(target_format),
            tool=self._tool(),
            owner=self._desk.equipment.binary.user,
            files=files,
            source_files=source_files,
            scratch=None if here else self._desk.config.paths.state,
        )
        return {"size_bytes": info.virtual_size}

    def _tool(self) -> Binary:
        return Binary.named(TOOL, user=self._desk.config.qemu.user)

    def _inside(self, text: str) -> Path:
        """A path in a volume that this host sees, whatever links lie on the way."""
        root = self._desk.config.paths.volumes
        path = Path(text)
        volume = volume_of(text)
        if volume is not None and self._desk.catalog.get(volume).kind in SERVED:
            return self._desk.catalog.check_inside(path, volume)
        real = path.parent.resolve() / path.name
        if not path.is_absolute() or root.resolve() not in real.parents or ".." in path.parts:
            raise Refused(f"{text} is in no volume", hint=f"name a path below {root}")
        if real.is_symlink():
            raise Refused(f"{text} is a link", hint="name the file itself")
        return path


def _format(text: str) -> DiskFormat:
    if text not in get_args(DiskFormat):
        known = ", ".join(get_args(DiskFormat))
        raise InvalidRequest(f"{text!r} is no disk format", hint=f"there are: {known}")
    return cast("DiskFormat", text)
