"""How long the store takes, and how much it does in a second: embedded and etcd side by side.

Starts its own stores on this machine, in a directory given with --directory (its disk matters:
every write is flushed before it is answered, by each member). All of them get the same requests
from the same client; within a round they take turns, in another order each time, so that a noisy
moment hits all alike. Times are milliseconds, rates are operations a second.

    embedded    the store daemon on SQLite, over TLS
    unix        the same over its unix socket
    etcd-1      etcd, one member
    etcd-3      etcd, three members on this one machine and disk: no network between, but three
                times the flushes and the processor time; on three machines those are apart
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.store import api, etcd
from godwit.store.client import StoreClient
from godwit.store.errors import StoreError
from godwit.store.members import leader_of
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import STORE_MEMBER_DNS

NAMES = ("embedded", "unix", "etcd-1", "etcd-3")
WRITERS = 16
READY_S = 30.0


@dataclass
class Peer:
    """One store under test: a client, its processes, and what was measured."""

    name: str
    client: StoreClient
    pids: tuple[int, ...]
    samples: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, values: list[float]) -> None:
        """More samples of a kind."""
        self.samples.setdefault(kind, []).extend(values)


def identity(directory: Path) -> ssl.SSLContext:
    """One identity for both ends, and the client's TLS; version 1.3 only, as everywhere."""
    authority = ClusterCa.create(cluster="bench")
    write_identity(directory, issue(authority, role="store", name="bench", ips=["127.0.0.1"]))
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone after the block."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def embedded(directory: Path, tls: Path, context: ssl.SSLContext) -> Iterator[list[Peer]]:
    """The store daemon, over TLS and over its unix socket."""
    path = directory / "s.sock"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(path))
        unix.listen()
        argv = [sys.executable, "-m", "godwit.store.daemon.main", "--data", str(directory / "data")]
        argv += ["--fd", str(tcp.fileno()), "--fd", str(unix.fileno())]
        for name in ("cert", "key", "ca"):
            argv += [f"--{name}", str(tls / f"{name}.pem")]
        log = (directory / "log").open("wb")
        handles = (tcp.fileno(), unix.fileno())
        with log, ended(subprocess.Popen(argv, pass_fds=handles, stderr=log)) as process:
            url = f"https://127.0.0.1:{tcp.getsockname()[1]}"
            pids = (process.pid,)
            yield [
                Peer("embedded", StoreClient([url], ssl_context=context), pids),
                Peer("unix", StoreClient([f"unix:{path}"]), pids),
            ]


@contextlib.contextmanager
def members(
    name: str, count: int, directory: Path, tls: Path, context: ssl.SSLContext
) -> Iterator[Peer]:
    """That many members of etcd on loopback, once they agree."""
    program = shutil.which("etcd")
    if program is None:
        sys.exit("etcd is not installed: apt-get install --no-install-recommends etcd-server")
    made = [etcd.EtcdMember(f"m{n}", "127.0.0.1", free_port(), free_port()) for n in range(count)]
    with contextlib.ExitStack() as stack:
        pids = []
        for member in made:
            words = etcd.argv(
                member,
                made,
                data=directory / member.name,
                tls=tls,
                member_dns=STORE_MEMBER_DNS,
                cluster=name,
                program=program,
            )
            log = stack.enter_context((directory / f"{member.name}.log").open("wb"))
            started = subprocess.Popen(words, stdout=log, stderr=log)
            pids.append(stack.enter_context(ended(started)).pid)
        urls = [member.client_url for member in made]
        asyncio.run(agreed(urls, context))
        yield Peer(name, StoreClient(urls, ssl_context=context), tuple(pids))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def agreed(urls: list[str], context: ssl.SSLContext) -> None:
    """Return when all members follow one leader."""
    client = StoreClient(urls, ssl_context=context, timeout=1.0)
    async with asyncio.timeout(READY_S):
        while True:
            views = await client.members()
            if leader_of(views) is not None and all(view.status for view in views):
                break
            await asyncio.sleep(0.05)
    await client.aclose()


# What is measured


async def swaps(store: StoreClient, rounds: int) -> list[float]:
    """Compare-and-swaps of a record of typical size, one after the other."""
    revision = await store.put("bench/owner", b"x")
    samples = []
    for number in range(rounds):
        began = time.perf_counter()
        result = await store.txn(
            [api.mod_is("bench/owner", revision)],
            [api.put("bench/owner", b'{"host":"host1","epoch":%d}' % number)],
        )
        samples.append(time.perf_counter() - began)
        assert result.succeeded
        revision = result.revision
    return samples


async def reads(store: StoreClient, rounds: int) -> list[float]:
    """Linearizable reads, one after the other."""
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        await store.get("bench/owner")
        samples.append(time.perf_counter() - began)
    return samples


async def watches(store: StoreClient, rounds: int) -> list[float]:
    """From sending a put to its event at a watch."""
    samples = []
    async with store.watch("bench/watch") as watch:
        await anext(watch)
        for number in range(rounds):
            began = time.perf_counter()
            waiting = asyncio.ensure_future(anext(watch))
            await store.put("bench/watch/k", b"%d" % number)
            while not (await waiting).events:
                waiting = asyncio.ensure_future(anext(watch))
            samples.append(time.perf_counter() - began)
    return samples


async def renewals(store: StoreClient, rounds: int) -> list[float]:
    """Keeping a lease alive."""
    lease = await store.lease_grant(60)
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        await store.lease_keepalive(lease.id)
        samples.append(time.perf_counter() - began)
    await store.lease_revoke(lease.id)
    return samples


async def together(
    work: Callable[[int, int], Awaitable[object]], workers: int, rounds: int
) -> list[float]:
    """Operations a second with several workers at once."""

    async def one(worker: int) -> None:
        for number in range(rounds):
            await work(worker, number)

    began = time.perf_counter()
    await asyncio.gather(*(one(worker) for worker in range(workers)))
    return [workers * rounds / (time.perf_counter() - began)]


async def many_writes(store: StoreClient, rounds: int) -> list[float]:
    """Writes a second with many writers."""
    return await together(
        lambda worker, number: store.put(f"bench/many/{worker}", b"%d" % number), WRITERS, rounds
    )


async def many_reads(store: StoreClient, rounds: int) -> list[float]:
    """Linearizable reads a second with many readers."""
    return await together(lambda worker, _: store.get(f"bench/many/{worker}"), WRITERS, rounds)


Measure = Callable[[StoreClient, int], Awaitable[list[float]]]
TIMES: dict[str, Measure] = {
    "compare-and-swap": swaps,
    "linearizable read": reads,
    "put to event": watches,
    "lease renewal": renewals,
}
RATES: dict[str, Measure] = {
    f"{WRITERS} writers": many_writes,
    f"{WRITERS} readers": many_reads,
}


async def measure(peers: list[Peer], *, rounds: int, blocks: int, idle_s: float) -> None:
    """Everything, in blocks; each begins with another store."""
    for peer in peers:
        await swaps(peer.client, 50)
    for block in range(blocks):
        turn = peers[block % len(peers) :] + peers[: block % len(peers)]
        for kind, work in TIMES.items():
            for peer in turn:
                peer.add(kind, await work(peer.client, rounds))
        for kind, work in RATES.items():
            for peer in turn:
                peer.add(kind, await work(peer.client, max(10, rounds // 4)))
        print(f"  block {block + 1} of {blocks}", file=sys.stderr)
    async with contextlib.AsyncExitStack() as stack:
        for peer in peers:
            for _ in range(2):
                await anext(await stack.enter_async_context(peer.client.watch("idle/")))
        before = {peer.name: cpu_s(peer) for peer in peers}
        await asyncio.sleep(idle_s)
        for peer in peers:
            peer.facts["idle_cpu_percent"] = 100 * (cpu_s(peer) - before[peer.name]) / idle_s
            peer.facts["resident_mib"] = sum(map(resident_mib, peer.pids))
    for peer in peers:
        await peer.client.aclose()


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS")) / 1024
    )


def cpu_s(peer: Peer) -> float:
    """Processor seconds of a store's processes so far."""
    ticks = 0
    for pid in peer.pids:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def flushes(directory: Path, rounds: int) -> list[float]:
    """What the disk itself takes for an overwrite of a page and its flush."""
    samples = []
    handle = os.open(directory / "flush", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(handle, bytes(1 << 20), 0)
        os.fsync(handle)
        for number in range(rounds):
            began = time.perf_counter()
            os.pwrite(handle, bytes(16384), 16384 * (number % 60))
            os.fdatasync(handle)
            samples.append(time.perf_counter() - began)
    finally:
        os.close(handle)
    return samples


# Telling


def percentile(samples: list[float], share: float) -> float:
    """The sample below which this share of them lies."""
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


def result(peers: list[Peer], flush: list[float]) -> dict[str, Any]:
    """Everything as one object."""
    found: dict[str, Any] = {"flush_ms": summary(flush), "load": os.getloadavg()[0], "stores": {}}
    for peer in peers:
        times = {kind: summary(peer.samples[kind]) for kind in TIMES}
        rates = {kind: percentile(peer.samples[kind], 0.5) for kind in RATES}
        for kind in TIMES:
            rates[kind] = 1 / (sum(peer.samples[kind]) / len(peer.samples[kind]))
        found["stores"][peer.name] = {
            "times_ms": times,
            "per_second": {kind: round(value, 1) for kind, value in rates.items()},
            **{name: round(value, 2) for name, value in peer.facts.items()},
        }
    return found


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 95th of a hundred and the worst, in milliseconds."""
    names = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(1e3 * percentile(samples, share), 3) for name, share in names.items()}


def table(found: dict[str, Any]) -> list[str]:
    """The result for people: one column a store."""
    stores = found["stores"]
    flush = found["flush_ms"]
    lines = [
        f"flush of 16 KiB, bare: p50 {flush['p50']} ms, p95 {flush['p95']} ms;"
        f" load {found['load']:.1f}",
        f"{'':28}" + "".join(f"{name:>22}" for name in stores),
    ]
    for kind in TIMES:
        cells = [store["times_ms"][kind] for store in stores.values()]
        shown = [f"{cell['p50']:.2f} / {cell['p95']:.2f} ms" for cell in cells]
        lines.append(f"{kind + ', p50 / p95':28}" + "".join(f"{text:>22}" for text in shown))
    for kind in (*TIMES, *RATES):
        shown = [f"{store['per_second'][kind]:.0f} /s" for store in stores.values()]
        lines.append(f"{kind:28}" + "".join(f"{text:>22}" for text in shown))
    for fact, unit in (("idle_cpu_percent", "% of a core"), ("resident_mib", "MiB")):
        shown = [f"{store[fact]:.1f} {unit}" for store in stores.values()]
        lines.append(f"{fact.partition('_')[0]:28}" + "".join(f"{text:>22}" for text in shown))
    return lines


def run(directory: Path, *, rounds: int, blocks: int, idle_s: float) -> dict[str, Any]:
    """Start the stores, measure, take them away."""
    tls = directory / "tls"
    context = identity(tls)
    flush = flushes(directory, rounds)
    with contextlib.ExitStack() as stack:
        folders = {name: directory / name for name in ("embedded", "etcd-1", "etcd-3")}
        for folder in folders.values():
            folder.mkdir()
        peers = stack.enter_context(embedded(folders["embedded"], tls, context))
        for name, count in (("etcd-1", 1), ("etcd-3", 3)):
            peers.append(stack.enter_context(members(name, count, folders[name], tls, context)))
        asyncio.run(measure(peers, rounds=rounds, blocks=blocks, idle_s=idle_s))
    return result(peers, flush)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="of each kind in a block")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--idle", type=float, default=5.0, help="seconds to watch them idle")
    parser.add_argument("--directory", type=Path, help="where the data goes (default: temporary)")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="store-bench-", dir=given.directory))
    try:
        found = run(directory, rounds=given.rounds, blocks=given.blocks, idle_s=given.idle)
    except (StoreError, TimeoutError) as error:
        print(f"a store did not answer: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory)
    print(json.dumps(found, indent=1) if given.json else "\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
