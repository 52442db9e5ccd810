"""Marks in volumes that are directories: written by each host, looked for by the others, locked.

A mark is a small hidden file, ``.godwit-validate.RUN.HOST``, whose contents follow from its name.
The lock on it is the one that QEMU takes on an image that a guest may write to. Every look happens
in a thread of its own with a deadline: a dead server must not hold the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from godwit.model.base import check_name
from godwit.model.validation_facts import FilesAsk, FilesSeen, LocksSeen, VolumeSeen

T = TypeVar("T")
PREFIX = ".godwit-validate"
LOOK_S = 10.0
HELD_S = 60.0
# QEMU says that nobody else may write to an image by a shared lock on its byte 201; whoever is
# about to write asks whether an exclusive one could be had there (block/file-posix.c, and seen).
_WRITE_BYTE = 201
_FLOCK = struct.Struct("hhxxxxqqixxxx")
_SIZE = 1 << 16


class Marks:
    """The marks of one host. Belongs to the agent's event loop."""

    def __init__(self, host: str, root: Path) -> None:
        self._host = host
        self._root = root
        self._locked: dict[str, list[int]] = {}  # run -> descriptors that hold its locks
        self._busy: set[str] = set()  # volumes where an earlier look still hangs

    async def write(self, ask: FilesAsk) -> FilesSeen:
        """Write this host's mark into every volume, durably, and read it back."""
        found = []
        for volume in ask.volumes:
            began = time.monotonic()
            wrong = await self._look(volume, partial(self._write, ask.run, volume))
            spent = time.monotonic() - began
            found.append(
                VolumeSeen(
                    volume=volume, host=self._host, wrong=wrong, write_s=None if wrong else spent
                )
            )
        return FilesSeen(volumes=tuple(found))

    async def read(self, ask: FilesAsk) -> FilesSeen:
        """Look for the marks of those hosts in every volume."""
        found = []
        for volume in ask.volumes:
            unread = {}
            for host in ask.hosts:
                why = await self._look(
                    volume, partial(_check, self._mark(ask.run, volume, host), ask.run, host)
                )
                if why:
                    unread[host] = why
            found.append(VolumeSeen(volume=volume, host=self._host, unread=unread))
        return FilesSeen(volumes=tuple(found))

    async def lock(self, ask: FilesAsk) -> LocksSeen:
        """Lock this host's marks as QEMU locks an image, until `clear`, a minute at the most."""
        said = {}
        for volume in ask.volumes:
            said[volume] = await self._look(volume, partial(self._lock, ask.run, volume))
        asyncio.get_running_loop().call_later(HELD_S, self._unlock, ask.run)
        return LocksSeen(volumes=said)

    async def observe(self, ask: FilesAsk) -> LocksSeen:
        """Whether the lock that the first of ``hosts`` holds is seen here; empty where it is."""
        holder = ask.hosts[0]
        said = {}
        for volume in ask.volumes:
            mark = self._mark(ask.run, volume, holder)
            said[volume] = await self._look(volume, partial(_observe, mark))
        return LocksSeen(volumes=said)

    async def clear(self, ask: FilesAsk) -> None:
        """Let go of the locks and take this host's marks away, also those of earlier runs."""
        self._unlock(ask.run)
        for volume in ask.volumes:
            await self._look(volume, partial(self._clear, volume))

    def _mark(self, run: str, volume: str, host: str) -> Path:
        return self._root / volume / f"{PREFIX}.{check_name(run)}.{check_name(host)}"

    def _write(self, run: str, volume: str) -> str:
        self._clear(volume)
        mark = self._mark(run, volume, self._host)
        descriptor = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content(run, self._host))
            file.flush()
            os.fsync(file.fileno())
        return _check(mark, run, self._host)

    def _clear(self, volume: str) -> str:
        for old in (self._root / volume).glob(f"{PREFIX}.*.{self._host}"):
            old.unlink(missing_ok=True)
        return ""

    def _lock(self, run: str, volume: str) -> str:
        mark = self._mark(run, volume, self._host)
        descriptor = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK))
        except BaseException:
            os.close(descriptor)
            raise
        self._locked.setdefault(run, []).append(descriptor)
        return ""

    def _unlock(self, run: str) -> None:
        for descriptor in self._locked.pop(run, ()):
            os.close(descriptor)

    async def _look(self, volume: str, work: Callable[[], str]) -> str:
        """What ``work`` says, or what stood in its way; empty is good."""
        if volume in self._busy:
            return "an earlier look at it still hangs"
        self._busy.add(volume)
        try:
            return await in_thread(work, LOOK_S, done=lambda: self._busy.discard(volume))
        except TimeoutError:
            return f"no answer within {LOOK_S:g} s"
        except FileNotFoundError as error:
            return f"{error.filename} is not there"
        except OSError as error:
            return f"{error.strerror or error} ({error.filename or volume})"


def content(run: str, host: str) -> bytes:
    """What the mark of a host holds in that run: 64 KiB that no other mark holds."""
    seed = hashlib.sha256(f"{run}/{host}".encode()).digest()
    return seed * (_SIZE // len(seed))


def _check(mark: Path, run: str, host: str) -> str:
    descriptor = os.open(mark, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = file.read(_SIZE + 1)
    if found == content(run, host):
        return ""
    return f"{mark.name} has {len(found)} bytes, not those that were written"


def _flock(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, _WRITE_BYTE, 1, 0)


def _observe(mark: Path) -> str:
    descriptor = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
    finally:
        os.close(descriptor)
    return "the image looks free" if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK else ""


async def in_thread(work: Callable[[], T], timeout: float, *, done: Callable[[], None]) -> T:
    """Run something that may hang; TimeoutError when it does. ``done`` is called when it ended,
    however late. The thread is a daemon: it does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        done()
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: T | None = None
        caught: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            caught = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, result, caught)

    threading.Thread(target=run, name="volume look", daemon=True).start()
    return await asyncio.wait_for(future, timeout)
