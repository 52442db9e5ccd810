"""Processes are known by number and start, and their end is heard, children or not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from godwit.host import process
from godwit.host.errors import ProcessGone, ProgramMissing
from godwit.host.process import Process

PYTHON = sys.executable


def open_descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - the kernel gives no event for a stop
            await asyncio.sleep(0.001)


async def end(child: Process) -> int | None:
    process.kill(child)
    async with asyncio.timeout(5):
        return await process.wait_exit(child)


async def test_exit_status_of_a_child() -> None:
    assert await process.wait_exit(process.spawn(["sh", "-c", "exit 7"])) == 7


async def test_killed_child_has_a_negative_status_and_is_reaped() -> None:
    child = process.spawn(["sleep", "60"])
    assert process.is_alive(child)
    assert await end(child) == -signal.SIGKILL
    assert not process.is_alive(child)
    assert not Path(f"/proc/{child.pid}").exists()


async def test_same_number_other_start_is_another_process() -> None:
    child = process.spawn(["sleep", "60"])
    try:
        assert process.is_same(child.pid, child.start_time)
        stranger = Process(child.pid, child.start_time + 1)
        assert not process.is_same(stranger.pid, stranger.start_time)
        assert not process.kill(stranger)
        assert await process.wait_exit(stranger) is None
        with pytest.raises(ProcessGone):
            process.open_pidfd(stranger)
        assert process.is_alive(child)
    finally:
        await end(child)


async def test_name_with_blanks_and_brackets_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) b (c"
    program.symlink_to("/bin/sleep")
    child = process.spawn([str(program), "60"])
    try:
        assert process.identify(child.pid) == child
        assert child.start_time > 0
    finally:
        await end(child)


async def test_end_of_a_process_that_is_not_our_child(tmp_path: Path) -> None:
    # The starter leaves an orphan behind and tells us its number.
    note = tmp_path / "pid"
    code = (
        "import subprocess,sys;"
        "p=subprocess.Popen(['sleep','60'],start_new_session=True);"
        "open(sys.argv[1],'w').write(str(p.pid));p.returncode=0"
    )
    assert await process.wait_exit(process.spawn([PYTHON, "-c", code, str(note)])) == 0
    orphan = process.identify(int(note.read_text()))
    assert orphan is not None
    waiting = asyncio.ensure_future(process.wait_exit(orphan))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    assert process.kill(orphan)
    async with asyncio.timeout(5):
        assert await waiting is None


async def test_cancelled_wait_leaves_process_and_descriptors_alone() -> None:
    child = process.spawn(["sleep", "60"])
    try:
        before = open_descriptors()
        waiting = asyncio.ensure_future(process.wait_exit(child))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert open_descriptors() == before
        assert process.is_alive(child)
    finally:
        await end(child)


async def test_freeze_and_thaw() -> None:
    child = process.spawn(["sleep", "60"])
    try:
        assert process.freeze(child)
        await until(lambda: process.is_stopped(child))
        assert process.thaw(child)
        await until(lambda: not process.is_stopped(child))
    finally:
        await end(child)


async def test_streams_environment_session_and_descriptors(tmp_path: Path) -> None:
    log, source = tmp_path / "log", tmp_path / "in"
    source.write_text("from stdin")
    log.write_text("kept\n")
    read_end, write_end = os.pipe()
    code = (
        "import os,sys;"
        "print(sys.stdin.read(),os.environ['A'],os.getcwd(),os.getsid(0)==os.getpid());"
        f"os.write({write_end},b'through the pipe')"
    )
    child = process.spawn(
        [PYTHON, "-c", code],
        stdin=source,
        stdout=log,
        stderr=log,
        env={"A": "b"},
        cwd="/usr",
        pass_fds=[write_end],
    )
    os.close(write_end)
    assert await process.wait_exit(child) == 0
    assert os.read(read_end, 100) == b"through the pipe"
    os.close(read_end)
    assert log.read_text() == "kept\nfrom stdin b /usr True\n"


def test_missing_program() -> None:
    with pytest.raises(ProgramMissing):
        process.spawn(["godwit-no-such-program"])
    with pytest.raises(FileNotFoundError):
        process.spawn(["sleep", "1"], cwd="/does/not/exist")


def test_figures_of_ourselves() -> None:
    me = os.getpid()
    assert 5_000_000 < process.rss_bytes(me) < 2_000_000_000
    before = process.cpu_seconds(me)
    while process.cpu_seconds(me) < before + 0.03:
        sum(range(10_000))
    assert me in process.thread_ids(me)


def test_figures_of_the_dead() -> None:
    for ask in (process.rss_bytes, process.cpu_seconds, process.thread_ids):
        with pytest.raises(ProcessGone):
            ask(2**22 + 1)
    assert process.identify(2**22 + 1) is None
