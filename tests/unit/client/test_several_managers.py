"""Several managers: which one is spoken to, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from godwit.client.api import AsyncClient
from godwit.client.link import Link
from godwit.client.settings import Target, contexts_file, resolve, save_context
from godwit.model.errors import InvalidRequest, OutcomeUnknown, Unavailable
from godwit.wire.server import Listener, WireServer


class Manager:
    """Answers as a manager does, as far as these tests ask."""

    def __init__(self, name: str, *, leads: bool = False, status: str = "ok") -> None:
        self.name, self.leads, self.status = name, leads, status
        self.asked: list[str] = []
        self.swallow = False
        self.dead = False
        self.slow_s = 0.0
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.asked.append(f"{scope['method']} {scope['path']}")
        if self.dead:
            await asyncio.sleep(3600)
        code, body = 200, json.dumps([{"name": self.name}]).encode()
        if scope["path"] == "/v1/health":
            body = json.dumps({"status": self.status, "leads": self.leads}).encode()
        elif self.swallow or self.slow_s:
            await asyncio.sleep(self.slow_s or 3600)
        elif self.status != "ok":
            code = 503
            said = {"code": "unavailable", "title": "not yet", "detail": "not yet", "status": 503}
            body = json.dumps(said).encode()
        kind = b"application/json" if code == 200 else b"application/problem+json"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Manager]:
        server = WireServer(self, [Listener.tcp("127.0.0.1", 0, tls=None)])
        await server.start()
        self.url = f"http://127.0.0.1:{server.ports[0]}"
        try:
            yield self
        finally:
            await server.stop(grace_s=0)


async def asked_of(client: AsyncClient) -> str:
    return str((await client.rows("hosts"))[0]["name"])


async def test_the_one_that_leads_is_spoken_to_first() -> None:
    one, two = Manager("one"), Manager("two", leads=True)
    async with one.serving(), two.serving(), AsyncClient(f"{one.url},{two.url}") as client:
        assert await asked_of(client) == "two"
        assert one.asked == ["GET /v1/health"]


async def test_another_one_is_taken_when_it_goes_away() -> None:
    one, two = Manager("one"), Manager("two", leads=True)
    async with one.serving(), contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(two.serving())
        async with AsyncClient(f"{one.url},{two.url}") as client:
            assert await asked_of(client) == "two"
            await stack.aclose()
            assert await asked_of(client) == "one"


async def test_one_that_cannot_see_the_store_is_left_for_one_that_can() -> None:
    one, two = Manager("one", status="degraded"), Manager("two")
    async with one.serving(), two.serving(), AsyncClient(f"{one.url},{two.url}") as client:
        assert await asked_of(client) == "two"
        two.status = "degraded"
        one.status = "ok"
        assert await asked_of(client) == "one"  # the refusal said that nothing was done


async def test_a_dead_ones_socket_that_lives_on_costs_a_moment() -> None:
    """As under a supervisor that keeps it: it takes connections, and nobody answers."""
    one, two = Manager("one"), Manager("two", leads=True)
    async with one.serving(), two.serving(), AsyncClient(f"{one.url},{two.url}") as client:
        assert await asked_of(client) == "two"
        two.dead = True
        began = asyncio.get_running_loop().time()
        assert await asked_of(client) == "one"
        assert asyncio.get_running_loop().time() - began < 6.0


async def test_a_slow_answer_is_waited_for() -> None:
    one, two = Manager("one"), Manager("two", leads=True)
    async with one.serving(), two.serving(), AsyncClient(f"{one.url},{two.url}") as client:
        two.slow_s = 2.5
        assert await asked_of(client) == "two"


async def test_a_request_that_may_have_been_done_is_not_repeated() -> None:
    one, two = Manager("one"), Manager("two", leads=True)
    async with one.serving(), two.serving():
        link = Link(Target(url=one.url, others=(two.url,)), name="test")
        await link.get("/v1/hosts")
        two.swallow = True
        peer = await link._manager()
        peer._deadline_s = 0.3
        with pytest.raises(OutcomeUnknown):
            await link.call("POST", "/v1/vms", {})
        assert "POST /v1/vms" not in one.asked
        assert two.asked.count("POST /v1/vms") == 1
        await link.close()


async def test_none_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    async with AsyncClient(f"http://127.0.0.1:{port},http://127.0.0.1:{port}") as client:
        with pytest.raises(Unavailable):
            await client.rows("hosts")


def test_a_context_keeps_every_address(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    target = Target(url="https://a:1", others=("https://b:2",), token_file=tmp_path / "t")
    save_context("lab", target, file=contexts_file(environ))
    assert resolve(environ=environ) == target
    assert resolve(url="https://b:2", environ=environ).token_file == tmp_path / "t"
    assert resolve(url="https://b:2", environ=environ).urls == ("https://b:2",)
    stranger = resolve(url="https://b:2,https://evil:1", environ=environ)
    assert stranger.token_file is None
    with pytest.raises(InvalidRequest, match="evil"):
        resolve(url="https://a:1,evil", environ=environ)
