"""The daemon's side of `remote_child`: questions to a storage server, each with a time-out.

A child that does not answer in time is killed and another one is started for the next question:
whatever libnfs or the kernel does with a server that is gone, only the child waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from godwit.host.errors import ProcessGone, ProgramMissing
from godwit.host.process import Process, kill, spawn, wait_exit

ASK_S: Final = 10.0
"""Seconds for one question about names, sizes or a small file."""
IDLE_S: Final = 30.0
"""Seconds after which a child that nobody asks is let go."""
_LONGEST_ANSWER: Final = 4 << 20
_MODULE: Final = "godwit.storage.remote_child"
_REAPERS: Final[set[asyncio.Task[int | None]]] = set()


@dataclass(frozen=True, slots=True)
class Server:
    """Whom a child talks to, and as whom. Without ``export`` it knows only LUNs and directories."""

    address: str = ""
    export: str = ""
    user: tuple[int, int] | None = None

    def argv(self, *words: str) -> list[str]:
        """The command line of a child."""
        user = f"{self.user[0]}:{self.user[1]}" if self.user else ""
        given = [("--user", user), ("--server", self.address), ("--export", self.export)]
        options = [f"{name}={value}" for name, value in given if value]
        return [sys.executable, "-I", "-m", _MODULE, *options, *words]


class Child:
    """One helper process, started at the first question. Belongs to one event loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def ask(self, op: str, *, timeout: float = ASK_S, **words: Any) -> Any:
        """The answer; an ``OSError`` of its kind otherwise, TimeoutError when none came in time.

        What a question without an answer has changed is not known.
        """
        try:
            async with asyncio.timeout(timeout), self._turn:
                answer = await self._asked({"op": op, **words})
        except TimeoutError:
            where = self._server.address or words.get("portal") or words.get("path") or "it"
            raise TimeoutError(
                errno.ETIMEDOUT, f"{where} does not answer within {timeout:g} s"
            ) from None
        if "errno" in answer:
            raise OSError(int(answer["errno"]), str(answer["error"]))
        return answer["ok"]

    async def _asked(self, question: Mapping[str, Any]) -> dict[str, Any]:
        whole = False
        try:
            reader, writer = await self._running()
            writer.write(json.dumps(question).encode() + b"\n")
            line = await reader.readline()
            whole = line.endswith(b"\n")
        except (ConnectionError, ProgramMissing) as error:
            raise OSError(errno.EIO, f"the helper process failed: {error}") from error
        finally:
            if not whole:
                self.close()  # cut off in a question: it would answer the next one wrongly
        if not whole:
            raise OSError(errno.EIO, "the helper process ended")
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.close)
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def _running(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._idle is not None:
            self._idle.cancel()
        if self._streams is None:
            ours, theirs = socket.socketpair()
            with theirs:
                descriptor = theirs.fileno()
                try:
                    self._process = spawn(
                        self._server.argv(), stdin=descriptor, stdout=descriptor, env=_ENV
                    )
                except BaseException:
                    ours.close()
                    raise
            self._streams = await asyncio.open_connection(sock=ours, limit=_LONGEST_ANSWER)
        return self._streams

    def close(self) -> None:
        """End the child; the next question starts another one."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        streams, self._streams = self._streams, None
        process, self._process = self._process, None
        if streams is not None:
            streams[1].close()
        if process is not None:
            kill(process)
            _reap(process)


_ENV: Final = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class Transfer:
    """The bulk of a file on its way to or from a server, in a child of its own."""

    def __init__(self, process: Process, said: int) -> None:
        self._process = process
        self._said = said
        self._end = asyncio.create_task(wait_exit(process), name=f"transfer {process.pid}")

    @classmethod
    def push(cls, server: Server, path: str, source: int) -> Transfer:
        """From a descriptor into a new file, which is whole and on the medium at the end."""
        return cls._start(server, "push", path, stdin=source)

    @classmethod
    def pull(cls, server: Server, path: str, target: int) -> Transfer:
        """From a file into a descriptor."""
        return cls._start(server, "pull", path, stdout=target)

    @classmethod
    def _start(
        cls,
        server: Server,
        what: str,
        path: str,
        *,
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> Transfer:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            argv = server.argv(f"--once={what}", f"--path={path}")
            process = spawn(argv, stdin=stdin, stdout=stdout, stderr=writing, env=_ENV)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return cls(process, reading)

    async def done(self, *, timeout: float) -> None:
        """Wait for its end; OSError when it failed, TimeoutError when it took too long."""
        finished, _ = await asyncio.wait({self._end}, timeout=timeout)
        if not finished:
            self.stop()
            raise TimeoutError(errno.ETIMEDOUT, f"the server took longer than {timeout:g} s")
        said = self._words()
        if self._end.result() == 0:
            return
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(said.splitlines()[-1] if said else b"{}")
            raise OSError(int(found["errno"]), str(found["error"]))
        raise OSError(errno.EIO, said.decode(errors="replace").strip()[-300:] or "it was ended")

    def stop(self) -> None:
        """End it, however far it is."""
        if not self._end.done():
            kill(self._process)
            _REAPERS.add(self._end)
            self._end.add_done_callback(_REAPERS.discard)
        self._words()

    def _words(self) -> bytes:
        descriptor, self._said = self._said, -1
        if descriptor < 0:
            return b""
        os.set_blocking(descriptor, False)
        try:
            return os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return b""
        finally:
            os.close(descriptor)


def _reap(process: Process) -> None:
    with contextlib.suppress(ProcessGone):
        task = asyncio.create_task(wait_exit(process), name=f"helper {process.pid}: end")
        _REAPERS.add(task)
        task.add_done_callback(_REAPERS.discard)
