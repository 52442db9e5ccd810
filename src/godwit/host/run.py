"""Runs a program to its end and returns what it printed.

Never a shell: the argument vector is given as a list.  Secrets go in through ``input`` or a
descriptor, never through ``argv``, so errors may show the whole command.  A program that
overstays its time, or whose caller is cancelled, is killed together with its process group:
nothing that it started stays behind unless it made a session of its own.

A program that handles what strangers made runs with ``user`` and ``limits``: as an unprivileged
user without capabilities, and ended by the kernel when it takes more than it may.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from godwit.host.errors import ProgramFailed, ProgramMissing, ProgramTimedOut
from godwit.host.process import as_user

NETNS_DIRECTORY = "/run/netns"


@dataclass(frozen=True, slots=True)
class Limits:
    """The most a program may take; None leaves our own limit. It never dumps core.

    ``memory_bytes`` is address space, ``file_bytes`` the length of any file it writes.
    """

    memory_bytes: int | None = None
    cpu_seconds: int | None = None
    file_bytes: int | None = None

    def around(self, argv: Sequence[str]) -> list[str]:
        """The argument vector that runs ``argv`` within these limits."""
        wanted = (
            ("as", self.memory_bytes),
            ("cpu", self.cpu_seconds),
            ("fsize", self.file_bytes),
        )
        options = [f"--{name}={value}" for name, value in wanted if value is not None]
        return ["prlimit", "--core=0", *options, "--", *argv]


def netns_path(netns: str) -> str:
    """Path of a network namespace given by name, or by path when it holds a slash."""
    return netns if "/" in netns else f"{NETNS_DIRECTORY}/{netns}"


def with_netns(argv: Sequence[str], netns: str | None) -> list[str]:
    """The argument vector that runs ``argv`` in a network namespace (None: in ours)."""
    if netns is None:
        return list(argv)
    return ["nsenter", f"--net={netns_path(netns)}", "--", *argv]


def _full_argv(
    argv: Sequence[str],
    netns: str | None,
    user: tuple[int, int] | None,
    limits: Limits | None,
) -> list[str]:
    # Outermost what needs our privileges, innermost the program.
    full = list(argv) if user is None else as_user(argv, user, ())
    if limits is not None:
        if shutil.which(full[0]) is None:  # prlimit would only end with a status of its own
            raise ProgramMissing(full)
        full = limits.around(full)
    return with_netns(full, netns)


def _kill_group(pid: int) -> None:
    # The leader is not reaped yet, so its number cannot mean another group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _outcome(argv: Sequence[str], returncode: int, out: bytes, err: bytes) -> bytes:
    if returncode != 0:
        raise ProgramFailed(argv, returncode, err.decode(errors="replace"))
    return out


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    input: bytes | None = None,  # noqa: A002 - the name subprocess uses
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    netns: str | None = None,
    user: tuple[int, int] | None = None,
    limits: Limits | None = None,
    pass_fds: Sequence[int] = (),
) -> bytes:
    """Run a program and return its standard output.

    ``timeout`` is in seconds; ``user`` is (uid, gid), without supplementary groups; ``pass_fds``
    keep their numbers.  Raises ProgramFailed, ProgramMissing or ProgramTimedOut.
    """
    full = _full_argv(argv, netns, user, limits)
    try:
        process = subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ProgramMissing(full) from error
    with process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            _kill_group(process.pid)
            raise ProgramTimedOut(full, timeout) from error
        except BaseException:
            _kill_group(process.pid)
            raise
    return _outcome(full, process.returncode, out, err)


async def _listen(
    process: asyncio.subprocess.Process,
    input: bytes | None,  # noqa: A002
    on_output: Callable[[bytes], None],
) -> tuple[bytes, bytes]:
    """What ``communicate`` does, telling of the output on the way."""
    stdout, stderr, stdin = process.stdout, process.stderr, process.stdin
    if stdout is None or stderr is None:
        raise AssertionError("program started without pipes")
    pieces: list[bytes] = []

    async def hear() -> None:
        while piece := await stdout.read(65536):
            pieces.append(piece)
            on_output(piece)

    async def tell() -> None:
        if stdin is not None:
            # A program need not want all of its input.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stdin.write(input or b"")
                await stdin.drain()
            stdin.close()

    _, err, _ = await asyncio.gather(hear(), stderr.read(), tell())
    await process.wait()
    return b"".join(pieces), err


async def run_async(
    argv: Sequence[str],
    *,
    timeout: float,
    input: bytes | None = None,  # noqa: A002 - the name subprocess uses
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    netns: str | None = None,
    user: tuple[int, int] | None = None,
    limits: Limits | None = None,
    pass_fds: Sequence[int] = (),
    on_output: Callable[[bytes], None] | None = None,
) -> bytes:
    """Like :func:`run`, without blocking the event loop; cancellation kills the program.

    ``on_output`` hears each piece of standard output as it comes, for programs that report how far
    they are; the whole is returned as well.
    """
    full = _full_argv(argv, netns, user, limits)
    try:
        process = await asyncio.create_subprocess_exec(
            *full,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ProgramMissing(full) from error
    try:
        async with asyncio.timeout(timeout):
            if on_output is None:
                out, err = await process.communicate(input)
            else:
                out, err = await _listen(process, input, on_output)
    except BaseException as error:
        _kill_group(process.pid)
        await process.wait()
        if isinstance(error, TimeoutError):
            raise ProgramTimedOut(full, timeout) from error
        raise
    if process.returncode is None:  # communicate() returns only after the end
        raise AssertionError("program ended without a status")
    return _outcome(full, process.returncode, out, err)
