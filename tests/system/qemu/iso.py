"""An ISO image that starts a few bytes of code, made by hand."""

from __future__ import annotations

import struct

BLOCK = 2048


def bootable_iso(code: bytes) -> bytes:
    """The least that is an ISO with a start image without emulation (El Torito)."""
    descriptor = b"\x01CD001\x01".ljust(BLOCK, b"\0")
    boot = b"\x00CD001\x01" + b"EL TORITO SPECIFICATION".ljust(32, b"\0") + bytes(32)
    boot += struct.pack("<I", 19)
    end = b"\xffCD001\x01".ljust(BLOCK, b"\0")
    validation = bytearray(b"\x01" + bytes(27) + b"\0\0\x55\xaa")
    words = struct.unpack("<16H", bytes(validation))
    struct.pack_into("<H", validation, 28, -sum(words) & 0xFFFF)
    entry = struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, 20).ljust(32, b"\0")
    catalog = (bytes(validation) + entry).ljust(BLOCK, b"\0")
    blocks = [descriptor, boot.ljust(BLOCK, b"\0"), end, catalog, code.ljust(BLOCK, b"\0")]
    return bytes(16 * BLOCK) + b"".join(blocks)
