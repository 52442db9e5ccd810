"""Writes a small ISO image: a few files in its root, with names as they are (Joliet). Pure.

    16 volume descriptors: ISO 9660, Joliet, end    19 path tables, two of each
    23 root directory, and again for Joliet         25 the files

ECMA-119 and the Joliet extension say what is where. It is for seeds that a guest reads once, so
there are no directories, no files of gigabytes and nothing to start from.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping
from typing import Final

BLOCK: Final = 2048
LARGEST: Final = 64 << 20
_PRIMARY, _JOLIET, _END = 1, 2, 255
_PATHS, _ROOTS, _FILES = 19, 23, 25
_UCS2_LEVEL_3: Final = b"%/E"

Encode = Callable[[str], bytes]


def write_iso(label: str, files: Mapping[str, bytes], *, at: float) -> bytes:
    """The bytes of the image; the same for the same arguments. ValueError when it cannot be."""
    if len(label) > 15 or any(len(name) > 60 or "/" in name for name in files):
        raise ValueError("a label has at most 15 letters, a name at most 60 and no slash")
    if sum(map(len, files.values())) > LARGEST:
        raise ValueError(f"the files have more than {LARGEST >> 20} MiB")
    extents, free = {}, _FILES
    for name in sorted(files):
        extents[name] = free
        free += _blocks(files[name])
    parts = [bytes(16 * BLOCK)]
    for kind, root in ((_PRIMARY, _ROOTS), (_JOLIET, _ROOTS + 1)):
        parts.append(_descriptor(kind, label, root, free, at))
    parts.append(_fit(bytes([_END]) + b"CD001\x01"))
    for root in (_ROOTS, _ROOTS + 1):
        parts += [_fit(_path_table(root, "<")), _fit(_path_table(root, ">"))]
    for number, encode in enumerate((_plain, _wide)):
        parts.append(_root(_ROOTS + number, files, extents, encode, at))
    parts += [files[name].ljust(_blocks(files[name]) * BLOCK, b"\0") for name in sorted(files)]
    return b"".join(parts)


def _descriptor(kind: int, label: str, root: int, blocks: int, at: float) -> bytes:
    encode, blank = (_letters, b" ") if kind == _PRIMARY else (_ucs2, b"\0 ")

    def text(words: str, size: int) -> bytes:
        return (encode(words) + blank * size)[:size]

    tables = _PATHS if kind == _PRIMARY else _PATHS + 2
    out = bytes([kind]) + b"CD001\x01\0" + text("", 32) + text(label, 32) + bytes(8)
    out += _both32(blocks)
    out += (b"" if kind == _PRIMARY else _UCS2_LEVEL_3).ljust(32, b"\0")
    out += _both16(1) + _both16(1) + _both16(BLOCK) + _both32(len(_path_table(root, "<")))
    out += struct.pack("<II", tables, 0) + struct.pack(">II", tables + 1, 0)
    out += _record(b"\0", root, BLOCK, at, directory=True)
    out += text("", 128) * 2 + text("", 128) + text("GODWIT", 128)
    # 37 bytes each: an odd number, so the last one of a wide text is a zero.
    out += b"".join(text("", 36) + (b" " if kind == _PRIMARY else b"\0") for _ in range(3))
    stamp = time.strftime("%Y%m%d%H%M%S00", time.gmtime(at)).encode() + b"\0"
    never = b"0" * 16 + b"\0"
    return _fit(out + stamp + stamp + never + never + b"\x01")


def _root(
    block: int, files: Mapping[str, bytes], extents: Mapping[str, int], encode: Encode, at: float
) -> bytes:
    records = [_record(name, block, BLOCK, at, directory=True) for name in (b"\0", b"\1")]
    # Sorted as a reader expects them: by the bytes of their names.
    for coded, name in sorted((encode(name), name) for name in files):
        records.append(_record(coded, extents[name], len(files[name]), at, directory=False))
    out = b"".join(records)
    if len(out) > BLOCK:
        raise ValueError("there are too many files for one directory block")
    return _fit(out)


def _record(name: bytes, block: int, size: int, at: float, *, directory: bool) -> bytes:
    moment = time.gmtime(at)
    body = b"\0" + _both32(block) + _both32(size)
    body += bytes([moment.tm_year - 1900, *moment[1:6], 0])
    body += bytes([2 if directory else 0, 0, 0]) + _both16(1) + bytes([len(name)]) + name
    if len(body) % 2 == 0:
        body += b"\0"
    return bytes([len(body) + 1]) + body


def _path_table(root: int, order: str) -> bytes:
    return struct.pack(f"{order}BBIH", 1, 0, root, 1) + b"\0\0"


def _plain(name: str) -> bytes:
    return name.upper().encode("ascii", "replace") + b";1"


def _wide(name: str) -> bytes:
    return name.encode("utf-16-be")


def _letters(text: str) -> bytes:
    return text.encode("ascii", "replace")


def _ucs2(text: str) -> bytes:
    return text.encode("utf-16-be")


def _both16(number: int) -> bytes:
    return struct.pack("<H", number) + struct.pack(">H", number)


def _both32(number: int) -> bytes:
    return struct.pack("<I", number) + struct.pack(">I", number)


def _blocks(data: bytes) -> int:
    return max(1, -(-len(data) // BLOCK))


def _fit(data: bytes) -> bytes:
    return data.ljust(BLOCK, b"\0")
