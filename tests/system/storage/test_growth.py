"""Images made larger, of every format, and cut short at each step; read by the real qemu-img."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_args

import pytest

from godwit.host.process import kill, spawn, wait_exit
from godwit.host.run import run_async
from godwit.model.errors import Conflict, InvalidRequest, OperationFailed, Refused
from godwit.model.vm import DiskFormat
from godwit.storage import growth, vhd
from godwit.storage.convert import convert
from godwit.storage.files import LOCAL, DirectoryFiles
from godwit.storage.formats import FORMATS
from godwit.storage.growth import check_room, grow
from godwit.storage.images import check, create_image, image_info

MIB, GIB = 1 << 20, 1 << 30
SIZE = 24 * MIB + 512
FORMAT_NAMES: tuple[DiskFormat, ...] = get_args(DiskFormat)
RIGID: tuple[DiskFormat, ...] = ("vhd-fixed", "vhd", "vhdx")

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


@pytest.fixture
def root() -> Iterator[Path]:
    """A volume's directory."""
    with tempfile.TemporaryDirectory(prefix="gwg-") as folder:
        yield Path(folder)


@pytest.fixture
def content(root: Path) -> Path:
    """A raw disk with data, zeroes and a tail."""
    rng, path = random.Random(7), root / "content.raw"
    with path.open("wb") as file:
        file.write(rng.randbytes(3 * MIB))
        file.seek(11 * MIB + 512)
        file.write(rng.randbytes(MIB))
        file.seek(SIZE - 512)
        file.write(rng.randbytes(512))
    return path


async def _image(root: Path, content: Path, format_: DiskFormat) -> Path:
    path = root / f"image.{format_}"
    await convert(content, source_format="raw", target=path, target_format=format_)
    return path


def _node(path: Path, format_: DiskFormat) -> str:
    if format_ == "vhd-fixed":
        with path.open("rb") as file:
            file.seek(-512, os.SEEK_END)
            size = vhd.parse_footer(file.read())
        assert size is not None
        return f"driver=raw,offset=0,size={size.virtual_size},file.driver=file,file.filename={path}"
    driver = FORMATS[format_].driver
    return f"driver={driver},file.driver=file,file.filename={path}"


async def _holds(path: Path, format_: DiskFormat, expected: Path, size: int) -> None:
    """The image has this size, begins with what is expected and is zero behind that."""
    with expected.open("r+b") as file:
        file.truncate(size)
    one, two = _node(path, format_), f"driver=raw,file.driver=file,file.filename={expected}"
    await run_async(["qemu-img", "compare", "-q", "--image-opts", one, two], timeout=60)
    info = await image_info(path, format=format_)
    assert info.virtual_size == size
    assert not (await check(path, format=format_)).damaged
    if format_ == "vhd":
        footer = vhd.parse_footer(path.read_bytes()[:512])
        assert footer is not None
        whole = path.read_bytes()
        vhd.check_blocks(footer, lambda at, length: whole[at : at + length], len(whole))
        assert vhd.parse_footer(whole[-512:]) == footer, "both footers say the same"


async def _write(path: Path, format_: DiskFormat, content: Path, *places: tuple[int, int]) -> None:
    """Mebibytes of a pattern, written by QEMU to the image and by us to what is expected."""
    for at, pattern in places:
        word = f"write -q -P {pattern} {at} 1M"
        await run_async(["qemu-io", "--image-opts", _node(path, format_), "-c", word], timeout=20)
        with content.open("r+b") as file:
            file.seek(at)
            file.write(bytes([pattern]) * MIB)


@pytest.mark.parametrize("format_", FORMAT_NAMES)
async def test_grown_and_written_to(root: Path, content: Path, format_: DiskFormat) -> None:
    path = await _image(root, content, format_)
    sizes = [SIZE + 5 * MIB, SIZE + 5 * MIB + 512, 300 * MIB, 40 * GIB]
    for number, size in enumerate(sizes, 1):
        await check_room(path, format=format_, size_bytes=size)
        info = await grow(path, format=format_, size_bytes=size)
        assert info.virtual_size == size
        if size < GIB:  # to look at every byte takes its time
            await _holds(path, format_, content, size)
        await _write(path, format_, content, (size - MIB, number), (9 * MIB, number))
        if size < GIB:
            await _holds(path, format_, content, size)
    words = [
        *("-c", f"read -q -P 3 {300 * MIB - MIB} 1M", "-c", f"read -q -P 4 {40 * GIB - MIB} 1M"),
        *("-c", f"read -q -P 0 {20 * GIB} 1M", "-c", f"read -q -P 4 {9 * MIB} 1M"),
    ]
    await run_async(["qemu-io", "-r", "--image-opts", _node(path, format_), *words], timeout=20)
    with pytest.raises(InvalidRequest, match="never made smaller"):
        await grow(path, format=format_, size_bytes=SIZE)
    again = await grow(path, format=format_, size_bytes=sizes[-1])
    assert again.virtual_size == sizes[-1]
    if format_ in ("vhd", "vhdx", "qcow2"):
        assert path.stat().st_blocks * 512 < 256 * MIB, "what was not written takes no room"


class Cut(DirectoryFiles):
    """Files of a host that loses its power before the so-manieth write in place."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    async def patch(self, path: Path, offset: int, content: bytes) -> None:
        if self.left == 0:
            raise OSError(5, "the power is gone")
        self.left -= 1
        await super().patch(path, offset, content)


@pytest.mark.parametrize("format_", RIGID)
async def test_cut_short_it_is_whole(root: Path, content: Path, format_: DiskFormat) -> None:
    """Of the old size or the new one, with all it held; done again it has grown."""
    original, larger = await _image(root, content, format_), 300 * MIB
    path, steps = root / "cut", 0
    while True:
        shutil.copyfile(original, path)
        cut = Cut(steps)
        try:
            await grow(path, format=format_, size_bytes=larger, files=cut)
            break
        except OperationFailed as error:
            assert "power" in error.message  # noqa: PT017
        steps += 1
        info = await image_info(path, format=format_)
        assert info.virtual_size in (SIZE, larger)
        expected = root / "expected.raw"
        shutil.copyfile(content, expected)
        whole = content.read_bytes()
        await run_async(
            ["qemu-img", "convert", "--image-opts", _node(path, format_), "-O", "raw",
             str(root / "out.raw")], timeout=60,
        )  # fmt: skip
        with (root / "out.raw").open("rb") as file:
            assert file.read(SIZE) == whole
        await grow(path, format=format_, size_bytes=larger)
        if format_ != "vhd-fixed":  # an old footer may lie in its new part
            await _holds(path, format_, expected, larger)
        assert (await image_info(path, format=format_)).virtual_size == larger
    assert steps == {"vhd-fixed": 2, "vhd": 3, "vhdx": 1}[format_]
    await _holds(path, format_, content, larger)


@pytest.mark.parametrize("format_", RIGID)
async def test_what_makes_it_larger_lies_in_one_sector(
    root: Path, content: Path, format_: DiskFormat
) -> None:
    """A sector is written or not; a write of several may be cut."""
    path = await _image(root, content, format_)
    before = await image_info(path, format=format_)
    async for at, written in growth._steps(path, format_, 300 * MIB, LOCAL):
        if at < path.stat().st_size:
            assert at // 512 == (at + len(written) - 1) // 512
            await LOCAL.patch(path, at, written)
        else:
            await LOCAL.patch(path, at, written)
            if format_ != "vhd-fixed":
                now = await image_info(path, format=format_)
                assert now.virtual_size == before.virtual_size, "nothing before has changed"
    assert (await image_info(path, format=format_)).virtual_size == 300 * MIB


async def test_a_geometry_no_longer_counts(root: Path) -> None:
    """A VHD by a maker whose footers mean their geometry says its size once it has grown."""
    path = root / "old.vhd"
    words = ["qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed", str(path), "20M"]
    await run_async(words, timeout=20)
    assert path.read_bytes()[-512:][28:32] == b"qemu"
    size = 40 * MIB + 512
    assert (await grow(path, format="vhd-fixed", size_bytes=size)).virtual_size == size
    printed = await run_async(["qemu-img", "info", "-f", "vpc", str(path)], timeout=20)
    assert f"({size} bytes)".encode() in printed, "QEMU itself agrees"


@asynccontextmanager
async def _in_use(path: Path, format_: DiskFormat):  # type: ignore[no-untyped-def]
    socket = path.with_suffix(".sock")
    words = [
        *("qemu-nbd", "-t", "-k", str(socket), "--image-opts", _node(path, format_)),
    ]
    process = spawn(words)
    try:
        async with asyncio.timeout(10):
            while not socket.exists():  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.02)
        yield
    finally:
        kill(process)
        await wait_exit(process)


@pytest.mark.parametrize("format_", FORMAT_NAMES)
async def test_not_while_it_is_in_use(root: Path, content: Path, format_: DiskFormat) -> None:
    path = await _image(root, content, format_)
    before = path.read_bytes()
    async with _in_use(path, format_):
        with pytest.raises(Conflict, match="in use"):
            await grow(path, format=format_, size_bytes=2 * SIZE)
        await check_room(path, format=format_, size_bytes=2 * SIZE)
    assert len(path.read_bytes()) == len(before)


async def test_what_has_no_room_is_refused_and_unchanged(root: Path, content: Path) -> None:
    path = await _image(root, content, "vhdx")
    before = path.read_bytes()
    with pytest.raises(Refused, match="no room for that size") as caught:
        await grow(path, format="vhdx", size_bytes=60 << 40)
    assert "vm disk move" in caught.value.hint
    with pytest.raises(Refused, match="no room"):
        await check_room(path, format="vhdx", size_bytes=60 << 40)
    with pytest.raises(InvalidRequest, match="2040 GiB"):
        await grow(path, format="vhd", size_bytes=3 << 40)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("at", "bytes_", "words"),
    [
        (64 << 10, b"xxxx", "header is missing"),
        (192 << 10, b"xxxx", "region table"),
    ],
)
async def test_a_damaged_vhdx_is_refused(
    root: Path, content: Path, at: int, bytes_: bytes, words: str
) -> None:
    path = await _image(root, content, "vhdx")
    for copy in (at, at + (64 << 10)):
        await LOCAL.patch(path, copy, bytes_)
    before = path.read_bytes()
    with pytest.raises((Refused, OperationFailed)):
        await grow(path, format="vhdx", size_bytes=2 * SIZE)
    with pytest.raises(Refused, match=words):
        [step async for step in growth._steps(path, "vhdx", 2 * SIZE, LOCAL)]
    assert path.read_bytes() == before


async def test_an_open_log_is_refused(root: Path, content: Path) -> None:
    """What it holds belongs into the image before anything else is written there."""
    path = await _image(root, content, "vhdx")
    for header in (64 << 10, 128 << 10):
        await LOCAL.patch(path, header + 48, os.urandom(16))
    with pytest.raises(Refused, match="not closed in order"):
        [step async for step in growth._steps(path, "vhdx", 2 * SIZE, LOCAL)]


async def test_a_damaged_dynamic_vhd_is_refused(root: Path) -> None:
    path = root / "a.vhd"
    await create_image(path, format="vhd", size_bytes=SIZE)
    await LOCAL.patch(path, 512 + 28, struct.pack(">I", 1))
    with pytest.raises(Refused, match="header is damaged"):
        [step async for step in growth._steps(path, "vhd", 2 * GIB, LOCAL)]
