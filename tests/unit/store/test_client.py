"""The client against peers that refuse, lie, vanish or are not a store at all."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from godwit.store import errors
from godwit.store.client import StoreClient
from godwit.store.daemon.listen import ListenError, TlsFiles
from godwit.store.http import ChunkedLines, HttpError, parse_endpoint
from godwit.wire.ca import ClusterCa, issue, write_identity

if TYPE_CHECKING:
    from conftest import Daemon


class Clients:
    """Makes clients and closes them when the test is over."""

    def __init__(self) -> None:
        self._made: list[StoreClient] = []

    def __call__(self, *endpoints: str, **options: Any) -> StoreClient:
        self._made.append(StoreClient(endpoints, **options))
        return self._made[-1]

    async def aclose(self) -> None:
        for client in self._made:
            await client.aclose()


@pytest.fixture
async def connect() -> AsyncIterator[Clients]:
    clients = Clients()
    yield clients
    await clients.aclose()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer(handler: Handler) -> AsyncIterator[str]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


def saying(answer: bytes) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    return handle


def http(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("code", "message", "read", "write"),
    [
        (14, "etcdserver: no leader", errors.StoreNoLeader, errors.StoreNoLeader),
        (14, "etcdserver: request timed out", errors.StoreUnavailable, errors.StoreOutcomeUnknown),
        (14, "etcdserver: leader changed", errors.StoreUnavailable, errors.StoreOutcomeUnknown),
        (4, "context deadline exceeded", errors.StoreTimeout, errors.StoreOutcomeUnknown),
        (8, "etcdserver: mvcc: database space exceeded", errors.StoreFull, errors.StoreFull),
        (8, "etcdserver: too many requests", errors.StoreUnavailable, errors.StoreUnavailable),
        (7, "etcdserver: permission denied", errors.StoreDenied, errors.StoreDenied),
        (3, "etcdserver: key is not provided", errors.StoreRefused, errors.StoreRefused),
    ],
)
async def test_what_a_member_says_becomes_what_to_do(
    connect: Clients, code: int, message: str, read: type[Exception], write: type[Exception]
) -> None:
    body = f'{{"error":"{message}","message":"{message}","code":{code}}}'
    async with peer(saying(http("503 Service Unavailable", body))) as url:
        store = connect(url)
        with pytest.raises(errors.StoreError) as caught:
            await store.get("k")
        assert type(caught.value) is read
        with pytest.raises(errors.StoreError) as caught:
            await store.put("k", b"")
        assert type(caught.value) is write
        assert caught.value.hint


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-OpenSSH_9\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", b""],
)
async def test_a_broken_answer_to_a_write_leaves_its_outcome_unknown(
    connect: Clients, answer: bytes
) -> None:
    async with peer(saying(answer)) as url:
        store = connect(url)
        with pytest.raises(errors.StoreOutcomeUnknown):
            await store.put("k", b"")
        with pytest.raises(errors.StoreUnavailable):
            await store.get("k")


async def test_another_kind_of_server_is_named_as_such(connect: Clients) -> None:
    async with peer(saying(http("404 Not Found", "<html>"))) as url:
        with pytest.raises(errors.StoreRefused, match="404"):
            await connect(url).get("k")


async def test_a_member_of_another_store_is_refused(connect: Clients) -> None:
    clusters = iter("12")

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = f'{{"header":{{"cluster_id":"{next(clusters)}","revision":"9","raft_term":"3"}}}}'
        writer.write(http("200 OK", body))
        writer.close()

    async with peer(handle) as url:
        store = connect(url)
        assert await store.get("k") is None
        with pytest.raises(errors.StoreRolledBack):
            await store.get("k")


async def test_a_member_whose_term_went_back_is_refused(connect: Clients) -> None:
    terms = iter("32")

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = f'{{"header":{{"cluster_id":"1","revision":"9","raft_term":"{next(terms)}"}}}}'
        writer.write(http("200 OK", body))
        writer.close()

    async with peer(handle) as url:
        store = connect(url)
        assert await store.get("k") is None
        with pytest.raises(errors.StoreRolledBack):
            await store.get("k")


async def test_another_member_takes_over_and_is_kept(
    connect: Clients, daemon: Daemon, tmp_path: Path
) -> None:
    daemon.start()
    silent = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    async with peer(mute) as url:
        gone = f"unix:{tmp_path}/nobody"
        store = connect(gone, daemon.endpoint)
        assert await store.put("k", b"") == 2
        store = connect(url, gone, daemon.endpoint, timeout=0.9)
        began = asyncio.get_running_loop().time()
        assert await store.get("k") is not None
        assert asyncio.get_running_loop().time() - began < 0.6
        began = asyncio.get_running_loop().time()
        assert await store.get("k") is not None
        assert asyncio.get_running_loop().time() - began < 0.2
        await store.aclose()
        silent.set()


async def test_the_deadline_holds_for_a_frozen_store(daemon: Daemon) -> None:
    store = daemon.start().client()
    await store.put("k", b"")
    daemon.signal(signal.SIGSTOP)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(errors.StoreTimeout):
        await store.get("k", timeout=0.2)
    with pytest.raises(errors.StoreOutcomeUnknown):
        await store.put("k", b"", timeout=0.2)
    assert 0.38 < loop.time() - began < 0.7
    daemon.signal(signal.SIGCONT)
    assert await store.get("k") is not None
    await store.aclose()


async def test_a_cancelled_call_does_not_mix_up_answers(daemon: Daemon) -> None:
    store = daemon.start().client()
    for number in range(40):
        await store.put(f"k/{number}", b"%d" % number)
    for number in range(40):
        try:
            async with asyncio.timeout(0.0001 * (number % 8)):
                await store.get(f"k/{39 - number}")
        except TimeoutError:
            pass
        kv = await store.get(f"k/{number}")
        assert kv is not None
        assert kv.value == b"%d" % number
    await store.aclose()


@pytest.fixture
def identities(tmp_path: Path) -> Path:
    for name in ("ours", "theirs"):
        issued = issue(ClusterCa.create(cluster=name), role="host", name="h", ips=["127.0.0.1"])
        write_identity(tmp_path / name, issued)
    return tmp_path


@asynccontextmanager
async def tls_daemon(daemon: Daemon, files: Path) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    arguments = ["--listen", f"tcp:127.0.0.1:{port}"]
    for name in ("cert", "key", "ca"):
        arguments += [f"--{name}", str(files / f"{name}.pem")]
    daemon.start(*arguments)
    yield f"https://127.0.0.1:{port}"


def context(trust: Path, identity: Path | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(trust / "ca.pem"))
    if identity is not None:
        made.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    return made


async def test_only_identities_of_the_cluster_are_let_in(
    connect: Clients, daemon: Daemon, identities: Path
) -> None:
    ours, theirs = identities / "ours", identities / "theirs"
    async with tls_daemon(daemon, ours) as url:
        good = connect(url, ssl_context=context(ours, ours))
        assert await good.put("k", b"") == 2
        for bad in (context(ours, None), context(ours, theirs), context(theirs, ours)):
            store = connect(url, ssl_context=bad)
            with pytest.raises(errors.StoreDenied):
                await store.put("k", b"evil")
            with pytest.raises(errors.StoreDenied):
                await store.get("k")
            with pytest.raises(errors.StoreDenied):
                async with asyncio.timeout(5):
                    await anext(store.watch("k"))
        assert (await good.status()).revision == 2
        await good.aclose()


async def test_the_peers_identity_is_judged_by_the_caller(
    connect: Clients, daemon: Daemon, identities: Path
) -> None:
    ours = identities / "ours"
    seen: list[object] = []

    def refuse(peer: ssl.SSLObject) -> None:
        seen.append(peer.getpeercert())
        raise ValueError("a host is not the store")

    async with tls_daemon(daemon, ours) as url:
        store = connect(url, ssl_context=context(ours, ours), verify_peer=refuse)
        with pytest.raises(errors.StoreDenied, match="a host is not the store"):
            await store.put("k", b"")
        assert seen


def test_a_server_context_needs_readable_files(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="cannot be used"):
        TlsFiles(tmp_path / "a", tmp_path / "b", tmp_path / "c").context()


@pytest.mark.parametrize("url", ["", "unix:relative", "ftp://h:1", "https://h", "host:1"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(errors.StoreRefused):
        parse_endpoint(url)


def test_lines_come_out_of_chunks_cut_anywhere() -> None:
    stream = b"3\r\nab\n\r\n5;x=y\r\nc\nde\n\r\n2\r\nfg\r\n1\r\n\n\r\n0\r\n\r\n"
    for cut in range(1, len(stream)):
        lines = ChunkedLines()
        found = [
            line for n in range(0, len(stream), cut) for line in lines.feed(stream[n : n + cut])
        ]
        assert found == [b"ab", b"c", b"de", b"fg"]
        assert lines.ended
    with pytest.raises(HttpError):
        ChunkedLines().feed(b"zz\r\n")
