"""A proxy that understands the store's requests and does to each what a bad network may do.

::

    delay      the request, or its answer, arrives late
    drop       the connection breaks before the request is sent on: nothing is done
    unknown    the request is carried out, its answer is lost
    duplicate  the request is carried out twice (a middle box sent it again), the first answer told;
               a watch tells an event twice
    compact    the store forgets its history, and every watch is broken at that moment

It ends TLS itself, with the store's own certificate, so that it sees requests and not bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from godwit.store.client import StoreClient
from godwit.store.errors import StoreError

KINDS = ("delay", "drop", "unknown", "duplicate", "compact")
_LATE_S = 0.08
_UNTOUCHED = ("/version", "/health")


class FaultyProxy:
    """Stands before a store; ``chances`` says how likely each kind is for each request."""

    def __init__(
        self, target: str, *, tls: ssl.SSLContext | None, certificates: Path | None
    ) -> None:
        self.endpoint = ""
        self.chances: Mapping[str, float] = {}
        self.done: Counter[str] = Counter()
        self.random = random.Random(1)
        self._target = target
        self._tls = tls if target.startswith("https") else None
        self._certificates = certificates
        self._server: asyncio.Server | None = None
        self._direct = StoreClient([target], ssl_context=tls)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        context = None
        if self._tls is not None:
            assert self._certificates is not None
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificates / "cert.pem", self._certificates / "key.pem")
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=context)
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"{'https' if context else 'http'}://127.0.0.1:{port}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._direct.aclose()

    # Connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError):
                far = await self._dial()
                try:
                    while await self._one(reader, writer, far):
                        pass
                finally:
                    far[1].transport.abort()
        except asyncio.CancelledError:
            pass  # the proxy is being closed; nobody waits for a connection's end
        finally:
            self._watching.discard(writer)
            self._tasks.discard(task)
            with contextlib.suppress(AttributeError):
                writer.transport.abort()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._target.startswith("unix:"):
            path = self._target.removeprefix("unix:")
            return await asyncio.open_unix_connection(path, limit=1 << 20)
        parts = urlsplit(self._target)
        name = parts.hostname if self._tls else None
        return await asyncio.open_connection(
            parts.hostname, parts.port, ssl=self._tls, server_hostname=name, limit=1 << 20
        )

    def _strikes(self, kind: str) -> bool:
        hit = self.random.random() < self.chances.get(kind, 0.0)
        self.done[kind] += hit
        return hit

    async def _one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> bool:
        """One request and its answer; False when the connection is to end."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_length(head))
        path = head.split(b" ", 2)[1].decode()
        if path == "/v3/watch":
            await self._watch(head + body, writer, far)
            return False
        if path in _UNTOUCHED:
            writer.write(await _ask(far, head + body))
            return True
        if self._strikes("compact"):
            await self._forget()
        if self._strikes("delay"):
            await asyncio.sleep(self.random.uniform(0, _LATE_S))
        if self._strikes("drop"):
            return False
        answer = await _ask(far, head + body)
        if self._strikes("duplicate"):
            await _ask(far, head + body)
        if self._strikes("delay"):
            await asyncio.sleep(self.random.uniform(0, _LATE_S))
        if self._strikes("unknown"):
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _forget(self) -> None:
        with contextlib.suppress(StoreError):  # two at a time: the second finds it done
            await self._direct.compact((await self._direct.status()).revision)
        for writer in list(self._watching):
            writer.transport.abort()

    async def _watch(
        self,
        request: bytes,
        writer: asyncio.StreamWriter,
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Relay a stream of lines; some come late, some twice, and it breaks now and then."""
        near, out = far
        out.write(request)
        writer.write(await near.readuntil(b"\r\n\r\n"))
        self._watching.add(writer)
        while True:
            size = await near.readuntil(b"\r\n")
            chunk = size + await near.readexactly(int(size.split(b";")[0], 16) + 2)
            if self._strikes("drop"):
                return
            if self._strikes("delay"):
                await asyncio.sleep(self.random.uniform(0, _LATE_S))
            writer.write(chunk)
            message = chunk[len(size) : -2]  # etcd sends the end of its line as a chunk of its own
            whole = message.rstrip().startswith(b"{") and message.rstrip().endswith(b"}}")
            if b'"events"' in message and whole and self._strikes("duplicate"):
                line = message if message.endswith(b"\n") else b"\n" + message
                writer.write(b"%x\r\n%b\r\n" % (len(line), line))
            await writer.drain()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _ask(far: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> bytes:
    """The whole answer to a request, with a length or in chunks, as it came."""
    reader, writer = far
    writer.write(request)
    answer = await reader.readuntil(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in answer.lower():
        return answer + await reader.readexactly(_length(answer))
    while True:
        size = await reader.readuntil(b"\r\n")
        answer += size
        count = int(size.split(b";")[0], 16)
        if count == 0:
            break
        answer += await reader.readexactly(count + 2)
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        answer += line
    return answer + b"\r\n"
