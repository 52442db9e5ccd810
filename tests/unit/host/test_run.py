"""Programs end with what they printed, an error that says why, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from godwit.host.errors import ProgramFailed, ProgramMissing, ProgramTimedOut
from godwit.host.run import Limits, run, run_async, with_netns
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


def test_limits_come_outside_of_the_user() -> None:
    full = Limits(memory_bytes=1, cpu_seconds=2, file_bytes=0).around(["x", "y"])
    assert full == ["prlimit", "--core=0", "--as=1", "--cpu=2", "--fsize=0", "--", "x", "y"]
    assert Limits().around(["x"]) == ["prlimit", "--core=0", "--", "x"]


def test_a_file_may_not_grow_past_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(ProgramFailed) as caught:
        run(["dd", "if=/dev/zero", f"of={path}", "bs=4096", "count=4", "status=none"],
            timeout=5, limits=Limits(file_bytes=8192))  # fmt: skip
    assert caught.value.returncode == -signal.SIGXFSZ
    assert path.stat().st_size == 8192


async def test_memory_and_time_are_limited() -> None:
    hungry = [PYTHON, "-c", "x = bytearray(1 << 30)"]
    with pytest.raises(ProgramFailed, match="MemoryError"):
        await run_async(hungry, timeout=10, limits=Limits(memory_bytes=256 << 20))
    with pytest.raises(ProgramFailed) as caught:
        await run_async(
            [PYTHON, "-c", "while True: pass"], timeout=20, limits=Limits(cpu_seconds=1)
        )
    assert caught.value.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_a_missing_program_is_still_told_with_limits() -> None:
    with pytest.raises(ProgramMissing):
        run(["godwit-no-such-program"], timeout=5, limits=Limits(cpu_seconds=1))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_another_user_has_no_groups_and_no_capabilities() -> None:
    argv = ["grep", "-E", "^(Uid|Gid|Groups|Cap(Inh|Prm|Eff))", "/proc/self/status"]
    for said in (
        run(argv, timeout=10, user=(65534, 65533)),
        await run_async(argv, timeout=10, user=(65534, 65533)),
    ):
        found = dict(line.split(":", 1) for line in said.decode().splitlines())
        assert {key: set(value.split()) for key, value in found.items()} == {
            "Uid": {"65534"},
            "Gid": {"65533"},
            "Groups": set(),
            "CapInh": {"0" * 16},
            "CapPrm": {"0" * 16},
            "CapEff": {"0" * 16},
        }


async def test_descriptors_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("inside")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY | os.O_CLOEXEC)
    try:
        argv = ["cat", f"/proc/self/fd/{descriptor}"]
        assert run(argv, timeout=5, pass_fds=[descriptor]) == b"inside"
        limits = Limits(cpu_seconds=5)
        said = await run_async(argv, timeout=5, pass_fds=[descriptor], limits=limits)
        assert said == b"inside"
    finally:
        os.close(descriptor)


async def test_output_is_heard_on_the_way() -> None:
    heard: list[bytes] = []
    script = "import sys,time\nfor n in (1,2): print(n, flush=True); time.sleep(0.2)\nsys.exit(n)"
    with pytest.raises(ProgramFailed) as caught:
        await run_async([PYTHON, "-c", script], timeout=10, on_output=heard.append)
    assert (b"".join(heard), caught.value.returncode) == (b"1\n2\n", 2)
    assert len(heard) > 1  # not all at the end; where a pipe is cut is the kernel's choice
    heard.clear()
    assert await run_async(["cat"], timeout=5, input=b"abc", on_output=heard.append) == b"abc"
    assert b"".join(heard) == b"abc"


async def test_listening_can_be_cancelled(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    argv = [PYTHON, "-c", NEST, str(note)]
    with pytest.raises(ProgramTimedOut):
        await run_async(argv, timeout=1.0, on_output=lambda _: None)
    assert gone(int(note.read_text()))
