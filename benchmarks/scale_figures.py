"""What is measured of a running manager: listings, followers, rest, decisions, store operations.

Every function returns plain figures (seconds, bytes, counts); `scale.py` prints and keeps them.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scale_decide
from scale_parts import Hosts, Place, RunningManager, RunningStore, usage

from godwit.manager.cache import Cache
from godwit.manager.leadership import states_of, transitions
from godwit.manager.metrics import Metrics
from godwit.manager.rooms import rooms_of
from godwit.manager.rows import ALL, VmRows
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import need_of
from godwit.manager.work.queueing import waits_for
from godwit.model import keys
from godwit.model.migration import Migration, MoveState
from godwit.model.ownership import OwnerState
from godwit.planner.placement import choose
from godwit.store.api import mod_is, put
from godwit.store.records import Records
from godwit.wire.http import PeerClient
from godwit.wire.tls import ClientTls

Figures = dict[str, Any]
EVENT_KIND = "vm.bench"
LATEST_S = 60.0
FREE = 100 << 30


def spread(samples: Sequence[float]) -> Figures:
    """Median, 99th percentile and worst of samples, in their own unit."""
    ordered = sorted(samples)
    if not ordered:
        return {"n": 0, "p50": None, "p99": None, "max": None}
    at = min(len(ordered) - 1, int(len(ordered) * 0.99))
    return {
        "n": len(ordered),
        "p50": statistics.median(ordered),
        "p99": ordered[at],
        "max": ordered[-1],
    }


def timed(work: Callable[[], Any], *, rounds: int) -> Figures:
    """The processor time of a call that waits for nothing, in seconds."""
    samples = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        samples.append(time.process_time() - began)
    return spread(samples)


# At rest


def rest(store: RunningStore, manager: RunningManager, hosts: Hosts, seconds: float) -> Figures:
    """Shares of a core and resident bytes of each process while only renewals come in."""
    pids = {"manager": manager.pid, "store": store.pid, "hosts": hosts.pid}
    hosts.figures()
    before = {name: usage(pid) for name, pid in pids.items()}
    began = time.perf_counter()
    time.sleep(seconds)  # nothing announces that a time of rest is over
    spent = time.perf_counter() - began
    after = {name: usage(pid) for name, pid in pids.items()}
    told = hosts.figures()
    return {
        "seconds": spent,
        "cores": {n: (after[n].cpu_s - before[n].cpu_s) / spent for n in pids},
        "resident_bytes": {name: one.resident_bytes for name, one in after.items()},
        "renewals_per_s": len(told["renewals_s"]) / spent,
        "renewal_s": spread(told["renewals_s"]),
        "renewals_failed": told["failed"],
        "leases_lost": told["lost"],
    }


# Listings

LISTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "vms": ("/v1/vms", {}),
    "vms, 8 fields": (
        "/v1/vms",
        {"fields": "name,state,host,epoch,cpus,memory_bytes,ha,reason"},
    ),
    "vms, a page of 500": ("/v1/vms", {"limit": "500"}),
    "vms of one host": ("/v1/vms", {"host": "host0000"}),
    "one vm": ("/v1/vms/vm00000", {}),
    "hosts": ("/v1/hosts", {}),
    "one host": ("/v1/hosts/host0000", {}),
    "networks": ("/v1/networks", {}),
    "volumes": ("/v1/volumes", {}),
    "tasks": ("/v1/tasks", {}),
    "migrations": ("/v1/migrations", {}),
    "metrics": ("/metrics", {}),
}


async def listings(place: Place, manager: RunningManager, rounds: int) -> Figures:
    """Each list over the API: the first time, and again while renewals come in."""
    tls = ClientTls.for_api(place.identity("manager") / "ca.pem")
    found: Figures = {}
    async with PeerClient(manager.url, tls=tls, token=place.token, deadline_s=120.0) as client:
        await client.get("/v1/health")
        for name, (path, query) in LISTINGS.items():
            before = usage(manager.pid).cpu_s
            samples, size, rows = [], 0, 0
            for number in range(rounds + 1):
                began = time.perf_counter()
                answer = await client.request("GET", path, query=query)
                samples.append(time.perf_counter() - began)
                size = len(answer.body)
                if number == 0 and path != "/metrics":
                    rows = len(answer.json())
            found[name] = {
                "first_s": samples[0],
                "again_s": spread(samples[1:]),
                "bytes": size,
                "rows": rows,
                "manager_cpu_s": (usage(manager.pid).cpu_s - before) / len(samples),
            }
    return found


COMMANDS = (
    ("vm", "list"),
    ("vm", "list", "-o", "json"),
    ("host", "list"),
    ("host", "list", "-o", "json"),
)


def commands(place: Place, manager: RunningManager, rounds: int) -> Figures:
    """What a person waits for: the command line, from its start to its end."""
    found: Figures = {}
    environment = os.environ | {
        "GODWIT_URL": manager.url,
        "GODWIT_TOKEN_FILE": str(place.root / "token"),
        "GODWIT_CA_FILE": str(place.identity("manager") / "ca.pem"),
    }
    program = str(Path(sys.executable).with_name("godwit"))
    for words in COMMANDS:
        samples, size = [], 0
        for _ in range(rounds):
            began = time.perf_counter()
            done = subprocess.run(
                [program, *words], env=environment, capture_output=True, check=True, timeout=300
            )
            samples.append(time.perf_counter() - began)
            size = len(done.stdout)
        found[" ".join(words)] = {"seconds": spread(samples), "bytes": size}
    return found


# Followers


class Follower:
    """One reader of the event stream; notes when each event of the benchmark arrived."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.seen: dict[int, float] = {}
        self.last = asyncio.Event()  # the last event of the benchmark has arrived

    @staticmethod
    async def open(place: Place, manager: RunningManager, query: str = "") -> Follower:
        context = ssl.create_default_context(cafile=str(place.identity("manager") / "ca.pem"))
        context.check_hostname = False
        port = int(manager.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(
            f"GET /v1/events{query} HTTP/1.1\r\nhost: localhost\r\n"
            f"authorization: Bearer {place.token}\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        return Follower(reader, writer)

    async def read(self, last: int) -> None:
        """Until cancelled. Only the marks are looked for: reading must not be what is measured."""
        rest = b""
        while chunk := await self._reader.read(1 << 16):
            now = time.perf_counter()
            rest += chunk
            *whole, rest = rest.split(b"bench-mark-")
            for part in (*whole[1:], rest) if whole else ():
                mark = part[:6]
                if len(mark) == 6 and mark.isdigit():
                    self.seen.setdefault(int(mark), now)
                    if int(mark) == last:
                        self.last.set()
            rest = (b"bench-mark-" + rest) if whole and len(rest) < 6 else rest[-16:]
        self.last.set()  # sent away: it was too slow, and does not come back here


async def followers(
    place: Place, store: RunningStore, manager: RunningManager, *, count: int, events: int
) -> Figures:
    """From an agent's sending an event to its arrival at each of ``count`` readers, in seconds.

    Beside it the way to a watch of the store itself: the manager's part is what lies between.
    """
    client = place.store_client(store.endpoint, timeout=30.0)
    records = Records(client)
    async with asyncio.TaskGroup() as group:
        opening = [group.create_task(Follower.open(place, manager)) for _ in range(count)]
    readers = [task.result() for task in opening]
    reading = [asyncio.create_task(reader.read(events - 1)) for reader in readers]
    watched: dict[int, float] = {}
    watching = asyncio.create_task(_watch(place, store, watched))
    await asyncio.sleep(1.0)  # the last reader's stream stands once its greeting is written
    before = usage(manager.pid).cpu_s
    began, sent = time.perf_counter(), {}
    for number in range(events):
        sent[number] = time.perf_counter()
        await records.append_event(
            EVENT_KIND, "vm/vm00000", f"bench-mark-{number:06d}", at=time.time()
        )
        await asyncio.sleep(max(0.0, began + (number + 1) * 0.05 - time.perf_counter()))
    wanted = range(events)
    lasts = [asyncio.create_task(reader.last.wait()) for reader in readers]
    _, late = await asyncio.wait(lasts, timeout=LATEST_S)
    for task in late:
        task.cancel()
    spent, cpu = time.perf_counter() - began, usage(manager.pid).cpu_s - before
    for task in (*reading, watching):
        task.cancel()
    await asyncio.gather(*reading, watching, return_exceptions=True)
    for reader in readers:
        reader.writer.transport.abort()
    await client.aclose()
    took = [reader.seen[n] - sent[n] for reader in readers for n in wanted if n in reader.seen]
    return {
        "followers": count,
        "latency_s": spread(took),
        "missed": count * events - len(took),
        "store_watch_s": spread([watched[n] - sent[n] for n in wanted if n in watched]),
        "manager_cores": cpu / spent,
    }


async def _watch(place: Place, store: RunningStore, seen: dict[int, float]) -> None:
    client = place.store_client(store.endpoint)
    try:
        async with client.watch(keys.EVENTS) as watch:
            async for batch in watch:
                now = time.perf_counter()
                for event in batch.events:
                    value = json.loads(event.kv.value)
                    if value["kind"] == EVENT_KIND:
                        seen[int(value["message"].rpartition("-")[2])] = now
    finally:
        await client.aclose()


# Decisions


async def read_all(place: Place, store: RunningStore) -> tuple[Cache, Figures]:
    """The cluster as a manager has it in memory, read here the same way; and what that took."""
    client = place.store_client(store.endpoint)
    cache = Cache(client)
    began, cpu = time.perf_counter(), time.process_time()
    following = asyncio.create_task(cache.run())
    await cache.ready.wait()
    took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await client.aclose()
    return cache, took


def decisions(cache: Cache, *, rounds: int) -> Figures:
    """One look of each kind at the whole cluster, and the placement of VMs; processor time."""
    snapshot = cache.snapshot
    vms = sorted(name for name, one in snapshot.owners.items() if one.state is OwnerState.RUNNING)
    hosts = sorted(snapshot.hosts)
    free: dict[str, int | None] = dict.fromkeys(hosts, FREE)
    lost = [name for name in vms if snapshot.owners[name].host == hosts[0]]
    rooms = rooms_of(snapshot, free)
    before = states_of(snapshot)
    queue = _queue(snapshot, hosts, vms)
    metrics = Metrics()
    some = vms[:: max(1, len(vms) // 200)]

    def place_all(names: Sequence[str]) -> None:
        for name in names:
            choose(rooms, need_of(snapshot, name))

    one = timed(lambda: choose(rooms, need_of(snapshot, vms[0])), rounds=rounds)
    sample = timed(lambda: place_all(some), rounds=1)["p50"]
    return {
        "states of all hosts": timed(lambda: transitions(before, snapshot), rounds=rounds),
        "rooms of all hosts": timed(lambda: rooms_of(snapshot, free), rounds=rounds),
        "one placement": one,
        "a lost host": {
            "vms": len(lost),
            **timed(lambda: (rooms_of(snapshot, free), place_all(lost)), rounds=rounds),
        },
        "placement of every vm": {
            "vms": len(vms),
            "placed": len(some),
            "seconds_for_all": sample / len(some) * len(vms),
        },
        "rows of all vms": timed(
            lambda: asyncio.run(VmRows().of(snapshot, snapshot.vm_names, ALL)),
            rounds=min(rounds, 3),
        ),
        "metrics": timed(lambda: metrics.render(cache), rounds=min(rounds, 3)),
        "failover": [scale_decide.cycle(snapshot, free, lost=lost) for lost in (0, 1, 3)],
        "a queue": {
            "waiting": sum(move.state is MoveState.WAITING for move in queue.migrations.values()),
            **timed(
                lambda: [
                    waits_for(queue, move)
                    for move in queue.migrations.values()
                    if move.state is MoveState.WAITING
                ],
                rounds=min(rounds, 3),
            ),
        },
    }


def _queue(snapshot: Snapshot, hosts: Sequence[str], vms: Sequence[str]) -> Snapshot:
    """The same cluster with one move waiting for each ten hosts, beside its history."""
    from dataclasses import replace

    from godwit.model.task import Task, TaskState

    moves, tasks = dict(snapshot.migrations), dict(snapshot.tasks)
    for number in range(0, len(hosts), 10):
        name = f"m-f{number:011x}00"
        vm = vms[number]
        moves[name] = Migration(
            id=name, vm=vm, source=hosts[number], destination=hosts[number - 5],
        )  # fmt: skip
        task = f"t-f{number:011x}00"
        tasks[task] = Task(
            id=task, request={}, subject=f"vm/{vm}", state=TaskState.WAITING,
            created_at=0.0, progress={"migration": name},
        )  # fmt: skip
    return replace(snapshot, migrations=moves, tasks=tasks)


# The store


async def operations(place: Place, store: RunningStore, *, rounds: int, writers: int) -> Figures:
    """Compare-and-swaps one after the other, and writes by many at once, beside the renewals."""
    client = place.store_client(store.endpoint, timeout=30.0)
    key = "bench/owner"
    revision = await client.put(key, b"x")
    samples = []
    for number in range(rounds):
        began = time.perf_counter()
        done = await client.txn(
            [mod_is(key, revision)], [put(key, b'{"host":"host0001","epoch":%d}' % number)]
        )
        samples.append(time.perf_counter() - began)
        assert done.succeeded
        revision = done.revision
    reads = []
    for _ in range(rounds):
        began = time.perf_counter()
        await client.get(key)
        reads.append(time.perf_counter() - began)

    async def write(worker: int) -> None:
        for number in range(rounds // 4):
            await client.put(f"bench/{worker}", b"%d" % number)

    began = time.perf_counter()
    await asyncio.gather(*(write(worker) for worker in range(writers)))
    spent = time.perf_counter() - began
    await client.delete("bench/", prefix=True)
    await client.aclose()
    return {
        "swap_s": spread(samples),
        "read_s": spread(reads),
        "writers": writers,
        "writes_per_s": writers * (rounds // 4) / spent,
    }
