"""Work on images that no VM uses: measured, grown, brought in, copied out. For the manager.

Every path has to lie in a volume of this host; what is not Godwit's own work is looked at as the
QEMU user, who can read no more than any VM could.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast, get_args

from godwit.agent.desk import Desk
from godwit.agent.files import Files
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.vm import Disk, DiskFormat
from godwit.qemu.devices import device_size
from godwit.qemu.launch import Binary
from godwit.storage import convert, images, imports
from godwit.storage.fetch import is_url
from godwit.storage.formats import SourceFormat

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
        path = self._files.disk_path(disk)
        if not path.is_file():
            raise NotFound(f"there is no image {path}", hint="look what the volume holds")
        info = await images.image_info(path, format=disk.format)
        await images.check_image(disk.but(size_bytes=info.virtual_size))
        return {"size_bytes": info.virtual_size}

    async def grow(self, disk: Disk, size_bytes: int) -> dict[str, int]:
        """Let the image of a stopped VM grow; Refused for formats that cannot."""
        if disk.source == "device":
            raise Refused(f"{disk.path} is a device", hint="grow it where it comes from")
        path = self._files.disk_path(disk)
        grown = await images.grow(
            path, format=disk.format, size_bytes=size_bytes, tool=self._tool()
        )
        return {"size_bytes": grown.virtual_size}

    async def export(self, disk: Disk, target: str, format: str) -> dict[str, int]:  # noqa: A002
        """Copy a stopped VM's disk to a new file in a volume."""
        info = await convert.export_image(
            self._files.disk_path(disk),
            source_format=disk.format,
            target=self._inside(target),
            target_format=_format(format),
            tool=self._tool(),
        )
        return {"size_bytes": info.virtual_size}

    async def bring_in(
        self,
        path: str,
        source: str,
        format: str,  # noqa: A002
        target_format: str,
    ) -> dict[str, int]:
        """Import an image from a URL or a volume; refused in one line when it is not sound."""
        origin = source if is_url(source) else str(self._inside(source))
        target = self._inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        info = await imports.import_image(
            origin,
            source_format="vmdk" if format == "vmdk" else cast("SourceFormat", _format(format)),
            target=target,
            target_format=_format(target_format),
            tool=self._tool(),
            owner=self._desk.equipment.binary.user,
        )
        return {"size_bytes": info.virtual_size}

    def _tool(self) -> Binary:
        return Binary.named(TOOL, user=self._desk.config.qemu.user)

    def _inside(self, text: str) -> Path:
        """A path in a volume that this host sees, whatever links lie on the way."""
        root = self._desk.config.paths.volumes
        path = Path(text)
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
