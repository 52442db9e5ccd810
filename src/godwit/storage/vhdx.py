"""The VHDX format as far as its size goes, after Microsoft's MS-VHDX.

    64 KiB   two headers; the one with the higher sequence number holds
    192 KiB  the region table: where the block table and the metadata lie
    metadata its table; items: block size, virtual size, sector size

The virtual size is one item of eight bytes, and the block table has room for far more blocks than
a disk begins with: a mebibyte of it stands for a terabyte in the smallest blocks that QEMU makes.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from godwit.model.errors import Refused

Read = Callable[[int, int], Awaitable[bytes]]
"""Reads (offset, length)."""

_HEADERS: Final = (64 << 10, 128 << 10)
_REGIONS: Final = (192 << 10, 256 << 10)
_TABLE_BYTES: Final = 64 << 10
_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_MOST: Final = 2047
_REGION: Final = struct.Struct("<16sQII")
_ITEM: Final = struct.Struct("<16sIIII")
_HAS_PARENT: Final = 0x2
_LARGEST_BLOCK: Final = 256 << 20


def _guid(text: str) -> bytes:
    return UUID(text).bytes_le


_BLOCK_TABLE: Final = _guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA: Final = _guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_PARAMETERS: Final = _guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VIRTUAL_SIZE: Final = _guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_SECTOR_SIZE: Final = _guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sizes of an image stand. Bytes all; ``size_at`` is the offset of the virtual size,
    ``table_at`` that of the block table."""

    virtual_size: int
    size_at: int
    block: int
    sector: int
    table_at: int
    table_bytes: int

    def table_for(self, size_bytes: int) -> int:
        """Bytes of the block table that a disk of this size uses."""
        blocks = -(-size_bytes // self.block)
        chunk = (self.sector << 23) // self.block  # blocks between two entries for their bitmaps
        return 8 * (blocks + max(0, blocks - 1) // chunk)


async def read_layout(read: Read, *, closed: bool = True) -> Layout:
    """Where the sizes stand; Refused for an image that is damaged, stands on another one, or
    (``closed``) has entries in its log, which belong before any change."""
    if closed:
        await _check_log(read)
    regions = await _regions(read)
    table_at, table_bytes = regions[_BLOCK_TABLE]
    at, _ = regions[_METADATA]
    items = _items(await read(at, _TABLE_BYTES))
    size_at = at + items[_VIRTUAL_SIZE]
    block, flags = struct.unpack("<II", await read(at + items[_PARAMETERS], 8))
    (size,) = struct.unpack("<Q", await read(size_at, 8))
    (sector,) = struct.unpack("<I", await read(at + items[_SECTOR_SIZE], 4))
    if flags & _HAS_PARENT:
        raise Refused("it stands on another image", hint="merge it first")
    if sector not in (512, 4096) or not 1 << 20 <= block <= _LARGEST_BLOCK or block & (block - 1):
        raise Refused(f"its sizes are absurd (blocks of {block}, sectors of {sector} bytes)")
    found = Layout(size, size_at, block, sector, table_at, table_bytes)
    if found.table_for(size) > table_bytes:
        raise Refused("its block table is too short for its size")
    return found


async def _check_log(read: Read) -> None:
    best: tuple[int, bytes] | None = None
    for at in _HEADERS:
        raw = await read(at, _HEADER.size)
        if len(raw) < _HEADER.size:
            continue
        mark, _, sequence, _, _, log, *_ = _HEADER.unpack(raw)
        if mark == b"head" and (best is None or sequence > best[0]):
            best = sequence, log
    if best is None:
        raise Refused("its header is missing", hint="is the file whole?")
    if any(best[1]):
        raise Refused("it was not closed in order", hint="start and stop the VM once, then again")


async def _regions(read: Read) -> dict[bytes, tuple[int, int]]:
    for at in _REGIONS:
        raw = await read(at, _TABLE_BYTES)
        if not raw.startswith(b"regi") or len(raw) < _TABLE_BYTES:
            continue
        (count,) = struct.unpack_from("<I", raw, 8)
        found = {}
        for number in range(min(count, _MOST)):
            name, offset, length, _ = _REGION.unpack_from(raw, 16 + number * _REGION.size)
            found[name] = offset, length
        if {_BLOCK_TABLE, _METADATA} <= found.keys():
            return found
    raise Refused("its region table is damaged", hint="is the file whole?")


def _items(raw: bytes) -> dict[bytes, int]:
    if not raw.startswith(b"metadata") or len(raw) < _TABLE_BYTES:
        raise Refused("its metadata are damaged", hint="is the file whole?")
    (count,) = struct.unpack_from("<H", raw, 10)
    found = {}
    for number in range(min(count, _MOST)):
        name, offset, *_ = _ITEM.unpack_from(raw, 32 + number * _ITEM.size)
        found[name] = offset
    if not {_PARAMETERS, _VIRTUAL_SIZE, _SECTOR_SIZE} <= found.keys():
        raise Refused("its metadata are incomplete", hint="is the file whole?")
    return found
