"""Marks in volumes: two hosts on one directory, on two, on none; locks; looks that hang."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from godwit.agent import validation_files
from godwit.agent.validation_files import PREFIX, Marks, in_thread
from godwit.model.validation_facts import FilesAsk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path


def ask(*hosts: str, run: str = "t-1", volumes: tuple[str, ...] = ("shared",)) -> FilesAsk:
    return FilesAsk(run=run, volumes=volumes, hosts=hosts)


async def test_what_one_host_writes_the_other_reads(root: Path) -> None:
    one, two = Marks("host1", root), Marks("host2", root)
    for marks in (one, two):
        [seen] = (await marks.write(ask())).volumes
        assert (seen.wrong, seen.volume) == ("", "shared")
        assert seen.write_s is not None
    [seen] = (await one.read(ask("host1", "host2"))).volumes
    assert seen.unread == {}


async def test_a_mark_that_is_not_there_or_not_whole_is_told(root: Path, tmp_path: Path) -> None:
    one, two = Marks("host1", root), Marks("host2", tmp_path / "elsewhere")
    await one.write(ask())
    [seen] = (await two.read(ask("host1"))).volumes
    assert "is not there" in seen.unread["host1"]
    mark = root / "shared" / f"{PREFIX}.t-1.host1"
    mark.write_bytes(b"old")
    [seen] = (await Marks("host2", root).read(ask("host1"))).volumes
    assert "3 bytes" in seen.unread["host1"]


async def test_a_volume_that_is_missing_says_so(root: Path) -> None:
    [seen] = (await Marks("host1", root).write(ask(volumes=("gone",)))).volumes
    assert "gone" in seen.wrong
    assert seen.write_s is None


async def test_a_mark_does_not_follow_a_link(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (root / "shared" / f"{PREFIX}.t-1.host9").symlink_to(secret)
    [seen] = (await Marks("host1", root).read(ask("host9"))).volumes
    assert seen.unread["host9"]


async def test_a_lock_is_seen_until_it_is_cleared(root: Path) -> None:
    one, two = Marks("host1", root), Marks("host2", root)
    await one.write(ask())
    assert (await two.observe(ask("host1"))).volumes == {"shared": "the image looks free"}
    assert (await one.lock(ask("host1"))).volumes == {"shared": ""}
    assert (await two.observe(ask("host1"))).volumes == {"shared": ""}
    await one.clear(ask())
    assert "is not there" in (await two.observe(ask("host1"))).volumes["shared"]
    assert list((root / "shared").iterdir()) == []


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is not installed")
async def test_the_lock_is_the_one_that_qemu_looks_for(root: Path) -> None:
    marks = Marks("host1", root)
    await marks.write(ask())
    mark = root / "shared" / f"{PREFIX}.t-1.host1"
    look = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(mark)]
    free = await asyncio.to_thread(subprocess.run, look, capture_output=True, text=True)
    assert free.returncode == 0, free.stderr
    await marks.lock(ask("host1"))
    held = await asyncio.to_thread(subprocess.run, look, capture_output=True, text=True)
    await marks.clear(ask())
    assert held.returncode == 1
    assert '"write" lock' in held.stderr


async def test_clearing_takes_ones_own_marks_away_and_no_others(root: Path) -> None:
    one, two = Marks("host1", root), Marks("x-host1", root)
    await one.write(ask(run="t-0"))
    await two.write(ask())
    await one.clear(ask())
    assert [mark.name for mark in (root / "shared").iterdir()] == [f"{PREFIX}.t-1.x-host1"]


async def test_a_look_that_hangs_is_given_up_and_not_repeated(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(validation_files, "LOOK_S", 0.05)
    monkeypatch.setattr(validation_files, "_check", lambda *_: str(over.wait(10.0)))
    marks = Marks("host1", root)
    [seen] = (await marks.read(ask("host2"))).volumes
    assert "no answer" in seen.unread["host2"]
    [seen] = (await marks.read(ask("host2"))).volumes
    assert "still hangs" in seen.unread["host2"]
    over.set()


async def test_what_breaks_in_the_thread_comes_out() -> None:
    ended = asyncio.Event()

    def work() -> str:
        raise PermissionError(13, "no")

    with pytest.raises(PermissionError):
        await in_thread(work, 5.0, done=ended.set)
    assert ended.is_set()
