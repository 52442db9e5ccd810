"""Copies images: to another format, out to a file, or as a clone that stands for itself or not.

Every copy goes to a name that we claimed first and is compared with its source, byte by byte as
the guest sees them, before anybody gets it. On a failure or when cancelled nothing stays behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from godwit.host.errors import HostError, ProgramFailed
from godwit.host.run import Limits
from godwit.model.errors import InvalidRequest, NotFound, OperationFailed, Refused
from godwit.model.vm import DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage.claims import claimed
from godwit.storage.files import LOCAL, VolumeFiles
from godwit.storage.formats import FORMATS, name_of, stored_size
from godwit.storage.images import (
    Backing,
    ImageInfo,
    check_open,
    create_options,
    held_image,
    image_info,
    open_info,
    opened_image,
)
from godwit.storage.qemu_img import (
    GIB,
    INFO_TIMEOUT,
    QEMU_IMG,
    OpenImage,
    Progress,
    failure,
    qemu_img,
    work_limits,
)

_DIFFERENT: Final = 1
_SLOWEST: Final = 4 << 20
"""Bytes per second; a copy that is slower than this is given up."""


@dataclass(frozen=True, slots=True)
class Clone:
    """A new image. ``backing`` has to go into the record of its disk, or nobody will open it."""

    info: ImageInfo
    backing: Backing | None = None


async def convert(
    source: Path,
    *,
    source_format: DiskFormat,
    target: Path,
    target_format: DiskFormat,
    backing: Backing | None = None,
    owner: tuple[int, int] | None = None,
    tool: Binary = QEMU_IMG,
    progress: Progress | None = None,
    source_files: VolumeFiles = LOCAL,
    target_files: VolumeFiles = LOCAL,
) -> ImageInfo:
    """Copy an image that Godwit made into a new file of any format, owned by ``owner``.

    ``backing`` is what the record of a linked clone names; the copy stands for itself.
    ``progress`` hears how much is done, from 0 to 1, the comparison included. ``source_files`` and
    ``target_files`` are those of their volumes. Conflict when the target exists or a VM uses the
    source.
    """
    await parent_exists(target, target_files)
    async with (
        opened_image(source, format=source_format, backing=backing, files=source_files) as image,
        copied(
            image,
            target,
            target_format,
            owner=owner,
            tool=tool,
            progress=progress,
            files=target_files,
        ),
    ):
        pass  # it is checked by then
    return await image_info(target, format=target_format, program=tool.path, files=target_files)


async def export_image(
    source: Path,
    *,
    source_format: DiskFormat,
    target: Path,
    target_format: DiskFormat,
    backing: Backing | None = None,
    tool: Binary = QEMU_IMG,
    progress: Progress | None = None,
    source_files: VolumeFiles = LOCAL,
    target_files: VolumeFiles = LOCAL,
) -> ImageInfo:
    """Copy a disk out of its volume, for others to take away: a whole image that needs no other.

    Unlike an image of a VM it belongs to us and not to the QEMU user. Errors as `convert`.
    """
    return await convert(
        source,
        source_format=source_format,
        target=target,
        target_format=target_format,
        backing=backing,
        owner=(os.geteuid(), os.getegid()),
        tool=tool,
        progress=progress,
        source_files=source_files,
        target_files=target_files,
    )


async def clone_image(
    source: Path,
    *,
    format: DiskFormat,  # noqa: A002 - the word the field uses
    target: Path,
    target_format: DiskFormat = "qcow2",
    linked: bool = False,
    backing: Backing | None = None,
    owner: tuple[int, int] | None = None,
    tool: Binary = QEMU_IMG,
    progress: Progress | None = None,
    files: VolumeFiles = LOCAL,
) -> Clone:
    """A second disk with the same content.

    A full clone is a copy, see `convert`. A ``linked`` one is a qcow2 image that holds only what
    changes and stands on ``source``, which nobody may write from then on: who keeps the records
    has to see to that. ``files`` are those of both volumes. Refused when ``source`` stands on
    another itself or is neither raw nor qcow2.
    """
    if not linked:
        info = await convert(
            source,
            source_format=format,
            target=target,
            target_format=target_format,
            backing=backing,
            owner=owner,
            tool=tool,
            progress=progress,
            source_files=files,
            target_files=files,
        )
        return Clone(info)
    base = _base(source, format, target_format, backing)
    return Clone(await _link(base, target, owner=owner, tool=tool, files=files), base)


def _base(
    source: Path,
    format: DiskFormat,  # noqa: A002
    target_format: DiskFormat,
    backing: Backing | None,
) -> Backing:
    if format not in ("raw", "qcow2"):
        raise Refused(
            f"{source} is {name_of(format)}; a linked clone stands on raw or qcow2",
            hint="make a full clone",
        )
    if target_format != "qcow2":
        raise InvalidRequest("a linked clone is a qcow2 image", hint="leave the format out")
    if backing is not None:
        raise Refused(f"{source} is a linked clone itself", hint="make a full clone")
    if not source.is_absolute():
        raise InvalidRequest(f"{source} is not an absolute path", hint="name it from the root")
    return Backing(str(source), format)


async def _link(
    base: Backing,
    target: Path,
    *,
    owner: tuple[int, int] | None,
    tool: Binary,
    files: VolumeFiles,
) -> ImageInfo:
    await parent_exists(target, files)
    source = Path(base.path)
    # By its own node, without what it stands on: also fails while a VM writes it.
    async with opened_image(source, format=base.format, files=files) as image:
        info = await open_info(image, tool=tool)
        if info.backing or info.data_file:
            other = info.backing or info.data_file
            raise Refused(f"{source} leads to another file ({other})", hint="make a full clone")
        words = ["create", "-q", "-u", "-f", "qcow2", *create_options("qcow2")]
        words += ["-b", base.path, "-F", base.format]
        async with claimed(target, owner=tool.user or owner, files=files) as claim:
            # -u: it was looked at already, and the name need not mean the same to the tool's user.
            words += [claim.word, str(info.virtual_size)]
            try:
                await qemu_img(
                    tool,
                    words,
                    images=[],
                    limits=None,
                    timeout=INFO_TIMEOUT,
                    descriptors=claim.descriptors(),
                )
            except HostError as error:
                raise failure(f"cannot create {target}", error) from error
            if owner is not None:
                claim.give(owner)
    return await image_info(target, format="qcow2", program=tool.path, files=files)


@contextlib.asynccontextmanager
async def copied(
    source: OpenImage,
    target: Path,
    target_format: DiskFormat,
    *,
    owner: tuple[int, int] | None,
    tool: Binary,
    progress: Progress | None = None,
    files: VolumeFiles = LOCAL,
) -> AsyncIterator[OpenImage]:
    """The copy of an open image under a new name; it stays if the block ends well.

    It is compared with the source, and checked where its format has a check. ``progress`` gives
    the copying the first half and the comparison the second.
    """
    what = f"cannot copy {source.path} to {target}"
    info = await _size_of(source, tool, what)
    size = stored_size(target_format, info.virtual_size)
    data = min(info.virtual_size, source.bytes_long())
    # Tables and a last allocation step on top of the content; VHDX allocates the most at once.
    limits = work_limits(data, file_bytes=size + size // 256 + GIB)
    timeout = 600.0 + data / _SLOWEST
    first = None if progress is None else _part(progress, 0.0)
    second = None if progress is None else _part(progress, 0.5)
    async with claimed(target, owner=tool.user or owner, files=files) as claim:
        words = ["convert", *([] if first is None else ["-p"]), "-O", FORMATS[target_format].driver]
        words += [*create_options(target_format), source.name(), claim.word]
        await _run(tool, words, [source], limits, timeout, what, first, *claim.descriptors())
        copy = await held_image(target, target_format, claim.descriptor, files)
        await _compare(tool, source, copy, limits, timeout, what, second)
        report = await check_open(copy, tool=tool)
        if report.damaged:
            raise OperationFailed(f"{what}: the copy is {report.words}")
        yield copy
        if owner is not None:
            claim.give(owner)
        elif tool.user is not None:
            claim.give((os.geteuid(), os.getegid()))
    if progress is not None:
        progress(1.0)


async def _size_of(source: OpenImage, tool: Binary, what: str) -> ImageInfo:
    if source.size is not None:
        return ImageInfo("raw", source.size, source.bytes_allocated())
    return await open_info(source, tool=tool, what=what)


async def _compare(
    tool: Binary,
    source: OpenImage,
    copy: OpenImage,
    limits: Limits,
    timeout: float,
    what: str,
    progress: Progress | None,
) -> None:
    words = ["compare", *(["-q"] if progress is None else ["-p"]), source.name(), copy.name()]
    try:
        await _run(tool, words, [source, copy], limits, timeout, what, progress)
    except OperationFailed as error:
        cause = error.__cause__
        if isinstance(cause, ProgramFailed) and cause.returncode == _DIFFERENT:
            raise OperationFailed(
                f"{what}: the copy is not equal to its source", hint="is the storage sound?"
            ) from cause
        raise


async def _run(
    tool: Binary,
    words: list[str],
    images: list[OpenImage],
    limits: Limits,
    timeout: float,
    what: str,
    progress: Progress | None,
    *descriptors: int,
) -> None:
    try:
        await qemu_img(
            tool,
            words,
            images=images,
            limits=limits,
            timeout=timeout,
            descriptors=descriptors,
            progress=progress,
        )
    except HostError as error:
        raise failure(what, error, *images) from error


def _part(progress: Progress, start: float) -> Progress:
    return lambda value: progress(start + value / 2)


async def parent_exists(target: Path, files: VolumeFiles) -> None:
    """NotFound when the directory of a new file is not there."""
    try:
        found = await files.look(target.parent)
    except OSError as error:
        raise OperationFailed(f"cannot look at {target.parent}: {error.strerror}") from error
    if found is None or not found.is_directory:
        raise NotFound(f"there is no directory {target.parent}", hint="make it first")
