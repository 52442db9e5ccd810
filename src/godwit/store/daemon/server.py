"""HTTP/1.1 as far as the daemon serves it: kept-alive connections, sized bodies, streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from godwit.store.codec import dump
from godwit.store.daemon import messages
from godwit.store.daemon.gateway import Gateway, WatchStream
from godwit.store.engine import EngineError

_MAX_HEAD = 16 << 10
_MAX_BODY = 8 << 20
_REASON = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    411: "Length Required",
    412: "Precondition Failed",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
}
# The cluster's authority signs other certificates too: that of the migration stream lies where
# QEMU's own user can read it, and must open nothing but a stream.
ROLES = ("host", "manager", "store")
_log = logging.getLogger("store")


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket, and the TLS context its connections need (None on a unix socket)."""

    sock: socket.socket
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True)
class Request:
    """One request."""

    method: str
    path: str
    body: bytes
    keep: bool


class BadHttp(Exception):
    """A request we do not read on from."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ToldHandshake(ssl.SSLObject):
    """A connection's TLS: says why it let somebody not in, which asyncio keeps to itself."""

    def do_handshake(self) -> None:
        """As ever, with a line in the log when it fails."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            _log.warning("refused a connection: %s", reason)
            raise


def objection(ssl_object: ssl.SSLObject | None, revoked: frozenset[int] = frozenset()) -> str:
    """Why this peer may not use the store, empty when it may: its verified certificate has to name
    one of ``ROLES`` and not to be revoked; a unix socket needs none."""
    if ssl_object is None:
        return ""
    certificate: dict[str, Any] = ssl_object.getpeercert() or {}
    names: list[tuple[str, str]] = list(certificate.get("subjectAltName", ()))
    uris = [value for kind, value in names if kind == "URI"]
    if not any(uri.startswith(f"godwit://{role}/") for uri in uris for role in ROLES):
        return "a certificate without a role that may use the store"
    if revoked and int(certificate.get("serialNumber", "0"), 16) in revoked:
        return f"{', '.join(uris)}: its certificate was revoked"
    return ""


class Server:
    """Serves one gateway on any number of listeners."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.StreamWriter] = set()
        self._streams: set[WatchStream] = set()
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._closing = False
        self._revoked: frozenset[int] = frozenset()

    def expel(self, revoked: frozenset[int]) -> None:
        """From now on these certificates (by serial number) count no more; hang up on them."""
        self._revoked = revoked
        for writer in list(self._connections):
            if why := objection(writer.get_extra_info("ssl_object"), revoked):
                _log.warning("hang up on %s", why)
                with contextlib.suppress(AttributeError):  # Python 3.11.2: a lost TLS transport
                    writer.transport.abort()

    async def start(self, listeners: Sequence[Listener]) -> None:
        """Begin to accept."""
        for listener in listeners:
            if listener.sock.family == socket.AF_UNIX:
                server = await asyncio.start_unix_server(
                    self._serve, sock=listener.sock, limit=_MAX_HEAD
                )
            else:
                server = await asyncio.start_server(
                    self._serve, sock=listener.sock, ssl=listener.tls, limit=_MAX_HEAD
                )
            self._servers.append(server)

    async def close(self, *, grace_s: float) -> None:
        """Stop accepting, end the watches, let requests under way finish, hang up."""
        self._closing = True
        for server in self._servers:
            server.close()
        for stream in self._streams:
            stream.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._quiet.wait()
        for writer in list(self._connections):
            with contextlib.suppress(AttributeError):  # Python 3.11.2: a lost TLS transport
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end. Never raises: what a peer does is no fault of ours."""
        self._connections.add(writer)
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client cut off the network is forgotten, and with it its watches.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
        try:
            if why := objection(writer.get_extra_info("ssl_object"), self._revoked):
                _log.warning("refused %s", why)
                return
            while not self._closing and await self._one(reader, writer):
                pass
        except BadHttp as error:
            body = dump({"error": str(error), "message": str(error), "code": 3})
            writer.write(_head(error.status, len(body), keep=False) + body)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        except Exception:
            _log.exception("a request failed")
        finally:
            self._connections.discard(writer)
            with contextlib.suppress(OSError):
                writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await read_request(reader, writer)
        if request is None:
            return False
        if request.path == "/v3/watch" and request.method == "POST":
            await self._stream(request, reader, writer)
            return False
        self._busy += 1
        self._quiet.clear()
        try:
            status, body = await self._gateway.answer(request.method, request.path, request.body)
            writer.write(_head(status, len(body), keep=request.keep) + body)
            await writer.drain()
        finally:
            self._busy -= 1
            if not self._busy:
                self._quiet.set()
        return request.keep

    async def _stream(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            stream = self._gateway.subscribe(request.body)
        except EngineError as error:
            status, reply = messages.failure(error)
            body = dump(reply)
            writer.write(_head(status, len(body), keep=False) + body)
            return
        self._streams.add(stream)
        # The client says no more on this connection; a byte or the end both close the watch.
        gone = asyncio.create_task(reader.read(1), name="store-watch-client")

        def hang_up(task: asyncio.Task[bytes]) -> None:
            if not task.cancelled():
                task.exception()  # a broken connection is an end like any other
            stream.close()

        gone.add_done_callback(hang_up)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            async with contextlib.aclosing(stream.lines()) as lines:
                async for line in lines:
                    writer.write(b"%x\r\n%b\r\n" % (len(line), line))
                    await writer.drain()
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self._streams.discard(stream)
            gone.cancel()


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Request | None:
    """The next request of a connection, None at its end. Raises BadHttp."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError as error:
        raise BadHttp(431, "the head of the request is too long") from error
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadHttp(400, "not an HTTP/1.1 request")
    length, keep = 0, parts[2] != "HTTP/1.0"
    for line in lines:
        name, _, value = line.partition(":")
        match name.lower():
            case "content-length":
                if not value.strip().isdecimal():
                    raise BadHttp(400, "unreadable Content-Length")
                length = int(value)
            case "transfer-encoding":
                raise BadHttp(411, "bodies need a Content-Length")
            case "connection":
                keep = keep and value.strip().lower() != "close"
            case "expect":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if length > _MAX_BODY:
        raise BadHttp(413, f"the body is longer than {_MAX_BODY} bytes")
    body = await reader.readexactly(length) if length else b""
    return Request(parts[0], parts[1].partition("?")[0], body, keep)


def _head(status: int, length: int, *, keep: bool) -> bytes:
    text = (
        f"HTTP/1.1 {status} {_REASON.get(status, 'Error')}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
    )
    return (text + ("\r\n" if keep else "Connection: close\r\n\r\n")).encode("ascii")
