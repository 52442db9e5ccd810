"""One HTTP/1.1 connection that is kept open: one exchange at a time, as few wake-ups as possible.

    idle -> exchange() -> whole answer                      -> idle
    idle -> begin() -> head -> chunks() ... -> end of body  -> idle

An exchange that does not end (deadline, cancel, broken answer) leaves the connection unusable:
`abort` it. h11 holds the protocol's rules; this file holds the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import h11

BODY_LIMIT = 64 * 1024 * 1024
_AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: on, 0 s
_BUFFER_HIGH, _BUFFER_LOW = 1024 * 1024, 256 * 1024

Headers = list[tuple[bytes, bytes]]


class ConnectionBroken(Exception):
    """The connection ended or made no sense; `answered` says whether an answer had begun."""

    def __init__(self, message: str, *, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


class HttpConnection(asyncio.Protocol):
    """The protocol of one connection. Body chunks wait here, bounded by pausing the reading."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._whole = False  # wake only when the whole answer is here
        self._response: h11.Response | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._ended = False
        self._paused = False
        self._error: Exception | None = None
        self.exchanges = 0
        self.idle_since = self._loop.time()

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            self._take_events()
        except h11.RemoteProtocolError as error:
            self._fail(ConnectionBroken(f"not a valid HTTP answer: {error}", answered=True))
            self.abort()

    def eof_received(self) -> None:
        with contextlib.suppress(h11.RemoteProtocolError):
            self._http.receive_data(b"")
            self._take_events()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = str(exc) if exc is not None else "the peer closed the connection"
        self._fail(ConnectionBroken(reason, answered=self._response is not None))
        self._transport = None

    def _take_events(self) -> None:
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Response):
                self._response = event
                if not self._whole:
                    self._wake()
            elif isinstance(event, h11.Data):
                self._keep(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._ended = True
                self._wake()
            elif isinstance(event, h11.ConnectionClosed):
                self.close()
                return

    def _keep(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)
        if self._whole:
            if self._buffered > BODY_LIMIT:
                raise h11.RemoteProtocolError("the answer is larger than 64 MiB")
            return
        if self._buffered > _BUFFER_HIGH and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    # The caller's side

    @property
    def usable(self) -> bool:
        """May a new exchange begin here?"""
        return (
            self._error is None
            and self._transport is not None
            and not self._transport.is_closing()
            and self._http.our_state is h11.IDLE
        )

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        if self._transport is None:
            return None
        return cast("ssl.SSLObject | None", self._transport.get_extra_info("ssl_object"))

    async def exchange(
        self, method: str, target: bytes, headers: Headers, body: bytes
    ) -> tuple[h11.Response, bytes]:
        """Send and wait for the whole answer. Errors: ConnectionBroken."""
        self._send(method, target, headers, body, whole=True)
        while not self._ended:
            await self._wait()
        answer = b"".join(self._chunks)
        return self._finish(), answer

    async def begin(
        self, method: str, target: bytes, headers: Headers, body: bytes
    ) -> h11.Response:
        """Send and wait for the answer's head; `chunks` gives the body."""
        self._send(method, target, headers, body, whole=False)
        while self._response is None:
            await self._wait()
        return self._response

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; the connection is idle again when this ends by itself."""
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._buffered -= len(chunk)
                if self._paused and self._buffered < _BUFFER_LOW and self._transport is not None:
                    self._paused = False
                    self._transport.resume_reading()
                yield chunk
            if self._ended:
                self._finish()
                return
            await self._wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Drop the connection at once, with whatever is under way.

        Also what the kernel still holds: on a path that is cut it would arrive once that is whole
        again, after what was sent on another connection since. SO_LINGER of 0 s sends a reset
        instead (socket(7)).
        """
        if self._transport is not None:
            # A TLS transport of Python 3.11.2 that is being lost has no protocol any more.
            with contextlib.suppress(AttributeError, OSError):
                raw = self._transport.get_extra_info("socket")
                if raw is not None and raw.family != socket.AF_UNIX and raw.fileno() >= 0:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            with contextlib.suppress(AttributeError):
                self._transport.abort()

    def _send(
        self, method: str, target: bytes, headers: Headers, body: bytes, *, whole: bool
    ) -> None:
        if self._transport is None or not self.usable:
            raise ConnectionBroken("the connection is closed", answered=False)
        self._whole, self._response, self._ended = whole, None, False
        self._chunks.clear()
        self._buffered = 0
        self.exchanges += 1
        request = h11.Request(method=method, target=target, headers=headers)
        parts = [self._http.send(request) or b""]
        if body:
            parts.append(self._http.send(h11.Data(data=body)) or b"")
        parts.append(self._http.send(h11.EndOfMessage()) or b"")
        self._transport.write(b"".join(parts))  # one write: one TLS record, one packet

    def _finish(self) -> h11.Response:
        assert self._response is not None  # noqa: S101 - an ended answer has a head
        response, self._response = self._response, None
        self._chunks.clear()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self.idle_since = self._loop.time()
        else:
            self.close()
        return response

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
