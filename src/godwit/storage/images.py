"""Disk images: made, measured and checked with qemu-img, the format always named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from godwit.host.errors import HostError, ProgramFailed
from godwit.host.run import run_async
from godwit.model.errors import NotFound, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage.claims import claimed
from godwit.storage.files import LOCAL, FileFacts, VolumeFiles
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
    file_node,
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


async def create_image(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002 - the word the field uses
    size_bytes: int,
    owner: tuple[int, int] | None = None,
    program: str = "qemu-img",
    files: VolumeFiles = LOCAL,
) -> None:
    """Make an empty image, owned by ``owner`` (uid, gid), its name durable.

    The size is rounded up to whole sectors. Conflict when the file exists: nothing is ever
    overwritten. InvalidRequest when the format cannot hold as much. On a failure nothing stays
    behind.
    """
    size = stored_size(format, size_bytes)
    try:
        await files.make_directories(path.parent)
        async with claimed(path, owner=owner, files=files):
            argv = [program, "create", "-q", "-f", FORMATS[format].driver]
            argv += [*create_options(format), files.word(path), str(size)]
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
    files: VolumeFiles = LOCAL,
) -> ImageInfo:
    """What the image is; ``in_use`` looks past the lock of a running QEMU.

    OperationFailed when it is not of this format.
    """
    if format in ("vhd-fixed", "vhd"):
        fixed = await _vhd_info(path, format, files)
        if fixed is not None:
            return fixed
    shared = ["-U"] if in_use else []
    argv = [program, "info", "--output=json", *shared, *named(path, format, files)]
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


def named(path: Path, format: SourceFormat, files: VolumeFiles) -> list[str]:  # noqa: A002
    """An image of Godwit's own as words of qemu-img."""
    driver, node = FORMATS[format].driver, files.node(path)
    if node is None and files.locking:
        return ["-f", driver, str(path)]
    whole = {"driver": driver, "file": node or file_node(str(path), locking=files.locking)}
    return ["json:" + json.dumps(whole, separators=(",", ":"))]


async def _vhd_info(
    path: Path,
    format: DiskFormat,  # noqa: A002
    files: VolumeFiles,
) -> ImageInfo | None:
    """A fixed VHD by its footer; None for a dynamic one, which QEMU shall measure.

    QEMU's driver looks for a footer in the first sector, which belongs to the guest here.
    """
    try:
        facts = await files.look(path)
        if facts is None:
            raise NotFound(f"there is no file {path}", hint="is it on this host?")
        if not facts.is_file:
            raise Refused(f"{path} is not a file", hint="name an image")
        end = max(0, facts.size - FOOTER_BYTES)
        tail = await files.read(path, end, FOOTER_BYTES)
        head = await files.read(path, 0, HEAD_BYTES)
    except OSError as error:
        raise OperationFailed(f"cannot read the image {path}: {error.strerror}") from error
    return vhd_info(path, format, head=head, tail=tail, facts=facts)


def vhd_info(
    path: Path,
    format: DiskFormat,  # noqa: A002
    *,
    head: bytes,
    tail: bytes,
    facts: FileFacts,
) -> ImageInfo | None:
    """As `image_info` for a VHD with these first and last bytes; None when only QEMU can tell."""
    footer = parse_footer(tail)
    if format == "vhd" and sniff(head, b"") == "vhd":
        return None
    if format == "vhd" or footer is None or footer.kind != "fixed":
        raise OperationFailed(f"cannot read the image {path}: it is not {name_of(format)}")
    if footer.virtual_size + FOOTER_BYTES > facts.size:
        raise OperationFailed(f"cannot read the image {path}: it is cut off")
    return ImageInfo("vpc", footer.virtual_size, facts.allocated)


async def check_image(
    disk: Disk,
    *,
    in_use: bool = False,
    program: str = "qemu-img",
    files: VolumeFiles = LOCAL,
) -> ImageInfo:
    """Refused, with the reason, unless the image is what the VM's record says it is.

    An image that leads to other files (a backing or data file) is refused: its maker would
    choose what QEMU opens. Only the one that the record of a linked clone names is accepted, and
    it has to stand for itself.
    """
    path, backing = Path(disk.path), backing_of(disk)
    info = await image_info(path, format=disk.format, in_use=in_use, program=program, files=files)
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
            Path(backing.path), format=backing.format, in_use=True, program=program, files=files
        )
        if base.backing or base.data_file:
            other = base.backing or base.data_file
            raise Refused(f"{backing.path} leads to another file ({other})", hint="flatten it")
    if info.virtual_size != -(-disk.size_bytes // SECTOR) * SECTOR:
        raise Refused(
            f"{disk.path} holds {info.virtual_size} bytes, the record says {disk.size_bytes}",
            hint="was it replaced? put the right one back; has it grown? godwit vm disk resize",
        )
    return info


def backing_of(disk: Disk) -> Backing | None:
    """What the disk's record says that its image stands on."""
    return None if disk.backing is None else Backing(disk.backing.path, disk.backing.format)


@contextlib.asynccontextmanager
async def opened_image(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    backing: Backing | None = None,
    files: VolumeFiles = LOCAL,
) -> AsyncIterator[OpenImage]:
    """An image that Godwit made, open for reading, with the one it stands on."""
    with contextlib.ExitStack() as held:
        base = None
        if backing is not None:
            base = await _hold(held, Path(backing.path), backing.format, files)
        image = await _hold(held, path, format, files)
        yield replace(image, base=base)


async def _hold(
    held: contextlib.ExitStack,
    path: Path,
    format: DiskFormat,  # noqa: A002
    files: VolumeFiles,
) -> OpenImage:
    if files.node(path) is None:
        descriptor = held.enter_context(opened(path))
        return await held_image(path, format, descriptor, files)
    return await held_image(path, format, -1, files)


async def held_image(
    path: Path,
    format: DiskFormat,  # noqa: A002
    descriptor: int,
    files: VolumeFiles,
) -> OpenImage:
    """The image in a file that we hold open, or (-1) that is served."""
    size = None
    if format == "vhd-fixed":
        info = await _vhd_info(path, format, files)
        part = None if info is None else payload(format, info)
        size = None if part is None else part[1]
    if descriptor >= 0:
        return OpenImage(path, format, descriptor, size=size, locking=files.locking)
    try:
        facts = await files.look(path)
    except OSError as error:
        raise OperationFailed(f"cannot open {path}: {error.strerror}") from error
    if facts is None:
        raise NotFound(f"there is no file {path}", hint="look what the volume holds")
    return OpenImage(
        path,
        format,
        size=size,
        served=files.node(path),
        length=facts.size,
        allocated=facts.allocated,
    )


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
    return parse_info(printed, itself=image.file_name())


async def check(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    backing: Backing | None = None,
    tool: Binary = QEMU_IMG,
    files: VolumeFiles = LOCAL,
) -> CheckReport:
    """Look through an image's own structure, changing nothing. It must not be in use."""
    async with opened_image(path, format=format, backing=backing, files=files) as image:
        return await check_open(image, tool=tool)


async def check_open(image: OpenImage, *, tool: Binary = QEMU_IMG) -> CheckReport:
    """As `check`, for an image held open."""
    if not FORMATS[image.format].has_check:
        return unchecked(image.format)
    limits = work_limits(image.bytes_long())
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
