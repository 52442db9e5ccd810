"""Takes in disk images that strangers made, from a file of this host or from an address.

    fetch      into a file without a name (addresses only)
    examine    by its own bytes: is it what it is said to be, whole, and leads nowhere?
    measure    by qemu-img, as the QEMU user and within limits, as all that follows
    check      its structure, where the format has a check
    convert    to a name that we claimed, compare the copy, check the copy
    look back  did the source change meanwhile?

Only then the image has its name for good. QEMU never opens what it names inside, a fault in
qemu-img meets no privileges, and on a refusal nothing stays behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from godwit.host.errors import ProgramFailed
from godwit.host.run import run_async
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused
from godwit.model.vm import DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage import vhd
from godwit.storage.convert import copied, parent_exists
from godwit.storage.fetch import fetch, is_url, shown
from godwit.storage.files import LOCAL, VolumeFiles
from godwit.storage.foreign import Claims, check_size, examine
from godwit.storage.formats import LARGEST_VIRTUAL, TIB, SourceFormat
from godwit.storage.images import ImageInfo, check_open, open_info
from godwit.storage.qemu_img import OpenImage, Progress, opened

ImportProgress = Callable[[str, float], None]
"""Hears the stage (``fetch``, ``check``, ``convert``) and how much of it is done, from 0 to 1."""

_LOOK_TIMEOUT: Final = 30.0
_COPIED_S: Final = 60.0
_PIECE: Final = 1 << 20
_SLOWEST: Final = 4 << 20
"""Bytes per second; a server that is slower than this is given up."""
_FLATTEN: Final = "flatten it where it comes from: qemu-img convert"


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """The most that is taken: bytes that the guest would see, and bytes of the file."""

    virtual_bytes: int = LARGEST_VIRTUAL
    file_bytes: int = 16 * TIB


@dataclass(frozen=True, slots=True)
class _Seen:
    """What of a file changes when somebody writes or replaces it; only root can turn it back."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @staticmethod
    def of(descriptor: int) -> _Seen:
        status = os.fstat(descriptor)
        return _Seen(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)


async def import_image(
    source: str,
    *,
    source_format: SourceFormat,
    target: Path,
    target_format: DiskFormat,
    tool: Binary,
    owner: tuple[int, int] | None = None,
    limits: ImportLimits | None = None,
    progress: ImportProgress | None = None,
    files: VolumeFiles = LOCAL,
    source_files: VolumeFiles = LOCAL,
    scratch: Path | None = None,
) -> ImageInfo:
    """Bring the image at ``source`` (an absolute path, or http:// or https://) into a volume.

    ``tool`` is qemu-img with the user that may look at strangers' images; a file of this host has
    to be readable for that user, so nothing is imported that only root may read. ``files`` are
    those of the target's volume, ``source_files`` those of the source's; what has to be fetched
    from an address or a server waits in ``scratch``, or else beside the target.
    Refused, with the reason in one line, for every image that should not be trusted; Conflict when
    the target exists; OperationFailed when the fetching or the copying fails.
    """
    allowed = limits or ImportLimits()
    name = shown(source) if is_url(source) else source
    await _check_free(target, files)  # before much is fetched; claimed for good later
    origin = _Origin(source, source_files, scratch or target.parent)
    async with _opened(origin, tool, allowed, _stage(progress, "fetch")) as descriptor:
        before = _Seen.of(descriptor)
        opened_as = OpenImage(Path(name), source_format, descriptor, locking=source_files.locking)
        image = await _judged(name, opened_as, before.size, tool, allowed)
        if progress is not None:
            progress("check", 1.0)
        async with copied(
            image,
            target,
            target_format,
            owner=owner or tool.user,
            tool=tool,
            progress=_stage(progress, "convert"),
            files=files,
        ) as copy:
            if _Seen.of(descriptor) != before:
                raise Refused(f"{name} changed while it was read", hint="let nobody write it")
            return await _described(copy, tool)


def _stage(progress: ImportProgress | None, stage: str) -> Progress | None:
    return None if progress is None else lambda value: progress(stage, value)


async def _check_free(target: Path, files: VolumeFiles) -> None:
    await parent_exists(target, files)
    try:
        taken = await files.look(target) is not None
    except OSError as error:
        raise OperationFailed(f"cannot look at {target}: {error.strerror}") from error
    if taken or (files.node(target) is None and target.is_symlink()):
        raise Conflict(f"{target} exists already", hint="choose another name")


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the stranger's image is, and where a copy of it may wait."""

    source: str
    files: VolumeFiles
    scratch: Path


@contextlib.asynccontextmanager
async def _opened(
    origin: _Origin, tool: Binary, limits: ImportLimits, progress: Progress | None
) -> AsyncIterator[int]:
    """A descriptor of the stranger's image."""
    source, path = origin.source, Path(origin.source)
    far = is_url(source) or origin.files.node(path) is not None
    if not far and not path.is_absolute():
        raise Refused(f"{source} is not an absolute path", hint="name it from the root")
    if not far:
        with opened(path) as descriptor:
            _check_length(source, os.fstat(descriptor).st_size, limits)
            await _check_readable(descriptor, path, tool)
            yield descriptor
        return
    # Beside the target, where there is room for an image; without a name it goes with us.
    with tempfile.TemporaryFile(dir=origin.scratch) as file:
        if tool.user is not None:
            os.fchown(file.fileno(), *tool.user)
        if is_url(source):
            await fetch(source, file, largest_bytes=limits.file_bytes, progress=progress)
        else:
            await _copy_here(origin, file, limits)
        yield file.fileno()


def _check_length(source: str, size: int, limits: ImportLimits) -> None:
    if size > limits.file_bytes:
        raise Refused(
            f"{source} is {size} bytes, at most {limits.file_bytes} are taken", hint="allow more"
        )


async def _copy_here(origin: _Origin, file: BinaryIO, limits: ImportLimits) -> None:
    """The file of a server, as QEMU's user may read it; it must not be longer than it said."""
    path = Path(origin.source)
    try:
        facts = await origin.files.look(path)
        if facts is None:
            raise NotFound(f"there is no file {path}", hint="look what the volume holds")
        if not facts.is_file:
            raise Refused(f"{path} is not a file", hint="name an image")
        _check_length(origin.source, facts.size, limits)
        free = shutil.disk_usage(origin.scratch).free
        if facts.size > free:
            raise Refused(
                f"{path} is {facts.size} bytes, which is more than this host has room for",
                hint=f"make room in {origin.scratch}: the image is copied there first",
            )
        channel = await origin.files.read_through(path)
        try:
            assert channel.descriptor is not None  # noqa: S101 - what is served is piped
            reading = os.dup(channel.descriptor)
            async with asyncio.timeout(_COPIED_S + facts.size / _SLOWEST):
                copied = await asyncio.to_thread(_drain, reading, file, facts.size)
            await channel.done(timeout=_COPIED_S)
        except BaseException:
            channel.stop()
            raise
    except OSError as error:
        reason = error.strerror or str(error) or "it took too long"
        raise OperationFailed(f"cannot read {path}: {reason}") from error
    if copied != facts.size:
        raise Refused(f"{path} changed while it was read", hint="let nobody write it")


def _drain(reading: int, file: BinaryIO, size: int) -> int:
    """Copy to the end, or a little beyond ``size``; how many bytes there were."""
    copied = 0
    with os.fdopen(reading, "rb") as stream:
        while copied <= size and (piece := stream.read(_PIECE)):
            file.write(piece)
            copied += len(piece)
    file.flush()
    return copied


async def _check_readable(descriptor: int, path: Path, tool: Binary) -> None:
    """Refused unless the tool's user finds and may read just this file under its name."""
    if tool.user is None:
        return
    status = os.fstat(descriptor)
    try:
        await run_async(["test", "-r", str(path)], timeout=_LOOK_TIMEOUT, user=tool.user)
        words = ["stat", "-L", "-c", "%d:%i", "--", str(path)]
        said = await run_async(words, timeout=_LOOK_TIMEOUT, user=tool.user)
    except ProgramFailed:
        said = b""
    if said.decode().strip() != f"{status.st_dev}:{status.st_ino}":
        raise Refused(
            f"{path} may not be read by the user that looks at strangers' images",
            hint=f"put it where everybody may read it: chmod o+r {path}",
        )


async def _judged(
    name: str, image: OpenImage, file_size: int, tool: Binary, limits: ImportLimits
) -> OpenImage:
    """The image, fit to be copied; Refused, with its name and the reason, when it is not."""

    def read(offset: int, length: int) -> bytes:
        return os.pread(image.descriptor, length, offset) if length > 0 else b""

    try:
        claims = await asyncio.to_thread(
            _examined, image.format, read, file_size, limits.virtual_bytes
        )
        # Of the raw kinds the payload alone is opened: what comes after is not the guest's.
        payload = claims.virtual_size if image.format == "vhd-fixed" else None
        image = replace(image, size=payload)
        await _measured(image, claims, tool, limits)
    except Conflict:
        raise
    except Refused as error:
        raise Refused(f"{name} is not taken: {error.message}", hint=error.hint) from error
    except OperationFailed as error:
        raise Refused(
            f"{name} is not taken: {error.message}", hint="is the file whole? fetch it again"
        ) from error
    return image


def _examined(
    source_format: SourceFormat,
    read: vhd.Read,
    file_size: int,
    largest_virtual: int,
) -> Claims:
    try:
        claims = examine(source_format, read, file_size, largest_virtual=largest_virtual)
        if source_format == "vhd":
            footer = vhd.parse_footer(read(0, vhd.FOOTER_BYTES))
            if footer is not None:
                vhd.check_blocks(footer, read, file_size)
    except (OSError, OverflowError) as error:
        # An offset beyond what a file can have is one more way to be cut off.
        raise Refused(f"it cannot be read where it points to ({error})") from error
    return claims


async def _measured(image: OpenImage, claims: Claims, tool: Binary, limits: ImportLimits) -> None:
    info = await open_info(image, tool=tool, what="qemu-img does not open it")
    check_size(info.virtual_size, largest_virtual=limits.virtual_bytes)
    if info.data_file or info.backing:
        raise Refused(f"it leads to another file ({info.data_file or info.backing})", hint=_FLATTEN)
    if info.encrypted:
        raise Refused("it is encrypted", hint="decrypt it where it comes from")
    if claims.virtual_size is not None and info.virtual_size != claims.virtual_size:
        raise Refused(
            f"it claims to hold {claims.virtual_size} bytes, qemu-img finds {info.virtual_size}"
        )
    report = await check_open(image, tool=tool)
    if report.damaged:
        raise Refused(f"it is {report.words}", hint="is the file whole? fetch it again")


async def _described(copy: OpenImage, tool: Binary) -> ImageInfo:
    if copy.size is not None:
        return ImageInfo("vpc", copy.size, copy.bytes_allocated())
    return await open_info(copy, tool=tool)
