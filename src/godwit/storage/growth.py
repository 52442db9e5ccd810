"""Images made larger: by qemu-img where QEMU can, in place where it cannot.

    raw, qcow2  qemu-img resize
    vhd-fixed   a footer at the new end; then the old one becomes zeroes
    vhd         a longer block table and a footer at the end; the header takes to that table; last
                the first footer, which says the size
    vhdx        unused entries of the block table; last the virtual size in the metadata

In place each step is one write that is on its medium before the next, and the one which makes the
disk larger lies within one sector. So a crash leaves a whole image of the old size or the new one,
and doing it again ends it; at worst the new part of a fixed VHD holds an old footer. Nobody has
the image open, but for a QEMU that sees a fixed VHD as raw bytes and stands still (``held``).

Why not QEMU, or a copy: docs/design/0008.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from godwit.host.errors import HostError
from godwit.model.errors import InvalidRequest, OperationFailed, Refused
from godwit.model.vm import DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage import vhd
from godwit.storage.files import LOCAL, VolumeFiles
from godwit.storage.formats import FORMATS, SECTOR, name_of, stored_size
from godwit.storage.images import ImageInfo, image_info, named
from godwit.storage.qemu_img import INFO_TIMEOUT, QEMU_IMG, failure, qemu_img
from godwit.storage.vhdx import Layout, read_layout

_PIECE: Final = 1 << 20

Step = tuple[int, bytes]
"""What is written, and where."""


async def grow(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002 - the word the field uses
    size_bytes: int,
    held: bool = False,
    tool: Binary = QEMU_IMG,
    files: VolumeFiles = LOCAL,
) -> ImageInfo:
    """Make an image that nobody uses larger; what it holds stays, the new part reads as zeroes.

    InvalidRequest for a smaller size, Conflict when it is in use (unless ``held``: by a QEMU that
    stands still), Refused with the reason when its format has no room for that size.
    """
    size = stored_size(format, size_bytes)
    info = await image_info(path, format=format, program=tool.path, in_use=True, files=files)
    if size < info.virtual_size:
        raise InvalidRequest(
            f"{path} holds {info.virtual_size} bytes; a disk is never made smaller",
            hint="name a larger size",
        )
    try:
        if FORMATS[format].grows:
            await _resize(path, format, size, tool, files)
        else:
            if not held:
                await _check_unused(path, tool, files)
            if size > info.virtual_size:
                async for at, content in _steps(path, format, size, files):
                    await files.patch(path, at, content)
        await files.sync(path)
    except OSError as error:
        raise OperationFailed(f"cannot make {path} larger: {error.strerror or error}") from error
    return await image_info(path, format=format, program=tool.path, in_use=held, files=files)


async def check_room(
    path: Path,
    *,
    format: DiskFormat,  # noqa: A002
    size_bytes: int,
    files: VolumeFiles = LOCAL,
) -> None:
    """Refused when the image cannot have that size; nothing is written. It may be in use."""
    size = stored_size(format, size_bytes)
    try:
        # What is in use may have an open log: that is closed before it grows.
        if format == "vhd-fixed":
            await _fixed_footer(path, size, files)
        elif format == "vhdx":
            await _vhdx_layout(path, size, files, closed=False)
    except OSError as error:
        raise OperationFailed(f"cannot read {path}: {error.strerror or error}") from error


async def _resize(
    path: Path,
    format: DiskFormat,  # noqa: A002
    size: int,
    tool: Binary,
    files: VolumeFiles,
) -> None:
    # Also when the size is right already: the lock says whether anybody uses the image.
    words = ["resize", "-q", *named(path, format, files), str(size)]
    try:
        await qemu_img(tool, words, images=[], limits=None, timeout=INFO_TIMEOUT)
    except HostError as error:
        raise failure(f"cannot make {path} larger", error) from error


async def _check_unused(path: Path, tool: Binary, files: VolumeFiles) -> None:
    """Conflict while somebody has it open, where there are locks to tell."""
    if files.node(path) is not None or not files.locking:
        return
    # Changes nothing, but asks for the locks that a change would need.
    words = ["resize", "-q", "-f", "raw", str(path), str(await _length(path, files))]
    try:
        await qemu_img(tool, words, images=[], limits=None, timeout=INFO_TIMEOUT)
    except HostError as error:
        raise failure(f"cannot make {path} larger", error) from error


async def _steps(
    path: Path,
    format: DiskFormat,  # noqa: A002
    size: int,
    files: VolumeFiles,
) -> AsyncIterator[Step]:
    if format == "vhd-fixed":
        end, footer = await _fixed_footer(path, size, files)
        yield size, vhd.grown_footer(footer, size)
        yield end, bytes(vhd.FOOTER_BYTES)
    elif format == "vhd":
        async for step in _dynamic(path, size, files):
            yield step
    elif format == "vhdx":
        async for step in _vhdx(path, size, files):
            yield step
    else:
        raise Refused(f"{path} is {name_of(format)}, which does not grow", hint="convert it")


async def _fixed_footer(path: Path, size: int, files: VolumeFiles) -> Step:
    """Where the footer is now, and what it says."""
    end = await _length(path, files) - vhd.FOOTER_BYTES
    footer = await files.read(path, end, vhd.FOOTER_BYTES)
    parsed = vhd.parse_footer(footer)
    if parsed is None or parsed.kind != "fixed":
        raise _refused(path, "its footer is missing", "is the file whole?")
    if parsed.virtual_size < size < end + vhd.FOOTER_BYTES:
        least = end + vhd.FOOTER_BYTES
        raise _refused(path, f"it has {end} bytes already", f"name at least {least} bytes")
    return end, footer


async def _dynamic(path: Path, size: int, files: VolumeFiles) -> AsyncIterator[Step]:
    first = await files.read(path, 0, vhd.FOOTER_BYTES)
    parsed = vhd.parse_footer(first)
    if parsed is None or parsed.kind != "dynamic":
        raise _refused(path, "its first footer is damaged", "is the file whole?")
    header_at = parsed.data_offset
    header = await files.read(path, header_at, vhd.HEADER_BYTES)
    try:
        table = vhd.parse_header(header)
    except Refused as error:
        raise _refused(path, f"{error.message}", error.hint) from error
    footer, length = vhd.grown_footer(first, size), await _length(path, files)
    needed = table.needs(size)
    if needed <= table.entries:
        yield length - vhd.FOOTER_BYTES, footer
    else:
        at = -(-length // SECTOR) * SECTOR
        raw = await files.read(path, table.offset, table.entries * 4)
        longer = vhd.longer_table(raw, needed)
        # Behind everything: the old table and the old footer stay until this one holds.
        yield at, longer + footer
        moved = vhd.header_with(header, vhd.Table(at, needed, table.block))
        yield header_at, moved[:SECTOR]
    yield 0, footer


async def _vhdx(path: Path, size: int, files: VolumeFiles) -> AsyncIterator[Step]:
    layout = await _vhdx_layout(path, size, files, closed=True)
    at = layout.table_at + layout.table_for(layout.virtual_size)
    end = layout.table_at + layout.table_for(size)
    while at < end:
        piece = await files.read(path, at, min(_PIECE, end - at))
        if any(piece) or not piece:
            yield at, bytes(min(_PIECE, end - at))
        at += _PIECE
    yield layout.size_at, struct.pack("<Q", size)


async def _vhdx_layout(path: Path, size: int, files: VolumeFiles, *, closed: bool) -> Layout:
    async def read(offset: int, length: int) -> bytes:
        return await files.read(path, offset, length)

    try:
        layout = await read_layout(read, closed=closed)
    except Refused as error:
        raise _refused(path, error.message, error.hint) from error
    except struct.error:
        raise _refused(path, "its metadata are cut off", "is the file whole?") from None
    if size % layout.sector:
        wanted = -(-size // layout.sector) * layout.sector
        raise _refused(
            path, f"its sectors have {layout.sector} bytes", f"name {wanted} bytes, for one"
        )
    if layout.table_for(size) > layout.table_bytes:
        raise _refused(
            path,
            "its block table has no room for that size",
            "move it to another format: godwit vm disk move --format qcow2",
        )
    return layout


async def _length(path: Path, files: VolumeFiles) -> int:
    facts = await files.look(path)
    if facts is None:
        raise FileNotFoundError(f"there is no file {path}")
    return facts.size


def _refused(path: Path, why: str, hint: str) -> Refused:
    return Refused(f"{path} cannot be made larger: {why}", hint=hint)
