"""The reader of the guest's disk log finds exactly what was done to it."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.lab.logcheck import HEADER, RECORD_BYTES, check_log, main

LOG = 0x1234


def record(sequence: int, *, log_id: int = LOG) -> bytes:
    filler = bytes([sequence % 251]) * (RECORD_BYTES - HEADER.size)
    blank = HEADER.pack(b"GODWITLG", RECORD_BYTES, 0, sequence, log_id, 5, 6) + filler
    return (
        HEADER.pack(b"GODWITLG", RECORD_BYTES, zlib.crc32(blank), sequence, log_id, 5, 6)
        + blank[HEADER.size :]
    )


def disk(count: int, *, size: int = 20) -> bytearray:
    data = bytearray(size * RECORD_BYTES)
    for sequence in range(1, count + 1):
        put(data, sequence, record(sequence))
    return data


def put(data: bytearray, sequence: int, content: bytes) -> None:
    at = (sequence - 1) * RECORD_BYTES
    data[at : at + len(content)] = content


def test_a_whole_log_is_good() -> None:
    found = check_log(io.BytesIO(disk(12)), acknowledged=10, log_id="0000000000001234")
    assert (found.intact, found.lost, found.torn, found.unacknowledged) == (10, 0, 0, 2)
    assert found.good
    assert found.log_id == "0000000000001234"


def test_an_empty_log_is_good_only_when_nothing_was_acknowledged() -> None:
    assert check_log(io.BytesIO(disk(0)), acknowledged=0).good
    assert check_log(io.BytesIO(disk(0)), acknowledged=3).lost == 3


@given(st.data())
def test_each_fault_is_counted_where_it_is(data: st.DataObject) -> None:
    raw = disk(10)
    faults = data.draw(st.dictionaries(st.integers(1, 10), st.sampled_from(["zero", "old", "bit"])))
    for sequence, fault in faults.items():
        at = (sequence - 1) * RECORD_BYTES
        if fault == "zero":
            put(raw, sequence, bytes(RECORD_BYTES))
        elif fault == "old":
            put(raw, sequence, record(sequence, log_id=LOG + 1))
        else:
            raw[at + 8 + data.draw(st.integers(0, RECORD_BYTES - 9))] ^= 0x10
    found = check_log(io.BytesIO(raw), acknowledged=10, log_id=f"{LOG:x}")
    torn = sum(fault == "bit" for fault in faults.values())
    assert (found.torn, found.lost) == (torn, len(faults) - torn)
    assert found.intact == 10 - len(faults)
    assert found.first_bad == tuple(sorted(faults))
    assert found.good is not bool(faults)


def test_a_misplaced_record_is_lost() -> None:
    raw = disk(5)
    put(raw, 3, record(4))
    assert check_log(io.BytesIO(raw), acknowledged=5).first_bad == (3,)


def test_a_write_in_flight_is_no_fault() -> None:
    raw = disk(6)
    raw[6 * RECORD_BYTES - 1] ^= 1
    found = check_log(io.BytesIO(raw), acknowledged=5)
    assert found.good
    assert found.unacknowledged == 0


def test_a_disk_that_ends_too_early_lost_the_rest() -> None:
    found = check_log(io.BytesIO(disk(4, size=4)), acknowledged=9)
    assert (found.intact, found.lost) == (4, 5)


@pytest.mark.parametrize(("acknowledged", "code"), [(4, 0), (5, 1)])
def test_the_program_says_it_with_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], acknowledged: int, code: int
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(disk(4))
    assert main([str(path), "--acknowledged", str(acknowledged)]) == code
    assert json.loads(capsys.readouterr().out)["good"] is (code == 0)
