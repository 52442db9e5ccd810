"""Let each connection in as who it is: the peer's identity in the scope of every request.

Sits between uvicorn's protocol classes and the application. uvicorn gives an application no
sight of the connection, so two small subclasses pass the transport to a `Gate`, which answers
for the listener: who is this, may that role enter, and which requests run.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from godwit.wire.identity import PeerIdentity
from godwit.wire.problem import Problem, send_problem
from godwit.wire.tls import is_revoked, peer_identity

PEER = "godwit.peer"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
AsgiApp = Callable[[Any, Receive, Send], Awaitable[None]]

_log = logging.getLogger("godwit.wire")


class Gate:
    """One listener's rule (`roles`: who may enter; None: anyone) and its running requests."""

    def __init__(
        self, app: AsgiApp, *, roles: Collection[str] | None, directory: Path | None = None
    ) -> None:
        self._app = app
        self._roles = None if roles is None else frozenset(roles)
        self._directory = directory  # where the list of revoked certificates lies
        self._streams: set[asyncio.Task[Any]] = set()
        self._stopping = False

    def application_for(self, transport: asyncio.BaseTransport) -> AsgiApp:
        """The application as a peer on this connection may use it."""
        ssl_object = transport.get_extra_info("ssl_object")
        peer = peer_identity(ssl_object)
        if is_revoked(ssl_object, self._directory):
            return functools.partial(self._serve_revoked, peer)
        return functools.partial(self._serve, peer)

    def is_expelled(self, transport: asyncio.BaseTransport) -> bool:
        """Whether the peer on this connection has been revoked since it came in."""
        return is_revoked(transport.get_extra_info("ssl_object"), self._directory)

    def end_streams(self) -> None:
        """End the event streams, which would never end by themselves."""
        self._stopping = True
        for task in self._streams:
            task.cancel("the server is stopping")

    async def _serve(
        self, peer: PeerIdentity | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        # The client's question whether TLS let it in; it learns nothing else.
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and scope["path"] == "*":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        if self._roles is not None and (peer is None or peer.role not in self._roles):
            _log.warning("refused %s at %s", peer, scope.get("path"))
            await self._refuse(peer, scope, send)
            return
        scope.setdefault("extensions", {})[PEER] = peer
        if scope["type"] == "http":
            await self._serve_http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve_revoked(
        self, peer: PeerIdentity | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        _log.warning("refused %s at %s: its certificate was revoked", peer, scope.get("path"))
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await send_problem(send, _REVOKED, close=True)

    async def _serve_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        task = cast("asyncio.Task[Any]", asyncio.current_task())

        async def watch(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if _is_event_stream(message):
                    self._streams.add(task)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            # Cut short by the stop: a stream ends cleanly, anything else says so.
            if started:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                harmless = scope.get("method") in ("GET", "HEAD", "OPTIONS")
                await send_problem(send, _STOPPING if harmless else _CUT_SHORT, close=True)
        finally:
            self._streams.discard(task)

    async def _refuse(self, peer: PeerIdentity | None, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        who = f"The role {peer.role!r}" if peer else "A caller without a cluster identity"
        detail = f"{who} may not use this interface."
        hint = f"It is for: {', '.join(sorted(self._roles or ()))}."
        await send_problem(send, Problem(403, "not-allowed", detail, hint), close=True)


_REVOKED = Problem(
    403,
    "not-allowed",
    "This certificate was revoked.",
    "The host was removed from the cluster; it may join again with a new token.",
)
_STOPPING = Problem(
    503, "unavailable", "The daemon is stopping; the request was cut short.", "Try again."
)
_CUT_SHORT = Problem(
    504,
    "outcome-unknown",
    "The daemon is stopping; the request was cut short and may have been carried out.",
    "Look at the object's state before trying again.",
)


def _is_event_stream(message: Any) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )


def peer_of(scope: Any) -> PeerIdentity | None:
    """Who made this request, by certificate; None on a listener that asks for none."""
    found = scope.get("extensions", {}).get(PEER)
    return found if isinstance(found, PeerIdentity) else None


class GatedHttp(H11Protocol):
    """uvicorn's HTTP/1.1, with the gate of its listener and word when it is gone.

    ``over``: whether the server has stopped; one whose handshake ends after that is not served.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        gone: Callable[[], None],
        over: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.gate, self._gone, self._over = gate, gone, over
        self.ws_protocol_class = cast(
            "Any", functools.partial(GatedWebSocket, gate=gate, gone=gone)
        )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            # asyncio does so only for sockets made with an explicit protocol number.
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self.app = cast("Any", self.gate.application_for(transport))
        if self._over():
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gone()


class GatedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, likewise."""

    def __init__(self, *, gate: Gate, gone: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self.gate, self._gone = gate, gone

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.app = cast("Any", self.gate.application_for(transport))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gone()
