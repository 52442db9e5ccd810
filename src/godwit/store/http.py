"""HTTP/1.1 as far as the store client needs it: one connection, and a small pool per endpoint.

Only what etcd's gateway and the store daemon send is understood: a status line, headers, and a
body with a length or in chunks (trailers are skipped; etcd sends one after errors).
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Final
from urllib.parse import unquote, urlsplit

from godwit.store.errors import StoreDenied, StoreRefused

# Judges the peer after the handshake; raises when it is not the store.
VerifyPeer = Callable[[ssl.SSLObject], object]
# Makes the socket, not yet connected, for a member's host: a lab's lies in another namespace.
MakeSocket = Callable[[str], socket.socket]

# A question that a member answers out of its own head: etcd's /health writes to the raft log.
HARMLESS: Final = "/version"

_LIMIT = 1 << 20
_MAX_BODY = 64 << 20
_MAX_IDLE = 8


class HttpError(ConnectionError):
    """The peer does not speak the HTTP we understand, or went away in mid answer."""


@dataclass(slots=True)
class Answer:
    """A status, and the body where it was asked for."""

    status: int
    body: bytes = b""


def _tune(sock: socket.socket) -> None:
    """Small writes leave at once, and a peer cut off the network is noticed in about 10 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000)


class Connection:
    """One kept-alive connection. After any failure or cancellation it is good for nothing."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host
        self._sock = writer.get_extra_info("socket")
        self.reused = False

    @property
    def alive(self) -> bool:
        """Whether the peer has not closed it. An idle one with something to read has ended."""
        reader = self._reader
        if self._writer.is_closing() or reader.at_eof() or reader.exception() is not None:
            return False
        # The loop may not have seen the end yet, and a write sent after it has an unknown outcome.
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    async def exchange(self, path: str, body: bytes | None, *, extra: str = "") -> Answer:
        """One request (POST, or GET without a body) and its whole answer."""
        answer, length = await self.begin(path, body, extra=extra)
        if length is None:
            answer.body = await self._chunks()
        elif length:
            answer.body = await self._reader.readexactly(length)
        return answer

    async def begin(
        self, path: str, body: bytes | None, *, extra: str = ""
    ) -> tuple[Answer, int | None]:
        """Send a request and read the head of its answer: the body's length, None for chunks."""
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self._host}\r\n{extra}"
        )
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode("ascii") + b"\r\n" + (body or b""))
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        status = _status(lines[0])
        length: int | None = 0
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            match name.lower():
                case b"content-length":
                    length = _length(value, base=10)
                case b"transfer-encoding" if value.strip().lower() == b"chunked":
                    length = None
                case b"connection" if value.strip().lower() == b"close":
                    self.reused = False
        return Answer(status), length

    async def _chunks(self) -> bytes:
        body = bytearray()
        while size := _length(await self._reader.readuntil(b"\r\n"), base=16):
            body += await self._reader.readexactly(size)
            if len(body) > _MAX_BODY:
                raise HttpError("the answer is too long")
            await self._reader.readexactly(2)
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return bytes(body)

    async def read_some(self) -> bytes:
        """Whatever arrives next, empty at the end. Cancelling loses nothing."""
        return await self._reader.read(1 << 16)

    def close(self) -> None:
        """Drop the connection at once, whatever is under way on it."""
        with contextlib.suppress(AttributeError):  # Python 3.11.2: a lost TLS transport
            self._writer.transport.abort()


def _status(line: bytes) -> int:
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
        raise HttpError("the peer does not speak HTTP/1.1")
    return int(parts[1])


def _length(text: bytes, *, base: int) -> int:
    try:
        length = int(text.split(b";", 1)[0].strip(), base)
    except ValueError as error:
        raise HttpError("the answer has no readable length") from error
    if not 0 <= length <= _MAX_BODY:
        raise HttpError("the answer is too long")
    return length


class ChunkedLines:
    """Cuts a chunked body into lines, fed with whatever bytes arrive.

    Chunk borders and line borders are independent of each other.
    """

    def __init__(self) -> None:
        self._raw = bytearray()
        self._line = bytearray()
        self.ended = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by ``data``."""
        self._raw += data
        lines: list[bytes] = []
        while not self.ended:
            border = self._raw.find(b"\r\n")
            if border < 0:
                break
            size = _length(bytes(self._raw[:border]), base=16)
            if size == 0:
                self.ended = True
                break
            if len(self._raw) < border + size + 4:
                break
            self._line += self._raw[border + 2 : border + 2 + size]
            del self._raw[: border + size + 4]
        *complete, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        lines.extend(bytes(line) for line in complete if line)
        return lines


@dataclass(slots=True)
class Endpoint:
    """Where one member listens, and its idle connections (last used first)."""

    url: str
    host: str
    port: int = 0
    unix_path: str = ""
    tls: ssl.SSLContext | None = None
    server_hostname: str = ""
    verify_peer: VerifyPeer | None = None
    make_socket: MakeSocket | None = None
    heard_at: float = -inf  # the loop's time when something last came from the member's process
    term: int = 0  # the newest raft term it has shown
    idle: list[Connection] = field(default_factory=list)

    async def acquire(self, *, fresh: bool = False) -> Connection:
        """A connection to send on. Raises OSError (SSLError among them) when there is none.

        With TLS 1.3 our handshake ends before the peer has judged our certificate, so a first
        harmless question goes ahead: no write is ever sent to a peer that may yet refuse us.
        """
        while self.idle and not fresh:
            connection = self.idle.pop()
            if connection.alive:
                connection.reused = True
                return connection
            connection.close()
        if self.unix_path:
            reader, writer = await asyncio.open_unix_connection(self.unix_path, limit=_LIMIT)
        else:
            reader, writer = await self._open()
            _tune(writer.get_extra_info("socket"))
        connection = Connection(reader, writer, self.host)
        if self.tls is not None:
            try:
                self._judge(writer)
                await connection.exchange(HARMLESS, None)
            except ConnectionResetError as error:
                connection.close()
                raise EOFError("hung up after the handshake") from error
            except BaseException:
                connection.close()
                raise
        return connection

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name = (self.server_hostname or self.host) if self.tls else None
        if self.make_socket is None:
            return await asyncio.open_connection(
                self.host, self.port, ssl=self.tls, server_hostname=name, limit=_LIMIT
            )
        sock = self.make_socket(self.host)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
            return await asyncio.open_connection(
                sock=sock, ssl=self.tls, server_hostname=name, limit=_LIMIT
            )
        except BaseException:
            sock.close()
            raise

    def heard(self) -> None:
        """Note that something has just come from the member."""
        self.heard_at = asyncio.get_running_loop().time()

    def silent_s(self) -> float:
        """Seconds since anything came from the member."""
        return asyncio.get_running_loop().time() - self.heard_at

    def _judge(self, writer: asyncio.StreamWriter) -> None:
        if self.verify_peer is None:
            return
        try:
            self.verify_peer(writer.get_extra_info("ssl_object"))
        except Exception as error:
            raise StoreDenied(f"{self.url} is not the store: {error}") from error

    def release(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        if connection.alive and len(self.idle) < _MAX_IDLE:
            self.idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Drop the idle connections."""
        for connection in self.idle:
            connection.close()
        self.idle.clear()


def parse_endpoint(
    url: str,
    *,
    tls: ssl.SSLContext | None = None,
    server_hostname: str = "",
    verify_peer: VerifyPeer | None = None,
    make_socket: MakeSocket | None = None,
) -> Endpoint:
    """``unix:/path``, ``https://host:port`` or, on loopback in tests, ``http://host:port``."""
    if url.startswith("unix:"):
        path = unquote(url.removeprefix("unix:").replace("//", "", 1))
        if not path.startswith("/"):
            raise StoreRefused(f"{url!r} is not a store address", hint="Use unix:/path.")
        return Endpoint(url, "localhost", unix_path=path)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port is None:
        raise StoreRefused(
            f"{url!r} is not a store address", hint="Use https://host:port or unix:/path."
        )
    if parts.scheme == "http":
        return Endpoint(url, parts.hostname, parts.port, make_socket=make_socket)
    if tls is None:
        raise StoreRefused(f"{url} needs a TLS context", hint="Pass ssl_context.")
    return Endpoint(
        url,
        parts.hostname,
        parts.port,
        tls=tls,
        server_hostname=server_hostname,
        verify_peer=verify_peer,
        make_socket=make_socket,
    )
