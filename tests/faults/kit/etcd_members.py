"""The store's members go under running VMs: nothing stops that need not, all comes together again.

    member    one that does not lead is killed; its host's supervisor starts it again
    leader    the one that leads stands still, and goes on
    quorum    two of three stand still, the leader among them, and go on
    manager   the manager that leads is killed and stays away
    power     the host of the store's leader loses its power, and gets it back

Beside it writes go to the store, lists are asked of the API, and VMs move back and forth; each wait
is measured from outside.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from godwit.client.sync import Client
from godwit.lab import fault
from godwit.lab.keeping import ETCD, look
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.qemu.intervals import overlaps
from godwit.store.api import MemberView
from godwit.store.errors import StoreError
from godwit.store.members import leader_of, majority_without_leader

from .cluster import Cluster
from .evidence import copies, spans
from .formats import log_end, outside, read_log
from .guest import Guest
from .report import Say, Section, tell

PARTS = ("member", "leader", "quorum", "manager")
FROZEN_S = 15.0
RECORDS_PER_S = 20
PROBE = "/proof/probe"  # outside of what managers follow
ELECTED_S = 8.0  # a write, after a leader is gone
BACK_S = 12.0  # a write, after a majority is back
LEADS_S = 7.0  # another manager
AGREE_S = 30.0
_TICK_S = 0.05


@dataclass
class Probe:
    """When something outside was last known to work; the longest time between."""

    work: Callable[[], None]
    ok_at: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self.work()
                self.ok_at.append(time.monotonic())
            except (GodwitError, StoreError, OSError) as error:
                self.said.append(str(error))
            stop.wait(_TICK_S)

    def longest(self, since: float) -> float:
        """Seconds of the longest wait from a moment on, that at its end included."""
        times = [since, *(at for at in self.ok_at if at >= since), time.monotonic()]
        return max(b - a for a, b in itertools.pairwise(times))


class Outside:
    """What people and daemons would notice: the store's writes, the API's lists, moves."""

    def __init__(self, cluster: Cluster, moving: Sequence[str]) -> None:
        self._cluster = cluster
        self._moving = moving
        self._loop = asyncio.new_event_loop()
        self._store = cluster.lab.store_client(timeout=5.0)
        self._clients: list[Client] = []
        self.outcomes: list[str] = []
        self.writes = Probe(self._write)
        self._lister = self._client()
        self.lists = Probe(self._list)

    def _client(self) -> Client:
        self._clients.append(self._cluster.new_client())
        return self._clients[-1]

    def _list(self) -> None:
        self._lister.rows("vms")

    def _write(self) -> None:
        self._loop.run_until_complete(self._store.put(PROBE, b"%d" % time.monotonic_ns()))

    def _move(self, stop: threading.Event, vm: str, client: Client) -> None:
        while not stop.is_set():
            try:
                host = client.vms.get(vm).host
                to = next(name for name in self._cluster.hosts if name != host)
                client.wait(client.vms.migrate(vm, to=to))
                self.outcomes.append("completed")
            except GodwitError as error:
                self.outcomes.append(error.message)
                stop.wait(0.5)

    @contextmanager
    def watched(self) -> Iterator[Outside]:
        """Probes and moves go on inside the block; each move that began has ended after it."""
        stop = threading.Event()
        works: list[threading.Thread] = [
            threading.Thread(target=probe.run, args=(stop,)) for probe in (self.writes, self.lists)
        ]
        works += [
            threading.Thread(target=self._move, args=(stop, vm, self._client()))
            for vm in self._moving
        ]
        for work in works:
            work.start()
        try:
            yield self
        finally:
            stop.set()
            for work in works:
                work.join()
            self._loop.run_until_complete(self._store.aclose())
            self._loop.close()
            for client in self._clients:
                client.close()


def views(cluster: Cluster) -> tuple[MemberView, ...]:
    """What each member says now."""

    async def ask() -> tuple[MemberView, ...]:
        store = cluster.lab.store_client(timeout=2.0)
        try:
            return await look(store)
        finally:
            await store.aclose()

    return asyncio.run(ask())


def node_of(cluster: Cluster, url: str) -> str:
    """The node of a member."""
    return next(m.name for m in cluster.lab.layout.store_members if m.client_url == url)


def agreed(cluster: Cluster) -> str:
    """The node of the leader, once every member answers and one leads."""
    until = time.monotonic() + AGREE_S
    while True:
        seen = views(cluster)
        leader = leader_of(seen)
        if leader is not None and all(view.status and view.status.leader for view in seen):
            return node_of(cluster, leader.endpoint)
        assert time.monotonic() < until, f"the members do not agree: {seen}"
        time.sleep(_TICK_S)  # nothing announces an election


def run(
    cluster: Cluster,
    *,
    vms: int = 20,
    writing: int = 4,
    moving: int = 2,
    quorum_s: float = 60.0,
    parts: Sequence[str] = PARTS,
    say: Say = tell,
) -> Section:
    """The parts, one after the other, under so many VMs."""
    section = Section("etcd")
    names = [f"v{number}" for number in range(1, vms + 1)]
    guests = {name: _boot(cluster, name, number) for number, name in enumerate(names)}
    writers = names[:writing]
    for name in writers:
        guests[name].ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    # Moved are those that do not write, and the last of those that do.
    moved = [*names[writing : writing + moving - 1], *writers[-1:]][:moving]
    before = {name: guests[name].stats()["uptime_s"] for name in names}
    began = time.time()
    with Outside(cluster, moved).watched() as seen:
        for part in parts:
            found = _STEPS[part](cluster, seen, quorum_s)
            section.figures[part] = found
            say(f"etcd, {part}: {found}")
            _judge_part(section, part, found)
        section.figures["api_longest_wait_s"] = round(seen.lists.longest(seen.lists.ok_at[0]), 2)
    section.figures["moves"] = {word: seen.outcomes.count(word) for word in set(seen.outcomes)}
    agreed(cluster)
    cluster.heal()
    hosts = [(row["name"], row["state"]) for row in cluster.client.rows("hosts")]
    section.judge("every host is up afterwards", all(s == "up" for _, s in hosts), hosts)
    if names:
        _judge_vms(cluster, section, guests, before, began, still=set(names) - set(moved))
    if writers:
        _judge_logs(cluster, section, {name: guests[name] for name in writers})
    for name in names:
        cluster.remove(name)
    return section


def _boot(cluster: Cluster, name: str, number: int) -> Guest:
    host = cluster.hosts[number % len(cluster.hosts)]
    return cluster.make(name, host=host, memory_mib=128, disks=["shared:32M:raw"])


def _waits(seen: Outside, since: float) -> dict[str, float]:
    return {
        "longest_wait_for_a_write_s": round(seen.writes.longest(since), 2),
        "longest_wait_for_a_list_s": round(seen.lists.longest(since), 2),
    }


def _member(cluster: Cluster, seen: Outside, _: float) -> dict[str, Any]:
    leader = agreed(cluster)
    node = next(m.name for m in cluster.lab.layout.store_members if m.name != leader)
    since = time.monotonic()
    fault.kill_process(cluster.lab, node, ETCD)
    agreed(cluster)
    together = time.monotonic() - since
    return {"node": node, "together_again_s": round(together, 2), **_waits(seen, since)}


def _leader(cluster: Cluster, seen: Outside, _: float) -> dict[str, Any]:
    node = agreed(cluster)
    since = time.monotonic()
    fault.freeze_process(cluster.lab, node, ETCD)
    try:
        _until_written(seen, since)
        elected = time.monotonic() - since
        time.sleep(max(0.0, FROZEN_S - elected) if elected < FROZEN_S else 0.0)  # it stands still
    finally:
        fault.thaw_process(cluster.lab, node, ETCD)
    leader = agreed(cluster)
    return {
        "node": node,
        "written_again_s": round(elected, 2),
        "leader_after": leader,
        **_waits(seen, since),
    }


def _until_written(seen: Outside, since: float) -> None:
    """Return at the first write that was acknowledged from a second after the fault on."""
    until = time.monotonic() + AGREE_S
    while not any(at > since + 1.0 for at in seen.writes.ok_at[-50:]):
        assert time.monotonic() < until, f"no write: {seen.writes.said[-3:]}"
        time.sleep(_TICK_S)  # it is the probe that would say so


def _quorum(cluster: Cluster, seen: Outside, lasts_s: float) -> dict[str, Any]:
    leader = agreed(cluster)
    other = next(m.name for m in cluster.lab.layout.store_members if m.name != leader)
    since = time.monotonic()
    for node in (leader, other):
        fault.freeze_process(cluster.lab, node, ETCD)
    try:
        time.sleep(lasts_s)  # the fault itself
        during = views(cluster)
    finally:
        for node in (leader, other):
            fault.thaw_process(cluster.lab, node, ETCD)
    back = time.monotonic()
    _until_written(seen, back - 1.0)
    written = time.monotonic() - back
    agreed(cluster)
    return {
        "nodes": [leader, other],
        "lasted_s": round(back - since, 1),
        "leader_meanwhile": leader_of(during) is not None,
        "majority_said_no_leader": majority_without_leader(during),
        "written_again_s": round(written, 2),
        "longest_wait_for_a_list_s": round(seen.lists.longest(since), 2),
    }


def leading_manager(cluster: Cluster) -> str:
    """Who leads, by the record; empty when nobody does."""
    found = cluster.store(lambda records: records.store.get(keys.LEADER))
    return found.value.decode().partition("/")[0] if found else ""


def _manager(cluster: Cluster, seen: Outside, _: float) -> dict[str, Any]:
    until = time.monotonic() + AGREE_S
    while not (node := leading_manager(cluster)):
        assert time.monotonic() < until, "no manager leads"
        time.sleep(_TICK_S)
    since = time.monotonic()
    fault.kill_process(cluster.lab, node, "manager", hold=True)
    while (now := leading_manager(cluster)) in ("", node):
        assert time.monotonic() < since + AGREE_S, "no other manager leads"
        time.sleep(_TICK_S)
    spent = time.monotonic() - since
    fault.thaw_process(cluster.lab, node, "manager")
    return {"node": node, "leads_now": now, "leads_again_s": round(spent, 2), **_waits(seen, since)}


def _power(cluster: Cluster, seen: Outside, _: float) -> dict[str, Any]:
    node = agreed(cluster)
    since = time.monotonic()
    cluster.power_off(node)
    _until_written(seen, since)
    found = {"node": node, "written_again_s": round(time.monotonic() - since, 2)}
    listed = _waits(seen, since)
    cluster.power_on(node)
    agreed(cluster)
    return {**found, **listed}


_STEPS: dict[str, Callable[[Cluster, Outside, float], dict[str, Any]]] = {
    "member": _member,
    "leader": _leader,
    "quorum": _quorum,
    "manager": _manager,
    "power": _power,
}


def _judge_part(section: Section, part: str, found: dict[str, Any]) -> None:
    if part == "member":
        waited = found["longest_wait_for_a_write_s"]
        section.judge("a member killed: a write waits at most 6.7 s", waited <= 6.7, found)
    elif part in ("leader", "power"):
        text = f"the store's leader gone ({part}): written again within {ELECTED_S:g} s"
        section.judge(text, found["written_again_s"] <= ELECTED_S, found)
    elif part == "quorum":
        text = f"no majority, and back: written again within {BACK_S:g} s"
        section.judge(text, found["written_again_s"] <= BACK_S, found)
        section.judge("no majority: nobody led", not found["leader_meanwhile"], found)
        silent = not found["majority_said_no_leader"]
        section.judge("two silent members are not two without a leader", silent, found)
    else:
        text = f"the leading manager killed: another leads within {LEADS_S:g} s"
        section.judge(text, found["leads_again_s"] <= LEADS_S, found)


def _judge_vms(
    cluster: Cluster,
    section: Section,
    guests: dict[str, Guest],
    before: dict[str, float],
    began: float,
    *,
    still: set[str],
) -> None:
    wrong: dict[str, Any] = {}
    for name, guest in guests.items():
        ran = spans(cluster, name, since=began)
        owner = cluster.owner(name)
        here = [copy.host for copy in copies(cluster, name)]
        fell = guest.stats()["uptime_s"] < before[name]
        paused = len(ran) - 1 if name in still else 0
        if overlaps(ran) or here != [owner.host] or fell or paused:
            wrong[name] = {
                "overlaps": len(overlaps(ran)),
                "copies": here,
                "owner": owner.host,
                "started_anew": fell,
                "pauses": paused,
            }
    text = f"{len(guests)} VMs: each runs once, none started anew, none that stayed was paused"
    section.judge(text, not wrong, wrong or "none")


def _judge_logs(cluster: Cluster, section: Section, writers: dict[str, Guest]) -> None:
    checks: dict[str, Any] = {}
    for name, guest in writers.items():
        logged = log_end(guest)
        cluster.client.wait(cluster.client.vms.stop(name, force=True))
        (disk,) = cluster.client.vms.get(name).disks
        checks[name] = asdict(read_log(outside(cluster, disk), disk, logged))
    section.figures["logs"] = checks
    bad = {n: c for n, c in checks.items() if c["lost"] or c["torn"] or not c["acknowledged"]}
    section.judge("0 lost, 0 torn acknowledged records of those that wrote", not bad, bad or "none")
