"""What a daemon leaves in an image when it dies between two writes of its metadata, made by hand.

Each state is made from what the real driver wrote before, or would have written next; see
`godwit.storage.vhdx_log`.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.system.storage.broker.rig import (
    NOBODY,
    PROGRAM,
    Connect,
    Start,
    is_clean,
    make_image,
    verify,
)

from godwit.host.process import kill
from godwit.model.errors import OperationFailed
from godwit.storage import vhd
from godwit.storage.broker import Broker, Opening
from godwit.storage.files import LOCAL
from godwit.storage.nodes import BrokerDisk
from godwit.storage.vhdx import read_layout
from godwit.storage.vhdx_log import HEADER_BYTES, HEADERS, find_mark, with_checksum

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(PROGRAM is None, reason="qemu-storage-daemon is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
MIB = 1 << 20
SIZE = 64 * MIB
FAR = 40 * MIB
"""In another block than the beginning: QEMU makes blocks of 8 MiB for a disk of this size."""


class Vhdx:
    """The metadata of an image that nobody has open."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, at: int, length: int) -> bytes:
        with self.path.open("rb") as stream:
            return os.pread(stream.fileno(), length, at)

    def write(self, at: int, content: bytes) -> None:
        with self.path.open("rb+") as stream:
            os.pwrite(stream.fileno(), content, at)

    def headers(self) -> list[bytes]:
        """Both, the one with the lower number first."""
        return sorted((self.read(at, HEADER_BYTES) for at in HEADERS), key=_number)

    def is_marked(self) -> bool:
        return find_mark(*[self.read(at, HEADER_BYTES) for at in HEADERS]) is not None

    @property
    def log_at(self) -> int:
        (at,) = struct.unpack_from("<Q", self.read(HEADERS[0], HEADER_BYTES), 72)
        return int(at)

    def mark(self, name: bytes, headers: int) -> None:
        """As QEMU does: the older header first, with the next number."""
        for _ in range(headers):
            old, new = self.headers()
            at = next(one for one in HEADERS if self.read(one, HEADER_BYTES) == old)
            head = bytearray(new)
            head[8:16] = struct.pack("<Q", _number(new) + 1)
            head[48:64] = name
            self.write(at, with_checksum(head))


def _number(header: bytes) -> int:
    return int(struct.unpack_from("<Q", header, 8)[0])


def _write_fails(path: Path, offset: int) -> str:
    """What a QEMU says that opens the image as it is and writes there."""
    argv = ["qemu-io", "-f", "vhdx", "-c", f"write -P 9 {offset} 4k", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


async def _killed_after(start: Start, connect: Connect, disk: BrokerDisk) -> Broker:
    """A broker whose daemon gave the disk its first block, and was killed."""
    broker = await start(disk, disk0=Opening(1))
    client = await connect(disk)
    await client.write(7, 0)
    kill(broker.record.process)
    await broker.ended()
    assert broker.gate("disk0").unsettled
    return broker


def _one(image: Vhdx) -> None:
    image.mark(uuid.uuid4().bytes, 1)


def _both(image: Vhdx) -> None:
    image.mark(uuid.uuid4().bytes, 2)


def _half_an_entry(image: Vhdx) -> None:
    """The entry's first sector got there, the others hold what was there before."""
    name = uuid.uuid4().bytes
    image.mark(name, 2)
    entry = bytearray(image.read(image.log_at, 4096))
    assert entry.startswith(b"loge")
    entry[32:48] = name
    image.write(image.log_at, bytes(entry))


@pytest.mark.parametrize("left", [_one, _both, _half_an_entry])
async def test_a_log_without_an_entry_is_closed(
    left: Callable[[Vhdx], None], root: Path, disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    """Unmended, every new block is refused; through the broker nobody notices."""
    broker = await _killed_after(start, connect, disk)
    image = Vhdx(Path(disk.path))
    left(image)
    assert image.is_marked()
    copy = root / "copy.vhdx"
    shutil.copyfile(image.path, copy)
    assert "write failed: Operation not supported" in _write_fails(copy, FAR)
    assert Vhdx(copy).is_marked()

    await broker.restart({"disk0": Opening(1)})
    client = await connect(disk)
    await client.check(7, 0)
    await client.write(8, FAR)
    await broker.release("disk0")
    assert not image.is_marked()
    verify(disk, {0: 7, FAR: 8})
    assert is_clean(disk)


async def test_a_log_with_an_entry_is_carried_out(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    """Killed when the entry was written and the block table was not."""
    image = Vhdx(Path(disk.path))

    async def read(offset: int, length: int) -> bytes:
        return await LOCAL.read(image.path, offset, length)

    layout = await read_layout(read)
    table = image.read(layout.table_at, 4096)
    broker = await _killed_after(start, connect, disk)
    entry = image.read(image.log_at, 4096)
    assert entry.startswith(b"loge")
    assert image.read(layout.table_at, 4096) != table
    image.write(layout.table_at, table)
    verify(disk, {0: 0})  # without the log the block is gone
    image.mark(entry[32:48], 2)

    await broker.restart({"disk0": Opening(1)})
    client = await connect(disk)
    await client.check(7, 0)
    await client.write(8, FAR)
    await broker.release("disk0")
    assert not image.is_marked()
    verify(disk, {0: 7, FAR: 8})
    assert is_clean(disk)


async def test_odd_headers_are_left_alone(
    disk: BrokerDisk, start: Start, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await _killed_after(start, connect, disk)
    image = Vhdx(Path(disk.path))
    image.mark(uuid.uuid4().bytes, 2)
    for at in HEADERS:
        head = bytearray(image.read(at, HEADER_BYTES))
        head[66:68] = struct.pack("<H", 2)
        image.write(at, with_checksum(head))
    before = image.read(0, MIB)
    with pytest.raises(OperationFailed, match="header"):
        await broker.restart({"disk0": Opening(1)})
    assert image.read(0, MIB) == before
    assert "left as it is: neither of its headers is whole" in caplog.text


async def test_a_host_that_knows_nothing_of_the_crash(
    disk: BrokerDisk, start: Start, connect: Connect
) -> None:
    """As after a crash of the host: the image was marked, and there is no record of a broker."""
    _both(Vhdx(Path(disk.path)))
    await start(disk, disk0=Opening(1, after_crash=True))
    client = await connect(disk)
    await client.write(8, FAR)


async def test_a_vhd_without_its_last_footer_is_opened_and_gets_one(
    root: Path, start: Start, connect: Connect
) -> None:
    """Killed when a new block's bitmap lay where the footer was: the copy at the start leads."""
    disk = make_image(root, "vhd", size=SIZE, owner=NOBODY)
    broker = await _killed_after(start, connect, disk)
    image = Vhdx(Path(disk.path))
    end = image.path.stat().st_size - vhd.FOOTER_BYTES
    first = image.read(0, vhd.FOOTER_BYTES)
    assert image.read(end, vhd.FOOTER_BYTES) == first
    image.write(end, b"\xff" * vhd.FOOTER_BYTES)

    await broker.restart({"disk0": Opening(1)})
    client = await connect(disk)
    await client.check(7, 0)
    await client.write(8, FAR)
    await broker.release("disk0")
    verify(disk, {0: 7, FAR: 8})
    longer = image.path.stat().st_size - vhd.FOOTER_BYTES
    assert longer > end
    assert image.read(longer, vhd.FOOTER_BYTES) == first
