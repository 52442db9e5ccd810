"""Failover by the real controller on a real store, with hosts that renew, fall silent and answer.

The timings are a tenth of the real ones; the decisions themselves are proven in virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from godwit.cluster import Decision, Memory, Snapshot, Timings
from godwit.cluster.facts import Rung, StoreSeen
from godwit.cluster.steps import Alarm, Fence, Note, Start, Swap
from godwit.host.clock import RealClock
from godwit.manager.cache import Cache
from godwit.manager.failover.acting import Actor
from godwit.manager.failover.admission import check_ha
from godwit.manager.failover.controller import Failover, restless
from godwit.manager.failover.members import StoreMembers, is_embedded, members_of
from godwit.manager.failover.reading import AT_ONCE, Known, Reader, agents_s
from godwit.manager.failover.telling import Told
from godwit.manager.snapshot import Snapshot as RecordsSeen
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import OutcomeUnknown, Refused, Unavailable
from godwit.model.membership import Renewal
from godwit.model.ownership import Owner, OwnerState, Restarts
from godwit.model.processes import HostProcesses, QemuProcess
from godwit.model.vm import Pins, Vm, VmStatus
from godwit.store.api import MemberView, StoreStatus, value_is
from godwit.store.memory import MemoryStore
from godwit.store.records import CasFailed, Records, encode

from .manager_fakes import GIB, host_info

PINS = Pins(uuid="u", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")
FAST = Timings(renew_s=0.2, lease_s=1.0, freeze_s=0.6, reset_s=0.8, retry_s=1.0)
RENEW_S = 0.2
ME = "m1/a"


def vm(name: str, *, ha: bool = True, **more: Any) -> Vm:
    return Vm(name=name, cpus=1, memory_bytes=GIB, pins=PINS, created_at=0.0, ha=ha, **more)


class Hosts:
    """The agents: what they say that they run, and what they were asked to do."""

    def __init__(self) -> None:
        self.processes: dict[str, list[QemuProcess]] = {}
        self.silent: set[str] = set()
        self.refuse: dict[str, Exception] = {}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.news = asyncio.Event()

    async def call(
        self, host: Any, method: str, path: str, body: Any = None, *, deadline_s: float = 10.0
    ) -> Any:
        name = host.name
        if name in self.silent:
            raise Unavailable(f"{name} is away", hint="")
        if path == "/v1/capacity":
            return {"memory_free_bytes": 6 * GIB}
        if path == "/v1/processes":
            found = tuple(self.processes.get(name, ()))
            answer = HostProcesses(host=name, boot_id=f"b-{name}", processes=found)
            return answer.model_dump(mode="json")
        verb = path.rpartition("/")[2]
        self.asked.append((name, path, body))
        self.news.set()
        if name in self.refuse:
            raise self.refuse[name]
        if verb == "take-over":
            found = QemuProcess(vm=path.split("/")[3], epoch=body["epoch"], state="running")
            self.processes.setdefault(name, []).append(found)
        if verb == "end-stray":
            left = [one for one in self.processes[name] if one.epoch != body["epoch"]]
            self.processes[name] = left
        return {}


class Cluster:
    """Three hosts, a leading manager and its store."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.records = Records(self.store)
        self.cache = Cache(self.store)
        self.hosts = Hosts()
        self.world = World(
            records=self.records,
            cache=self.cache,
            agents=self.hosts,  # type: ignore[arg-type]
            clock=RealClock(),
            pin=lambda _hosts, _cpu: PINS,
            worker=ME,
        )
        self.actor = Actor(self.world, proof=lambda: value_is(keys.LEADER, ME.encode()))
        known = Known(self.actor.attempts, self.actor.refused, self.world.cutter.uncuttable)
        standing = StoreMembers(
            self.store, self.world.clock, hosts=lambda: self.cache.snapshot.hosts
        )
        self.reader = Reader(self.world, standing, known, timings=FAST)
        self.leads = True
        self.failover = Failover(self.world, self.reader, self.actor, leads=lambda: self.leads)
        self.cache.listen(self.failover.take)
        self.renewing: set[str] = set()
        self.number = 0

    async def begin(self) -> None:
        await self.store.put(keys.LEADER, ME.encode())
        for name in ("host1", "host2", "host3"):
            info = host_info(name).but(boot_id=f"b-{name}")
            await self.store.put(keys.host_info(name), encode(info))
            for key in (keys.host_lease(name), keys.host_agent(name)):
                await self.store.put(key, b"{}")
            self.renewing.add(name)
            await self.renew(name)

    async def renew(self, name: str) -> None:
        self.number += 1
        renewal = Renewal(boot_id=f"b-{name}", number=self.number, guard="armed", watchdog=True)
        await self.store.put(keys.host_renewal(name), encode(renewal))

    async def keep_renewing(self) -> None:
        while True:
            for name in tuple(self.renewing):
                await self.renew(name)
            await asyncio.sleep(RENEW_S)

    async def dies(self, name: str) -> None:
        self.renewing.discard(name)
        self.hosts.silent.add(name)
        await self.store.delete(keys.host_lease(name))

    async def add(self, machine: Vm, owner: Owner) -> None:
        await self.store.put(keys.vm_spec(machine.name), encode(machine))
        await self.store.put(keys.vm_owner(machine.name), encode(owner))
        if owner.state is OwnerState.RUNNING and owner.host:
            process = QemuProcess(vm=machine.name, epoch=owner.epoch, state="running")
            self.hosts.processes.setdefault(owner.host, []).append(process)

    async def owner(self, name: str) -> Owner:
        found = await self.records.owner(name)
        assert found is not None
        return found.value

    async def was_asked(self, verb: str, *, times: int = 1) -> list[tuple[str, str, Any]]:
        async with asyncio.timeout(10):
            while len(found := [one for one in self.hosts.asked if verb in one[1]]) < times:
                self.hosts.news.clear()
                await self.hosts.news.wait()
        return found

    async def kinds(self) -> list[str]:
        found = await self.store.range(keys.EVENTS)
        return [kv.value.decode().partition('"kind":"')[2].partition('"')[0] for kv in found.kvs]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    await made.begin()
    tasks = [
        asyncio.ensure_future(work)
        for work in (made.cache.run(), made.failover.run(), made.keep_renewing())
    ]
    yield made
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await made.store.aclose()


def lost(cluster: Cluster, host: str) -> bool:
    here = cluster.failover.standings.get(host)
    return here is not None and here.lost


RUNS = Owner(host="host1", epoch=4, state=OwnerState.RUNNING)


async def test_the_vms_of_a_silent_host_start_elsewhere_and_only_those_with_ha(
    cluster: Cluster,
) -> None:
    await cluster.add(vm("web"), RUNS)
    await cluster.add(vm("plain", ha=False), RUNS)
    await cluster.add(vm("other"), RUNS.but(host="host2"))
    await cluster.dies("host1")
    ((host, path, body),) = await cluster.was_asked("take-over")
    assert (path, body) == ("/v1/vms/web/take-over", {"epoch": 5})
    owner = await cluster.owner("web")
    assert (owner.host, owner.epoch, owner.state) == (host, 5, OwnerState.STARTING)
    assert host != "host1"
    assert await cluster.owner("plain") == RUNS
    assert (await cluster.owner("other")).epoch == 4
    restarts = await cluster.records.get(keys.vm_restarts("web"), Restarts)
    assert restarts is not None
    assert len(restarts.value.times) == 1
    assert "vm.failover" in await cluster.kinds()


async def test_what_a_host_that_came_back_shows_nothing_of_is_settled(cluster: Cluster) -> None:
    """Others run, so not all power was lost; and nobody asked for it to be started again."""
    await cluster.add(vm("other"), RUNS.but(host="host2"))
    await cluster.store.put(keys.vm_spec("plain"), encode(vm("plain", ha=False)))
    revision = await cluster.store.put(keys.vm_owner("plain"), encode(RUNS))
    await asyncio.wait_for(cluster.cache.ready.wait(), 5)
    await cluster.cache.reached(revision)
    async with asyncio.timeout(10):
        await cluster.cache.until(
            lambda snapshot: snapshot.owner("plain").state is OwnerState.STOPPED or None
        )
    assert (await cluster.owner("other")).state is OwnerState.RUNNING
    assert await cluster.records.get(keys.vm_status("plain"), VmStatus) is not None


async def test_nothing_new_rests_on_the_word_of_a_host_that_is_silent(cluster: Cluster) -> None:
    cluster.renewing.clear()
    await cluster.dies("host1")  # its renewal stays; its lease does not
    await asyncio.wait_for(cluster.cache.ready.wait(), 5)
    async with asyncio.timeout(5):
        await cluster.cache.until(lambda snapshot: "host1" not in snapshot.leases or None)
    assert "host1" in cluster.cache.renewals
    with pytest.raises(Refused, match="has not renewed"):
        check_ha(cluster.cache.snapshot, cluster.cache.renewals, vm("web"), cluster.world.cutter)


async def test_a_replica_is_young_until_it_has_listened_as_long_as_a_host_may_be_silent(
    cluster: Cluster,
) -> None:
    assert cluster.failover.young
    async with asyncio.timeout(10):
        while cluster.failover.young:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)
    since = cluster.failover._since
    assert since is not None
    assert cluster.world.clock.monotonic() - since >= FAST.takeover_s


async def test_who_does_not_lead_only_listens(cluster: Cluster) -> None:
    cluster.leads = False
    await cluster.add(vm("web"), RUNS)
    await cluster.dies("host1")
    async with asyncio.timeout(10):
        while not lost(cluster, "host1"):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)
    assert await cluster.owner("web") == RUNS
    assert cluster.hosts.asked == []


async def test_a_host_that_refuses_is_passed_over(cluster: Cluster) -> None:
    await cluster.add(vm("web"), RUNS)
    cluster.hosts.refuse = {name: Refused("no image there", hint="") for name in ("host2",)}
    cluster.hosts.processes["host3"] = []
    await cluster.add(vm("full", ha=False), RUNS.but(host="host3"))  # host2 is tried first
    await cluster.dies("host1")
    asked = await cluster.was_asked("take-over", times=2)
    assert [one[0] for one in asked] == ["host2", "host3"]
    assert asked[1][2] == {"epoch": 6}
    assert (await cluster.owner("web")).host == "host3"


async def test_an_answer_that_is_lost_is_no_refusal(cluster: Cluster) -> None:
    cluster.hosts.refuse["host2"] = OutcomeUnknown("nobody can tell", hint="")
    with pytest.raises(OutcomeUnknown):
        await asyncio.wait_for(cluster.cache.ready.wait(), 5) and await cluster.actor.act(
            Start(vm="web", host="host2", epoch=5)
        )
    assert cluster.actor.refused("web") == {}


async def swap(cluster: Cluster, **changes: Any) -> Swap:
    found = await cluster.records.owner("web")
    renewal = await cluster.store.get(keys.host_renewal("host1"))
    assert found is not None
    assert renewal is not None
    fields: dict[str, Any] = {
        "vm": "web", "source": "host1", "to": "host2", "epoch": 5, "proof": "it is off",
        "owner_revision": found.revision, "renewal_revision": renewal.mod_revision,
    }  # fmt: skip
    return Swap(**{**fields, **changes})


@pytest.mark.parametrize("what", ["renewal", "owner", "lead", "lease"])
async def test_a_swap_compares_all_that_it_rests_on(cluster: Cluster, what: str) -> None:
    cluster.leads = False
    cluster.renewing.clear()
    await cluster.add(vm("web"), RUNS)
    step = await swap(cluster)
    if what == "renewal":
        await cluster.renew("host1")
    elif what == "owner":
        await cluster.store.put(keys.vm_owner("web"), encode(RUNS.but(paused=True)))
    elif what == "lead":
        await cluster.store.put(keys.LEADER, b"m2/b")
    else:
        await cluster.store.delete(keys.host_lease("host2"))
    with pytest.raises(CasFailed):
        await cluster.actor.act(step)
    assert (await cluster.owner("web")).epoch == 4
    assert await cluster.records.get(keys.vm_restarts("web"), Restarts) is None


async def test_a_swap_whose_ground_still_holds_is_made(cluster: Cluster) -> None:
    cluster.leads = False
    cluster.renewing.clear()
    await cluster.add(vm("web"), RUNS)
    await cluster.actor.act(await swap(cluster))
    owner = await cluster.owner("web")
    assert (owner.host, owner.epoch, owner.state) == ("host2", 5, OwnerState.STARTING)


async def test_a_fence_that_nothing_carries_out_has_failed(cluster: Cluster) -> None:
    step = Fence(host="host1", rung=Rung.POWER, heard=("b", 1))
    await cluster.actor.act(step)
    (attempt,) = cluster.actor.attempts()
    assert (attempt.outcome, attempt.heard) == ("failed", ("b", 1))


async def test_an_agent_is_asked_by_the_record_of_the_decision(cluster: Cluster) -> None:
    """Not by that of the moment, which may have moved on to where the VM is wanted."""
    cluster.leads = False
    await cluster.add(vm("web"), RUNS)
    await asyncio.wait_for(cluster.cache.ready.wait(), 5)
    step = Fence(host="host1", rung=Rung.AGENT, vm="web", owner_revision=7)
    await cluster.actor.act(step)
    assert [one for one in cluster.hosts.asked if "end-own" in one[1]] == [
        ("host1", "/v1/vms/web/end-own", {"revision": 7})
    ]


async def test_a_confirmed_fence_is_kept_as_long_as_the_host_is_silent(cluster: Cluster) -> None:
    class Switch:
        async def off(self, host: str) -> str:
            return f"{host} reads off"

    cluster.actor._switch = Switch()
    await asyncio.wait_for(cluster.cache.ready.wait(), 5)
    snapshot = await cluster.reader.listen()
    await cluster.actor.act(Fence(host="host1", rung=Rung.POWER, heard=("", 0)))
    cluster.actor.forget(snapshot)
    assert cluster.actor.attempts()[0].outcome == "confirmed"
    other = Fence(host="host1", rung=Rung.POWER, heard=("b-host1", 99))
    await cluster.actor.act(other)
    cluster.actor.forget(snapshot)
    assert cluster.actor.attempts() == ()


def test_a_word_is_told_once_while_it_is_repeated() -> None:
    told, note, alarm = Told(), Note(subject="web", why="a"), Alarm(subject="web", why="b")
    assert told.news((note,), 0.0) == [note]
    assert told.news((note, alarm), 5.0) == [alarm]
    assert told.news((), 30.0) == []
    assert told.news((note,), 64.0) == []  # hosts are asked every few seconds only
    assert told.news((note,), 200.0) == [note]


def view(address: str, *, member: int, leader: int, voters: int = 3) -> MemberView:
    status = StoreStatus(revision=1, member_id=member, cluster_id=1, leader=leader, raft_term=4)
    return MemberView(f"https://{address}:2379", status, voters)


def test_members_are_told_by_the_host_they_run_on() -> None:
    hosts = {"host1": host_info("host1", "https://10.92.0.11:7780")}
    views = (
        view("10.92.0.11", member=1, leader=1),
        view("10.92.0.12", member=2, leader=1),
        MemberView("https://10.92.0.13:2379", problem="no answer"),
    )
    found = members_of(views, hosts)
    assert [(one.name, one.host, one.healthy) for one in found] == [
        ("host1", "host1", True),
        ("10.92.0.12", "", True),
        ("10.92.0.13", "", False),
    ]
    assert not is_embedded(views)
    assert is_embedded((view("10.92.0.11", member=1, leader=1, voters=0),))


@pytest.mark.parametrize(
    ("guard", "watchdog", "refused"),
    [
        ("armed", True, ""),
        ("unarmed", True, "did not keep the deadline"),
        ("armed", False, "no wa"),
    ],
)
async def test_high_availability_needs_something_that_proves(
    cluster: Cluster, guard: Any, watchdog: bool, refused: str
) -> None:
    cluster.renewing.clear()
    for name in ("host1", "host2", "host3"):
        renewal = Renewal(boot_id=f"b-{name}", number=1, guard=guard, watchdog=watchdog)
        revision = await cluster.store.put(keys.host_renewal(name), encode(renewal))
    await asyncio.wait_for(cluster.cache.ready.wait(), 5)
    await cluster.cache.reached(revision)
    snapshot, renewals = cluster.cache.snapshot, cluster.cache.renewals
    cutter = cluster.world.cutter
    check_ha(snapshot, renewals, vm("plain", ha=False), cutter)
    if not refused:
        check_ha(snapshot, renewals, vm("web"), cutter)
        return
    with pytest.raises(Refused, match=refused) as error:
        check_ha(snapshot, renewals, vm("web"), cutter)
    assert "watchdog or a power device" in error.value.hint


def test_what_shows_nothing_running_is_asked_for_again_and_again() -> None:
    """It counts only when its host says so in reading after reading."""
    calm = Decision(steps=(), sentence="")
    assert not restless(Snapshot(store=StoreSeen()), calm, 100.0)
    bare = Snapshot(store=StoreSeen(), heard=Memory(bare={"web": (1, 99.0)}))
    assert restless(bare, calm, 100.0)
    assert not restless(bare, calm, 300.0)


@pytest.mark.parametrize(("hosts", "seconds"), [(1, 5.0), (250, 5.0), (1000, 20.0)])
def test_many_hosts_are_asked_more_seldom(hosts: int, seconds: float) -> None:
    assert agents_s(hosts) == pytest.approx(seconds)


async def test_only_so_many_agents_are_asked_at_one_time() -> None:
    """Else a round of a thousand is all that the manager does for seconds."""
    cluster = Cluster()
    busy, most, call = 0, 0, cluster.hosts.call

    async def counted(*words: Any, **more: Any) -> Any:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        try:
            await asyncio.sleep(0)
            return await call(*words, **more)
        finally:
            busy -= 1

    cluster.hosts.call = counted  # type: ignore[method-assign]
    names = [f"host{number}" for number in range(3 * AT_ONCE)]
    records = RecordsSeen(hosts={name: host_info(name) for name in names})
    said = await cluster.reader._processes(records)
    assert said.keys() == set(names)
    assert most == AT_ONCE
