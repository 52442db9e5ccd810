"""Disk images: made, measured and checked with qemu-img, the format always named."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from godwit.host.errors import HostError
from godwit.host.files import sync_directory
from godwit.host.run import run_async
from godwit.model.errors import Conflict, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat

QEMU_IMG = "qemu-img"
_TIMEOUT = 60.0
SECTOR = 512


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image as qemu-img sees it; sizes in bytes, ``backing`` empty when there is none."""

    format: str
    virtual_size: int
    disk_size: int
    backing: str = ""
    data_file: str = ""


async def create_image(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002 - the word the field uses
    size_bytes: int,
    owner: tuple[int, int] | None = None,
    program: str = QEMU_IMG,
) -> None:
    """Make an empty image, owned by ``owner`` (uid, gid), its name durable.

    The size is rounded up to whole sectors. Conflict when the file exists: nothing is ever
    overwritten. On a failure nothing stays behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Claimed by us first: qemu-img would overwrite what is there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise Conflict(f"{path} exists already", hint="choose another name") from None
    except OSError as error:
        raise OperationFailed(f"cannot create {path}: {error.strerror}") from error
    try:
        if owner is not None:
            os.fchown(descriptor, *owner)
        size = -(-size_bytes // SECTOR) * SECTOR
        # Lazy extras (refcounts, extended L2) stay off: old QEMUs must read it.
        options = ["-o", "compat=1.1,lazy_refcounts=off"] if format == "qcow2" else []
        argv = [program, "create", "-q", "-f", format, *options, str(path), str(size)]
        await run_async(argv, timeout=_TIMEOUT)
        os.fsync(descriptor)
        sync_directory(path.parent)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, HostError | OSError):
            raise OperationFailed(f"cannot create {path}: {error}") from error
        raise
    finally:
        os.close(descriptor)


async def image_info(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    in_use: bool = False,
    program: str = QEMU_IMG,
) -> ImageInfo:
    """What the image is; ``in_use`` looks past the lock of a running QEMU."""
    shared = ["-U"] if in_use else []
    argv = [program, "info", "-f", format, "--output=json", *shared, str(path)]
    try:
        answer = json.loads(await run_async(argv, timeout=_TIMEOUT))
    except HostError as error:
        raise OperationFailed(f"cannot read the image {path}: {error}") from error
    specific = answer.get("format-specific", {}).get("data", {})
    return ImageInfo(
        format=str(answer["format"]),
        virtual_size=int(answer["virtual-size"]),
        disk_size=int(answer.get("actual-size", 0)),
        backing=str(answer.get("backing-filename", "")),
        data_file=str(specific.get("data-file", "")),
    )


async def check_image(disk: Disk, *, in_use: bool = False, program: str = QEMU_IMG) -> ImageInfo:
    """Refused, with the reason, unless the image is what the VM's record says it is.

    An image that leads to other files (a backing or data file) is refused: its maker would
    choose what QEMU opens.
    """
    info = await image_info(Path(disk.path), format=disk.format, in_use=in_use, program=program)
    if info.backing or info.data_file:
        other = info.backing or info.data_file
        raise Refused(f"{disk.path} leads to another file ({other})", hint="flatten the image")
    if info.virtual_size != -(-disk.size_bytes // SECTOR) * SECTOR:
        raise Refused(
            f"{disk.path} holds {info.virtual_size} bytes, the record says {disk.size_bytes}",
            hint="was the image replaced? put the right one back",
        )
    return info
