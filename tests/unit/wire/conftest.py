"""A small cluster PKI and an application with the awkward endpoints, on real loopback sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import Identity
from godwit.wire.server import Listener, ServerTls, WireServer, peer_of
from godwit.wire.sse import EventHub
from godwit.wire.tls import ClientTls, Expect


@dataclass
class Pki:
    root: Path
    ca: ClusterCa
    made: dict[str, Identity] = field(default_factory=dict)

    def identity(
        self, role: str, name: str, *, days: float = 30, ca: ClusterCa | None = None
    ) -> Identity:
        directory = self.root / f"{role}-{name}-{days}-{id(ca)}"
        if str(directory) not in self.made:
            write_identity(directory, issue(ca or self.ca, role=role, name=name, days=days))
            self.made[str(directory)] = Identity.load(directory)
        return self.made[str(directory)]

    def client(self, *, name: str = "host2", expect: str = "host/host1") -> ClientTls:
        role, _, wanted = expect.partition("/")
        return ClientTls.for_daemon(self.identity("host", name), Expect(role, wanted or None))


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(root=tmp_path_factory.mktemp("pki"), ca=ClusterCa.create(cluster="test"))


class App:
    """ASGI: /who, /echo, /slow, /count, /fail, /events, /big, and a websocket echo at /ws."""

    def __init__(self) -> None:
        self.hub = EventHub(capacity=8)
        self.count = 0
        self.slow_entered = asyncio.Event()
        self.slow_may_end = asyncio.Event()
        self.caller_gone = asyncio.Event()
        self.resumed_from: list[str | None] = []
        self._followed = asyncio.Condition()

    async def streams(self, count: int) -> None:
        """Return once so many event streams have begun; TimeoutError."""
        async with asyncio.timeout(30), self._followed:
            await self._followed.wait_for(lambda: len(self.resumed_from) >= count)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self.websocket(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.count += 1
        if scope["path"] == "/wait_until_caller_goes":
            self.slow_entered.set()
            await receive()
            self.caller_gone.set()
            return
        handler = getattr(self, scope["path"].strip("/"))
        await handler(scope, body, send)

    async def who(self, scope: Any, _body: bytes, send: Any) -> None:
        await answer(send, {"peer": str(peer_of(scope)), "query": scope["query_string"].decode()})

    async def echo(self, _scope: Any, body: bytes, send: Any) -> None:
        await answer(send, json.loads(body))

    async def slow(self, _scope: Any, _body: bytes, send: Any) -> None:
        self.slow_entered.set()
        await self.slow_may_end.wait()
        await answer(send, {"done": True})

    async def fail(self, _scope: Any, _body: bytes, send: Any) -> None:
        problem = {"code": "conflict", "detail": "web is moving.", "hint": "Wait.", "status": 409}
        await answer(send, problem, status=409, kind=b"application/problem+json")

    async def plain_fail(self, _scope: Any, _body: bytes, send: Any) -> None:
        await answer(send, "boom", status=500, kind=b"text/plain")

    async def big(self, _scope: Any, _body: bytes, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(40):
            chunk = bytes([number]) * 100_000
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def events(self, scope: Any, _body: bytes, send: Any) -> None:
        last = dict(scope["headers"]).get(b"last-event-id")
        async with self._followed:
            self.resumed_from.append(last.decode() if last else None)
            self._followed.notify_all()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        stream = self.hub.stream(last_event_id=last.decode() if last else None, keepalive_s=0.2)
        async for chunk in stream:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def websocket(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": str(peer_of(scope))})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message["bytes"]})


async def answer(
    send: Any, value: Any, *, status: int = 200, kind: bytes = b"application/json"
) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def running(
    app: Callable[[Any, Any, Any], Awaitable[None]], tls: ServerTls | None, *, port: int = 0
) -> AsyncIterator[tuple[WireServer, str]]:
    server = WireServer(app, [Listener.tcp("127.0.0.1", port, tls=tls)])
    await server.start()
    try:
        yield server, f"{'https' if tls else 'http'}://127.0.0.1:{server.ports[0]}"
    finally:
        await server.stop(grace_s=0.5)
