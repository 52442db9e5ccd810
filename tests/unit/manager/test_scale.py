"""What a large cluster costs, counted: records touched, rows made, agents asked. Never a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manager_fakes import host_info

from godwit.manager import capacity, index, rows, views
from godwit.manager.agents import Agents, HttpAgents
from godwit.manager.capacity import AT_ONCE, FreeMemory, unpromised
from godwit.manager.metrics import Metrics
from godwit.manager.rows import ALL, VmRows, choose_vms, fields_of, page_of
from godwit.manager.snapshot import Snapshot
from godwit.model.clones import all_clones, clones_of
from godwit.model.errors import InvalidRequest, Unavailable
from godwit.model.host import HostInfo
from godwit.model.network import Network
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.task import Task
from godwit.model.vm import Backing, Disk, Nic, Pins, Vm, VmState, VmStatus, VmView
from godwit.model.volume import Volume, VolumeOnHost, VolumeState

PINS = Pins(uuid="u-1", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")


def disk(path: str, *, on: str = "") -> Disk:
    backing = Backing(path=on, format="qcow2") if on else None
    return Disk(
        id="disk0", volume="shared", path=path, size_bytes=1, serial="s", lun=0, backing=backing
    )


def make_vm(name: str, *, on: str = "") -> Vm:
    nic = Nic(id="nic0", network="lan", mac="52:54:00:00:00:01")
    return Vm(
        name=name,
        cpus=1,
        memory_bytes=1 << 28,
        pins=PINS,
        created_at=1.0,
        disks=(disk(f"/{name}", on=on),),
        nics=(nic,),
    )


class Touched(dict[str, Any]):
    """Records of one kind; ``count`` holds how often one of them was handed out."""

    def __init__(self, records: dict[str, Any], count: Counter[str]) -> None:
        super().__init__(records)
        self._count = count

    def __getitem__(self, key: str) -> Any:
        self._count["touched"] += 1
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._count["touched"] += 1
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._count["touched"] += len(self)
        return super().__iter__()

    def values(self) -> Any:
        self._count["touched"] += len(self)
        return super().values()

    def items(self) -> Any:
        self._count["touched"] += len(self)
        return super().items()


def cluster(hosts: int, vms: int, count: Counter[str]) -> Snapshot:
    """A whole cluster that counts how often its records are looked at."""
    names = [f"h{number}" for number in range(hosts)]
    specs = {
        f"vm{n}": make_vm(f"vm{n}", on=f"/vm{n - 1}" if n % 10 == 1 else "") for n in range(vms)
    }
    owners = {
        name: Owner(host=names[n % hosts], epoch=1, state=OwnerState.RUNNING)
        for n, name in enumerate(specs)
    }
    seen = VolumeOnHost(state=VolumeState.DIRECT, capacity_bytes=9, since=1.0)
    volumes = [f"v{number}" for number in range(4)]

    def kept(records: dict[str, Any]) -> Touched:
        return Touched(records, count)

    return Snapshot(
        vms=kept(specs),
        owners=kept(owners),
        statuses=kept({n: VmStatus(state=VmState.RUNNING, host=o.host) for n, o in owners.items()}),
        hosts=kept({name: host_info(name, volumes=("shared", *volumes)) for name in names}),
        leases=frozenset(names),
        agents=frozenset(names),
        networks=kept({n: Network(name=n, bridge=n) for n in ("lan", "dmz", "san")}),
        volumes=kept({name: Volume(name=name) for name in volumes}),
        volume_states=kept({f"{v}/{h}": seen for v in volumes for h in names}),
        tasks=kept(
            {
                f"t{n}": Task(id=f"t{n}", request={}, subject="vm/none", created_at=1.0)
                for n in range(vms)
            }
        ),
    )


async def list_vms(snapshot: Snapshot) -> int:
    return len(await VmRows().of(snapshot, choose_vms(snapshot, host=None, state=None), ALL))


async def list_hosts(snapshot: Snapshot) -> int:
    return len([views.view_host(snapshot, info) for info in snapshot.hosts.values()])


async def list_networks(snapshot: Snapshot) -> int:
    return len([views.view_network(snapshot, one) for one in snapshot.networks.values()])


async def list_volumes(snapshot: Snapshot) -> int:
    return len(views.all_volumes(snapshot))


async def scrape(snapshot: Snapshot) -> int:
    class Cached:
        revision = 1

    found = Cached()
    found.snapshot = snapshot  # type: ignore[attr-defined]
    return len(Metrics().render(cast("Any", found)))


async def room_of_each(snapshot: Snapshot) -> int:
    return sum(unpromised(snapshot, info) for info in snapshot.hosts.values())


async def who_is_busy(snapshot: Snapshot) -> int:
    return sum(not snapshot.active_tasks(f"vm/{name}") for name in snapshot.vms)


@pytest.mark.parametrize(
    "look", [who_is_busy, list_vms, list_hosts, list_networks, list_volumes, scrape, room_of_each]
)
async def test_what_a_list_touches_grows_with_the_cluster_and_not_faster(look: Any) -> None:
    touched = []
    for times in (1, 4):
        count: Counter[str] = Counter()
        assert await look(cluster(10 * times, 200 * times, count)) > 0
        touched.append(count["touched"])
    assert touched[1] < 4.5 * touched[0]
    # And a record is looked at a few times, not once for each of its kind.
    assert touched[0] < 12 * 3 * 200


def test_a_quadratic_list_would_be_found() -> None:
    """The fault that the test above is for: each VM looks through all VMs."""
    touched = []
    for times in (1, 4):
        count: Counter[str] = Counter()
        snapshot = cluster(10 * times, 200 * times, count)
        for vm in list(dict.values(cast("Touched", snapshot.vms))):
            clones_of(vm, snapshot.vms.values())
        touched.append(count["touched"])
    assert touched[1] > 12 * touched[0]


# What is found once means the same as what is found each time.

_some = st.sampled_from(["a", "b", "c", "d", "e"])
_vms = st.dictionaries(
    _some, st.one_of(st.just(""), _some.map("/{}".format), st.just("/elsewhere"))
).map(lambda found: {name: make_vm(name, on=on) for name, on in found.items()})
_owners = st.dictionaries(
    _some,
    st.builds(
        Owner,
        host=st.sampled_from([None, "h1", "h2"]),
        state=st.sampled_from(OwnerState),
        migration=st.none()
        | st.builds(
            MoveIntent,
            id=st.just("m"),
            method=st.just("live"),
            source=st.sampled_from(["h1", "h2"]),
            destination=st.sampled_from(["h1", "h2"]),
        ),
    ),
)
quietly = settings(deadline=None, max_examples=150)


@quietly
@given(_vms)
def test_clones_are_found_as_one_by_one(vms: dict[str, Vm]) -> None:
    each = {name: clones_of(vm, vms.values()) for name, vm in vms.items()}
    assert all_clones(vms.values()) == {name: found for name, found in each.items() if found}


@quietly
@given(_vms, _owners)
def test_who_is_where_is_found_as_one_by_one(vms: dict[str, Vm], owners: dict[str, Owner]) -> None:
    here, there = index.present(vms, owners), index.coming(vms, owners)
    for host in ("h1", "h2"):
        runs = [
            vms[name]
            for name, owner in owners.items()
            if owner.host == host
            and owner.state in (OwnerState.RUNNING, OwnerState.STARTING)
            and name in vms
        ]
        comes = [
            vms[name]
            for name, owner in owners.items()
            if owner.migration is not None
            and owner.migration.destination == host != owner.host
            and name in vms
        ]
        assert here.get(host, ()) == tuple(runs)
        assert there.get(host, ()) == tuple(comes)


def test_what_was_found_is_kept_only_with_its_records() -> None:
    assert set(index.RESTS_ON) <= {name for name in dir(Snapshot) if not name.startswith("_")}
    before = cluster(2, 20, Counter())
    for name in index.RESTS_ON:
        assert getattr(before, name) is not None
    same = {room: getattr(before, room) for rooms in index.RESTS_ON.values() for room in rooms}
    for changed in same:
        after = Snapshot(**{**same, changed: dict(same[changed])})
        after.inherit(before)
        for name, rooms in index.RESTS_ON.items():
            kept = name in after.__dict__
            assert kept is (changed not in rooms), f"{name} after a change of {changed}"


# Rows.


async def test_a_row_is_made_again_only_when_its_records_changed() -> None:
    snapshot, kept = cluster(4, 40, Counter()), VmRows()
    first = await kept.of(snapshot, snapshot.vm_names, ALL)
    assert kept.made == 40
    assert await kept.of(snapshot, snapshot.vm_names, ALL) == first
    assert kept.made == 40

    def but(**changes: Any) -> Snapshot:
        fields = {name: getattr(snapshot, name) for name in snapshot.__dataclass_fields__}
        return Snapshot(**{**fields, **changes})

    paused = VmStatus(state=VmState.PAUSED, host="h3", epoch=1)
    changed = but(statuses={**snapshot.statuses, "vm7": paused})
    again = await kept.of(changed, changed.vm_names, ALL)
    assert kept.made == 41
    assert [row for row in again if row not in first] == [
        row for row in again if b'"name":"vm7"' in row and b'"paused"' in row
    ]
    # A host whose lease is gone changes the rows of its VMs, and of no others.
    silent = but(leases=snapshot.leases - {"h2"})
    unknown = await kept.of(silent, silent.vm_names, ALL)
    assert sum(b'"state":"unknown"' in row for row in unknown) == 10
    assert kept.made == 41 + 10 + 1  # and vm7 runs again
    # So does a new clone, which is no part of the VM's own record.
    cloned = but(vms={**snapshot.vms, "twin": make_vm("twin", on="/vm0")})
    found = await kept.of(cloned, ["vm0"], ALL)
    assert b'"clones":["twin","vm1"]' in found[0]


async def test_rows_that_are_gone_are_forgotten() -> None:
    kept = VmRows()
    large, small = cluster(2, 50, Counter()), cluster(2, 10, Counter())
    await kept.of(large, large.vm_names, ALL)
    await kept.of(small, small.vm_names, ALL)
    await kept.of(small, small.vm_names, ALL)
    assert len(kept._kept[ALL]) == 10
    for number in range(rows.CHOICES_KEPT + 2):
        await kept.of(small, small.vm_names, frozenset(list(VmView.model_fields)[: number + 1]))
    assert len(kept._kept) == rows.CHOICES_KEPT


async def test_others_have_their_turn_while_rows_are_made() -> None:
    snapshot, turns = cluster(2, 10 * rows.AT_ONCE, Counter()), 0
    making = asyncio.create_task(VmRows().of(snapshot, snapshot.vm_names, ALL))
    while not making.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 10


@quietly
@given(st.sets(_some), st.integers(1, 3))
def test_pages_are_the_list(names: set[str], limit: int) -> None:
    ordered, found, after = sorted(names), list[str](), ""
    while True:
        page = page_of(ordered, limit=limit, after=after)
        assert len(page.names) <= limit
        found += page.names
        after = page.more_after
        if not after:
            break
    assert found == ordered


def test_fields_are_those_of_a_row() -> None:
    assert fields_of(VmView, " name, state,") == {"name", "state"}
    assert fields_of(VmView, "") == ALL
    with pytest.raises(InvalidRequest, match="no field 'colour'"):
        fields_of(VmView, "name,colour")


def test_a_host_of_a_stopped_vm_is_only_its_last_place() -> None:
    snapshot = cluster(2, 4, Counter())
    owners = {**snapshot.owners, "vm0": Owner(host="h0", epoch=2)}
    stopped = Snapshot(vms=snapshot.vms, owners=owners, leases=snapshot.leases)
    assert choose_vms(stopped, host="h0", state=None) == ["vm2"]
    assert choose_vms(stopped, host=None, state=VmState.STOPPED) == ["vm0"]


# Free memory.


class Asked:
    """Agents that answer when they are let, and count how many are asked at the same time."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.let.set()
        self.calls: list[str] = []
        self.now, self.most = 0, 0
        self.news = asyncio.Event()
        self.dead: set[str] = set()

    async def call(self, host: HostInfo, *_: Any, deadline_s: float = 1.0) -> Any:
        self.calls.append(host.name)
        self.now += 1
        self.most = max(self.most, self.now)
        self.news.set()
        try:
            await self.let.wait()
        finally:
            self.now -= 1
            self.news.set()
        if host.name in self.dead:
            raise Unavailable("away")
        return {"memory_free_bytes": 7}

    async def are(self, number: int) -> None:
        """So many are being asked now."""
        while self.now != number:
            self.news.clear()
            await self.news.wait()


def free_memory(asked: Asked, now: Callable[[], float]) -> FreeMemory:
    return FreeMemory(cast("Agents", asked), now=now)


async def test_many_hosts_are_asked_a_few_at_a_time_and_not_again_at_once() -> None:
    asked, clock = Asked(), [100.0]
    free, many = free_memory(asked, lambda: clock[0]), cluster(200, 400, Counter())
    asked.let.clear()
    looking = asyncio.create_task(free.for_list(many))
    await asked.are(AT_ONCE)
    asked.let.set()
    assert await looking == dict.fromkeys(many.hosts, 7)
    assert asked.most == AT_ONCE
    assert sorted(asked.calls) == sorted(many.hosts)
    clock[0] += 1.0
    await free.for_list(many)
    assert len(asked.calls) == 200  # it is the same answer, and still a new one
    clock[0] += 200 / capacity.LIST_CALLS_PER_S + capacity.LIST_FRESH_S
    await free.for_list(many)
    assert len(asked.calls) == 400


async def test_few_hosts_are_asked_for_every_placement() -> None:
    asked = Asked()
    free, few = free_memory(asked, lambda: 100.0), cluster(3, 6, Counter())
    asked.dead = {"h1"}
    for number in (1, 2):
        assert await free.for_placement(few) == {"h0": 7, "h1": None, "h2": 7}
        assert len(asked.calls) == 3 * number


async def test_who_has_most_room_is_asked_first() -> None:
    asked = Asked()
    many = cluster(100, 0, Counter())
    owners = {f"vm{n}": Owner(host=f"h{n}", state=OwnerState.RUNNING) for n in range(60)}
    busy = Snapshot(
        vms={name: make_vm(name) for name in owners},
        owners=owners,
        hosts=many.hosts,
        agents=many.agents,
    )
    await free_memory(asked, lambda: 100.0).for_placement(busy)
    assert set(asked.calls[:40]) == {f"h{number}" for number in range(60, 100)}


async def test_a_list_waits_for_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "LIST_WAIT_S", 0.01)
    asked, clock = Asked(), [100.0]
    free, some = free_memory(asked, lambda: clock[0]), cluster(5, 5, Counter())
    asked.let.clear()
    assert set((await free.for_list(some)).values()) == {None}
    await free.for_list(some)
    assert len(asked.calls) == 5  # they are being asked: nobody asks them once more
    asked.let.set()
    await asked.are(0)
    await asyncio.sleep(0)  # the last answer is on its way
    assert set((await free.for_list(some)).values()) == {7}
    assert len(asked.calls) == 5
    # What it said before stands in a list until it is old, and in no placement.
    clock[0] += 5.0
    asked.let.clear()
    assert set((await free.for_list(some)).values()) == {7}
    await free.stop()
    assert asked.now == 0


async def test_all_hosts_are_reached_with_one_tls_context(identities: Any) -> None:
    """A context is some hundred kilobytes; the peer's name is checked beside it."""
    agents = HttpAgents(identities["m1"])
    tls = [agents._tls(host_info(f"h{number}")) for number in range(5)]
    assert len({id(one.context) for one in tls if one is not None}) == 1
    assert [one.expect.name for one in tls if one and one.expect] == [f"h{n}" for n in range(5)]
