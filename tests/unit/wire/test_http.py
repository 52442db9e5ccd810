"""Requests between daemons: answers, deadlines, and what is known when there is no answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.unit.wire.conftest import App, Pki, running

from godwit.model.errors import Conflict, OutcomeUnknown, Unavailable
from godwit.wire.http import PeerClient, PeerOutcomeUnknown, PeerRefused, PeerUnreachable
from godwit.wire.server import Listener, ServerTls, WireServer, peer_of


@contextlib.asynccontextmanager
async def raw_server(
    handler: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A TCP server that speaks whatever the test writes; its connections end with it."""
    running: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.current_task())
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()
    await asyncio.gather(*filter(None, running))


@pytest.fixture
async def app() -> App:
    return App()


@pytest.fixture
async def client(app: App, pki: Pki) -> AsyncIterator[PeerClient]:
    async with (
        running(app, ServerTls(pki.identity("host", "host1"), {"host"})) as (_, url),
        PeerClient(url, tls=pki.client()) as client,
    ):
        yield client


async def test_requests_share_one_connection(app: App, client: PeerClient) -> None:
    for number in range(5):
        assert await client.post("/echo", {"n": number}) == {"n": number}
    assert len(client._idle) == 1
    assert client._idle[0].exchanges == 5
    assert app.count == 5


async def test_many_at_once_do_not_wait_for_each_other(app: App, client: PeerClient) -> None:
    slow = asyncio.ensure_future(client.post("/slow"))
    await app.slow_entered.wait()
    answers = await asyncio.gather(*(client.post("/echo", n) for n in range(10)))
    assert answers == list(range(10))
    app.slow_may_end.set()
    assert await slow == {"done": True}


async def test_a_problem_answer_becomes_the_peers_own_error(client: PeerClient) -> None:
    with pytest.raises(PeerRefused) as caught:
        await client.post("/fail")
    error = caught.value.error
    assert isinstance(error, Conflict)
    assert (error.message, error.hint, error.exit_code) == ("web is moving.", "Wait.", 4)
    assert caught.value.to_problem()["code"] == "conflict"
    with pytest.raises(PeerRefused) as caught:
        await client.get("/plain_fail")
    assert (caught.value.status, caught.value.problem.code) == (500, "http-500")
    assert len(client._idle) == 1  # a refusal does not cost the connection


async def test_past_the_deadline_the_outcome_is_unknown(app: App, client: PeerClient) -> None:
    with pytest.raises(PeerOutcomeUnknown, match=r"within 0\.1 s") as caught:
        await client.post("/slow", deadline_s=0.1)
    assert isinstance(caught.value, OutcomeUnknown)
    assert app.slow_entered.is_set()
    assert await client.post("/echo", 1) == 1  # on a connection of its own


async def test_cancelling_a_request_never_leaves_its_answer_to_the_next(
    app: App, client: PeerClient
) -> None:
    request = asyncio.ensure_future(client.post("/slow"))
    await app.slow_entered.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    app.slow_may_end.set()
    assert await client.post("/echo", "mine") == "mine"


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_request_given_up_closes_its_connection(
    app: App, client: PeerClient, how: str
) -> None:
    deadline_s = 0.1 if how == "deadline" else 10
    request = asyncio.ensure_future(client.post("/wait_until_caller_goes", deadline_s=deadline_s))
    await app.slow_entered.wait()
    if how == "cancel":
        request.cancel()
    with pytest.raises((PeerOutcomeUnknown, asyncio.CancelledError)):
        await request
    async with asyncio.timeout(2):
        await app.caller_gone.wait()


async def test_nobody_listening_is_unreachable(pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with PeerClient(f"https://127.0.0.1:{port}", tls=pki.client()) as client:
        with pytest.raises(PeerUnreachable, match="cannot be reached") as caught:
            await client.post("/echo", 1)
    assert isinstance(caught.value, Unavailable)


async def test_a_peer_that_accepts_and_says_nothing_is_unreachable(pki: Pki) -> None:
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        url = f"https://127.0.0.1:{frozen.getsockname()[1]}"
        async with PeerClient(url, tls=pki.client()) as client:
            with pytest.raises(PeerUnreachable, match="did not let us connect"):
                await client.post("/echo", 1, deadline_s=0.2)


_VICTIM = """
import asyncio, sys
from pathlib import Path
from godwit.wire.identity import Identity
from godwit.wire.server import Listener, ServerTls, WireServer
async def app(scope, receive, send):
    await receive()
    print("working", flush=True)
    await asyncio.Event().wait()
async def main():
    tls = ServerTls(Identity.load(Path(sys.argv[1])), {"host"})
    server = WireServer(app, [Listener.tcp("127.0.0.1", 0, tls=tls)])
    await server.start()
    print(server.ports[0], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_server_killed_in_mid_request_leaves_the_outcome_unknown(pki: Pki) -> None:
    directory = str(pki.identity("host", "host1").cert.parent)
    victim = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _VICTIM, directory, stdout=subprocess.PIPE
    )
    assert victim.stdout is not None
    try:
        port = int(await victim.stdout.readline())
        async with PeerClient(f"https://127.0.0.1:{port}", tls=pki.client()) as client:
            request = asyncio.ensure_future(client.post("/start", {}))
            assert await victim.stdout.readline() == b"working\n"
            victim.send_signal(signal.SIGKILL)
            with pytest.raises(PeerOutcomeUnknown):
                await request
            with pytest.raises(PeerUnreachable):
                await client.post("/start", {})
    finally:
        with contextlib.suppress(ProcessLookupError):
            victim.kill()
        await victim.wait()


async def test_what_was_not_answered_in_time_is_reset_not_sent_later() -> None:
    """A kernel goes on sending for a connection that is closed; a reset takes it back."""
    ended: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            await reader.read()
            ended.append("closed")
        except ConnectionResetError:
            ended.append("reset")
        writer.transport.abort()

    async with raw_server(serve) as url, PeerClient(url) as client:
        with pytest.raises(PeerOutcomeUnknown):
            await client.request("PUT", "/x", deadline_s=0.1)
    assert ended == ["reset"]


@pytest.mark.parametrize(("method", "seen"), [("GET", 3), ("POST", 2)])
async def test_only_a_get_is_repeated_when_a_kept_connection_breaks(method: str, seen: int) -> None:
    """A raw server that drops the second request of each connection without a word."""
    requests = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        for turn in range(2):
            await reader.readuntil(b"\r\n\r\n")
            requests += 1
            if turn == 0:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.transport.abort()

    async with raw_server(serve) as url, PeerClient(url) as client:
        await client.request(method, "/x")
        if method == "GET":
            assert (await client.request(method, "/x")).json() == {}
        else:
            with pytest.raises(PeerOutcomeUnknown):
                await client.request(method, "/x")
    assert requests == seen


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_a_broken_answer_is_no_answer(raw: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        writer.close()

    async with raw_server(serve) as url, PeerClient(url) as client:
        with pytest.raises(PeerOutcomeUnknown):
            await client.get("/x", deadline_s=2)


async def test_a_large_answer_streams_whole_though_the_reader_is_slow(client: PeerClient) -> None:
    sizes, first = 0, b""
    async with client.stream("GET", "/big") as answer:
        async for chunk in answer.chunks(idle_s=2):
            first = first or chunk
            sizes += len(chunk)
            await asyncio.sleep(0)
    assert sizes == 4_000_000
    assert first[:1] == b"\0"
    assert len((await client.request("GET", "/big")).body) == 4_000_000


async def test_websocket_echo_with_identity(client: PeerClient) -> None:
    async with client.websocket("/ws") as ws:
        assert await ws.recv() == "host/host2"
        for size in (1, 70_000):
            await ws.send(os.urandom(size))
            assert len(await ws.recv()) == size


async def test_unix_and_inherited_sockets_serve_too(tmp_path: Path, app: App) -> None:
    path = tmp_path / "a.sock"
    passed = socket.socket()  # without an explicit protocol number, as systemd passes them
    passed.bind(("127.0.0.1", 0))
    passed.listen()
    inherited = Listener.inherited(passed.detach(), tls=None)
    listeners = [Listener.unix(path), inherited, Listener.tcp("127.0.0.1", 0, tls=None)]
    server = WireServer(app, listeners)
    await server.start()
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        async with PeerClient(f"unix://{path}") as client:
            assert await client.post("/echo", 1) == 1
            async with client.websocket("/ws") as ws:
                assert await ws.recv() == "None"
        for number in (1, 2):
            async with PeerClient(f"http://127.0.0.1:{server.ports[number]}") as client:
                assert await client.post("/echo", 2) == 2
                socks = [c.transport.get_extra_info("socket") for c in server._state.connections]
                ours = [one for one in socks if one.family == socket.AF_INET]
                assert ours
                assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in ours)
    finally:
        await server.stop()
    assert not path.exists()


async def test_stop_is_bounded_and_lets_a_request_finish(app: App, pki: Pki) -> None:
    async with (
        running(app, ServerTls(pki.identity("host", "host1"), {"host"})) as (server, url),
        PeerClient(url, tls=pki.client()) as client,
    ):
        request = asyncio.ensure_future(client.post("/slow"))
        await app.slow_entered.wait()
        stop = asyncio.ensure_future(server.stop(grace_s=5))
        await asyncio.sleep(0)
        app.slow_may_end.set()
        assert await request == {"done": True}
        async with asyncio.timeout(1):
            await stop
        with pytest.raises(PeerUnreachable):
            await client.post("/echo", 1)


async def test_stop_cuts_what_does_not_finish(app: App, pki: Pki) -> None:
    async with (
        running(app, ServerTls(pki.identity("host", "host1"), {"host"})) as (server, url),
        PeerClient(url, tls=pki.client()) as client,
        client.websocket("/ws") as ws,
    ):
        request = asyncio.ensure_future(client.post("/slow"))
        await app.slow_entered.wait()
        async with asyncio.timeout(1.5):
            await server.stop(grace_s=0.2)
        with pytest.raises(PeerRefused, match="stopping") as caught:
            await request
        assert caught.value.status == 504  # a POST may have been carried out
        assert await ws.recv() == "host/host2"
        assert await ws.wait_closed() is None
    assert not server._state.tasks
    assert not server._state.connections


def test_the_client_imports_no_heavy_library() -> None:
    heavy = ["cryptography", "fastapi", "httpx2", "pydantic", "rich", "uvicorn", "websockets"]
    code = f"import sys, godwit.wire.http; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


async def test_peer_of_a_bare_scope_is_none() -> None:
    assert peer_of({"type": "http"}) is None
