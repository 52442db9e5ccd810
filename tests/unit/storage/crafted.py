"""Images made byte by byte, as a stranger could."""

from __future__ import annotations

import struct

from godwit.storage.vhd import Read

MIB = 1 << 20


def reader(data: bytes) -> Read:
    """How the code reads a file of this content."""
    return lambda offset, length: data[offset : offset + length]


def vhd_footer(
    size: int,
    *,
    kind: int = 2,
    creator: bytes = b"qem2",
    geometry: tuple[int, int, int] = (0, 0, 0),
    data_offset: int = 512,
) -> bytes:
    """A VHD footer with a right checksum."""
    sector = struct.pack(
        ">8sIIQI4sI4sQQHBBI",
        *(b"conectix", 2, 0x10000, data_offset, 0, creator, 0x50003, b"Wi2k", size, size),
        *(*geometry, kind),
    )
    sector = sector.ljust(512, b"\0")
    return sector[:64] + struct.pack(">I", ~sum(sector) & 0xFFFFFFFF) + sector[68:]


def dynamic_vhd(
    size: int, *, blocks: tuple[int, ...] = (), block: int = 2 * MIB, entries: int | None = None
) -> bytes:
    """A dynamic VHD whose table has these sectors; what a block holds is up to the test."""
    footer = vhd_footer(size, kind=3)
    count = -(-size // block) if entries is None else entries
    header = struct.pack(">8sQQIIII", b"cxsparse", (1 << 64) - 1, 1536, 0x10000, count, block, 0)
    table = b"".join(struct.pack(">I", sector) for sector in blocks)
    table = table.ljust(4 * count, b"\xff") if count < MIB else table
    return footer + header.ljust(1024, b"\0") + table.ljust(512, b"\xff") + footer


def qcow2(
    *,
    size: int = 4 * MIB,
    version: int = 3,
    backing: bytes = b"",
    data_file: bytes = b"",
    external: bool = False,
    crypt: int = 0,
    cluster_bits: int = 16,
    l1_size: int = 1,
) -> bytes:
    """A qcow2 header with its tables, in five clusters."""
    extensions = b""
    if data_file:
        padded = data_file.ljust(-(-len(data_file) // 8) * 8, b"\0")
        extensions = struct.pack(">II", 0x44415441, len(data_file)) + padded
    extensions += bytes(8)
    name_at = 104 + len(extensions) if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", version, name_at, len(backing), cluster_bits, size, crypt),
        *(l1_size, 3 << 16, 1 << 16, 1, 0, 0),
    )
    head += struct.pack(">QQQII", 4 if external else 0, 0, 0, 4, 104)
    return (head + extensions + backing).ljust(5 << 16, b"\0")


def vmdk(descriptor: str = "", *, capacity: int = 8192) -> bytes:
    """A sparse VMDK with an embedded descriptor."""
    head = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, capacity, 128, 1, 20, 512, 21, 26, 128)
    return (head.ljust(512, b"\0") + descriptor.encode().ljust(20 * 512, b"\0")).ljust(
        64 << 10, b"\0"
    )


def vmdk_descriptor(kind: str = "monolithicSparse", *extents: str, parent: str = "") -> str:
    """What a VMDK says of itself in words."""
    lines = ["# Disk DescriptorFile", "version=1", "CID=12345678"]
    lines.append(f"parentCID={'0badcafe' if parent else 'ffffffff'}")
    lines.append(f'createType="{kind}"')
    if parent:
        lines.append(f'parentFileNameHint="{parent}"')
    return "\n".join([*lines, *(extents or ('RW 8192 SPARSE "a.vmdk"',)), ""])
