"""How long the store takes: transactions and watches, over a unix socket and over TLS.

Starts its own daemons on this machine, on a directory given with --directory (its disk matters:
every transaction is flushed), and prints one line per figure, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from godwit.store import api
from godwit.store.client import StoreClient
from godwit.wire.ca import ClusterCa, issue, write_identity

Figures = dict[str, float]


@contextlib.contextmanager
def daemon(directory: Path) -> Iterator[tuple[int, dict[str, StoreClient]]]:
    """A running daemon: its process id, and a client over each transport."""
    write_identity(
        directory,
        issue(ClusterCa.create(cluster="bench"), role="store", name="store1", ips=["127.0.0.1"]),
    )
    context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
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
            argv += [f"--{name}", str(directory / f"{name}.pem")]
        process = subprocess.Popen(argv, pass_fds=(tcp.fileno(), unix.fileno()))
        try:
            yield (
                process.pid,
                {
                    "unix": StoreClient([f"unix:{path}"]),
                    "tls": StoreClient(
                        [f"https://127.0.0.1:{tcp.getsockname()[1]}"], ssl_context=context
                    ),
                },
            )
        finally:
            process.terminate()
            process.wait(10)


def percentile(samples: list[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(len(samples) * share))]


def line(name: str, samples: list[float]) -> None:
    p50, p95, worst = (1e3 * percentile(samples, share) for share in (0.5, 0.95, 1.0))
    print(f"{name:34} p50 {p50:7.3f} ms  p95 {p95:7.3f} ms  max {worst:7.3f} ms")


async def transactions(store: StoreClient, rounds: int) -> list[float]:
    """Sequential compare-and-swaps of a record of typical size."""
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
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        await store.get("bench/owner")
        samples.append(time.perf_counter() - began)
    return samples


async def watches(writer: StoreClient, watcher: StoreClient, rounds: int) -> list[float]:
    """From sending a put to the event at another client, and beyond the put's own answer."""
    samples = []
    async with watcher.watch("bench/watch") as watch:
        await anext(watch)
        for number in range(rounds):
            began = time.perf_counter()
            waiting = asyncio.ensure_future(anext(watch))
            await writer.put("bench/watch/k", b"%d" % number)
            await waiting
            samples.append(time.perf_counter() - began)
    return samples


async def together(store: StoreClient, workers: int, rounds: int) -> float:
    """Transactions per second with several at once."""

    async def work(worker: int) -> None:
        for number in range(rounds):
            await store.put(f"bench/many/{worker}", b"%d" % number)

    began = time.perf_counter()
    await asyncio.gather(*(work(worker) for worker in range(workers)))
    return workers * rounds / (time.perf_counter() - began)


def flush(directory: Path, rounds: int) -> list[float]:
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


def process_facts(pid: int) -> tuple[float, float]:
    """Resident MiB and CPU seconds of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmRSS"))
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return rss / 1024, (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


async def measure(pid: int, clients: dict[str, StoreClient], rounds: int, idle_s: float) -> None:
    for name, store in clients.items():
        await transactions(store, 50)
        line(f"transaction, {name}", await transactions(store, rounds))
        line(f"linearizable read, {name}", await reads(store, rounds))
        line(f"put to event elsewhere, {name}", await watches(store, store, rounds))
    rate = await together(clients["tls"], 16, max(20, rounds // 8))
    print(f"{'16 writers at once, tls':34} {rate:.0f} transactions/s")
    async with contextlib.AsyncExitStack() as stack:
        for store in clients.values():
            await anext(await stack.enter_async_context(store.watch("idle/")))
        await clients["tls"].lease_grant(60)
        before = process_facts(pid)[1]
        await asyncio.sleep(idle_s)
        rss, cpu = process_facts(pid)
    print(f"{'daemon, idle with 2 watches':34} {100 * (cpu - before) / idle_s:.2f} % of a core")
    print(f"{'daemon, resident':34} {rss:.1f} MiB")
    for store in clients.values():
        await store.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--idle", type=float, default=5.0, help="seconds to watch it idle")
    parser.add_argument("--directory", type=Path, help="where the data goes (default: temporary)")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="store-bench-", dir=given.directory))
    try:
        line("flush of 16 KiB, bare", flush(directory, given.rounds))
        with daemon(directory) as (pid, clients):
            asyncio.run(measure(pid, clients, given.rounds, given.idle))
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"{'client, CPU in all':34} {used.ru_utime + used.ru_stime:.2f} s")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
