"""Starts long-lived processes, knows them again after a restart, and hears of their end.

A process is named by its number *and* its start time, because numbers are used again.  Ends are
heard through a pidfd, which works for children and for adopted processes alike.  Only a child
has an exit status that we can read; for an adopted process the end is all one learns.

Whoever spawns a process awaits :func:`wait_exit` once, else a dead child stays a zombie.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from godwit.host.errors import ProcessGone, ProgramMissing

Stream = int | Path | None

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """Identity of one process: its number, and its start in clock ticks since boot."""

    pid: int
    start_time: int


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from ``state`` (field 3) on; the name before may hold spaces."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} has ended") from error
    return text[text.rindex(")") + 2 :].split()


def identify(pid: int) -> Process | None:
    """The identity of whatever has this number now, None when nothing has."""
    try:
        return Process(pid, int(_stat_fields(pid)[19]))
    except ProcessGone:
        return None


def is_same(pid: int, start_time: int) -> bool:
    """Whether this number still means the process that started at ``start_time``."""
    return identify(pid) == Process(pid, start_time)


def is_alive(process: Process) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        fields = _stat_fields(process.pid)
    except ProcessGone:
        return False
    return int(fields[19]) == process.start_time and fields[0] not in "ZX"


def is_stopped(process: Process) -> bool:
    """Whether the process is stopped by a signal (``T``)."""
    try:
        fields = _stat_fields(process.pid)
    except ProcessGone:
        return False
    return int(fields[19]) == process.start_time and fields[0] in "Tt"


def stands_still(process: Process) -> bool:
    """Whether every thread of the process is stopped by a signal, or it has ended."""
    try:
        states = [_thread_state(process.pid, thread) for thread in thread_ids(process.pid)]
    except ProcessGone:
        return True
    return all(state in "TtZX" for state in states)


def _thread_state(pid: int, thread: int) -> str:
    try:
        text = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X"
    return text[text.rindex(")") + 2]


def _open_stream(stream: Stream, flags: int) -> tuple[int, bool]:
    """A descriptor for a stream, and whether we opened it."""
    if isinstance(stream, int):
        return stream, False
    return os.open(stream or os.devnull, flags | os.O_CLOEXEC, 0o640), True


def as_user(argv: Sequence[str], user: tuple[int, int], groups: Sequence[int]) -> list[str]:
    """The command that becomes a user and then, in the same process, ``argv``.

    ``user`` is (uid, gid), ``groups`` its only supplementary groups; no
    capability survives the exec.  Raises ProgramMissing.  Popen can change the user itself, but
    only by a fork that copies our page tables: 10 ms for a daemon of 90 MiB, where this costs 1 ms.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise ProgramMissing(argv)
    only = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return [
        *("setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", only, "--inh-caps=-all"),
        *("--", program, *argv[1:]),
    ]


def spawn(
    argv: Sequence[str],
    *,
    user: tuple[int, int] | None = None,
    groups: Sequence[int] = (),
    pass_fds: Sequence[int] = (),
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    new_session: bool = True,
    umask: int = -1,
) -> Process:
    """Start a process that outlives this call, and perhaps this daemon.

    ``user`` is (uid, gid); ``groups`` are its only supplementary groups.  ``pass_fds`` keep
    their numbers.  A stream is a descriptor, a path (output is appended) or None: /dev/null.
    Raises ProgramMissing, or OSError when the kernel refuses.  With ``user``, a program that
    exists but may not be run by that user ends at once with a status other than 0.
    """
    command = list(argv) if user is None else as_user(argv, user, groups)
    with contextlib.ExitStack() as opened:
        descriptors = []
        writing = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for stream, flags in ((stdin, os.O_RDONLY), (stdout, writing), (stderr, writing)):
            descriptor, ours = _open_stream(stream, flags)
            if ours:
                opened.callback(os.close, descriptor)
            descriptors.append(descriptor)
        try:
            child = subprocess.Popen(
                command,
                stdin=descriptors[0],
                stdout=descriptors[1],
                stderr=descriptors[2],
                cwd=cwd,
                env=None if env is None else dict(env),
                pass_fds=tuple(pass_fds),
                start_new_session=new_session,
                umask=umask,
            )
        except FileNotFoundError as error:
            if cwd is not None and not Path(cwd).is_dir():
                raise
            raise ProgramMissing(argv) from error
    # Popen would warn of, and later reap, a child it believes to be its own.  Reaping belongs to
    # wait_exit(), so the object is told that it has nothing left to wait for.
    child.returncode = 0
    identity = identify(child.pid)
    if identity is None:  # even a dead child stays visible until it is reaped
        raise ProcessGone(f"{argv[0]}: reaped by someone else")
    return identity


def open_pidfd(process: Process) -> int:
    """A pidfd for exactly this process; the caller closes it.  Raises ProcessGone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError as error:
        raise ProcessGone(f"process {process.pid} has ended") from error
    # Checked after opening: the descriptor cannot come to mean another process any more.
    if not is_same(process.pid, process.start_time):
        os.close(descriptor)
        raise ProcessGone(f"process {process.pid} has ended and its number is in use again")
    return descriptor


def send_signal(process: Process, number: int) -> bool:
    """Send a signal to exactly this process; False when it has ended."""
    try:
        descriptor = open_pidfd(process)
    except ProcessGone:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def kill(process: Process) -> bool:
    """Kill the process at once (SIGKILL); False when it has ended already."""
    return send_signal(process, signal.SIGKILL)


def freeze(process: Process) -> bool:
    """Stop all threads of the process (SIGSTOP); False when it has ended."""
    return send_signal(process, signal.SIGSTOP)


def thaw(process: Process) -> bool:
    """Let a stopped process go on (SIGCONT); False when it has ended."""
    return send_signal(process, signal.SIGCONT)


def _reap(descriptor: int) -> int | None:
    """The exit status (negative: signal) when the process was our child, else None."""
    try:
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


async def wait_readable(descriptor: int) -> None:
    """Wait until a descriptor becomes readable; leaves no reader behind when cancelled."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def wait_exit(process: Process) -> int | None:
    """Wait for the end of a process, child or not, and reap it if it was our child.

    Returns the exit status (negative: killed by that signal), None for a process that is not
    our child or whose status another waiter took.  Cancelling it leaves the process alone.
    """
    try:
        descriptor = open_pidfd(process)
    except ProcessGone:
        return None
    try:
        await wait_readable(descriptor)
        return _reap(descriptor)
    finally:
        os.close(descriptor)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process in bytes.  Raises ProcessGone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} has ended") from error


def cpu_seconds(pid: int) -> float:
    """Processor time used by all threads of a process so far.  Raises ProcessGone."""
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def thread_ids(pid: int) -> tuple[int, ...]:
    """Thread numbers of a process, in our PID namespace.  Raises ProcessGone."""
    try:
        return tuple(sorted(int(entry) for entry in os.listdir(f"/proc/{pid}/task")))  # noqa: PTH208
    except FileNotFoundError as error:
        raise ProcessGone(f"process {pid} has ended") from error
