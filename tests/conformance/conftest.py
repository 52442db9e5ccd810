"""The stores the conformance suite runs against, each as a rig that hands out clients."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from godwit.store.api import Store
from godwit.store.client import StoreClient
from godwit.store.errors import StoreUnavailable
from godwit.store.memory import MemoryStore
from godwit.wire.ca import ClusterCa, issue, write_identity

from .etcd_rig import daemon_context, one_member
from .faulty import FaultyProxy


@dataclass
class Rig:
    """One running store. ``endpoint`` is empty where there is no network in between."""

    name: str
    endpoint: str = ""
    tls: ssl.SSLContext | None = None
    memory: MemoryStore | None = None
    certificates: Path | None = None  # of the store itself; none where it speaks no TLS
    opened: list[StoreClient] = field(default_factory=list)

    def client(self, endpoint: str = "", *, timeout: float = 5.0) -> Store:
        if self.memory is not None:
            return self.memory
        client = StoreClient([endpoint or self.endpoint], ssl_context=self.tls, timeout=timeout)
        self.opened.append(client)
        return client


class Proxy:
    """Pumps bytes to the store and can break every connection, or hold the answers back."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.swallow_answers = False
        self.endpoint = ""

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        scheme = "https" if self._target.startswith("https") else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{port}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if not self.open.is_set():
                writer.transport.abort()
                return
            if self._target.startswith("unix:"):
                far = await asyncio.open_unix_connection(self._target.removeprefix("unix:"))
            else:
                parts = urlsplit(self._target)
                far = await asyncio.open_connection(parts.hostname, parts.port)
            self._writers |= {writer, far[1]}
            await asyncio.gather(
                self._pump(reader, far[1], answers=False), self._pump(far[0], writer, answers=True)
            )

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if answers and self.swallow_answers:
                    continue
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()

    def drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.drop()
        await asyncio.sleep(0)


def make_certificates(directory: Path) -> None:
    """A throw-away authority and one identity for both ends: ca.pem, cert.pem, key.pem."""
    authority = ClusterCa.create(cluster="test")
    write_identity(directory, issue(authority, role="store", name="store1", ips=["127.0.0.1"]))


def client_context(directory: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


@contextlib.contextmanager
def running(argv: list[str], ready: Callable[[], bool], **options: object) -> Iterator[None]:
    """A child process that is up inside the block and gone after it."""
    process = subprocess.Popen(argv, **options)  # type: ignore[call-overload]
    try:
        limit = time.monotonic() + 15
        while not ready():
            assert process.poll() is None, f"{argv[0]} ended with {process.returncode}"
            assert time.monotonic() < limit, f"{argv[0]} was not ready in time"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def _daemon_unix(directory: Path) -> Iterator[Rig]:
    path = directory / "s.sock"
    argv = [sys.executable, "-m", "godwit.store.daemon.main", "--data", str(directory / "data")]
    with running([*argv, "--listen", f"unix:{path}"], path.exists):
        yield Rig("daemon-unix", f"unix:{path}")


@contextlib.contextmanager
def _daemon_tls(directory: Path) -> Iterator[Rig]:
    make_certificates(directory)
    # Bind first and pass the descriptor: nobody can take the port in between.
    with socket.create_server(("127.0.0.1", 0)) as sock:
        argv = [sys.executable, "-m", "godwit.store.daemon.main", "--data", str(directory / "data")]
        for name in ("cert", "key", "ca"):
            argv += [f"--{name}", str(directory / f"{name}.pem")]
        argv += ["--fd", str(sock.fileno())]
        with running(argv, lambda: True, pass_fds=(sock.fileno(),)):
            endpoint = f"https://127.0.0.1:{sock.getsockname()[1]}"
            yield Rig("daemon-tls", endpoint, client_context(directory), certificates=directory)


@contextlib.contextmanager
def _etcd_tls(directory: Path) -> Iterator[Rig]:
    etcd = one_member(directory)
    context = daemon_context(directory / "host")
    try:
        etcd.start()
        asyncio.run(_serving(etcd.member.client_url, context))
        yield Rig("etcd-tls", etcd.member.client_url, context, certificates=directory / "store")
    finally:
        etcd.end(signal.SIGTERM)


async def _serving(url: str, context: ssl.SSLContext) -> None:
    client = StoreClient([url], ssl_context=context, timeout=1.0)
    until = time.monotonic() + 20
    try:
        while True:
            try:
                await client.status()
                return
            except StoreUnavailable:
                assert time.monotonic() < until, f"{url} does not serve"
                await asyncio.sleep(0.02)  # it tells nobody but systemd
    finally:
        await client.aclose()


@contextlib.contextmanager
def _memory(directory: Path) -> Iterator[Rig]:
    yield Rig("memory")


_RIGS = {
    "memory": _memory,
    "daemon-unix": _daemon_unix,
    "daemon-tls": _daemon_tls,
    "etcd-tls": _etcd_tls,
}


@pytest.fixture(scope="module", params=list(_RIGS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    with _RIGS[request.param](tmp_path_factory.mktemp("store")) as rig:
        yield rig


@pytest.fixture
async def rig(server: Rig) -> AsyncIterator[Rig]:
    if server.name == "memory":
        server.memory = MemoryStore()
    server.opened = []
    yield server
    for client in server.opened:
        await client.aclose()
    if server.memory is not None:
        await server.memory.aclose()


@pytest.fixture
def store(rig: Rig) -> Store:
    return rig.client()


@pytest.fixture
async def proxy(rig: Rig) -> AsyncIterator[Proxy]:
    if not rig.endpoint:
        pytest.skip("the in-memory twin has no network to break")
    proxy = await Proxy(rig.endpoint).start()
    yield proxy
    await proxy.close()


@pytest.fixture
async def faulty(rig: Rig) -> AsyncIterator[FaultyProxy]:
    if not rig.endpoint:
        pytest.skip("the in-memory twin has no network to break")
    proxy = FaultyProxy(rig.endpoint, tls=rig.tls, certificates=rig.certificates)
    await proxy.start()
    yield proxy
    await proxy.close()


@pytest.fixture
def base(request: pytest.FixtureRequest) -> str:
    """A key prefix of this test's own: the server is shared by a module's tests."""
    return f"{request.node.name.partition('[')[0]}/"
