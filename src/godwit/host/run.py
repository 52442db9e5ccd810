"""Runs a program to its end and returns what it printed.

Never a shell: the argument vector is given as a list.  Secrets go in through ``input`` or a
descriptor, never through ``argv``, so errors may show the whole command.  A program that
overstays its time, or whose caller is cancelled, is killed together with its process group:
nothing that it started stays behind unless it made a session of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from godwit.host.errors import ProgramFailed, ProgramMissing, ProgramTimedOut

NETNS_DIRECTORY = "/run/netns"


def netns_path(netns: str) -> str:
    """Path of a network namespace given by name, or by path when it holds a slash."""
    return netns if "/" in netns else f"{NETNS_DIRECTORY}/{netns}"


def with_netns(argv: Sequence[str], netns: str | None) -> list[str]:
    """The argument vector that runs ``argv`` in a network namespace (None: in ours)."""
    if netns is None:
        return list(argv)
    return ["nsenter", f"--net={netns_path(netns)}", "--", *argv]


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
) -> bytes:
    """Run a program and return its standard output.

    ``timeout`` is in seconds.  Raises ProgramFailed, ProgramMissing or ProgramTimedOut.
    """
    full = with_netns(argv, netns)
    try:
        process = subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
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


async def run_async(
    argv: Sequence[str],
    *,
    timeout: float,
    input: bytes | None = None,  # noqa: A002 - the name subprocess uses
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    netns: str | None = None,
) -> bytes:
    """Like :func:`run`, without blocking the event loop; cancellation kills the program."""
    full = with_netns(argv, netns)
    try:
        process = await asyncio.create_subprocess_exec(
            *full,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ProgramMissing(full) from error
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate(input)
    except BaseException as error:
        _kill_group(process.pid)
        await process.wait()
        if isinstance(error, TimeoutError):
            raise ProgramTimedOut(full, timeout) from error
        raise
    if process.returncode is None:  # communicate() returns only after the end
        raise AssertionError("program ended without a status")
    return _outcome(full, process.returncode, out, err)
