"""Where a VM goes: rules, marks, CPUs, and the smallest reason when nothing fits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_kit import GIB, need, room

from godwit.model.errors import Refused
from godwit.model.host import HostState, QemuFacts
from godwit.model.vm import Pins
from godwit.planner.placement import (
    Kind,
    Need,
    Obstacle,
    Room,
    choose,
    obstacles,
    reasons_against,
    smallest,
)


def test_a_rule_names_the_hosts_it_allows() -> None:
    web = need(hosts=("host2", "host3"))
    assert reasons_against(room("host1"), web) == (
        "the rules of web allow only host2, host3, not host1",
    )
    assert choose([room("host1", memory_free_bytes=7 * GIB), room("host2")], web).host == "host2"


def test_vms_of_one_group_are_kept_apart() -> None:
    taken = room("host1", groups={"db": frozenset({"db1"})})
    second = need("db2", apart=("db",))
    assert reasons_against(taken, second) == (
        "db1 is on host1, and db2 is kept apart from it (db)",
    )
    assert reasons_against(taken, need("web", apart=("front",))) == ()
    assert reasons_against(taken, need("db1", apart=("db",))) == (), "not apart from itself"


def test_a_vm_with_its_hosts_own_cpu_starts_anywhere_and_then_stays() -> None:
    pins = Pins(uuid="u", machine="pc-q35-10.0", cpu_model="max", accelerator="tcg")
    facts = {"qemu": QemuFacts(version=(10, 0, 2), accelerator="tcg", cpu_models=("Nehalem-v1",))}
    here, there = room("host1", facts=facts), room("host2", facts=facts)
    assert reasons_against(there, need(pins=pins)) == ()
    assert reasons_against(here, need(pins=pins, stays_on="host1")) == ()
    assert reasons_against(there, need(pins=pins, stays_on="host1")) == (
        "web has the CPU of host1 (--cpu host): it cannot go on elsewhere",
    )
    assert reasons_against(there, need(pins=pins.but(cpu_model="Haswell-v4"))) == (
        "host2 cannot give the CPU model Haswell-v4",
    )


@pytest.mark.parametrize(
    "state", [HostState.DRAINING, HostState.MAINTENANCE, HostState.QUARANTINED]
)
def test_a_marked_host_takes_no_vm_and_says_why(state: HostState) -> None:
    marked = room("host1", state=state, reason="new memory is put in")
    assert reasons_against(marked, need()) == (f"host1 is {state.value}: new memory is put in",)


def test_cpus_are_promised_up_to_a_limit() -> None:
    full = room("host1", cpus_promised=15, cpus_limit=16)
    assert reasons_against(full, need(cpus=1)) == ()
    assert reasons_against(full, need(cpus=2)) == (
        "host1 has promised 15 of at most 16 CPUs to VMs, 2 needed",
    )
    assert reasons_against(room("host1", cpus_promised=900), need(cpus=2)) == (), "0 is no limit"


def test_the_smallest_reason_is_the_nearest_hosts() -> None:
    rooms = [
        room("host1", memory_free_bytes=GIB // 2),
        room("host2", memory_free_bytes=GIB),
        room("host3", state=HostState.DOWN, reason="it renews no lease"),
        room("host4", memory_free_bytes=0, cpus_promised=16, cpus_limit=16),
    ]
    with pytest.raises(Refused) as caught:
        choose(rooms, need())
    assert caught.value.message == (
        "no host can take web: not enough memory: 1 GiB free on host2, 1.06 GiB needed "
        "(that is the nearest of 4 hosts)"
    )
    assert set(caught.value.context["rejected"]) == {"host1", "host2", "host3", "host4"}
    with pytest.raises(Refused, match="no host is known"):
        choose([], need())


def test_a_rule_is_nearer_than_a_host_that_is_down() -> None:
    found = {
        "host1": (Obstacle(Kind.STATE, "host1 is down"),),
        "host2": (Obstacle(Kind.RULE, "the rules allow only host9"),),
        "host3": (Obstacle(Kind.MEMORY, "full", 1), Obstacle(Kind.NETWORK, "no lan")),
    }
    assert smallest(found).startswith("the rules allow only host9")


needs = st.builds(
    need,
    st.sampled_from(["a", "b", "c", "d"]),
    memory_bytes=st.sampled_from([GIB // 4, GIB, 2 * GIB]),
    cpus=st.integers(1, 5),
    hosts=st.sampled_from([(), ("host1",), ("host1", "host2")]),
    apart=st.sampled_from([(), ("x",), ("x", "y")]),
)
ROOMS = st.lists(
    st.builds(
        room,
        st.sampled_from(["host1", "host2", "host3"]),
        memory_free_bytes=st.none() | st.integers(0, 6 * GIB),
        cpus_promised=st.integers(0, 8),
        cpus_limit=st.sampled_from([0, 8]),
        state=st.sampled_from([HostState.UP, HostState.UP, HostState.DRAINING]),
    ),
    unique_by=lambda entry: entry.info.name,
)


@settings(deadline=None, max_examples=200)
@given(found=ROOMS, wanted=st.lists(needs, max_size=8, unique_by=lambda one: one.vm))
def test_placing_one_after_the_other_never_breaks_a_rule(
    found: list[Room], wanted: list[Need]
) -> None:
    rooms = {one.info.name: one for one in found}
    placed: dict[str, list[Need]] = {name: [] for name in rooms}
    for one in wanted:
        if all(obstacles(entry, one) for entry in rooms.values()):
            with pytest.raises(Refused) as caught:
                choose(rooms.values(), one)
            assert set(caught.value.context["rejected"]) == set(rooms)
            continue
        host = choose(rooms.values(), one).host
        rooms[host] = rooms[host].taking(one)
        placed[host].append(one)
    before = {one.info.name: one for one in found}
    for host, there in placed.items():
        start = before[host]
        if there:
            assert start.state is HostState.UP
            assert sum(one.whole_bytes for one in there) <= (start.memory_free_bytes or 0)
        if start.cpus_limit and there:
            assert start.cpus_promised + sum(one.cpus for one in there) <= start.cpus_limit
        assert all(host in one.hosts for one in there if one.hosts)
        groups = [group for one in there for group in one.apart]
        assert len(groups) == len(set(groups)), "two of a group on one host"
