"""Reads back what a demo guest logged to its disk and says what was lost.

Record s (from 1) lies at offset (s - 1) * 4096 and was acknowledged to the guest once the write
returned. Every record up to the last acknowledged one must be there, intact, and of one log. Past
it, at most the write in flight may be there, whole, in part or not at all: no promise covers it.

Layout, little-endian, as written by `images/demo/gwguest/disklog.c`: "GODWITLG", u32 record size,
u32 CRC-32 of the record with this field zero, u64 sequence, u64 log id, u64 CLOCK_REALTIME ns,
u64 CLOCK_MONOTONIC ns, filler.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

RECORD_BYTES = 4096
MAGIC = b"GODWITLG"
HEADER = struct.Struct("<8sIIQQQQ")
CRC_OFFSET = 12
NAMED = 20  # of the lost and torn records, how many are listed by number

Verdict = Literal["intact", "torn", "lost"]


@dataclass(frozen=True)
class LogCheck:
    """What became of the acknowledged records.

    `torn`: the place holds a record whose checksum is wrong. `lost`: it holds something else
    (nothing, an older record, a record of another log). `unacknowledged`: intact records past the
    last acknowledged one; harmless.
    """

    acknowledged: int
    intact: int
    lost: int
    torn: int
    unacknowledged: int
    first_bad: tuple[int, ...]
    log_id: str | None

    @property
    def good(self) -> bool:
        return self.lost == 0 and self.torn == 0


@dataclass(frozen=True)
class Record:
    """The header of one record."""

    sequence: int
    log_id: int
    realtime_ns: int
    monotonic_ns: int


def parse_record(data: bytes) -> Record | Verdict:
    """The record in these bytes, or why there is none."""
    if len(data) != RECORD_BYTES or data[:8] != MAGIC:
        return "lost"
    _, size, crc, sequence, log_id, realtime_ns, monotonic_ns = HEADER.unpack_from(data)
    blank = data[:CRC_OFFSET] + b"\0\0\0\0" + data[CRC_OFFSET + 4 :]
    if size != RECORD_BYTES or zlib.crc32(blank) != crc:
        return "torn"
    return Record(sequence, log_id, realtime_ns, monotonic_ns)


def check_log(disk: BinaryIO, *, acknowledged: int, log_id: str | None = None) -> LogCheck:
    """Compares a raw disk with what the guest says was acknowledged.

    `log_id` is the guest's (16 hex digits); without it the first intact record decides.
    """
    wanted = int(log_id, 16) if log_id else None
    counts = {"intact": 0, "lost": 0, "torn": 0}
    bad: list[int] = []
    unacknowledged = 0
    for sequence, data in _slots(disk, atleast=acknowledged):
        found = parse_record(data)
        if isinstance(found, Record):
            wanted = found.log_id if wanted is None else wanted
            ours = found.sequence == sequence and found.log_id == wanted
            verdict: Verdict = "intact" if ours else "lost"
        else:
            verdict = found
        if sequence > acknowledged:
            if verdict != "intact":
                break
            unacknowledged += 1
            continue
        counts[verdict] += 1
        if verdict != "intact" and len(bad) < NAMED:
            bad.append(sequence)
    return LogCheck(
        acknowledged=acknowledged,
        **counts,
        unacknowledged=unacknowledged,
        first_bad=tuple(bad),
        log_id=None if wanted is None else f"{wanted:016x}",
    )


def _slots(disk: BinaryIO, *, atleast: int) -> Iterator[tuple[int, bytes]]:
    """(sequence, bytes) of each place on the disk; a disk that ends too early reads as empty."""
    sequence = 0
    while (data := disk.read(RECORD_BYTES)) or sequence < atleast:
        sequence += 1
        yield sequence, data


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: every acknowledged record is there. 1: some are not."""
    parser = argparse.ArgumentParser(prog="logcheck", description=check_log.__doc__)
    parser.add_argument("disk", type=Path, help="raw image or block device")
    parser.add_argument("--acknowledged", type=int, required=True)
    parser.add_argument("--log-id")
    arguments = parser.parse_args(argv)
    with arguments.disk.open("rb") as disk:
        result = check_log(disk, acknowledged=arguments.acknowledged, log_id=arguments.log_id)
    sys.stdout.write(json.dumps({**asdict(result), "good": result.good}) + "\n")
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
