"""Serve an ASGI application to other daemons or to people, over TLS.

    tls = ServerTls(identity, roles={"host"})
    server = WireServer(app, [Listener.tcp("10.0.0.1", 7101, tls=tls)])
    await server.start()
    ...
    await server.stop(grace_s=2)  # no new requests; event streams end; the rest gets 2 s

uvicorn's protocol classes without its `Server`: that one wakes ten times a second, installs
signal handlers and exits the process; here the daemon owns all three. There is no ASGI
lifespan: daemons build and tear down themselves. Requests see `peer_of(scope)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from godwit.wire.gate import AsgiApp, Gate, GatedHttp, GatedWebSocket, peer_of
from godwit.wire.http import MAX_IDLE_S
from godwit.wire.identity import Identity
from godwit.wire.tls import server_context

_BACKLOG = 256
_HANDSHAKE_S = 5.0
_TLS_CLOSE_S = 1.0
_WS_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Our identity, and whom we let in: certificates of these roles, or (None) anybody."""

    identity: Identity
    roles: Collection[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening socket and its TLS. The server owns the socket and closes it."""

    sock: socket.socket = field(repr=False)
    tls: ServerTls | None = None
    unlink: Path | None = None

    @classmethod
    def tcp(cls, host: str, port: int, *, tls: ServerTls | None) -> Listener:
        """Bind an address of this machine (port 0: any free one)."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        return cls(sock=sock, tls=tls)

    @classmethod
    def unix(cls, path: Path, *, mode: int = 0o600) -> Listener:
        """Bind a path, replacing a stale one; its rights are set before it listens."""
        path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            path.chmod(mode)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return cls(sock=sock, unlink=path)

    @classmethod
    def inherited(cls, fd: int, *, tls: ServerTls | None) -> Listener:
        """A socket that was bound before us and passed on, TCP or unix."""
        return cls(sock=socket.socket(fileno=fd), tls=tls)

    @property
    def port(self) -> int:
        name = self.sock.getsockname()
        return int(name[1]) if isinstance(name, tuple) else 0


class WireServer:
    """One application on one or more listeners, until `stop`."""

    def __init__(self, app: AsgiApp, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)
        self._gates = [
            Gate(app, roles=_roles(one), directory=_directory(one)) for one in self._listeners
        ]
        self._servers: list[asyncio.Server] = []
        self._state = ServerState()
        self._none_left = asyncio.Event()
        self._stopped = False
        self._config = uvicorn.Config(
            _placeholder,
            http=GatedHttp,
            ws=GatedWebSocket,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=int(2 * MAX_IDLE_S),
            ws_max_size=_WS_LIMIT,
            ws_per_message_deflate=False,
        )
        self._config.load()

    @property
    def ports(self) -> list[int]:
        """TCP port of each listener, in order; 0 for unix sockets."""
        return [listener.port for listener in self._listeners]

    async def start(self) -> None:
        """Accept connections from here on. Errors: IdentityUnusable, OSError."""
        try:
            for listener, gate in zip(self._listeners, self._gates, strict=True):
                self._servers.append(await self._serve(listener, gate))
        except BaseException:
            await self.stop(grace_s=0)
            raise

    async def reload(self, identity: Identity) -> None:
        """Use a renewed certificate and CA for new connections; open ones go on.

        The listening sockets stay open throughout: no connection is refused meanwhile.
        """
        renewed = [
            replace(one, tls=replace(one.tls, identity=identity)) if one.tls else one
            for one in self._listeners
        ]
        servers: list[asyncio.Server] = []
        try:
            for listener, gate in zip(renewed, self._gates, strict=True):
                servers.append(await self._serve(listener, gate))
        except BaseException:
            for server in servers:
                server.close()
            raise
        old, self._servers, self._listeners = self._servers, servers, renewed
        for server in old:
            server.close()

    def expel(self) -> None:
        """Cut the connections of peers whose certificates were revoked after they came in."""
        for connection in list(self._state.connections):
            gate, transport = getattr(connection, "gate", None), connection.transport
            if gate is not None and transport is not None and gate.is_expelled(transport):
                with contextlib.suppress(AttributeError):  # Python 3.11.2: a lost TLS transport
                    transport.abort()

    async def stop(self, *, grace_s: float = 2.0) -> None:
        """Stop within about `grace_s`: streams end now, requests may finish, the rest is cut."""
        self._stopped = True
        for server in self._servers:
            server.close()
        for listener in self._listeners:
            listener.sock.close()
            if listener.unlink is not None:
                listener.unlink.unlink(missing_ok=True)
        self._servers = []
        for gate in self._gates:
            gate.end_streams()
        for connection in list(self._state.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_ended()
        for task in list(self._state.tasks):
            task.cancel("the server is stopping")
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=0.5)
        for connection in list(self._state.connections):
            with contextlib.suppress(AttributeError):  # Python 3.11.2: a lost TLS transport
                connection.transport.abort()

    async def serve(self, until: asyncio.Event, *, grace_s: float = 2.0) -> None:
        """Start, wait for the event, stop; also stops when cancelled."""
        await self.start()
        try:
            await until.wait()
        finally:
            await self.stop(grace_s=grace_s)

    async def _serve(self, listener: Listener, gate: Gate) -> asyncio.Server:
        def protocol() -> GatedHttp:
            return GatedHttp(
                gate=gate,
                gone=self._connection_gone,
                over=lambda: self._stopped,
                config=self._config,
                server_state=self._state,
                app_state={},
            )

        options: dict[str, Any] = {}
        if listener.tls is not None:
            wanted = listener.tls.roles is not None
            options = {
                "ssl": server_context(listener.tls.identity, client_certificates=wanted),
                "ssl_handshake_timeout": _HANDSHAKE_S,
                "ssl_shutdown_timeout": _TLS_CLOSE_S,
            }
        # A duplicate, because asyncio closes what it listens on, and a reload must not.
        sock = listener.sock.dup()
        try:
            loop = asyncio.get_running_loop()
            return await loop.create_server(protocol, sock=sock, backlog=_BACKLOG, **options)
        except BaseException:
            sock.close()
            raise

    def _connection_gone(self) -> None:
        if not self._state.connections:
            self._none_left.set()

    async def _all_ended(self) -> None:
        while self._state.tasks:
            await asyncio.wait(list(self._state.tasks))
        while self._state.connections:
            self._none_left.clear()
            await self._none_left.wait()


def _roles(listener: Listener) -> Collection[str] | None:
    return listener.tls.roles if listener.tls is not None else None


def _directory(listener: Listener) -> Path | None:
    return listener.tls.identity.directory if listener.tls is not None else None


async def _placeholder(_scope: Any, _receive: Any, _send: Any) -> None:
    raise RuntimeError("every connection gets its application from its gate")


__all__ = ["Listener", "ServerTls", "WireServer", "peer_of"]
