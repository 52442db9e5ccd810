"""A VHDX whose daemon was killed at its log: what it left, and what makes it whole. Pure.

QEMU's driver gives a block to the guest in this order, each step on the medium before the next:

    1  one header, then the other, gets the name of a new log (a GUID): the mark
    2  the log gets an entry with the new line of the block table
    3  the block table gets that line
    4  one header, then the other, loses the mark

Killed between 2 and 4 it leaves a mark and an entry; whoever opens the image for writing carries
the entry out. Killed between 1 and 2 it leaves a mark and no entry: QEMU opens the image, finds
nothing to carry out, leaves the mark, and refuses every new block, because a log is open. The block
table is as it was before the mark, so taking the mark away is all there is to do.

Which header holds, and when an entry does, is by Microsoft's MS-VHDX, as QEMU reads it too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

HEADERS: Final = (64 << 10, 128 << 10)
HEADER_BYTES: Final = 4096
"""What a header's checksum covers."""
LARGEST_LOG: Final = 16 << 20
"""Bytes; QEMU and Hyper-V make logs of 1 MiB."""

_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
_ENTRY: Final = struct.Struct("<4sIIIQII16sQQ")
_SECTOR: Final = 4096
_MIB: Final = 1 << 20
_CHECKSUM: Final = slice(4, 8)
_SEQUENCE: Final = slice(8, 16)
_LOG_NAME: Final = slice(48, 64)
_LAST_SEQUENCE: Final = (1 << 64) - 1

Step = tuple[int, bytes]
"""Where something is written, and what."""


class Unclear(Exception):
    """Neither QEMU nor the format leaves an image like this one: nothing is to be changed."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A log is open, by the header that holds: the one in ``slot``. Bytes and offsets in bytes."""

    slot: int
    header: bytes
    log_name: bytes
    log_at: int
    log_bytes: int


def find_mark(first: bytes, second: bytes) -> Mark | None:
    """The mark by these two headers of `HEADER_BYTES`; None when no log is open.

    Unclear when none of them holds, they contradict each other, or the log cannot be where it is
    said to be.
    """
    slot, header = _holding(first, second)
    _, _, sequence, _, _, name, log_version, _, log_bytes, log_at = _HEADER.unpack_from(header)
    if not any(name):
        return None
    if log_version != 0:
        raise Unclear(f"its log is of version {log_version}")
    if log_at < _MIB or log_at % _MIB or not 0 < log_bytes <= LARGEST_LOG or log_bytes % _MIB:
        raise Unclear(f"its log has {log_bytes} bytes at {log_at}")
    if sequence + len(HEADERS) > _LAST_SEQUENCE:
        raise Unclear(f"its header is the {sequence}th")
    return Mark(slot, header, name, log_at, log_bytes)


def unmark(mark: Mark, log: bytes) -> tuple[Step, ...]:
    """What takes the mark away, one after the other; nothing when the log has a valid entry.

    After the first step the image is whole. The second is for the header that held: QEMU writes
    each header anew when it opens an image, and an old mark in one of them with it.

    Unclear when the log is not all there, or entries overlap.
    """
    if len(log) != mark.log_bytes:
        raise Unclear("its log lies past the end of the file")
    if _has_entry(log, mark.log_name):
        return ()
    (sequence,) = struct.unpack("<Q", mark.header[_SEQUENCE])
    steps = []
    for count, slot in enumerate((1 - mark.slot, mark.slot), start=1):
        header = bytearray(mark.header)
        header[_LOG_NAME] = bytes(16)
        header[_SEQUENCE] = struct.pack("<Q", sequence + count)
        steps.append((HEADERS[slot], with_checksum(header)))
    return tuple(steps)


def with_checksum(content: bytes | bytearray) -> bytes:
    """A header or log entry with the checksum that its content has."""
    sealed = bytearray(content)
    sealed[_CHECKSUM] = bytes(4)
    sealed[_CHECKSUM] = struct.pack("<I", crc32c(bytes(sealed)))
    return bytes(sealed)


def crc32c(content: bytes) -> int:
    """The checksum of VHDX: CRC-32 with Castagnoli's polynomial."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _holding(*headers: bytes) -> tuple[int, bytes]:
    whole = []
    for slot, raw in enumerate(headers):
        if len(raw) != HEADER_BYTES or raw[:4] != b"head" or raw != with_checksum(raw):
            continue
        _, _, sequence, *_, version, _, _ = _HEADER.unpack_from(raw)
        if version == 1:
            whole.append((sequence, slot))
    if not whole:
        raise Unclear("neither of its headers is whole")
    (sequence, slot), *others = sorted(whole, key=lambda one: (-one[0], one[1]))
    if others and others[0][0] == sequence and headers[0] != headers[1]:
        raise Unclear("its headers differ and have the same number")
    return slot, headers[slot]


def _has_entry(log: bytes, name: bytes) -> bool:
    """Whether some entry of this log is whole."""
    left = len(log)
    for at in range(0, len(log), _SECTOR):
        if not log.startswith(b"loge", at):
            continue
        _, _, length, _, sequence, _, _, of, _, _ = _ENTRY.unpack_from(log, at)
        if of != name or sequence == 0 or length % _SECTOR or not 0 < length <= len(log):
            continue
        # Entries lie one behind the other. Also the end of what a stranger's log may cost.
        left -= length
        if left < 0:
            raise Unclear("the entries of its log overlap")
        entry = log[at : at + length]
        entry += log[: length - len(entry)]  # the log is a ring
        if entry == with_checksum(entry):
            return True
    return False


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC: Final = tuple(_crc_of(byte) for byte in range(256))
