"""The hosts of a simulated cluster: what their guards and agents write, and where agents answer.

One process stands for all of them, but each has a connection of its own to the store, its own two
leases, its own rhythm and, for the manager's question how much memory is free, its own address and
certificate. Written is what a guard writes (lease kept alive and ``renewal`` put side by side every
3 s) and what an agent keeps (its presence, every 1.5 s), or so many times slower, with leases that
are as much longer. There are no VMs and no watches behind it.

Started by `scale.py`, with one JSON document on standard input; says JSON lines on standard output,
``ready`` first, and the figures of its renewals when standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from godwit.agent.main import AGENT_TTL_S
from godwit.guard.lease import RENEW_S, TTL_S
from godwit.model import keys
from godwit.store.client import StoreClient
from godwit.store.errors import LeaseNotFound, StoreError
from godwit.wire.identity import STORE, Identity
from godwit.wire.tls import ClientTls, Expect

AGENT_PORT = 7101
FREE_BYTES = 100 << 30
AT_ONCE = 32
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


@dataclass
class Told:
    """What the renewals of all hosts came to; latencies in seconds from sending to the answer."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    lost: int = 0  # leases that ran out
    asked: int = 0  # how often an agent was asked for its free memory


def address(number: int) -> str:
    """Where the agent of a host answers: an address of the loopback network of its own."""
    return f"127.71.{number // 250}.{number % 250 + 1}"


class Host:
    """One host: guard and agent, as far as the store and the manager see them."""

    def __init__(
        self, name: str, boot_id: str, store: StoreClient, told: Told, slow: float
    ) -> None:
        self.name = name
        self._slow = slow
        self._boot_id = boot_id
        self._store = store
        self._told = told
        self._leases = {"guard": 0, "agent": 0}
        self._number = 0

    async def appear(self) -> None:
        """Take both leases and write what they hold; a store that is slow is asked again."""
        while True:
            try:
                return await self._appear()
            except StoreError:
                self._told.failed += 1

    async def _appear(self) -> None:
        boot = json.dumps({"boot_id": self._boot_id}).encode()
        for who, ttl, key in (
            ("guard", TTL_S, keys.host_lease(self.name)),
            ("agent", AGENT_TTL_S, keys.host_agent(self.name)),
        ):
            lease = await self._store.lease_grant(ceil(self._slow * ttl), timeout=30.0)
            await self._store.put(key, boot, lease=lease.id, timeout=30.0)
            self._leases[who] = lease.id
        await self._renew()

    async def live(self, phase: float) -> None:
        """Renew for ever; ``phase`` (0 to 1) spreads the hosts over the period."""
        loop = asyncio.get_running_loop()
        due = loop.time() + phase * RENEW_S * self._slow
        halves = 0
        while True:
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += AGENT_TTL_S / 4 * self._slow
            halves += 1
            try:
                # The agent's period is half the guard's.
                work = [self._store.lease_keepalive(self._leases["agent"], timeout=RENEW_S)]
                if halves % 2:
                    work.append(self._renew())
                await asyncio.gather(*work)
            except LeaseNotFound:
                self._told.lost += 1
                await self.appear()
            except StoreError:
                self._told.failed += 1

    async def _renew(self) -> None:
        self._number += 1
        value = {
            "boot_id": self._boot_id,
            "number": self._number,
            "guard": "armed",
            "watchdog": True,
        }
        sent = time.perf_counter()
        await asyncio.gather(
            self._store.lease_keepalive(self._leases["guard"], timeout=RENEW_S),
            self._store.put(
                f"{keys.HOSTS}{self.name}/renewal",
                json.dumps(value, separators=(",", ":")).encode(),
                lease=self._leases["guard"],
                timeout=RENEW_S,
            ),
        )
        self._told.seconds.append(time.perf_counter() - sent)


def agent_context(identity: Path) -> ssl.SSLContext:
    """TLS as an agent serves it: 1.3, certificates on both sides."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    context.load_verify_locations(identity / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return context


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, told: Told) -> None:
    """``GET /v1/capacity`` and the client's question whether TLS let it in, until it hangs up."""
    body = json.dumps({"memory_free_bytes": FREE_BYTES, "cpus": 64, "load": 0.1}).encode()
    with contextlib.suppress(OSError, EOFError, ssl.SSLError):
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(b"OPTIONS"):
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            else:
                told.asked += 1
                writer.write(HEAD % len(body) + body)
            await writer.drain()
    writer.close()


def clients(setup: dict[str, Any]) -> Iterator[StoreClient]:
    """A client for each host. Certificates prove the role; one identity does for all here."""
    identity = Identity.load(Path(setup["store_identity"]))
    context = ClientTls.for_daemon(identity, Expect(STORE)).context
    for _ in setup["hosts"]:
        yield StoreClient(setup["endpoints"], ssl_context=context)


async def run(setup: dict[str, Any]) -> None:
    told = Told()
    stores = list(clients(setup))
    hosts = [
        Host(name, boot, store, told, setup["slow"])
        for (name, boot), store in zip(setup["hosts"].items(), stores, strict=True)
    ]
    gate = asyncio.Semaphore(AT_ONCE)
    lives: set[asyncio.Task[None]] = set()

    async def begin(number: int, host: Host) -> None:
        async with gate:
            await host.appear()
        # Its leases run from here on: nobody waits for the others.
        lives.add(asyncio.create_task(host.live(number / len(hosts)), name=host.name))

    servers = []
    for number, host in enumerate(hosts):
        context = agent_context(Path(setup["identities"]) / host.name)
        serve = lambda reader, writer: answer(reader, writer, told)  # noqa: E731
        servers.append(await asyncio.start_server(serve, address(number), AGENT_PORT, ssl=context))
    await asyncio.gather(*(begin(number, host) for number, host in enumerate(hosts)))
    print(json.dumps({"ready": len(hosts)}), flush=True)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        if line.strip() == b"figures":
            seconds, told.seconds = told.seconds, []
            figures = {
                "renewals_s": seconds,
                "failed": told.failed,
                "lost": told.lost,
                "asked": told.asked,
            }
            told.failed = told.lost = told.asked = 0
            print(json.dumps(figures), flush=True)
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.stdin.readline())))
