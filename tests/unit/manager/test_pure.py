"""Decisions without a world: views, placement, queue, definitions, orphans, hosts' transitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manager_fakes import GIB, host_info, store_file

from godwit.manager.config import ManagerConfig
from godwit.manager.keyspace import place_of
from godwit.manager.leadership import transitions
from godwit.manager.rooms import rooms_of
from godwit.manager.snapshot import Snapshot
from godwit.manager.tokens import Tokens, load_tokens
from godwit.manager.views import all_volumes, host_state, view_host, vm_state
from godwit.manager.work.admit import admit, may_join
from godwit.manager.work.define import bridge_name, define_vm
from godwit.manager.work.queueing import waits_for
from godwit.manager.work.tasks import orphans
from godwit.manager.world import new_id
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import Conflict, InvalidRequest, NotFound, Refused
from godwit.model.host import HostState
from godwit.model.migration import Migration, MoveState
from godwit.model.network import Network
from godwit.model.ownership import MoveIntent, MovePhase, Owner, OwnerState
from godwit.model.task import Task, TaskState
from godwit.model.vm import Boot, Pins, Vm, VmState, VmStatus
from godwit.planner.placement import Need, Room, candidates, choose, reasons_against

PINS = Pins(uuid="u-1", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")


def make_vm(name: str = "web", **changes: Any) -> Vm:
    fields: dict[str, Any] = {
        "name": name,
        "cpus": 1,
        "memory_bytes": 1 << 28,
        "pins": PINS,
        "created_at": 1.0,
    }
    return Vm(**{**fields, **changes})


# The machine that tests run on is shared: a slow example is no fault.
quietly = settings(deadline=None, max_examples=80)

# Views.

owners = st.builds(
    Owner,
    host=st.sampled_from(["host1", "host2"]),
    epoch=st.integers(1, 3),
    state=st.sampled_from(OwnerState),
    paused=st.booleans(),
    migration=st.none()
    | st.builds(
        MoveIntent,
        id=st.just("m-1"),
        method=st.just("live"),
        source=st.just("host1"),
        destination=st.just("host2"),
        phase=st.sampled_from(MovePhase),
    ),
)
statuses = st.none() | st.builds(
    VmStatus,
    state=st.sampled_from(VmState),
    host=st.sampled_from(["host1", "host2"]),
    epoch=st.integers(0, 4),
    reason=st.sampled_from(["", "said so"]),
)


@quietly
@given(owner=owners, status=statuses, leased=st.booleans(), agent=st.booleans())
def test_the_record_rules_and_the_status_only_refines(
    owner: Owner, status: VmStatus | None, leased: bool, agent: bool
) -> None:
    state, reason = vm_state(owner, status, leased=leased, agent=agent)
    alive = owner.state in (OwnerState.RUNNING, OwnerState.STARTING)
    if not alive:
        assert state in (VmState.STOPPED, VmState.SAVED, VmState.FAILED)
        assert (state is VmState.SAVED) == (owner.state is OwnerState.SAVED)
        return
    assert state not in (VmState.STOPPED, VmState.SAVED)
    if not leased:
        assert state is VmState.UNKNOWN
        assert str(owner.host) in reason
    elif owner.migration is not None:
        assert state is VmState.MIGRATING
        assert "m-1" in reason
    elif owner.state is OwnerState.STARTING:
        assert state is VmState.STARTING
    elif status is None or status.epoch != owner.epoch or status.host != owner.host:
        assert state in (VmState.RUNNING, VmState.PAUSED), "another epoch's status says nothing"
        assert (state is VmState.PAUSED) == owner.paused


@quietly
@given(status=statuses.filter(bool), paused=st.booleans())
def test_the_status_of_another_epoch_or_host_says_nothing(status: VmStatus, paused: bool) -> None:
    owner = Owner(host="host1", epoch=2, state=OwnerState.RUNNING, paused=paused)
    state, reason = vm_state(owner, status, leased=True)
    if (status.host, status.epoch) != ("host1", 2):
        assert (state, reason) == (VmState.PAUSED if paused else VmState.RUNNING, "")


def test_a_vm_that_never_ran_is_stopped() -> None:
    assert vm_state(None, None, leased=False) == (VmState.STOPPED, "")


def test_a_failed_vm_says_why_until_it_starts_again() -> None:
    failed = VmStatus(state=VmState.FAILED, host="host1", epoch=3, reason="QEMU died")
    ended = Owner(host="host1", epoch=3)
    assert vm_state(ended, failed, leased=True) == (VmState.FAILED, "QEMU died")
    again = Owner(host="host1", epoch=4, state=OwnerState.RUNNING)
    assert vm_state(again, failed, leased=True)[0] is VmState.RUNNING


@pytest.mark.parametrize(
    ("leased", "agent", "state"),
    [
        (True, True, HostState.UP),
        (True, False, HostState.UNMANAGED),
        (False, True, HostState.DOWN),
        (False, False, HostState.DOWN),
    ],
)
def test_host_states(leased: bool, agent: bool, state: HostState) -> None:
    found, reason = host_state(leased=leased, agent=agent)
    assert found is state
    assert bool(reason) == (state is not HostState.UP)
    snapshot = Snapshot(
        leases=frozenset({"host1"} if leased else ()),
        agents=frozenset({"host1"} if agent else ()),
    )
    row = view_host(snapshot, host_info("host1"), memory_free_bytes=5)
    assert row.memory_free_bytes == (0 if state is HostState.DOWN else 5)


# Placement.


def room(name: str, **changes: Any) -> Room:
    fields: dict[str, Any] = {"memory_free_bytes": 4 * GIB}
    info = {key: changes.pop(key) for key in list(changes) if key not in Room.__annotations__}
    return Room(info=host_info(name, **info), **{**fields, **changes})


NEED = Need(vm="web", memory_bytes=GIB, cpus=2, networks={"lan": 1500}, pins=PINS)

rooms = st.lists(
    st.builds(
        room,
        st.sampled_from(["host1", "host2", "host3", "host4"]),
        memory_free_bytes=st.none() | st.integers(0, 8 * GIB),
        cpus_promised=st.integers(0, 12),
        state=st.sampled_from([HostState.UP, HostState.DOWN, HostState.UNMANAGED]),
        cpus=st.sampled_from([1, 4]),
        networks=st.sampled_from([{"lan": 1500}, {"lan": 9000}, {}]),
    ),
    unique_by=lambda entry: entry.info.name,
)


@quietly
@given(found=rooms, barred=st.sets(st.sampled_from(["host1", "host2"])))
def test_placement_takes_a_host_that_fits_or_says_why_not(
    found: list[Room], barred: set[str]
) -> None:
    exclude = dict.fromkeys(barred, ("barred",))
    listed = {c.host: c for c in candidates(found, NEED, exclude=exclude)}
    assert set(listed) == {entry.info.name for entry in found}
    if not any(candidate.eligible for candidate in listed.values()):
        with pytest.raises(Refused) as caught:
            choose(found, NEED, exclude=exclude)
        assert set(caught.value.context["rejected"]) == set(listed)
        return
    decision = choose(found, NEED, exclude=exclude)
    assert listed[decision.host].eligible
    assert decision.host in decision.reason
    assert decision.host not in barred
    chosen = next(entry for entry in found if entry.info.name == decision.host)
    assert chosen.state is HostState.UP
    assert (chosen.memory_free_bytes or 0) > NEED.memory_bytes
    for name, reasons in decision.rejected.items():
        assert reasons
        assert not listed[name].eligible
    assert choose(list(reversed(found)), NEED, exclude=exclude) == decision, "order is no reason"


def test_the_scarcer_resource_decides() -> None:
    full_memory = room("host1", memory_free_bytes=2 * GIB)
    full_cpus = room("host2", memory_free_bytes=7 * GIB, cpus_promised=8)
    roomy = room("host3", memory_free_bytes=5 * GIB, cpus_promised=1)
    decision = choose([full_memory, full_cpus, roomy], NEED)
    assert decision.host == "host3"
    assert decision.reason == (
        "host3 has the most room of 3 hosts: 5 GiB free and 1 of 4 CPUs promised"
    )


def test_reasons_name_every_obstacle() -> None:
    bad = room("host1", memory_free_bytes=1, cpus=1, networks={"lan": 9000})
    other = Need(
        vm="web",
        memory_bytes=GIB,
        cpus=2,
        networks={"lan": 1500, "dmz": 1500},
        volumes=frozenset({"fast"}),
        pins=PINS.but(machine="pc-q35-11.0", cpu_model="EPYC-v1", accelerator="kvm"),
    )
    text = "\n".join(reasons_against(bad, other))
    words = ("memory", "1 CPUs", "dmz", "MTU 9000", "volume fast", "pc-q35-11", "EPYC", "kvm")
    for word in words:
        assert word in text


def test_memory_promised_to_arriving_vms_counts() -> None:
    intent = MoveIntent(id="m-1", method="live", source="host2", destination="host1")
    snapshot = Snapshot(
        hosts={"host1": host_info("host1")},
        leases=frozenset({"host1"}),
        agents=frozenset({"host1"}),
        vms={"a": make_vm("a", memory_bytes=5 * GIB, cpus=3)},
        owners={"a": Owner(host="host2", state=OwnerState.RUNNING, migration=intent)},
    )
    (found,) = rooms_of(snapshot, {"host1": 8 * GIB})
    assert (found.memory_free_bytes or 0) < 3 * GIB
    assert found.cpus_promised == 3


# Queue.


def move(number: int, source: str, destination: str, state: MoveState) -> Migration:
    return Migration(
        id=f"m-{number}", vm=f"vm{number}", source=source, destination=destination, state=state
    )


HOSTS = ["host1", "host2", "host3"]
pairs = st.tuples(st.sampled_from(HOSTS), st.sampled_from(HOSTS)).filter(lambda p: p[0] != p[1])


@quietly
@given(asked=st.lists(pairs, min_size=1, max_size=7), seed=st.randoms(use_true_random=False))
def test_the_queue_never_shares_a_host_and_never_stands_still(
    asked: list[tuple[str, str]], seed: Any
) -> None:
    moves = {
        f"m-{n}": move(n, source, destination, MoveState.WAITING)
        for n, (source, destination) in enumerate(asked)
    }
    tasks = {
        f"t-{n}": Task(
            id=f"t-{n}",
            request={"kind": "vm.migrate"},
            subject=f"vm/vm{n}",
            created_at=0,
            progress={"migration": f"m-{n}"},
        )
        for n in range(len(asked))
    }
    while any(not entry.state.final for entry in moves.values()):
        snapshot = Snapshot(migrations=moves, tasks=tasks, leases=frozenset(HOSTS))
        waiting = [m for m in moves.values() if m.state is MoveState.WAITING]
        for entry in waiting:
            snapshot = dataclasses.replace(snapshot, migrations=dict(moves))
            if waits_for(snapshot, entry) is None:
                moves[entry.id] = entry.but(state=MoveState.RUNNING, turn_at=1.0)
        running = [m for m in moves.values() if m.state is MoveState.RUNNING]
        assert running, "somebody may always go"
        used = [host for m in running for host in (m.source, m.destination)]
        assert len(used) == len(set(used)), "one live move per host"
        ended = seed.choice(running)
        moves[ended.id] = ended.but(state=MoveState.COMPLETED)


def test_a_record_that_nobody_works_on_does_not_hold_up_the_queue() -> None:
    dead = move(1, "host1", "host2", MoveState.WAITING)
    lost = move(2, "host3", "host1", MoveState.RUNNING)
    mine = move(3, "host1", "host2", MoveState.WAITING)
    found = {entry.id: entry for entry in (dead, lost, mine)}
    snapshot = Snapshot(migrations=found, leases=frozenset({"host1", "host2"}))
    assert waits_for(snapshot, mine) is None
    alive = dataclasses.replace(snapshot, leases=frozenset(HOSTS))
    assert waits_for(alive, mine) == (
        "waits for m-2 (vm2 from host3 to host1), which uses host1 "
        "(limit: one move per host at a time)"
    )


# Definitions and admission.


def test_a_definition_is_whole_and_the_same_every_time() -> None:
    request = ask.CreateVm(
        name="web",
        memory_bytes=1 << 28,
        kernel="/clusterstorage/shared/k",
        disks=(
            ask.NewDisk(volume="shared", size_bytes=1),
            ask.NewDisk(volume="fast", size_bytes=2),
        ),
        networks=("lan", "lan"),
    )
    snapshot = Snapshot(networks={"lan": Network(name="lan", bridge="br-lan", mtu=9000)})
    options: dict[str, Any] = {"pins": PINS, "boot": Boot(), "now": 1.0}
    vm = define_vm(snapshot, request, **options)
    assert vm == define_vm(snapshot, request, **options)
    assert [(d.id, d.lun, d.path) for d in vm.disks] == [
        ("disk0", 0, "/clusterstorage/shared/web/disk0.qcow2"),
        ("disk1", 1, "/clusterstorage/fast/web/disk1.qcow2"),
    ]
    assert len({d.serial for d in vm.disks}) == 2
    assert [n.mtu for n in vm.nics] == [9000, 9000]
    assert len({n.mac for n in vm.nics}) == 2
    crowded = dataclasses.replace(snapshot, vms={"old": vm})
    other = define_vm(crowded, request, **options)
    assert {n.mac for n in other.nics}.isdisjoint({n.mac for n in vm.nics})


@quietly
@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True))
def test_every_network_name_has_a_bridge_name(name: str) -> None:
    Network(name=name, bridge=bridge_name(name))


def snapshot_with(*vms: Vm, **changes: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "vms": {vm.name: vm for vm in vms},
        "owners": {vm.name: Owner() for vm in vms},
        "hosts": {"host1": host_info("host1")},
        "networks": {"lan": Network(name="lan", bridge="br-lan")},
    }
    return Snapshot(**{**fields, **changes})


CREATE: dict[str, Any] = {"name": "new", "memory_bytes": 1 << 28, "image": "demo"}


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"name": "web"}, Conflict, "there is a VM web already"),
        ({"image": None}, InvalidRequest, "nothing to boot from"),
        ({"kernel": "/clusterstorage/k"}, InvalidRequest, "both an image and a kernel"),
        ({"image": None, "kernel": "/boot/k"}, InvalidRequest, "every host sees"),
        ({"image": None, "kernel": "/clusterstorage/../etc/k"}, InvalidRequest, "every host"),
        ({"initrd": "/clusterstorage/i"}, InvalidRequest, "initrd without a kernel"),
        ({"networks": ("dmz",)}, NotFound, "no network dmz"),
        ({"disks": (ask.NewDisk(volume="x", size_bytes=1),)}, NotFound, "no volume x"),
        ({"host": "host9"}, NotFound, "no host host9"),
    ],
)
def test_create_is_refused_with_reason_and_hint(
    changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        admit(snapshot_with(make_vm("web")), ask.CreateVm(**{**CREATE, **changes}))
    assert caught.value.hint  # type: ignore[attr-defined]


def test_only_cutting_the_power_may_join_a_running_task() -> None:
    def running(**request: Any) -> Task:
        return Task(id="t-1", request=request, subject="vm/web", created_at=0)

    cut, ask_nicely = ask.StopVm(name="web", force=True), ask.StopVm(name="web")
    assert may_join(cut, running(kind="vm.stop"))
    assert may_join(cut, running(kind="vm.start"))
    assert not may_join(ask_nicely, running(kind="vm.stop"))
    assert not may_join(cut, running(kind="vm.stop", force=True))
    assert not may_join(cut, running(kind="vm.migrate"))
    assert not may_join(cut, running(kind="vm.delete"))


# Tasks and hosts.


def test_orphans_are_those_of_dead_workers() -> None:
    def task(number: int, worker: str, state: TaskState = TaskState.RUNNING) -> Task:
        return Task(
            id=f"t-{number}", request={}, subject="vm/a", created_at=0, worker=worker, state=state
        )

    found = {
        t.id: t
        for t in (
            task(1, "m1/old"),
            task(2, "m1/new"),
            task(3, "m2/x"),
            task(4, "m3/y"),
            task(5, "m3/y", TaskState.COMPLETED),
        )
    }
    snapshot = Snapshot(tasks=found, members=frozenset({"m1.new", "m1.old", "m2.x"}))
    left = orphans(snapshot, me="m1/new", running={"t-2"})
    assert [t.id for t in left] == ["t-1", "t-4"], "m2 lives, m1/old is an earlier life of ours"


def test_transitions_are_news_only() -> None:
    up = Snapshot(
        hosts={"host1": host_info("host1")},
        leases=frozenset({"host1"}),
        agents=frozenset({"host1"}),
    )
    assert transitions(None, up) == []
    assert transitions({"host1": HostState.UP}, up) == []
    gone = dataclasses.replace(up, leases=frozenset(), agents=frozenset())
    ((name, state, reason),) = transitions({"host1": HostState.UP}, gone)
    assert (name, state) == ("host1", HostState.DOWN)
    assert reason
    assert transitions({}, up)[0][1] is HostState.UP


def test_ids_sort_by_time_and_are_usable() -> None:
    ids = [new_id("m", now) for now in (1.0, 1_700_000_000.0, 1_700_000_000.5, 4e9)]
    assert ids == sorted(ids)
    for one in ids:
        ask.CancelMigration(id=one)


def test_keys_and_places_agree() -> None:
    wanted = {
        keys.vm_spec("a"): "vms",
        keys.vm_owner("a"): "owners",
        keys.vm_status("a"): "statuses",
        keys.host_info("a"): "hosts",
        keys.host_lease("a"): "leases",
        keys.host_agent("a"): "agents",
        keys.network("a"): "networks",
        keys.volume("a"): "volumes",
        keys.migration("a"): "migrations",
        keys.task("a"): "tasks",
        keys.event("a"): "events",
    }
    both = place_of(keys.volume_state("a", "host1"))
    assert both is not None
    assert (both.room, both.name) == ("volume_states", "a/host1")
    assert place_of(keys.VOLUME_STATES + "a") is None
    for key, where in wanted.items():
        place = place_of(key)
        assert place is not None
        assert (place.room, place.name) == (where, "a")
    assert place_of(keys.host_reservation("a", "b")) is None
    assert place_of(keys.LEADER) is None


def test_volumes_are_what_hosts_report() -> None:
    snapshot = Snapshot(
        hosts={"host1": host_info("host1"), "host2": host_info("host2", volumes=("shared", "x"))}
    )
    assert [(v.name, list(v.hosts)) for v in all_volumes(snapshot)] == [
        ("shared", ["host1", "host2"]),
        ("x", ["host2"]),
    ]


# Files.


def test_tokens_are_read_again_and_must_be_private(tmp_path: Path) -> None:
    path = store_file(tmp_path / "tokens", "# c\nann:0123456789abcdef\nbob:fedcba9876543210\n")
    tokens = Tokens(path)
    assert tokens.caller("fedcba9876543210") == "bob"
    assert tokens.caller("fedcba987654321") is None
    assert tokens.caller("") is None
    store_file(path, "ann:0123456789abcdef\n")
    assert tokens.caller("fedcba9876543210") is None, "a token taken out no longer works"
    path.chmod(0o640)
    with pytest.raises(InvalidRequest, match="read by others"):
        load_tokens(path)
    path.unlink()
    assert tokens.caller("0123456789abcdef") is None
    store_file(path, "ann:short\n")
    with pytest.raises(InvalidRequest) as caught:
        load_tokens(path)
    assert "short" not in caught.value.message


def test_configuration_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "manager.toml"
    path.write_text('[store]\nendpoints=["https://a:1"]\n[tls]\ndir="/t"\n[api]\n')
    with pytest.raises(InvalidRequest, match="tokens_file"):
        ManagerConfig.load(path)
    path.write_text(
        '[store]\nendpoints=["https://a:1"]\n[tls]\ndir="/t"\n[api]\ntokens_file="/x"\nport=1\n'
    )
    config = ManagerConfig.load(path)
    assert (config.api_tls_dir, config.port, config.lab) == (Path("/t"), 1, False)
