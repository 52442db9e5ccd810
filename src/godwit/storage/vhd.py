"""The VHD format as far as its footer and its block table, after Microsoft's specification 1.0.

Read here and not by QEMU where the guest could lie: the first sector of a fixed VHD belongs to the
guest, and QEMU's driver takes a footer copy it finds there for the truth.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from godwit.model.errors import Refused
from godwit.storage.formats import SECTOR, VHD_COOKIE

FOOTER_BYTES: Final = 512
HEADER_BYTES: Final = 1024
_FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII")
_DYNAMIC: Final = struct.Struct(">8sQQIIII")
_CHECKSUM: Final = 36
_KINDS: Final = {2: "fixed", 3: "dynamic", 4: "differencing"}
_UNUSED: Final = 0xFFFFFFFF
_LARGEST_TABLE: Final = 1 << 22
"""Entries of the block table: 2040 GiB in the smallest blocks that anybody makes (512 KiB)."""

# These makers write the exact size; all others mean the geometry (so does QEMU's own driver).
_EXACT: Final = b"qem2"
_EXACT_SIZE: Final = frozenset({b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"})
_LARGEST_GEOMETRY: Final = 65535 * 16 * 255

Read = Callable[[int, int], bytes]
"""Reads (offset, length); what lies past the end is missing from the answer."""


@dataclass(frozen=True, slots=True)
class Footer:
    """A footer whose checksum is right. ``virtual_size`` in bytes, as QEMU understands it."""

    kind: Literal["fixed", "dynamic", "differencing"]
    virtual_size: int
    data_offset: int


def parse_footer(sector: bytes) -> Footer | None:
    """The footer in these 512 bytes, None when there is none or its checksum is wrong."""
    if len(sector) < FOOTER_BYTES or not sector.startswith(VHD_COOKIE):
        return None
    fields = _FOOTER.unpack_from(sector)
    creator, current = fields[5], fields[9]
    cylinders, heads, sectors, kind, checksum = fields[10:15]
    without = sector[:64] + bytes(4) + sector[68:FOOTER_BYTES]
    if checksum != ~sum(without) & 0xFFFFFFFF or kind not in _KINDS:
        return None
    geometry = cylinders * heads * sectors
    exact = creator in _EXACT_SIZE or geometry >= _LARGEST_GEOMETRY
    size = current // SECTOR if exact else geometry
    return Footer(_KINDS[kind], size * SECTOR, fields[3])  # type: ignore[arg-type]


def check_blocks(footer: Footer, read: Read, file_size: int) -> None:
    """Refused unless every block of a dynamic VHD lies within the file.

    QEMU has no check for the format, and reads zeroes where a file was cut off.
    """
    header = read(footer.data_offset, _DYNAMIC.size)
    if len(header) < _DYNAMIC.size or not header.startswith(b"cxsparse"):
        raise Refused("its dynamic header is missing", hint="is the file whole?")
    _, _, table, _, entries, block, _ = _DYNAMIC.unpack(header)
    if block < SECTOR or block & (block - 1) or entries > _LARGEST_TABLE:
        raise Refused(f"its block table is absurd ({entries} blocks of {block} bytes)")
    if entries * block < footer.virtual_size:
        raise Refused("its block table is too short for its size")
    raw = read(table, entries * 4)
    if len(raw) < entries * 4:
        raise Refused("its block table is cut off", hint="is the file whole?")
    bitmap = -(-block // SECTOR // 8 // SECTOR) * SECTOR
    for (sector,) in struct.iter_unpack(">I", raw):
        if sector != _UNUSED and sector * SECTOR + bitmap + block > file_size:
            raise Refused("a block of it lies past the end of the file", hint="is the file whole?")


def grown_footer(sector: bytes, size_bytes: int) -> bytes:
    """The footer in these 512 bytes as that of a disk of this size, a multiple of 512.

    One by a maker whose footers mean their geometry becomes one that means its size.
    """
    fields = list(_FOOTER.unpack_from(sector))
    cylinders, heads, sectors = fields[10:13]
    largest = cylinders * heads * sectors >= _LARGEST_GEOMETRY
    if fields[5] not in _EXACT_SIZE:
        fields[5], largest = _EXACT, True
    fields[9], fields[14] = size_bytes, 0
    fields[10:13] = (65535, 16, 255) if largest else _geometry(size_bytes // SECTOR)
    anew = _FOOTER.pack(*fields) + sector[_FOOTER.size : FOOTER_BYTES]
    checksum = ~sum(anew) & 0xFFFFFFFF
    return anew[:64] + struct.pack(">I", checksum) + anew[68:]


def _geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors a track, by the specification's appendix."""
    sectors = min(sectors, _LARGEST_GEOMETRY)
    if sectors >= 65535 * 16 * 63:
        return sectors // 255 // 16, 16, 255
    track = 17
    heads = max(4, -(-(sectors // track) // 1024))
    if sectors // track >= heads * 1024 or heads > 16:
        track, heads = 31, 16
    if sectors // track >= heads * 1024:
        track, heads = 63, 16
    return sectors // track // heads, heads, track


@dataclass(frozen=True, slots=True)
class Table:
    """The block table of a dynamic VHD: where it lies, its entries, and bytes a block holds."""

    offset: int
    entries: int
    block: int

    def needs(self, size_bytes: int) -> int:
        """Entries for a disk of this size."""
        return -(-size_bytes // self.block)


def parse_header(header: bytes) -> Table:
    """The table by these `HEADER_BYTES` of a dynamic header; Refused when they are none."""
    if len(header) < HEADER_BYTES or not header.startswith(b"cxsparse"):
        raise Refused("its dynamic header is missing", hint="is the file whole?")
    _, _, table, _, entries, block, checksum = _DYNAMIC.unpack_from(header)
    without = header[:_CHECKSUM] + bytes(4) + header[_CHECKSUM + 4 :]
    if checksum != ~sum(without) & 0xFFFFFFFF:
        raise Refused("its dynamic header is damaged", hint="is the file whole?")
    if block < SECTOR or block & (block - 1) or entries > _LARGEST_TABLE:
        raise Refused(f"its block table is absurd ({entries} blocks of {block} bytes)")
    return Table(table, entries, block)


def header_with(header: bytes, table: Table) -> bytes:
    """The dynamic header leading to this table. It differs in its first sector alone."""
    fields = list(_DYNAMIC.unpack_from(header))
    fields[2], fields[4], fields[6] = table.offset, table.entries, 0
    anew = _DYNAMIC.pack(*fields) + header[_DYNAMIC.size :]
    checksum = ~sum(anew) & 0xFFFFFFFF
    return anew[:_CHECKSUM] + struct.pack(">I", checksum) + anew[_CHECKSUM + 4 :]


def longer_table(raw: bytes, entries: int) -> bytes:
    """A block table with so many entries, the new ones unused, in whole sectors."""
    length = -(-entries * 4 // SECTOR) * SECTOR
    return raw + b"\xff" * (length - len(raw))
