"""Does this host reach a volume, right now? A real write and read, by a process that may hang.

A file system whose server is gone blocks whoever touches it in the kernel, where no timeout and
no signal reaches. So the touching is done by a child (`godwit.storage.path_child`); one that does
not answer is killed and left behind, and no other is started until it is gone: its end is the
news that the path failed at last or is back.

``PROBERS`` has one kind of prober for each kind of volume.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from godwit.host.errors import ProgramMissing
from godwit.host.process import Process, kill, spawn, wait_exit
from godwit.model.base import Record
from godwit.model.errors import InvalidRequest
from godwit.model.volume import SERVED, Volume
from godwit.storage.places import Access

START_S: Final = 10.0


class PathProbe(Record):
    """What one look at a volume found. Sizes in bytes.

    ``hung``: there was no answer in time. ``firm`` False: perhaps because this machine was slow
    and not the path. ``identity`` names the volume itself, so that an empty mount point, or
    another file system in its place, is not taken for it.
    """

    ok: bool
    reason: str = ""
    capacity_bytes: int | None = None
    used_bytes: int | None = None
    identity: str = ""
    hung: bool = False
    firm: bool = True


class Prober(Protocol):
    """Looks at one volume, again and again."""

    async def probe(self, timeout: float, *, identity: str = "") -> PathProbe:
        """One look, answered within ``timeout`` seconds; ``identity``: which volume it must be."""
        ...

    async def close(self) -> None:
        """End what was started for it."""
        ...


class DirProber:
    """Looks at a directory; ``host`` names this host's own file in there."""

    def __init__(self, place: Path, host: str) -> None:
        self._place = place
        self._host = host
        self._process: Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._leaving: asyncio.Task[int | None] | None = None

    async def probe(self, timeout: float, *, identity: str = "") -> PathProbe:
        """See `Prober`."""
        if self._leaving is not None and not await self._left(timeout):
            return PathProbe(ok=False, hung=True, reason=f"{self._place} hangs")
        try:
            if self._process is None:
                await self._start()
        except (ProgramMissing, OSError, TimeoutError) as error:
            await self._end()
            why = f"nobody could look at {self._place}: {error}"
            return PathProbe(ok=False, firm=False, reason=why)
        return await self._ask(timeout, identity)

    async def _ask(self, timeout: float, identity: str) -> PathProbe:
        assert self._reader is not None  # noqa: S101 - narrows for the type checker
        assert self._writer is not None  # noqa: S101
        begun = False
        try:
            self._writer.write(f"{identity or '-'}\n".encode())
            async with asyncio.timeout(timeout):
                begun = await self._reader.readline() == b"begun\n"
                answer = json.loads(await self._reader.readline())
        except TimeoutError:
            await self._end()
            why = f"{self._place} did not answer within {timeout:g} s"
            return PathProbe(ok=False, hung=True, firm=begun, reason=why)
        except (OSError, ValueError):
            await self._end()
            return PathProbe(ok=False, firm=False, reason=f"looking at {self._place} ended early")
        except BaseException:
            await self._end()
            raise
        return PathProbe(
            ok=answer["ok"],
            reason=answer.get("reason", ""),
            capacity_bytes=answer.get("capacity"),
            used_bytes=answer.get("used"),
            identity=answer.get("identity", ""),
        )

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            argv = (sys.executable, "-I", "-m", "godwit.storage.path_child")
            plug = theirs.fileno()
            try:
                self._process = spawn(
                    [*argv, str(self._place), self._host], stdin=plug, stdout=plug
                )
            except BaseException:
                ours.close()
                raise
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        async with asyncio.timeout(START_S):
            if await self._reader.readline() != b"ready\n":
                raise OSError("it ended at once")

    async def _end(self) -> None:
        """Kill the child and wait for its end elsewhere, however long the kernel holds it."""
        process, self._process = self._process, None
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        if process is not None:
            kill(process)
            self._leaving = asyncio.create_task(wait_exit(process), name=f"probe {self._place}")

    async def _left(self, timeout: float) -> bool:
        if self._leaving is not None:
            done, _ = await asyncio.wait({self._leaving}, timeout=timeout)
            if not done:
                return False
            self._leaving = None
        return True

    async def close(self) -> None:
        """See `Prober`."""
        await self._end()
        if not await self._left(0.5) and self._leaving is not None:
            self._leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._leaving


Maker = Callable[[Volume, Path, str, Access], Prober]


def _directory(volume: Volume, root: Path, host: str, _access: Access) -> Prober:
    return DirProber(root / volume.name, host)


def _served(volume: Volume, _root: Path, host: str, access: Access) -> Prober:
    from godwit.storage.served_paths import ServedProber  # it answers in our words

    return ServedProber(volume, access, host)


PROBERS: dict[str, Maker] = {
    "dir": _directory,
    "local": _directory,
    **dict.fromkeys(SERVED, _served),
}
"""Kind of volume -> what looks at one, given all volumes' root, our name and who we are there."""


def prober(
    volume: Volume,
    *,
    root: Path,
    host: str,
    access: Access | None = None,
    kinds: Mapping[str, Maker] = PROBERS,
) -> Prober:
    """What looks at this volume; InvalidRequest for a kind that nobody knows."""
    make = kinds.get(volume.kind)
    if make is None:
        raise InvalidRequest(f"nobody can look at a volume of kind {volume.kind}", hint="update")
    return make(volume, root, host, access or Access())


async def probe(
    volume: Volume, timeout: float, *, root: Path, host: str, access: Access | None = None
) -> PathProbe:
    """Look once, with a process of its own."""
    one = prober(volume, root=root, host=host, access=access)
    try:
        return await one.probe(timeout)
    finally:
        await one.close()
