"""The processes of a simulated cluster: store, manager and hosts, with certificates of one CA."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scale_hosts import AGENT_PORT, address
from scale_records import host_names

from godwit.store.api import put
from godwit.store.client import StoreClient
from godwit.store.errors import StoreError
from godwit.store.etcd import EtcdMember, argv
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import HOST, MANAGER, STORE, STORE_MEMBER_DNS, Identity
from godwit.wire.tls import ClientTls, Expect

EMBEDDED, ETCD = "embedded", "etcd"
STORES = (EMBEDDED, ETCD)
OPS_AT_ONCE = 100  # of the 128 that a transaction may have
READY_S = 120.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class NotThere(Exception):
    """Something that the benchmark needs is not installed."""


@dataclass(frozen=True)
class Usage:
    """What a process has used: processor seconds in all, resident bytes now."""

    cpu_s: float
    resident_bytes: int


def usage(pid: int) -> Usage:
    """Read from the kernel, all threads together."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    resident = next(int(row.split()[1]) for row in status if row.startswith("VmRSS"))
    return Usage((int(stat[11]) + int(stat[12])) / CLOCK_TICKS, resident * 1024)


class Place:
    """A directory with the CA and every identity, used by all runs."""

    def __init__(self, root: Path, hosts: int) -> None:
        self.root = root
        self.names = host_names(hosts)
        self.urls = {
            name: f"https://{address(number)}:{AGENT_PORT}"
            for number, name in enumerate(self.names)
        }
        ca = ClusterCa.create(cluster="scale")
        for role, name in ((STORE, "store"), (MANAGER, "manager"), (HOST, "guards")):
            names = ["localhost", *([STORE_MEMBER_DNS] if role == STORE else [])]
            made = issue(ca, role=role, name=name, dns=names, ips=["127.0.0.1"])
            write_identity(self.identity(name), made)
        for number, name in enumerate(self.names):
            made = issue(ca, role=HOST, name=name, ips=[address(number)])
            write_identity(self.identity(name), made)
        self.token = secrets.token_urlsafe(24)
        for file, text in (("tokens", f"bench:{self.token}\n"), ("token", f"{self.token}\n")):
            (root / file).touch(mode=0o600)
            (root / file).write_text(text)

    def identity(self, name: str) -> Path:
        """Where certificate, key and CA of a peer lie."""
        return self.root / "pki" / name

    def store_client(self, endpoint: str, **options: Any) -> StoreClient:
        """A client as the manager has one."""
        tls = ClientTls.for_daemon(Identity.load(self.identity("manager")), Expect(STORE))
        return StoreClient([endpoint], ssl_context=tls.context, **options)


def free_port() -> int:
    """A TCP port that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(argv: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A running program, ended at the end."""
    with log.open("ab") as stream:
        options = {"stderr": stream, "stdout": stream} | options
        started = subprocess.Popen(argv, **options)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@dataclass(frozen=True)
class RunningStore:
    """A store that answers."""

    kind: str
    pid: int
    endpoint: str
    version: str


@contextlib.contextmanager
def store(kind: str, place: Place) -> Iterator[RunningStore]:
    """An empty store of this kind, over TLS with certificates on both sides."""
    root = place.root / kind
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    port = free_port()
    endpoint = f"https://127.0.0.1:{port}"
    argv = _etcd(place, root, port) if kind == ETCD else _embedded(place, root, port)
    with process(argv, root / "log") as running:
        version = asyncio.run(_answering(place, endpoint, running))
        yield RunningStore(kind, running.pid, endpoint, version)


def _embedded(place: Place, root: Path, port: int) -> list[str]:
    argv = [sys.executable, "-I", "-m", "godwit.store.daemon.main", "--data", str(root / "data")]
    for name in ("cert", "key", "ca"):
        argv += [f"--{name}", str(place.identity("store") / f"{name}.pem")]
    return [*argv, "--listen", f"tcp:127.0.0.1:{port}"]


def _etcd(place: Place, root: Path, port: int) -> list[str]:
    program = shutil.which("etcd")
    if program is None:
        raise NotThere("etcd is not installed: apt-get install etcd-server")
    me = EtcdMember("one", "127.0.0.1", client_port=port, peer_port=free_port())
    words = argv(
        me,
        [me],
        data=root / "data",
        tls=place.identity("store"),
        member_dns=STORE_MEMBER_DNS,
        cluster="scale",
        program=program,
    )
    return list(words)


async def _answering(place: Place, endpoint: str, running: subprocess.Popen[bytes]) -> str:
    client = place.store_client(endpoint)
    try:
        async with asyncio.timeout(30):
            while True:
                if running.poll() is not None:
                    raise RuntimeError(f"the store ended with {running.returncode}")
                try:
                    return (await client.status(timeout=1.0)).version
                except StoreError:
                    await asyncio.sleep(0.1)
    finally:
        await client.aclose()


async def fill(place: Place, endpoint: str, records: list[tuple[str, bytes]]) -> float:
    """Write all records, many in a transaction; the seconds it took."""
    client = place.store_client(endpoint, timeout=60.0)
    batches = [records[at : at + OPS_AT_ONCE] for at in range(0, len(records), OPS_AT_ONCE)]
    began = time.perf_counter()
    try:
        for batch in batches:
            await client.txn([], [put(key, value) for key, value in batch])
    finally:
        await client.aclose()
    return time.perf_counter() - began


@dataclass
class Hosts:
    """The process that stands for all hosts."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]

    def figures(self) -> dict[str, Any]:
        """What its renewals came to since it was asked last."""
        self.stdin.write(b"figures\n")
        self.stdin.flush()
        return dict(json.loads(self.stdout.readline()))


@contextlib.contextmanager
def hosts(place: Place, endpoint: str, boots: dict[str, str], *, slow: float) -> Iterator[Hosts]:
    """All hosts renew, ``slow`` times slower than they should, and their agents answer."""
    setup = {
        "endpoints": [endpoint],
        "store_identity": str(place.identity("guards")),
        "identities": str(place.root / "pki"),
        "hosts": boots,
        "slow": slow,
    }
    argv = [sys.executable, str(Path(__file__).with_name("scale_hosts.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with process(argv, place.root / "hosts.log", **pipes) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        here = Hosts(running.pid, running.stdin, running.stdout)
        here.stdin.write(json.dumps(setup).encode() + b"\n")
        here.stdin.flush()
        if not here.stdout.readline():
            raise RuntimeError(
                f"the hosts did not appear: {(place.root / 'hosts.log').read_text()}"
            )
        yield here


@dataclass(frozen=True)
class RunningManager:
    """A manager that has read the store; ``ready_s`` from its start."""

    pid: int
    url: str
    ready_s: float
    started: Usage


@contextlib.contextmanager
def manager(place: Place, store: RunningStore) -> Iterator[RunningManager]:
    """The daemon itself, as its unit starts it."""
    port = free_port()
    root = place.root / f"manager-{store.kind}"
    root.mkdir(exist_ok=True)
    config = root / "manager.toml"
    config.write_text(
        f'[store]\nendpoints=["{store.endpoint}"]\n[tls]\ndir="{place.identity("manager")}"\n'
        f'[api]\ntokens_file="{place.root / "tokens"}"\nhost="127.0.0.1"\nport={port}\n'
        f'[paths]\nstate="{root}"\n'
    )
    argv = [sys.executable, "-I", "-m", "godwit.manager.main", "--config", str(config)]
    began = time.perf_counter()
    with process(argv, root / "log") as running:
        url = f"https://127.0.0.1:{port}"
        ready_s = asyncio.run(_ready(place, url, running, began))
        yield RunningManager(running.pid, url, ready_s, usage(running.pid))


async def _ready(place: Place, url: str, running: subprocess.Popen[bytes], began: float) -> float:
    from godwit.wire.errors import PeerOutcomeUnknown, PeerRefused, PeerUnreachable
    from godwit.wire.http import PeerClient

    tls = ClientTls.for_api(place.identity("manager") / "ca.pem")
    async with PeerClient(url, tls=tls, token=place.token) as client:
        while time.perf_counter() - began < READY_S:
            if running.poll() is not None:
                raise RuntimeError(f"the manager ended with {running.returncode}")
            with contextlib.suppress(PeerRefused, PeerUnreachable, PeerOutcomeUnknown):
                await client.get("/v1/networks", deadline_s=READY_S)
                return time.perf_counter() - began
            await asyncio.sleep(0.05)
    raise RuntimeError(f"the manager was not ready within {READY_S:.0f} s")
