"""Snapshots in images that nobody has open, with the real qemu-img."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.host.run import run
from godwit.model.errors import Conflict, NotFound, OperationFailed
from godwit.model.vm import Backing, Disk
from godwit.storage import snapshots
from godwit.storage.convert import clone_image
from godwit.storage.images import check, create_image

MIB = 1 << 20
SIZE = 8 * MIB
TAG = snapshots.tag_of("one", "abc")

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


@pytest.fixture
def root() -> Iterator[Path]:
    """A volume's directory."""
    with tempfile.TemporaryDirectory(prefix="gws-") as folder:
        yield Path(folder)


async def make(root: Path, *names: str) -> list[Disk]:
    found = []
    for lun, name in enumerate(names):
        path = root / f"{name}.qcow2"
        await create_image(path, format="qcow2", size_bytes=SIZE)
        found.append(
            Disk(id=name, volume="v", path=str(path), size_bytes=SIZE, serial=name, lun=lun)
        )
    return found


def write(disk: Disk, pattern: int) -> None:
    io(disk, f"write -P {pattern} 0 1M")


def holds(disk: Disk, pattern: int) -> bool:
    return "Pattern verification failed" not in io(disk, f"read -P {pattern} 0 1M")


def io(disk: Disk, command: str) -> str:
    argv = ["qemu-io", "-f", "qcow2", "-c", command, disk.path]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


async def test_taken_gone_back_to_and_dropped(root: Path) -> None:
    disks = await make(root, "a", "b")
    for disk in disks:
        write(disk, 1)
    await snapshots.take_all(disks, TAG, known=[])
    await snapshots.take_all(disks, TAG, known=[])
    for disk in disks:
        assert await snapshots.list_tags(disk) == (TAG,)
        write(disk, 2)
    run(["qemu-img", "resize", "-q", "-f", "qcow2", disks[0].path, str(2 * SIZE)], timeout=20)
    for _ in range(2):  # cut short, it is done again
        assert await snapshots.revert_all(disks, TAG) == {"a": SIZE, "b": SIZE}
        assert all(holds(disk, 1) and not holds(disk, 2) for disk in disks)
    await snapshots.drop_all(disks, TAG)
    await snapshots.drop_all(disks, TAG)
    for disk in disks:
        assert await snapshots.list_tags(disk) == ()
        assert holds(disk, 1)
        assert (await check(Path(disk.path), format="qcow2")).words == "clean"


async def test_all_or_none(root: Path) -> None:
    disks = await make(root, "a", "b")
    Path(disks[1].path).write_bytes(b"QFI\xfb" + bytes(64))
    with pytest.raises(OperationFailed, match=r"b\.qcow2"):
        await snapshots.take_all(disks, TAG, known=[])
    assert await snapshots.list_tags(disks[0]) == ()


async def test_a_missing_one_changes_nothing(root: Path) -> None:
    disks = await make(root, "a", "b")
    write(disks[0], 1)
    await snapshots.take_all(disks[:1], TAG, known=[])
    write(disks[0], 2)
    with pytest.raises(NotFound, match=r"b\.qcow2 does not hold"):
        await snapshots.revert_all(disks, TAG)
    assert holds(disks[0], 2)


async def test_what_no_record_knows_goes_and_a_strangers_stays(root: Path) -> None:
    (disk,) = await make(root, "a")
    for tag in ("mine", "godwit-left", "godwit-kept"):
        run(["qemu-img", "snapshot", "-c", tag, disk.path], timeout=20)
    await snapshots.take_all([disk], TAG, known=["godwit-kept"])
    assert set(await snapshots.list_tags(disk)) == {"mine", "godwit-kept", TAG}


async def test_an_image_in_use_is_left_alone(root: Path) -> None:
    (disk,) = await make(root, "a")
    argv = ["qemu-io", "-f", "qcow2", disk.path]
    holder = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdin.write(b"write 0 4k\n")
        await holder.stdout.readuntil(b"ops")  # it has the image open
        with pytest.raises(Conflict, match="in use"):
            await snapshots.take_all([disk], TAG, known=[])
        with pytest.raises(Conflict, match="in use"):
            await snapshots.revert_all([disk], TAG)
    finally:
        holder.stdin.write(b"quit\n")
        await holder.communicate()
    assert await snapshots.list_tags(disk) == ()


async def test_a_linked_clone_keeps_what_it_stands_on(root: Path) -> None:
    (base,) = await make(root, "base")
    write(base, 1)
    path = root / "clone.qcow2"
    await clone_image(Path(base.path), format="qcow2", target=path, linked=True)
    stands_on = Backing(path=base.path, format="qcow2")
    clone = base.but(id="clone", path=str(path), backing=stands_on)
    before = Path(base.path).read_bytes()
    await snapshots.take_all([clone], TAG, known=[])
    write(clone, 2)
    await snapshots.revert_all([clone], TAG)
    assert holds(clone, 1)
    assert Path(base.path).read_bytes() == before
