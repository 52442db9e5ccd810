"""Call another daemon, or the manager's API: JSON over HTTPS on connections that stay open.

Why not httpx2: on loopback with mutual TLS against our own server, two slow cores, a call takes
0.43 ms (p50; p99 0.56) here and 0.80 ms (p99 1.4) there, the first call of a process 8 ms and
46-70 ms, the import beyond asyncio 40 ms and 100 ms. And it cannot tell what callers need to
know: whether the request was sent (`PeerUnreachable` or `PeerOutcomeUnknown`), and who answers,
checked by the identity in the certificate *before* the request and its token leave.

Every request has a deadline in seconds that covers connecting and the whole answer. Only a GET
that met a connection which the peer had just closed is repeated, once. Cancelling a request
drops its connection; the peer may or may not have acted on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from godwit.wire.answer import (
    Answer,
    Query,
    StreamedAnswer,
    checked,
    encode_body,
    encode_headers,
    encode_target,
    refusal,
    untrusted,
)
from godwit.wire.connection import ConnectionBroken, Headers, HttpConnection
from godwit.wire.errors import PeerNotTrusted, PeerOutcomeUnknown, PeerRefused, PeerUnreachable
from godwit.wire.identity import PeerIdentity
from godwit.wire.sse import SseEvent, SseParser
from godwit.wire.tls import ClientTls

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

# The server keeps an idle connection for twice as long, so a request rarely meets a closing one.
MAX_IDLE_S = 60.0
_MAX_IDLE_CONNECTIONS = 4
_SAFE = frozenset({"GET", "HEAD"})


class PeerClient:
    """Requests to one peer. Many may run at once; each holds one connection meanwhile.

    `url` is https://host:port, http://host:port or unix:///path. One event loop only.
    """

    def __init__(
        self,
        url: str,
        *,
        tls: ClientTls | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float = 10.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("https", "http", "unix"):
            raise ValueError(f"{url} is not an https://, http:// or unix:// address")
        if (parts.scheme == "https") != (tls is not None):
            raise ValueError("https needs TLS settings, and only https takes them")
        self.url = url.rstrip("/")
        self._unix = parts.path if parts.scheme == "unix" else None
        self._host = parts.hostname or "localhost"
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._prefix = "" if self._unix else parts.path.rstrip("/")
        self._tls = tls
        self._deadline_s = deadline_s
        authority = parts.netloc.rpartition("@")[2] if not self._unix else "localhost"
        self._common: Headers = [(b"host", authority.encode())]
        if token is not None:
            self._common.append((b"authorization", f"Bearer {token}".encode()))
        self._common += [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        self._idle: list[HttpConnection] = []
        self._closed = False
        self.peer: PeerIdentity | None = None  # proven by the newest connection

    async def __aenter__(self) -> PeerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, at_once: bool = False) -> None:
        """Close the idle connections; requests under way end by themselves.

        ``at_once``: without TLS's farewell, for which a peer would be waited for up to a second.
        """
        self._closed = True
        while self._idle:
            connection = self._idle.pop()
            if at_once:
                connection.abort()
            else:
                connection.close()
        await asyncio.sleep(0)  # what was aborted is let go of in the loop's next turn

    def use_tls(self, tls: ClientTls) -> None:
        """Use a renewed certificate or CA: from now on new connections only."""
        self._tls = tls
        while self._idle:
            self._idle.pop().close()

    # Requests

    async def get(
        self, path: str, *, query: Query | None = None, deadline_s: float | None = None
    ) -> Any:
        """The JSON of a GET."""
        return (await self.request("GET", path, query=query, deadline_s=deadline_s)).json()

    async def post(
        self,
        path: str,
        json: Any = None,
        *,
        query: Query | None = None,
        deadline_s: float | None = None,
    ) -> Any:
        """The JSON answered to a POST of JSON."""
        answer = await self.request("POST", path, json=json, query=query, deadline_s=deadline_s)
        return answer.json()

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> Answer:
        """Send one request and read the whole answer.

        Errors: PeerUnreachable, PeerNotTrusted, PeerOutcomeUnknown, PeerRefused (status >= 400).
        """
        body, extra = encode_body(json, content)
        all_headers = [*self._common, *extra, *encode_headers(headers)]
        target = encode_target(self._prefix + path, query)
        limit = self._deadline_s if deadline_s is None else deadline_s
        connection: HttpConnection | None = None
        try:
            async with asyncio.timeout(limit):
                while True:
                    connection = await self._acquire()
                    fresh = connection.exchanges == 0
                    try:
                        response, answer = await connection.exchange(
                            method, target, all_headers, body
                        )
                        break
                    except ConnectionBroken as error:
                        if fresh or error.answered or method not in _SAFE:
                            raise self._unknown(method, path, str(error)) from error
                        connection = None
        except TimeoutError as error:
            raise self._late(connection, method, path, limit) from error
        except BaseException:
            if connection is not None:
                connection.abort()
            raise
        self._release(connection)
        return checked(response, answer)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> AsyncIterator[StreamedAnswer]:
        """A request whose answer is read in chunks; the deadline covers the head only.

        The connection goes back to use only if the body was read to its end.
        """
        target = encode_target(self._prefix + path, query)
        all_headers = [*self._common, *encode_headers(headers)]
        limit = self._deadline_s if deadline_s is None else deadline_s
        connection: HttpConnection | None = None
        try:
            try:
                async with asyncio.timeout(limit):
                    connection = await self._acquire(fresh=True)
                    response = await connection.begin(method, target, all_headers, b"")
                    if response.status_code >= 400:
                        parts = [chunk async for chunk in connection.chunks()]
                        checked(response, b"".join(parts))
            except TimeoutError as error:
                raise self._late(connection, method, path, limit) from error
            except ConnectionBroken as error:
                raise self._unknown(method, path, str(error)) from error
            yield StreamedAnswer(response, connection, f"{method} {self.url}{path}")
        finally:
            if connection is not None:
                if connection.usable:
                    self._release(connection)
                else:
                    connection.abort()

    async def events(
        self,
        path: str,
        *,
        query: Query | None = None,
        last_event_id: str | None = None,
        idle_s: float = 45.0,
        give_up_s: float = 30.0,
    ) -> AsyncGenerator[SseEvent, None]:
        """Follow server-sent events, resuming after a break by the last id seen.

        Never ends by itself, except on 204. The first connection must succeed; later ones may
        fail for `give_up_s` in a row. Silence of `idle_s` (servers send comments) is a break.
        Close it with `contextlib.aclosing` when leaving early.
        Errors: as `request`.
        """
        loop = asyncio.get_running_loop()
        last_id, connected_at, pause_s = last_event_id, -1.0, 0.05
        while True:
            headers = {"accept": "text/event-stream"}
            if last_id is not None:
                headers["last-event-id"] = last_id
            try:
                async with self.stream("GET", path, query=query, headers=headers) as answer:
                    if answer.status == 204:
                        return
                    parser = SseParser()
                    async with contextlib.aclosing(answer.chunks(idle_s=idle_s)) as chunks:
                        async for chunk in chunks:
                            connected_at, pause_s = loop.time(), 0.05
                            for event in parser.feed(chunk):
                                last_id = event.id or last_id
                                yield event
            except (PeerUnreachable, PeerOutcomeUnknown) as error:
                given_up = connected_at < 0 or loop.time() - connected_at > give_up_s
                if given_up or isinstance(error, PeerNotTrusted):
                    raise
            # Nothing tells us when the server is back: try, ever less often.
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 2.0)

    @contextlib.asynccontextmanager
    async def websocket(
        self, path: str, *, query: Query | None = None, deadline_s: float | None = None
    ) -> AsyncIterator[ClientConnection]:
        """An open WebSocket (`recv`, `send`, `async for`), with the same TLS checks and token.

        Errors: PeerUnreachable, PeerNotTrusted, PeerRefused.
        """
        from godwit.wire import websocket  # the library costs 60 ms to import

        limit = self._deadline_s if deadline_s is None else deadline_s
        scheme = "wss" if self._tls is not None else "ws"
        authority = dict(self._common)[b"host"].decode()
        uri = f"{scheme}://{authority}{encode_target(self._prefix + path, query).decode()}"
        headers = {k.decode(): v.decode() for k, v in self._common if k != b"host"}
        opened = await websocket.connect(
            uri, tls=self._tls, unix=self._unix, headers=headers, deadline_s=limit
        )
        try:
            yield opened
        finally:
            await opened.close()

    # Connections

    async def _acquire(self, *, fresh: bool = False) -> HttpConnection:
        now = asyncio.get_running_loop().time()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.close()
        return await self._connect()

    def _release(self, connection: HttpConnection) -> None:
        if not connection.usable:
            return
        if self._closed or len(self._idle) >= _MAX_IDLE_CONNECTIONS:
            connection.close()
        else:
            self._idle.append(connection)

    async def _connect(self) -> HttpConnection:
        connection: HttpConnection | None = None
        try:
            connection = await self._open()
            if self._tls is not None:
                self.peer = self._tls.verify(connection.ssl_object, where=self.url)
                if self._tls.expect is not None:
                    await self._await_acceptance(connection)
        except BaseException as error:
            if connection is not None:
                connection.abort()
            if isinstance(error, ssl.SSLError):
                raise untrusted(self.url, error) from error
            if isinstance(error, OSError):
                raise PeerUnreachable(
                    f"{self.url} cannot be reached: {error.strerror or error}.",
                    hint="Check that the daemon runs there and that the network is up.",
                ) from error
            raise
        return connection

    async def _open(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        if self._unix is not None:
            return (await loop.create_unix_connection(HttpConnection, self._unix))[1]
        if self._tls is None:
            return (await loop.create_connection(HttpConnection, self._host, self._port))[1]
        opened = await loop.create_connection(
            HttpConnection,
            self._host,
            self._port,
            ssl=self._tls.context,
            server_hostname=self._host,
            ssl_shutdown_timeout=1.0,
        )
        return opened[1]

    async def _await_acceptance(self, connection: HttpConnection) -> None:
        """In TLS 1.3 our side of the handshake is over before the server has judged our
        certificate, or the lack of one. An empty question first, so that a refusal is never
        mistaken for a request with unknown outcome."""
        try:
            response, answer = await connection.exchange("OPTIONS", b"*", self._common[:1], b"")
        except ConnectionBroken as error:
            raise PeerNotTrusted(
                f"{self.url} closed the connection instead of accepting us: {error}.",
                hint="It wants an unexpired certificate of the cluster CA; check the clocks too.",
            ) from error
        if response.status_code == 403:
            problem = refusal(response, answer)
            raise PeerNotTrusted(f"{self.url} refuses us: {problem.detail}", hint=problem.hint)
        if not connection.usable:
            raise PeerUnreachable(
                f"{self.url} closed the connection before a request.", hint="Try again."
            )
        connection.exchanges = 0

    # Words

    def _late(
        self, connection: HttpConnection | None, method: str, path: str, limit: float
    ) -> PeerUnreachable | PeerOutcomeUnknown:
        if connection is None:
            return PeerUnreachable(
                f"{self.url} did not let us connect within {limit:g} s.",
                hint="Check that the daemon runs there and that the network is up.",
            )
        connection.abort()
        return self._unknown(method, path, f"no answer within {limit:g} s")

    def _unknown(self, method: str, path: str, reason: str) -> PeerOutcomeUnknown:
        return PeerOutcomeUnknown(
            f"{method} {self.url}{path} was sent, but its outcome is unknown: {reason}.",
            hint="Look at the object's state before trying again.",
        )


__all__ = [
    "Answer",
    "PeerClient",
    "PeerNotTrusted",
    "PeerOutcomeUnknown",
    "PeerRefused",
    "PeerUnreachable",
    "StreamedAnswer",
]
