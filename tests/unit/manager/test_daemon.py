"""The process itself, on a real store daemon: start, watchdog, kill -9 and return, clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from manager_fakes import FakeAgent, host_info, store_file

from godwit.model import keys
from godwit.store.client import StoreClient
from godwit.store.records import Records, encode
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.http import PeerClient
from godwit.wire.identity import STORE, Identity
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.tls import ClientTls, Expect

TOKEN = "a-token-of-many-letters"
# What a supervisor does between fork and exec: the socket is descriptor 3, and it is for us.
BECOME = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True); "
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
    "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[2:]])"
)


class Processes:
    """A store daemon and a manager, each on a socket that we keep open for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ca = ClusterCa.create(cluster="test")
        for role, name in (("manager", "m1"), ("store", "s1"), ("host", "host1")):
            write_identity(root / name, issue(ca, role=role, name=name))
        self.sockets = {
            name: socket.create_server(("127.0.0.1", 0)) for name in ("store", "manager")
        }
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind(str(root / "notify"))
        self.notices.settimeout(30)
        self.running: list[subprocess.Popen[bytes]] = []
        self.manager: subprocess.Popen[bytes] = None  # type: ignore[assignment]

    def port(self, name: str) -> int:
        return int(self.sockets[name].getsockname()[1])

    def spawn(self, name: str, *argv: str, **environment: str) -> subprocess.Popen[bytes]:
        handle = self.sockets[name].fileno()
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", BECOME, str(handle), *argv],
                pass_fds=[handle],
                env={**os.environ, **environment},
                stderr=log,
            )
        self.running.append(process)
        return process

    def start_store(self, identity: str = "s1") -> None:
        pki = self.root / identity
        self.spawn(
            "store",
            "godwit.store.daemon.main",
            *("--data", str(self.root / "data")),
            *("--cert", str(pki / "cert.pem"), "--key", str(pki / "key.pem")),
            *("--ca", str(pki / "ca.pem")),
        )

    def start_manager(self) -> None:
        config = self.root / "manager.toml"
        tokens = store_file(self.root / "tokens", f"admin:{TOKEN}\n")
        config.write_text(
            f'[store]\nendpoints=["https://127.0.0.1:{self.port("store")}"]\n'
            f'[tls]\ndir="{self.root / "m1"}"\n[api]\ntokens_file="{tokens}"\n'
            f'[paths]\nstate="{self.root / "state"}"\n'
        )
        self.manager = self.spawn(
            "manager",
            "godwit.manager.main",
            *("--config", str(config)),
            NOTIFY_SOCKET=str(self.root / "notify"),
            WATCHDOG_USEC="2000000",
        )
        while self.notices.recv(256) != b"READY=1":
            pass

    def log(self) -> str:
        return (self.root / "manager.log").read_text()

    def client(self) -> PeerClient:
        return PeerClient(
            f"https://127.0.0.1:{self.port('manager')}",
            tls=ClientTls.for_api(self.root / "m1" / "ca.pem"),
            token=TOKEN,
        )

    def store(self) -> StoreClient:
        tls = ClientTls.for_daemon(Identity.load(self.root / "m1"), Expect(STORE))
        return StoreClient(
            [f"https://127.0.0.1:{self.port('store')}"], ssl_context=tls.context, timeout=60
        )

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for sock in (*self.sockets.values(), self.notices):
            sock.close()


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    found = Processes(tmp_path)
    yield found
    await asyncio.sleep(0.2)  # closed TLS connections take a few turns of the loop to be gone
    found.close()
    await asyncio.sleep(0.05)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_killed_manager_comes_back_to_its_tasks(processes: Processes) -> None:
    processes.start_store()
    processes.start_manager()
    store = processes.store()
    records = Records(store)
    agent = FakeAgent("host1", records)
    tls = ServerTls(Identity.load(processes.root / "host1"), roles={"manager"})
    server = WireServer(agent.app, [Listener.tcp("127.0.0.1", 0, tls=tls)])
    await server.start()
    await agent.join(f"https://127.0.0.1:{server.ports[0]}")
    try:
        async with processes.client() as api:
            body = {"name": "web", "memory_bytes": 1 << 28, "image": "demo"}
            answer = await api.request("POST", "/v1/vms", json=body, query={"wait": 20})
            assert answer.json()["state"] == "completed", answer.json()
            agent.drop_after.add("start")
            posted = await api.post("/v1/vms/web/actions/start", {})
            await agent.was_asked("start")
            processes.manager.send_signal(signal.SIGKILL)
            processes.manager.wait()
            processes.start_manager()
        async with processes.client() as api:
            task = await api.get(f"/v1/tasks/{posted['id']}", query={"wait": 30}, deadline_s=40)
            assert task["state"] == "completed", task
            assert len(agent.asked("start")) == 1
            (row,) = await api.get("/v1/vms")
            assert row["state"] == "running"
        while processes.notices.recv(256) != b"WATCHDOG=1":
            pass
        processes.manager.send_signal(signal.SIGTERM)
        assert processes.manager.wait(timeout=20) == 0
        assert "Traceback" not in processes.log()
    finally:
        await server.stop(grace_s=0)
        await store.aclose()


async def test_who_answers_as_the_store_must_be_the_store(processes: Processes) -> None:
    """A host's certificate is of the same CA; its holder gets no records."""
    processes.start_store("host1")
    processes.start_manager()
    async with asyncio.timeout(10):
        while "is host/host1, not store/" not in processes.log():  # noqa: ASYNC110 - it only logs
            await asyncio.sleep(0.05)


async def test_idle_it_costs_next_to_nothing(processes: Processes) -> None:
    processes.start_store()
    processes.start_manager()
    store = processes.store()
    for number in range(20):
        name = f"host{number}"
        await store.put(keys.host_info(name), encode(host_info(name)))
    async with processes.client() as api:
        assert len(await api.get("/v1/hosts")) == 20
        times = []
        for _ in range(30):
            began = time.perf_counter()
            await api.get("/v1/vms")
            times.append(time.perf_counter() - began)
        pid = processes.manager.pid
        began, used = time.monotonic(), cpu_s(pid)
        await asyncio.sleep(4)  # nothing to wait for: the point is that nothing happens
        share = (cpu_s(pid) - used) / (time.monotonic() - began)
        status = Path(f"/proc/{pid}/status").read_text()
        rss_kib = int(status.split("VmRSS:")[1].split()[0])
    print(json.dumps({"cpu": share, "rss_kib": rss_kib, "list_s": sorted(times)[15]}))
    assert share < 0.02
    assert rss_kib < 120 * 1024
    assert sorted(times)[15] < 0.1
    await store.aclose()


def test_a_bad_configuration_is_one_line_and_a_hint(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("[store]\n")
    argv = [sys.executable, "-m", "godwit.manager.main", "--config", str(tmp_path / "m.toml")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "is missing" in ended.stderr
    assert "Traceback" not in ended.stderr
