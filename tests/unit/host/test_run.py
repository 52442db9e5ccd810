"""Programs end with what they printed, an error that says why, or not at all."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from godwit.host.errors import ProgramFailed, ProgramMissing, ProgramTimedOut
from godwit.host.run import run, run_async, with_netns
from godwit.model.errors import OperationFailed

PYTHON = sys.executable
# Starts a child that holds the pipes open, tells its number, and waits with it.
NEST = (
    "import subprocess,sys,time;"
    "p=subprocess.Popen([sys.executable,'-c','import time;time.sleep(60)']);"
    "open(sys.argv[1],'w').write(str(p.pid));time.sleep(60)"
)


def gone(pid: int) -> bool:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_output_and_input_and_environment() -> None:
    assert run(["cat"], timeout=5, input=b"hello\0") == b"hello\0"
    assert run(["env"], timeout=5, env={"A": "b"}) == b"A=b\n"
    assert run(["pwd"], timeout=5, cwd="/usr") == b"/usr\n"


def test_no_input_means_end_of_file() -> None:
    assert run(["cat"], timeout=5) == b""


async def test_async_output() -> None:
    assert await run_async(["cat"], timeout=5, input=b"x") == b"x"


def test_failure_tells_status_and_error_output() -> None:
    with pytest.raises(ProgramFailed) as caught:
        run(["ls", "/does/not/exist"], timeout=5)
    assert caught.value.returncode == 2
    assert "/does/not/exist" in caught.value.stderr
    assert caught.value.argv == ("ls", "/does/not/exist")
    assert isinstance(caught.value, OperationFailed)


async def test_async_failure_by_signal_is_negative() -> None:
    with pytest.raises(ProgramFailed) as caught:
        await run_async([PYTHON, "-c", "import os;os.kill(os.getpid(),9)"], timeout=5)
    assert caught.value.returncode == -9


def test_missing_program_has_a_hint() -> None:
    with pytest.raises(ProgramMissing) as caught:
        run(["godwit-no-such-program"], timeout=5)
    assert "godwit-no-such-program" in caught.value.hint


async def test_async_missing_program() -> None:
    with pytest.raises(ProgramMissing):
        await run_async(["godwit-no-such-program"], timeout=5)


def test_timeout_kills_grandchildren_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(ProgramTimedOut):
        run([PYTHON, "-c", NEST, str(note)], timeout=1.0)
    assert gone(int(note.read_text()))


async def test_async_timeout_kills_grandchildren_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(ProgramTimedOut):
        await run_async([PYTHON, "-c", NEST, str(note)], timeout=1.0)
    assert gone(int(note.read_text()))


async def test_cancelling_kills_the_program(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    task = asyncio.ensure_future(run_async([PYTHON, "-c", NEST, str(note)], timeout=30))
    async with asyncio.timeout(10):
        while not note.exists() or not note.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(int(note.read_text()))


def test_namespace_by_name_or_path() -> None:
    assert with_netns(["ip", "a"], None) == ["ip", "a"]
    assert with_netns(["ip", "a"], "sw")[:2] == ["nsenter", "--net=/run/netns/sw"]
    assert with_netns(["ip"], f"/proc/{os.getpid()}/ns/net")[1].startswith("--net=/proc/")
