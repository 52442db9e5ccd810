"""A cluster formed by the command line, with its real daemons: embedded store, etcd, manager."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from godwit.form.places import STORE_PORT, Places
from godwit.model import keys
from godwit.model.join import parse_token
from godwit.store.client import StoreClient
from godwit.store.errors import StoreDenied, StoreError
from godwit.wire.identity import Identity
from godwit.wire.keeper import Place
from godwit.wire.tls import ClientTls, Expect

pytestmark = pytest.mark.system
BIN = Path(sys.executable).parent
ETCD = shutil.which("etcd")


@dataclass
class Machine:
    """The first host's files, an address of loopback that nobody else has, and its processes."""

    root: Path
    address: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def places(self) -> Places:
        return Places(self.root / "host1")

    def godwit(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "GODWIT_URL": f"https://{self.address}:7100",
            "GODWIT_TOKEN_FILE": str(self.places.admin_token),
            "GODWIT_CA_FILE": str(self.places.tls / "ca.pem"),
        }
        return subprocess.run(
            [BIN / "godwit", *words],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=60,
        )

    def done(self, *words: str, stdin: str = "") -> str:
        """The output of a command that succeeds."""
        ended = self.godwit(*words, stdin=stdin)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def init(self, *more: str) -> None:
        place = ("--root", str(self.root / "host1"), "--address", self.address)
        self.done("cluster", "init", "test", "--host", "host1", *place, *more)

    def join(self, name: str, token: str) -> subprocess.CompletedProcess[str]:
        place = ("--root", str(self.root / name), "--address", self.address)
        return self.godwit(
            *("cluster", "join", "--url", f"https://{self.address}:7100", "--token", "-"),
            *("--host", name, *place),
            stdin=token + "\n",
        )

    def start(self, daemon: str) -> subprocess.Popen[bytes]:
        """Start a daemon with the configuration that `init` wrote; return when it is ready."""
        path = self.root / f"{daemon}.notify"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind(str(path))
            notices.settimeout(30)
            process = self.run(
                BIN / f"godwit-{daemon}",
                *("--config", self.places.config(daemon)),
                log=daemon,
                environment={"NOTIFY_SOCKET": str(path)},
            )
            while b"READY=1" not in notices.recv(4096):
                pass
        return process

    def run(
        self, *argv: str | Path, log: str, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.root / f"{log}.log").open("ab") as stream:
            process = subprocess.Popen(
                argv, stdout=stream, stderr=stream, env={**os.environ, **(environment or {})}
            )
        self.running.append(process)
        return process

    def well(self) -> dict[str, Any]:
        """The status once all is well: a manager that has just begun leads a moment later."""
        until = time.monotonic() + 20
        while True:
            found: dict[str, Any] = json.loads(self.done("cluster", "status", "-o", "json"))
            if found["words"] == "all is well":
                return found
            assert time.monotonic() < until, found

    def log(self, daemon: str) -> str:
        return (self.root / f"{daemon}.log").read_text()

    def store(self, directory: Path, url: str = "") -> StoreClient:
        tls = ClientTls.for_daemon(Identity.load(directory), Expect("store"))
        return StoreClient(
            [url or f"https://{self.address}:{STORE_PORT}"],
            ssl_context=tls.context,
            verify_peer=lambda found: tls.verify(found, where="the store"),
        )

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        self.running.remove(process)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    pid = os.getpid()
    found = Machine(tmp_path, f"127.{100 + pid // 62500 % 100}.{pid // 250 % 250}.{pid % 250 + 1}")
    (found.places.root / "run" / "godwit-store").mkdir(parents=True)
    yield found
    for process in found.running:
        process.kill()
        process.wait()


def test_the_first_host_a_second_by_token_and_out_again(machine: Machine) -> None:
    machine.init()
    machine.start("store")
    manager = machine.start("manager")
    status = machine.well()
    assert [(one["name"], one["leads"]) for one in status["managers"]] == [("host1", True)]
    assert [one["state"] for one in status["store"]["members"]] == ["leader"]
    assert "store: one store on one machine" in machine.done("cluster", "status")
    token = machine.done("cluster", "token", "create", "--ttl", "10m").strip()
    joined = machine.join("host2", token)
    assert joined.returncode == 0, joined.stderr
    assert "host2 has joined the cluster test" in joined.stdout
    replayed = machine.join("host3", token)
    assert replayed.returncode == 4
    why = replayed.stderr.splitlines()[0]
    assert why == "error: the join token has been used, by host2 at 127.0.0.1"
    secret = parse_token(token).secret
    assert secret not in replayed.stderr + joined.stderr + machine.log("manager")
    asyncio.run(_removed(machine))
    # The list is read again by a manager that starts anew, and a new host may take the name.
    machine.end(manager)
    machine.start("manager")
    (machine.root / "host2").rename(machine.root / "old")
    again = machine.join("host2", machine.done("cluster", "token", "create").strip())
    assert again.returncode == 0, again.stderr


async def _removed(machine: Machine) -> None:
    """host2 uses the store until it is removed; then nothing lets it in."""
    store = machine.store(Places(machine.root / "host2").tls)
    await store.put(keys.host_info("host2"), json.dumps(_info("host2")).encode())
    async with store.watch(keys.HOSTS) as watch:
        await anext(watch)
        out = await asyncio.to_thread(machine.done, "cluster", "remove", "host2", "-o", "json")
        assert "out of the cluster; 2 certificates were revoked" in json.loads(out)["reason"]
        with pytest.raises(StoreDenied):
            await asyncio.wait_for(_to_its_end(watch), 20)
    with pytest.raises(StoreDenied):
        await store.put(keys.host_info("host2"), b"{}")
    assert "host/host2: its certificate was revoked" in machine.log("store")
    own = machine.store(machine.places.tls)
    assert (await own.range(f"{keys.HOSTS}host2/")).kvs == ()
    await own.aclose()
    await store.aclose()


async def _to_its_end(watch: object) -> None:
    async for _ in watch:  # type: ignore[attr-defined]
        pass


def _info(name: str) -> dict[str, object]:
    return {
        "name": name,
        "agent_url": "https://127.0.0.1:1",
        "cpus": 1,
        "memory_bytes": 1,
        "qemu": {"version": [10, 0, 0], "accelerator": "tcg"},
        "migration_address": "127.0.0.1",
    }


def _etcd(machine: Machine) -> str:
    """One etcd member with a certificate of the cluster's CA and its list of revoked ones."""
    assert ETCD is not None
    directory = machine.root / "etcd-tls"
    words = ("--role", "store", "--address", machine.address, "--into", str(directory))
    machine.done("cluster", "issue", "etcd1", *words, "--root", str(machine.places.root))
    url, peer = f"https://{machine.address}:2379", f"http://{machine.address}:2380"
    machine.run(
        *(ETCD, "--name", "etcd1", "--data-dir", str(machine.root / "etcd")),
        *("--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"etcd1={peer}"),
        *("--cert-file", directory / "cert.pem", "--key-file", directory / "key.pem"),
        *("--trusted-ca-file", directory / "ca.pem", "--client-cert-auth"),
        *("--client-crl-file", directory / "crl.pem"),
        log="etcd",
    )
    return url


async def _reached(store: StoreClient) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await store.get(keys.TRUST_CLUSTER, timeout=2.0)
            except StoreError:
                await asyncio.sleep(0.1)  # it is coming up; nothing announces it
            else:
                return


def test_records_go_from_the_embedded_store_to_etcd_and_back(machine: Machine) -> None:
    machine.init()
    store = machine.start("store")
    manager = machine.start("manager")
    machine.done("network", "create", "lan2", "--mtu", "9000")
    config = ("--config", str(machine.places.config("manager")))
    first, second, third = (machine.root / f"{name}.export" for name in ("one", "two", "three"))
    machine.done("cluster", "export", str(first), *config)
    url = _etcd(machine)

    async def use_etcd() -> None:
        client = machine.store(machine.places.manager_tls, url)
        await _reached(client)
        await client.aclose()

    asyncio.run(use_etcd())
    machine.done("cluster", "import", str(first), *config, "--endpoint", url)
    refused = machine.godwit("cluster", "import", str(first), *config, "--endpoint", url)
    assert refused.returncode == 4
    assert "is not empty" in refused.stderr
    machine.done("cluster", "export", str(second), *config, "--endpoint", url)
    # Back again, into a new embedded store in the old one's place.
    machine.end(manager)
    machine.end(store)
    shutil.rmtree(machine.places.root / "var" / "lib" / "godwit-store")
    machine.start("store")
    machine.done("cluster", "import", str(second), *config)
    machine.done("cluster", "export", str(third), *config)
    contents = [_content(path) for path in (first, second, third)]
    assert contents[0] == contents[1] == contents[2]
    assert keys.network("lan2") in contents[0]
    machine.start("manager")
    assert "lan2" in machine.done("network", "list")


def _content(path: Path) -> dict[str, str]:
    """What an import must keep: all but the log of events."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:-1]]
    return {one["key"]: one["value"] for one in lines if not one["key"].startswith(keys.EVENTS)}


async def test_etcd_refuses_a_revoked_host_when_a_connection_begins(machine: Machine) -> None:
    """And keeps one that is open: what etcd can and what it cannot."""
    machine.init()
    machine.start("store")
    manager = machine.start("manager")
    token = machine.done("cluster", "token", "create").strip()
    assert machine.join("host2", token).returncode == 0
    url, tls = _etcd(machine), Places(machine.root / "host2").tls
    old, new = machine.store(tls, url), machine.store(tls, url)
    try:
        await _reached(old)
        own = machine.store(machine.places.tls)
        await own.put(keys.host_info("host2"), json.dumps(_info("host2")).encode())
        await own.aclose()
        await asyncio.to_thread(machine.done, "cluster", "remove", "host2")
        etcd = Place(machine.root / "etcd-tls")
        assert etcd.take_list((machine.places.ca / "crl.pem").read_bytes())
        with pytest.raises(StoreDenied):
            await new.put("/a", b"1")
        assert await old.put("/a", b"2") > 0
    finally:
        await old.aclose()
        await new.aclose()
    machine.end(manager)
