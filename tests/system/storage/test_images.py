"""Every format with the real qemu-img: made, measured, checked, grown, copied and cloned."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal, get_args

import pytest

from godwit.host.process import kill, spawn, wait_exit
from godwit.host.run import run, run_async
from godwit.model.errors import Conflict, InvalidRequest, NotFound, OperationFailed, Refused
from godwit.model.vm import Disk, DiskFormat
from godwit.qemu.launch import Binary
from godwit.storage import convert as copying
from godwit.storage import snapshots
from godwit.storage.convert import clone_image, convert, export_image
from godwit.storage.files import DirectoryFiles, VolumeFiles
from godwit.storage.formats import FORMATS, HEAD_BYTES, TAIL_BYTES, sniff
from godwit.storage.growth import grow
from godwit.storage.images import (
    Backing,
    check,
    check_image,
    create_image,
    image_info,
    opened_image,
)
from godwit.storage.qemu_img import opened

NOBODY = (65534, 65534)
MIB = 1 << 20
SIZE = 24 * MIB
FORMAT_NAMES: tuple[DiskFormat, ...] = get_args(DiskFormat)
TOOL = Binary("qemu-img", user=NOBODY)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


@pytest.fixture
def root() -> Iterator[Path]:
    """A volume's directory; the QEMU user may not even enter it."""
    with tempfile.TemporaryDirectory(prefix="gwi-") as folder:
        yield Path(folder)


@pytest.fixture
def content(root: Path) -> Path:
    """A raw disk with data, zeroes and a tail, readable for everybody."""
    rng = random.Random(7)
    path = root / "content.raw"
    with path.open("wb") as file:
        file.write(rng.randbytes(3 * MIB))
        file.seek(11 * MIB + 512)
        file.write(rng.randbytes(MIB))
        file.seek(SIZE - 512)
        file.write(rng.randbytes(512))
    os.chown(path, *NOBODY)
    return path


async def as_raw(path: Path, format: DiskFormat, *, backing: Backing | None = None) -> bytes:  # noqa: A002
    """The guest's bytes, by a plain qemu-img that knows nothing of ours."""
    if format == "raw":
        return path.read_bytes()
    with tempfile.TemporaryDirectory(prefix="gwi-") as folder:
        out = f"{folder}/out"
        driver = FORMATS[format].driver
        assert backing is None or format == "qcow2"
        run(["qemu-img", "convert", "-f", driver, "-O", "raw", str(path), out], timeout=60)
        return Path(out).read_bytes()


def disk_of(path: Path, format: DiskFormat, size: int) -> Disk:  # noqa: A002
    return Disk(
        id="d0", volume="v", path=str(path), size_bytes=size, format=format, serial="s", lun=0
    )


def strangers(root: Path, *known: str) -> set[str]:
    return {path.name for path in root.iterdir()} - set(known)


@pytest.mark.parametrize("format_", FORMAT_NAMES)
async def test_created_measured_and_checked(root: Path, format_: DiskFormat) -> None:
    path = root / "web" / "disk"
    await create_image(path, format=format_, size_bytes=SIZE + 1, owner=NOBODY)
    stat = path.stat()
    assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o777) == (*NOBODY, 0o600)
    info = await image_info(path, format=format_)
    assert (info.format, info.virtual_size) == (FORMATS[format_].driver, SIZE + 512)
    assert info.disk_size < 8 * MIB
    await check_image(disk_of(path, format_, SIZE + 1))
    with pytest.raises(Refused, match="the record says"):
        await check_image(disk_of(path, format_, SIZE * 2))
    report = await check(path, format=format_)
    assert (report.checked, report.damaged) == (FORMATS[format_].has_check, False)
    data = path.read_bytes()
    found = sniff(data[:HEAD_BYTES], data[-TAIL_BYTES:])
    assert found == (None if format_ == "raw" else format_)
    before = data
    with pytest.raises(Conflict, match="exists already"):
        await create_image(path, format=format_, size_bytes=SIZE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("format_", ["vhd-fixed", "vhd"])
async def test_the_size_of_a_vhd_is_the_one_qemu_sees(root: Path, format_: DiskFormat) -> None:
    path = root / "a.vhd"
    # No number of cylinders makes this size.
    await create_image(path, format=format_, size_bytes=123457 * 512)
    said = run(["qemu-img", "info", "-f", "vpc", str(path)], timeout=20).decode()
    assert f"({123457 * 512} bytes)" in said
    assert (await image_info(path, format=format_)).virtual_size == 123457 * 512


async def test_another_format_is_told_apart(root: Path) -> None:
    for format_ in FORMAT_NAMES:
        await create_image(root / format_, format=format_, size_bytes=SIZE)
    for named in FORMAT_NAMES:
        for real in FORMAT_NAMES:
            if real != named and named != "raw":
                with pytest.raises(OperationFailed, match="cannot read"):
                    await image_info(root / real, format=named)
    with pytest.raises(Refused, match="the record says"):
        await check_image(disk_of(root / "qcow2", "raw", SIZE))


async def test_a_guest_cannot_forge_the_footer_of_its_fixed_vhd(root: Path) -> None:
    path, other = root / "a.vhd", root / "b.vhd"
    await create_image(path, format="vhd-fixed", size_bytes=SIZE)
    await create_image(other, format="vhd", size_bytes=512 * MIB)
    with path.open("r+b") as file:
        file.write(other.read_bytes()[:2048])
    assert (await image_info(path, format="vhd-fixed")).virtual_size == SIZE
    copy = root / "copy.raw"
    await convert(path, source_format="vhd-fixed", target=copy, target_format="raw")
    assert copy.read_bytes() == path.read_bytes()[:SIZE]


async def test_too_large_for_the_format_changes_nothing(root: Path) -> None:
    with pytest.raises(InvalidRequest, match="at most 2040 GiB"):
        await create_image(root / "a.vhd", format="vhd", size_bytes=3 << 40)
    with pytest.raises(OperationFailed, match="cannot create"):
        await create_image(root / "x.raw", format="raw", size_bytes=1 << 62)
    assert strangers(root) == set()


async def test_the_largest_vhd_and_vhdx_are_made(root: Path) -> None:
    await create_image(root / "a.vhd", format="vhd", size_bytes=2040 << 30)
    assert (await image_info(root / "a.vhd", format="vhd")).virtual_size == 2040 << 30
    await create_image(root / "a.vhdx", format="vhdx", size_bytes=64 << 40)
    assert (await image_info(root / "a.vhdx", format="vhdx")).virtual_size == 64 << 40


@pytest.mark.parametrize("source", FORMAT_NAMES)
async def test_there_and_back_again(root: Path, content: Path, source: DiskFormat) -> None:
    first = root / "first"
    heard: list[float] = []
    info = await convert(
        content,
        source_format="raw",
        target=first,
        target_format=source,
        owner=NOBODY,
        tool=TOOL,
        progress=heard.append,
    )
    assert info.virtual_size == SIZE
    assert heard == sorted(heard)
    assert (heard[0] < 0.5, heard[-1]) == (True, 1.0)
    for target in FORMAT_NAMES:
        second = root / f"second-{target}"
        await convert(
            first,
            source_format=source,
            target=second,
            target_format=target,
            owner=NOBODY,
            tool=TOOL,
        )
        guest = await as_raw(second, target)
        assert guest[:SIZE] == content.read_bytes(), (source, target)
        assert not any(guest[SIZE:])
        assert second.stat().st_uid == NOBODY[0]
        second.unlink()


async def test_a_copy_never_overwrites(root: Path, content: Path) -> None:
    target = root / "mine"
    target.write_bytes(b"precious")
    with pytest.raises(Conflict, match="exists already"):
        await convert(content, source_format="raw", target=target, target_format="qcow2")
    target.unlink()
    target.symlink_to(root / "elsewhere")
    with pytest.raises(Conflict, match="exists already"):
        await convert(content, source_format="raw", target=target, target_format="qcow2")
    assert not (root / "elsewhere").exists()
    with pytest.raises(NotFound, match="no directory"):
        await convert(content, source_format="raw", target=root / "a/b", target_format="raw")


async def test_a_failed_copy_leaves_nothing(root: Path, content: Path) -> None:
    await create_image(root / "big", format="qcow2", size_bytes=3 << 40)
    with pytest.raises(InvalidRequest, match="2040 GiB"):
        await convert(root / "big", source_format="qcow2", target=root / "x", target_format="vhd")
    assert not (root / "x").exists()
    with pytest.raises(OperationFailed, match="cannot copy"):
        await convert(content, source_format="qcow2", target=root / "x", target_format="raw")
    assert strangers(root, "big", "content.raw") == set()


async def test_a_cancelled_copy_leaves_nothing(root: Path, content: Path) -> None:
    """Cancelled while qemu-img writes: the program ends and the new file goes."""
    slow, note = root / "slow", root / "note"
    slow.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = convert ] || exec qemu-img "$@"\necho $$ >{note}.new\n'
        f"mv {note}.new {note}\nexec sleep 60\n"
    )
    slow.chmod(0o755)
    copying_ = asyncio.ensure_future(
        convert(
            content,
            source_format="raw",
            target=root / "x",
            target_format="qcow2",
            tool=Binary(str(slow)),
        )
    )
    async with asyncio.timeout(20):
        while not note.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (root / "x").exists()
    copying_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying_
    assert not (root / "x").exists()
    assert not Path(f"/proc/{note.read_text().strip()}").exists()


async def test_a_copy_that_differs_is_not_kept(
    root: Path, content: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison looks: what is planted between copying and comparing is found."""
    honest = copying.held_image

    async def plant(
        target: Path, target_format: DiskFormat, descriptor: int, files: VolumeFiles
    ) -> object:
        os.pwrite(descriptor, b"\1", 5 * MIB)
        return await honest(target, target_format, descriptor, files)

    monkeypatch.setattr(copying, "held_image", plant)
    with pytest.raises(OperationFailed, match="not equal to its source"):
        await convert(content, source_format="raw", target=root / "x", target_format="raw")
    assert not (root / "x").exists()


@pytest.fixture
async def held(root: Path) -> AsyncIterator[Path]:
    """An image that a storage daemon has open for writing, as a VM would."""
    if shutil.which("qemu-storage-daemon") is None:
        pytest.skip("qemu-storage-daemon is not installed")
    path, pidfile = root / "held.qcow2", root / "pid"
    await create_image(path, format="qcow2", size_bytes=SIZE)
    words = [
        *("qemu-storage-daemon", "--pidfile", str(pidfile)),
        *("--blockdev", f"driver=file,node-name=f,filename={path}"),
        *("--blockdev", "driver=qcow2,node-name=q,file=f"),
        *("--nbd-server", f"addr.type=unix,addr.path={root / 'nbd'}"),
        *("--export", "type=nbd,id=e,node-name=q,writable=on"),
    ]
    process = spawn(words)
    try:
        for _ in range(500):
            if pidfile.exists() and pidfile.read_text().strip():
                break
            await run_async(["sleep", "0.02"], timeout=5)
        yield path
    finally:
        kill(process)
        await wait_exit(process)


async def test_an_image_in_use_is_left_alone(held: Path, root: Path) -> None:
    with pytest.raises(Conflict, match="in use"):
        await convert(held, source_format="qcow2", target=root / "x", target_format="raw")
    with pytest.raises(Conflict, match="in use"):
        await grow(held, format="qcow2", size_bytes=2 * SIZE)
    with pytest.raises(Conflict, match="in use"):
        await check(held, format="qcow2")
    with pytest.raises(Conflict, match="in use"):
        await clone_image(held, format="qcow2", target=root / "x", linked=True)
    assert not (root / "x").exists()
    assert (await image_info(held, format="qcow2", in_use=True)).virtual_size == SIZE


async def test_without_locks_nobody_asks_for_one(held: Path, root: Path) -> None:
    """What a host with ``image_locks = false`` is told: it looks at no lock that is there."""
    bare = DirectoryFiles(locking=False)
    assert (await image_info(held, format="qcow2", files=bare)).virtual_size == SIZE
    assert not (await check(held, format="qcow2", files=bare)).damaged
    disk = disk_of(held, "qcow2", SIZE)
    await check_image(disk, files=bare)
    await snapshots.take_all([disk], "godwit-x-1", known=(), files=bare)
    assert await snapshots.list_tags(disk, bare) == ("godwit-x-1",)
    await snapshots.drop_all([disk], "godwit-x-1", files=bare)
    grown = await grow(held, format="qcow2", size_bytes=2 * SIZE, files=bare)
    assert grown.virtual_size == 2 * SIZE
    clone = await clone_image(held, format="qcow2", target=root / "x", linked=True, files=bare)
    assert clone.info.virtual_size == 2 * SIZE
    await clone_image(held, format="qcow2", target=root / "y", files=bare)


def on(disk: Disk, backing: Backing | None) -> Disk:
    """The disk with a record that names what its image stands on."""
    assert backing is not None
    return disk.but(backing={"path": backing.path, "format": backing.format})


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_a_linked_clone_stands_on_what_its_record_names(
    root: Path, content: Path, format_: Literal["raw", "qcow2"]
) -> None:
    base, target = root / "base", root / "clone.qcow2"
    await convert(content, source_format="raw", target=base, target_format=format_, owner=NOBODY)
    clone = await clone_image(
        base, format=format_, target=target, linked=True, owner=NOBODY, tool=TOOL
    )
    assert clone.backing == Backing(str(base), format_)
    assert clone.info.virtual_size == SIZE
    assert clone.info.disk_size < MIB
    disk = disk_of(target, "qcow2", SIZE)
    await check_image(on(disk, clone.backing))
    assert await as_raw(target, "qcow2") == content.read_bytes()
    with pytest.raises(Refused, match="leads to another file"):
        await check_image(disk)
    other = Backing(str(root / "other"), format_)
    with pytest.raises(Refused, match="leads to another file"):
        await check_image(on(disk, other))
    plain = root / "plain.qcow2"
    await create_image(plain, format="qcow2", size_bytes=SIZE)
    with pytest.raises(Refused, match="does not stand on"):
        await check_image(on(disk_of(plain, "qcow2", SIZE), clone.backing))
    assert (await check(target, format="qcow2", backing=clone.backing)).words == "clean"
    # What is copied out of it needs no other image.
    whole = root / "whole.vhdx"
    await export_image(
        target,
        source_format="qcow2",
        target=whole,
        target_format="vhdx",
        backing=clone.backing,
        tool=TOOL,
    )
    assert (await as_raw(whole, "vhdx"))[:SIZE] == content.read_bytes()
    assert whole.stat().st_uid == os.geteuid()
    with pytest.raises(Refused, match="linked clone itself"):
        await clone_image(
            target, format="qcow2", target=root / "y", linked=True, backing=clone.backing
        )
    with pytest.raises(Refused, match="leads to another file"):
        await clone_image(target, format="qcow2", target=root / "y", linked=True)


async def test_a_clone_whose_base_leads_on_is_refused(root: Path, content: Path) -> None:
    base, target = root / "base.qcow2", root / "clone.qcow2"
    await convert(content, source_format="raw", target=base, target_format="qcow2")
    clone = await clone_image(base, format="qcow2", target=target, linked=True)
    run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(content), "-F", "raw", str(base)],
        timeout=20,
    )
    with pytest.raises(Refused, match=r"base.qcow2 leads to another file"):
        await check_image(on(disk_of(target, "qcow2", SIZE), clone.backing))


async def test_a_full_clone_stands_alone(root: Path, content: Path) -> None:
    clone = await clone_image(
        content, format="raw", target=root / "c.vhdx", target_format="vhdx", tool=TOOL, owner=NOBODY
    )
    assert clone.backing is None
    content.unlink()
    assert (await check(root / "c.vhdx", format="vhdx")).words == "clean"


async def test_damage_is_found(root: Path, content: Path) -> None:
    path = root / "a.qcow2"
    await convert(content, source_format="raw", target=path, target_format="qcow2")
    os.truncate(path, path.stat().st_size // 2)
    report = await check(path, format="qcow2")
    assert report.damaged
    assert report.words.startswith("damaged: ")


async def test_an_open_image_cannot_be_swapped(root: Path, content: Path) -> None:
    """What was opened is what is read, whatever takes its name afterwards."""
    path = root / "a.raw"
    shutil.copy(content, path)
    async with opened_image(path, format="raw") as image:
        path.unlink()
        path.write_bytes(bytes(512))
        async with copying.copied(image, root / "copy", "raw", owner=None, tool=Binary("qemu-img")):
            pass
    assert (root / "copy").read_bytes() == content.read_bytes()
    with opened(root / "copy") as descriptor:
        assert os.fstat(descriptor).st_size == SIZE
