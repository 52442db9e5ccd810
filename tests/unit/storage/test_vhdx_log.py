"""What a killed daemon left at a VHDX's log: the mark goes where no entry is, and only there."""

from __future__ import annotations

import struct

import pytest

from godwit.storage import vhdx_log
from godwit.storage.vhdx_log import HEADERS, Unclear, crc32c, find_mark, unmark, with_checksum

MIB = 1 << 20
LOG = bytes(range(1, 17))
OTHER = bytes(range(17, 33))
NONE = bytes(16)


def _header(
    sequence: int,
    log: bytes = NONE,
    *,
    version: int = 1,
    log_version: int = 0,
    log_bytes: int = MIB,
    log_at: int = MIB,
) -> bytes:
    guids = b"F" * 16 + b"D" * 16 + log
    numbers = struct.pack("<HHIQ", log_version, version, log_bytes, log_at)
    content = b"head" + bytes(4) + struct.pack("<Q", sequence) + guids + numbers
    return with_checksum(content.ljust(4096, b"\0"))


def _entry(of: bytes = LOG, *, sequence: int = 1, sectors: int = 2) -> bytes:
    length = sectors * 4096
    head = struct.pack("<4sIIIQII", b"loge", 0, length, 0, sequence, 1, 0)
    content = head + of + struct.pack("<QQ", 8 * MIB, 8 * MIB)
    return with_checksum(content.ljust(length, b"d"))


def _log(*parts: tuple[int, bytes]) -> bytes:
    log = bytearray(MIB)
    for at, content in parts:
        for place, byte in enumerate(content, start=at):
            log[place % MIB] = byte
    return bytes(log)


def _after(first: bytes, second: bytes, log: bytes, steps: int) -> tuple[bytes, bytes]:
    """The headers after so many steps, written where they were to be written."""
    mark = find_mark(first, second)
    assert mark is not None
    headers = {HEADERS[0]: first, HEADERS[1]: second}
    for at, content in unmark(mark, log)[:steps]:
        assert at in headers
        headers[at] = content
    return headers[HEADERS[0]], headers[HEADERS[1]]


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_a_closed_image_has_no_mark() -> None:
    assert find_mark(_header(7), _header(8)) is None
    # An old mark in the header that does not hold is history.
    assert find_mark(_header(7, LOG), _header(8)) is None
    assert find_mark(_header(8), _header(7, LOG)) is None


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("old", [NONE, LOG])
def test_a_mark_without_an_entry_goes(old: bytes, swapped: bool) -> None:
    """After either step no log is open, and all else that the headers say is as before."""
    headers = (_header(7, old), _header(8, LOG))
    if swapped:
        headers = headers[::-1]
    for steps in (1, 2):
        first, second = _after(*headers, _log(), steps)
        assert find_mark(first, second) is None
    assert {first, second} == {_header(9), _header(10)}
    # The header that held is the last one to be written.
    assert (second if swapped else first) == _header(9)


def test_the_step_in_between_is_one_to_begin_with() -> None:
    """Killed between the two, and opened by QEMU, which brings the old mark of the other back."""
    first, second = _after(_header(7, LOG), _header(8, LOG), _log(), 1)
    assert (first, second) == (_header(9), _header(8, LOG))
    assert _after(first, _header(10, LOG), _log(), 2) == (_header(11), _header(12))


@pytest.mark.parametrize("at", [0, 4096, MIB - 4096])
def test_a_mark_with_an_entry_stays(at: int) -> None:
    mark = find_mark(_header(7, LOG), _header(8, LOG))
    assert mark is not None
    assert unmark(mark, _log((at, _entry()))) == ()
    assert unmark(mark, _log((at, _entry()), ((at + 8192) % MIB, _entry()[:4096]))) == ()


def test_entries_that_are_not_whole_or_of_another_log_are_none() -> None:
    mark = find_mark(_header(7, LOG), _header(8, LOG))
    assert mark is not None
    torn = _entry()[:4096]  # its second sector was never written
    flipped = bytearray(_entry())
    flipped[5000] ^= 1
    short = _entry()[:8] + bytes(4) + _entry()[12:]
    for nothing in (torn, bytes(flipped), short, _entry(OTHER), _entry(sequence=0)):
        assert len(unmark(mark, _log((0, nothing)))) == 2
    assert unmark(mark, _log((0, torn), (8192, _entry(sequence=2)))) == ()
    assert len(unmark(mark, _log((100, _entry())))) == 2  # entries begin at sectors


@pytest.mark.parametrize("swapped", [False, True])
def test_a_torn_header_does_not_count(swapped: bool) -> None:
    """Cut off while the second one got the mark, or while the first one did."""
    torn = _header(9, LOG)[:64] + bytes(4032)
    marked = (torn, _header(8, LOG))
    closed = (torn, _header(8))
    if swapped:
        marked, closed = marked[::-1], closed[::-1]
    assert set(_after(*marked, _log(), 2)) == {_header(9), _header(10)}
    assert find_mark(*closed) is None


def test_what_is_odd_is_left_alone() -> None:
    last = (1 << 64) - 1
    for first, second in (
        (bytes(4096), bytes(4096)),
        (b"", b""),
        (_header(8, LOG)[:-1] + b"x", _header(7)[:100]),
        (_header(8, LOG), _header(8)),
        (_header(7, version=2), _header(8, LOG, version=2)),
        (_header(7), _header(8, LOG, log_version=1)),
        (_header(7), _header(8, LOG, log_at=0)),
        (_header(7), _header(8, LOG, log_at=MIB + 4096)),
        (_header(7), _header(8, LOG, log_bytes=0)),
        (_header(7), _header(8, LOG, log_bytes=4096)),
        (_header(7), _header(8, LOG, log_bytes=vhdx_log.LARGEST_LOG + MIB)),
        (_header(7), _header(last - 1, LOG)),
    ):
        with pytest.raises(Unclear):
            find_mark(first, second)


def test_twin_headers_are_one() -> None:
    """Some tools write both with one number; QEMU takes the first one then."""
    found = _after(_header(8, LOG), _header(8, LOG), _log(), 2)
    assert found == (_header(10), _header(9))


def test_a_log_that_cannot_be_is_left_alone() -> None:
    mark = find_mark(_header(7, LOG), _header(8, LOG))
    assert mark is not None
    with pytest.raises(Unclear, match="past the end"):
        unmark(mark, bytes(MIB - 1))
    # None of them is whole, and each would cost a checksum of the whole log.
    greedy = struct.pack("<4sIIIQII", b"loge", 0, MIB, 0, 1, 1, 0) + LOG
    with pytest.raises(Unclear, match="overlap"):
        unmark(mark, _log((0, greedy), (4096, greedy)))
