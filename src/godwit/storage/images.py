"""Disk images: made, measured, checked and grown with qemu-img, the format always named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from godwit.host.errors import HostError, ProgramFailed
from godwit.host.files import sync_directory
from godwit.host.run import run_async
from godwit.model.errors import Conflict, InvalidRequest, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage.formats import (
    FORMATS,
    HEAD_BYTES,
    SECTOR,
    SourceFormat,
    name_of,
    payload,
    sniff,
    stored_size,
)
from godwit.storage.qemu_img import (
    INFO_LIMITS,
    INFO_TIMEOUT,
    NOT_SUPPORTED,
    QEMU_IMG,
    OpenImage,
    explain,
    failure,
    opened,
    qemu_img,
    work_limits,
)
from godwit.storage.vhd import FOOTER_BYTES, parse_footer

_CHECK_TIMEOUT = 3600.0
_CORRUPT, _LEAKS = 2, 3


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image as qemu-img sees it; sizes in bytes, ``backing`` empty when there is none.

    ``format`` is the name of QEMU's driver: ``vpc`` for both kinds of VHD.
    """

    format: str
    virtual_size: int
    disk_size: int
    backing: str = ""
    data_file: str = ""
    backing_format: str = ""
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Backing:
    """The image that a linked clone stands on; to be kept in the record of its disk.

    Godwit wrote it into the clone, and only this one is ever accepted there.
    """

    path: str
    format: Literal["raw", "qcow2"]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check of an image's structure found. ``words`` says it in a sentence.

    ``checked`` is false when the format has no check. ``leaks`` are wasted space, no damage.
    """

    checked: bool
    damaged: bool
    leaks: bool
    words: str


@contextlib.asynccontextmanager
async def claimed(path: Path, *, owner: tuple[int, int] | None) -> AsyncIterator[int]:
    """A new file of this name, open for writing, and durable once the block has ended well.

    Conflict when the name is taken: nothing is ever overwritten. On a failure nothing stays.
    """
    try:
        # Claimed by us first: qemu-img would overwrite what is there.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise Conflict(f"{path} exists already", hint="choose another name") from None
    except OSError as error:
        raise OperationFailed(f"cannot create {path}: {error.strerror}") from error
    try:
        if owner is not None:
            os.fchown(descriptor, *owner)
        yield descriptor
        # The kernel may have gigabytes to write.
        await asyncio.to_thread(os.fsync, descriptor)
        sync_directory(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


async def create_image(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002 - the word the field uses
    size_bytes: int,
    owner: tuple[int, int] | None = None,
    program: str = "qemu-img",
) -> None:
    """Make an empty image, owned by ``owner`` (uid, gid), its name durable.

    The size is rounded up to whole sectors. Conflict when the file exists: nothing is ever
    overwritten. InvalidRequest when the format cannot hold as much. On a failure nothing stays
    behind.
    """
    size = stored_size(format, size_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        async with claimed(path, owner=owner):
            argv = [program, "create", "-q", "-f", FORMATS[format].driver]
            argv += [*create_options(format), str(path), str(size)]
            await run_async(argv, timeout=INFO_TIMEOUT)
    except (HostError, OSError) as error:
        raise OperationFailed(f"cannot create {path}: {error}") from error


def create_options(format: DiskFormat) -> list[str]:  # noqa: A002
    """The words of ``qemu-img create`` and ``convert`` for a new image of this format."""
    options = FORMATS[format].create
    return ["-o", ",".join(options)] if options else []


async def image_info(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    in_use: bool = False,
    program: str = "qemu-img",
) -> ImageInfo:
    """What the image is; ``in_use`` looks past the lock of a running QEMU.

    OperationFailed when it is not of this format.
    """
    if format in ("vhd-fixed", "vhd"):
        fixed = await asyncio.to_thread(_vhd_info, path, format)
        if fixed is not None:
            return fixed
    shared = ["-U"] if in_use else []
    driver = FORMATS[format].driver
    argv = [program, "info", "-f", driver, "--output=json", *shared, str(path)]
    try:
        return parse_info(await run_async(argv, timeout=INFO_TIMEOUT))
    except HostError as error:
        raise OperationFailed(f"cannot read the image {path}: {error}") from error


def parse_info(printed: bytes, *, itself: str = "") -> ImageInfo:
    """What ``qemu-img info --output=json`` printed of the file named ``itself``.

    An extent of a VMDK in any other file counts as a data file.
    """
    answer = json.loads(printed)
    specific = answer.get("format-specific", {}).get("data", {})
    extents = [str(one.get("filename", "")) for one in specific.get("extents", ())]
    other = next((name for name in extents if name != itself), "")
    return ImageInfo(
        format=str(answer["format"]),
        virtual_size=int(answer["virtual-size"]),
        disk_size=int(answer.get("actual-size", 0)),
        backing=str(answer.get("backing-filename", "")),
        data_file=str(specific.get("data-file", "")) or other,
        backing_format=str(answer.get("backing-filename-format", "")),
        encrypted=bool(answer.get("encrypted", False)),
    )


def _vhd_info(path: Path, format: DiskFormat) -> ImageInfo | None:  # noqa: A002
    """A fixed VHD by its footer; None for a dynamic one, which QEMU shall measure.

    QEMU's driver looks for a footer in the first sector, which belongs to the guest here.
    """
    with opened(path) as descriptor:
        return vhd_info(descriptor, path, format)


def vhd_info(descriptor: int, path: Path, format: DiskFormat) -> ImageInfo | None:  # noqa: A002
    """As `image_info` for a VHD held open, None when only QEMU can measure it."""
    status = os.fstat(descriptor)
    tail = os.pread(descriptor, FOOTER_BYTES, max(0, status.st_size - FOOTER_BYTES))
    footer = parse_footer(tail)
    if format == "vhd" and sniff(os.pread(descriptor, HEAD_BYTES, 0), b"") == "vhd":
        return None
    if format == "vhd" or footer is None or footer.kind != "fixed":
        raise OperationFailed(f"cannot read the image {path}: it is not {name_of(format)}")
    if footer.virtual_size + FOOTER_BYTES > status.st_size:
        raise OperationFailed(f"cannot read the image {path}: it is cut off")
    return ImageInfo("vpc", footer.virtual_size, status.st_blocks * SECTOR)


async def check_image(
    disk: Disk,
    *,
    in_use: bool = False,
    program: str = "qemu-img",
    backing: Backing | None = None,
) -> ImageInfo:
    """Refused, with the reason, unless the image is what the VM's record says it is.

    An image that leads to other files (a backing or data file) is refused: its maker would
    choose what QEMU opens. Only ``backing``, which the record of a linked clone names, is
    accepted, and it has to stand for itself.
    """
    path = Path(disk.path)
    info = await image_info(path, format=disk.format, in_use=in_use, program=program)
    expected = ("", "") if backing is None else (backing.path, backing.format)
    if info.data_file or (info.backing, info.backing_format) != expected:
        other = info.data_file or info.backing
        if not other:
            raise Refused(
                f"{disk.path} does not stand on {expected[0]}, as the record says",
                hint="was the image replaced? put the right one back",
            )
        raise Refused(f"{disk.path} leads to another file ({other})", hint="flatten the image")
    if backing is not None:
        # Many clones may have it open.
        base = await image_info(
            Path(backing.path), format=backing.format, in_use=True, program=program
        )
        if base.backing or base.data_file:
            other = base.backing or base.data_file
            raise Refused(f"{backing.path} leads to another file ({other})", hint="flatten it")
    if info.virtual_size != -(-disk.size_bytes // SECTOR) * SECTOR:
        raise Refused(
            f"{disk.path} holds {info.virtual_size} bytes, the record says {disk.size_bytes}",
            hint="was the image replaced? put the right one back",
        )
    return info


@contextlib.asynccontextmanager
async def opened_image(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    backing: Backing | None = None,
) -> AsyncIterator[OpenImage]:
    """An image that Godwit made, open for reading, with the one it stands on."""
    with contextlib.ExitStack() as files:
        base = None
        if backing is not None:
            descriptor = files.enter_context(opened(Path(backing.path)))
            base = OpenImage(Path(backing.path), backing.format, descriptor)
        descriptor = files.enter_context(opened(path))
        size = None
        if format == "vhd-fixed":
            info = await asyncio.to_thread(vhd_info, descriptor, path, format)
            part = None if info is None else payload(format, info)
            size = None if part is None else part[1]
        yield OpenImage(path, format, descriptor, size=size, base=base)


async def open_info(
    image: OpenImage, *, tool: Binary = QEMU_IMG, what: str | None = None
) -> ImageInfo:
    """What an image held open is; errors say ``what`` could not be done."""
    # ``info`` opens no backing file, and takes none that is named outright.
    alone = replace(image, base=None)
    words = ["info", "--output=json", alone.name()]
    try:
        printed = await qemu_img(
            tool, words, images=[alone], limits=INFO_LIMITS, timeout=INFO_TIMEOUT
        )
    except HostError as error:
        raise failure(what or f"cannot read the image {image.path}", error, alone) from error
    return parse_info(printed, itself=f"/proc/self/fd/{image.descriptor}")


async def check(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    backing: Backing | None = None,
    tool: Binary = QEMU_IMG,
) -> CheckReport:
    """Look through an image's own structure, changing nothing. It must not be in use."""
    async with opened_image(path, format=format, backing=backing) as image:
        return await check_open(image, tool=tool)


async def check_open(image: OpenImage, *, tool: Binary = QEMU_IMG) -> CheckReport:
    """As `check`, for an image held open."""
    if not FORMATS[image.format].has_check:
        return unchecked(image.format)
    limits = work_limits(os.fstat(image.descriptor).st_size)
    words = ["check", "-q", image.name()]
    try:
        await qemu_img(tool, words, images=[image], limits=limits, timeout=_CHECK_TIMEOUT)
    except ProgramFailed as error:
        if error.returncode == NOT_SUPPORTED:
            return unchecked(image.format)
        if error.returncode == _LEAKS:
            return CheckReport(True, False, True, "clean, but some space in it is wasted")
        if error.returncode == _CORRUPT:
            return CheckReport(True, True, False, f"damaged: {explain(error, image)}")
        raise failure(f"cannot check {image.path}", error, image) from error
    except HostError as error:
        raise failure(f"cannot check {image.path}", error, image) from error
    return CheckReport(True, False, False, "clean")


def unchecked(format: SourceFormat) -> CheckReport:  # noqa: A002
    """The report for a format that has no check."""
    return CheckReport(False, False, False, f"not checked: {name_of(format)} has no check in QEMU")


async def grow(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    size_bytes: int,
    tool: Binary = QEMU_IMG,
) -> ImageInfo:
    """Make an image that nobody uses larger; what it holds stays, the new part reads as zeroes.

    Refused for formats that QEMU cannot grow and for a smaller size, Conflict when it is in use.
    """
    if not FORMATS[format].grows:
        raise Refused(
            f"{path} is {name_of(format)}, which QEMU cannot make larger",
            hint="convert it: export the disk and import it as qcow2 or raw",
        )
    size = stored_size(format, size_bytes)
    info = await image_info(path, format=format, program=tool.path, in_use=True)
    if size < info.virtual_size:
        raise InvalidRequest(
            f"{path} holds {info.virtual_size} bytes; a disk is never made smaller",
            hint="name a larger size",
        )
    # Also when the size is right already: the lock says whether anybody uses the image.
    words = ["resize", "-q", "-f", FORMATS[format].driver, str(path), str(size)]
    try:
        await qemu_img(tool, words, images=[], limits=None, timeout=INFO_TIMEOUT)
    except HostError as error:
        raise failure(f"cannot make {path} larger", error) from error
    await asyncio.to_thread(_sync_file, path)
    return await image_info(path, format=format, program=tool.path)


def _sync_file(path: Path) -> None:
    with opened(path) as descriptor:
        os.fsync(descriptor)
