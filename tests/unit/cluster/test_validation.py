"""Each fault of a cluster is found by the check that is about it, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from godwit.cluster.validation import judge
from godwit.cluster.validation.findings import by_value, listed, odd_ones
from godwit.model.host import QemuFacts
from godwit.model.validation import CATEGORIES, ValidationCheck
from godwit.model.validation_facts import (
    ClusterFacts,
    CpuSeen,
    HostProbe,
    HostSeen,
    LinkSeen,
    LockSeen,
    PathSeen,
    RungSeen,
    StoreMember,
    StoreSeen,
    VolumeKnown,
    VolumeSeen,
)

HOSTS = ("host1", "host2", "host3")
FLAGS = ("aes", "avx2", "ept", "sse4_2", "vmx")


def probe(name: str, **changes: Any) -> HostProbe:
    number = name.removeprefix("host")
    made = HostProbe(
        name=name,
        machine="x86_64",
        kernel="6.12.1",
        system="Debian 13",
        version="0.1.0",
        cpu=CpuSeen(count=8, vendor="GenuineIntel", flags=FLAGS, virtualization="vmx", slat="ept"),
        kvm=True,
        userfaultfd=True,
        qemu=QemuFacts(
            version=(10, 0, 2),
            accelerator="kvm",
            machines=("pc-q35-9.2", "pc-q35-10.0"),
            cpu_models=("Nehalem-v1", "Skylake-Server-v1"),
        ),
        management=LinkSeen(name="mgmt", address=f"10.90.0.1{number}/24", mtu=1500),
        migration=LinkSeen(name="mig", address=f"10.92.0.1{number}/24", mtu=1500),
        migration_address=f"10.92.0.1{number}",
        migration_subnet="10.92.0.0/24",
        migration_rate_bits=1_000_000_000,
        networks={"lan": 1500},
        guard=True,
        armed=True,
        watchdog=True,
    )
    return made.but(**changes)


def facts(hosts: tuple[str, ...] = HOSTS, **changes: Any) -> ClusterFacts:
    """A cluster that has nothing wrong with it."""
    pairs = [(a, b) for a in hosts for b in hosts if a != b]
    members = tuple(
        StoreMember(name=f"m{n}", endpoint=f"https://10.90.0.1{n}:2379", fsync_p99_s=0.002)
        for n in (1, 2, 3)
    )
    made = ClusterFacts(
        hosts=tuple(HostSeen(name=name, state="up", probe=probe(name)) for name in hosts),
        paths=tuple(
            PathSeen(
                source=a,
                destination=b,
                full_bytes=1500,
                largest_bytes=1500,
                bits_per_s=9.4e8,
                clock_offset_s=0.002,
                clock_error_s=0.001,
            )
            for a, b in pairs
        ),
        volumes=(VolumeKnown(name="shared", kind="dir"),),
        volumes_seen=tuple(
            VolumeSeen(volume="shared", host=h, state="direct", identity="v1", write_s=0.01)
            for h in hosts
        ),
        locks=tuple(
            LockSeen(volume="shared", holder=hosts[0], observer=h, seen=True) for h in hosts[1:]
        ),
        networks={"lan": 1500},
        store=StoreSeen(kind="etcd", members=members, write_s=(0.004, 0.005, 0.009)),
        rungs=tuple(RungSeen(host=h, rung="power", answers=True) for h in hosts),
    )
    return made.but(**changes)


def on(found: ClusterFacts, host: str, **changes: Any) -> ClusterFacts:
    """The same facts with one host's own answer changed."""
    return found.but(
        hosts=tuple(
            one.but(probe=one.probe.but(**changes)) if one.name == host and one.probe else one
            for one in found.hosts
        )
    )


def paths(found: ClusterFacts, choose: Callable[[PathSeen], bool], **changes: Any) -> ClusterFacts:
    return found.but(paths=tuple(one.but(**changes) if choose(one) else one for one in found.paths))


def not_passed(found: ClusterFacts) -> dict[str, ValidationCheck]:
    return {check.name: check for check in judge(found) if check.result != "pass"}


def only(found: ClusterFacts, name: str) -> ValidationCheck:
    """The one check that did not pass."""
    wrong = not_passed(found)
    assert set(wrong) == {name}, wrong
    return wrong[name]


def of(host: str) -> Callable[[PathSeen], bool]:
    return lambda path: host in (path.source, path.destination)


@pytest.mark.parametrize("hosts", [HOSTS, HOSTS[:2]])
def test_nothing_is_wrong_with_a_good_cluster(hosts: tuple[str, ...]) -> None:
    checks = judge(facts(hosts))
    assert not_passed(facts(hosts)) == {}
    assert [c.category for c in checks] == sorted(
        (c.category for c in checks), key=CATEGORIES.index
    )
    assert {check.category for check in checks} == set(CATEGORIES)


def test_every_check_that_does_not_pass_says_what_to_do() -> None:
    checks = judge(ClusterFacts(hosts=tuple(HostSeen(name=h, state="down") for h in HOSTS)))
    wrong = [check for check in checks if check.result != "pass"]
    assert len(wrong) > 5
    assert all(check.hint for check in wrong)


# System


def test_another_cpu_vendor_fails() -> None:
    cpu = probe("host2").cpu.but(vendor="AuthenticAMD")
    check = only(on(facts(), "host2", cpu=cpu), "cpu-vendor")
    assert (check.result, check.hosts) == ("fail", ("host2",))
    assert "AuthenticAMD on host2; GenuineIntel on host1, host3" in check.message


def test_a_missing_feature_is_named_with_its_host() -> None:
    cpu = probe("host2").cpu.but(flags=tuple(f for f in FLAGS if f != "avx2"))
    check = only(on(facts(), "host2", cpu=cpu), "cpu-features")
    assert (check.result, check.hosts) == ("warn", ("host2",))
    assert "host2 lacks avx2" in check.message
    assert f"{len(FLAGS) - 1} features are common" in check.message


def test_no_common_cpu_model_fails_and_fewer_warn() -> None:
    qemu = probe("host2").qemu
    assert only(on(facts(), "host2", qemu=qemu.but(cpu_models=())), "cpu-models").result == "fail"
    fewer = on(facts(), "host2", qemu=qemu.but(cpu_models=("Nehalem-v1",)))
    check = only(fewer, "cpu-models")
    assert (check.result, check.hosts) == ("warn", ("host2",))


def test_a_host_below_what_vms_have_is_named_with_each_model() -> None:
    needs = facts().but(cpu_models={"Skylake-Server-v1": 3, "Nehalem-v1": 1, "host": 2})
    assert not_passed(needs) == {}
    qemu = probe("host2").qemu.but(cpu_models=("Nehalem-v1",))
    check = not_passed(on(needs, "host2", qemu=qemu))["cpu-baseline"]
    assert (check.result, check.hosts) == ("warn", ("host2",))
    assert "it cannot give Skylake-Server-v1, which 3 VMs have" in check.message
    assert "Nehalem-v1" not in check.message
    assert "give host" not in check.message
    wanted = on(facts().but(cpu_baseline="Skylake-Server-v1"), "host2", qemu=qemu)
    assert "the baseline that was set" in not_passed(wanted)["cpu-baseline"].message
    assert "cpu-baseline" not in not_passed(on(facts(), "host2", qemu=qemu))


def test_virtualization_that_is_off_warns() -> None:
    cpu = probe("host2").cpu.but(virtualization="", slat="")
    wrong = not_passed(on(facts(), "host2", cpu=cpu, kvm=False))
    assert {name: check.result for name, check in wrong.items()} == {
        "virtualization": "warn",
        "slat": "warn",
    }
    closed = only(on(facts(), "host3", kvm=False, kvm_reason="no right"), "virtualization")
    assert (closed.hosts, "no right" in closed.message) == (("host3",), True)


def test_emulation_beside_kvm_fails() -> None:
    qemu = probe("host2").qemu.but(accelerator="tcg")
    assert only(on(facts(), "host2", qemu=qemu), "accelerator").hosts == ("host2",)


def test_a_qemu_that_is_too_old_fails() -> None:
    qemu = probe("host3").qemu.but(live_migration_refusal="it forgets pages")
    check = only(on(facts(), "host3", qemu=qemu), "qemu-live")
    assert (check.result, check.hosts) == ("fail", ("host3",))
    assert "it forgets pages" in check.message


def test_no_userfaultfd_warns() -> None:
    assert only(on(facts(), "host1", userfaultfd=False), "post-copy").result == "warn"


def test_another_architecture_fails() -> None:
    assert only(on(facts(), "host1", machine="aarch64"), "architecture").hosts == ("host1",)


@pytest.mark.parametrize(("seconds", "result"), [(5.0, "fail"), (0.3, "warn")])
def test_a_wrong_clock_is_laid_at_its_own_door(seconds: float, result: str) -> None:
    check = only(paths(facts(), of("host2"), clock_offset_s=seconds), "clock")
    assert (check.result, check.hosts) == (result, ("host2",))
    assert f"{seconds:.3f} s" in check.message


def test_of_two_clocks_nobody_knows_which_is_wrong() -> None:
    check = only(paths(facts(HOSTS[:2]), of("host2"), clock_offset_s=-5.0), "clock")
    assert (check.result, check.hosts) == ("fail", ("host1", "host2"))


def test_what_a_measurement_may_be_wrong_by_is_no_fault() -> None:
    found = paths(facts(), of("host2"), clock_offset_s=0.3, clock_error_s=0.29)
    assert not_passed(found) == {}


def test_a_clock_that_nobody_could_read_warns() -> None:
    found = paths(facts(), of("host2"), clock_offset_s=None, clock_reason="silent")
    check = only(found, "clock")
    assert (check.result, "silent" in check.message) == ("warn", True)


# Network


def test_a_wrong_subnet_fails() -> None:
    link = LinkSeen(name="mig", address="10.99.0.12/24", mtu=1500)
    check = only(on(facts(), "host2", migration=link), "subnet")
    assert (check.result, check.hosts) == ("fail", ("host2",))
    assert "10.99.0.0/24 on host2" in check.message


def test_an_address_that_no_interface_has_fails() -> None:
    wrong = not_passed(on(facts(), "host2", migration=None))
    assert wrong["subnet"].hosts == ("host2",)
    assert "10.92.0.12" in wrong["subnet"].message


def test_a_shared_interface_warns() -> None:
    link = LinkSeen(name="mgmt", address="10.92.0.12/24", mtu=1500)
    check = only(on(facts(), "host2", migration=link), "dedicated")
    assert (check.result, check.hosts) == ("warn", ("host2",))


def test_mtus_that_differ_fail() -> None:
    link = LinkSeen(name="mig", address="10.92.0.12/24", mtu=1400)
    check = only(on(facts(), "host2", migration=link), "mtu")
    assert (check.result, check.hosts) == ("fail", ("host2",))
    assert check.message.endswith("1400 on host2; 1500 on host1, host3")


def test_a_packet_that_does_not_arrive_whole_fails() -> None:
    def into(path: PathSeen) -> bool:
        return path.destination == "host2"

    wrong = judge(paths(facts(), into, largest_bytes=1400))
    full = [check for check in wrong if check.name == "full-packets"]
    assert [check.hosts for check in full] == [("host1", "host2"), ("host2", "host3")]
    assert all(check.result == "fail" and "1400" in check.message for check in full)


def test_a_host_that_nothing_reaches_is_named_once() -> None:
    found = paths(facts(), of("host2"), largest_bytes=None, reason="no packet is answered")
    found = paths(found, of("host2"), bits_per_s=None)
    check = only(found, "reachable")
    assert (check.result, check.hosts) == ("fail", ("host2",))


@pytest.mark.parametrize(("bits", "result"), [(4e7, "fail"), (3e8, "warn")])
def test_a_slow_migration_network_is_found(bits: float, result: str) -> None:
    def one(path: PathSeen) -> bool:
        return (path.source, path.destination) == ("host2", "host3")

    check = only(paths(facts(), one, bits_per_s=bits), "bandwidth")
    assert (check.result, check.hosts) == (result, ("host2", "host3"))
    assert "Mbit/s" in check.message


def test_a_rate_that_was_not_measured_warns() -> None:
    found = paths(facts(), lambda _: True, bits_per_s=None)
    assert only(found, "bandwidth").result == "warn"
    found = paths(facts(), of("host2"), rate_reason="web is on the move", bits_per_s=None)
    assert "web is on the move" in only(found, "bandwidth").message


def test_a_fast_network_wants_jumbo_frames() -> None:
    fast = paths(facts(), lambda _: True, bits_per_s=9.4e9)
    assert only(fast, "jumbo-frames").result == "warn"
    large = paths(fast, lambda _: True, full_bytes=9000, largest_bytes=9000)
    assert not_passed(large) == {}


def test_a_vm_network_that_is_missing_or_differs_fails() -> None:
    assert only(on(facts(), "host2", networks={}), "vm-networks").hosts == ("host2",)
    check = only(on(facts(), "host2", networks={"lan": 9000}), "vm-networks")
    assert (check.result, "9000 on host2" in check.message) == ("fail", True)


# Storage


def volume(found: ClusterFacts, host: str, **changes: Any) -> ClusterFacts:
    return found.but(
        volumes_seen=tuple(
            one.but(**changes) if one.host == host else one for one in found.volumes_seen
        )
    )


def test_a_volume_that_is_missing_on_a_host_fails() -> None:
    check = only(volume(facts(), "host2", wrong="it is not there"), "volumes")
    assert (check.result, check.hosts) == ("fail", ("host2",))
    assert "it is not there" in check.message


def test_a_host_that_does_not_read_what_others_wrote_fails() -> None:
    check = only(volume(facts(), "host2", unread={"host1": "gone"}), "written-and-read")
    assert (check.result, check.hosts) == ("fail", ("host1", "host2"))


def test_two_volumes_under_one_name_fail() -> None:
    check = only(volume(facts(), "host2", identity="v2"), "same-volume")
    assert (check.result, check.hosts) == ("fail", ("host2",))


def test_a_redirected_volume_warns_and_an_unavailable_one_fails() -> None:
    check = only(volume(facts(), "host2", state="redirected", state_reason="cut"), "volumes")
    assert check.result == "warn"
    check = only(volume(facts(), "host2", state="unavailable", state_reason="cut"), "volumes")
    assert check.result == "fail"


def test_a_lock_that_is_not_seen_fails() -> None:
    lock = LockSeen(volume="shared", holder="host1", observer="host2", seen=False, reason="free")
    check = only(facts(locks=(lock,)), "image-locks")
    assert (check.result, check.hosts) == ("fail", ("host1", "host2"))
    assert only(facts(locks=()), "image-locks").result == "warn"
    assert only(on(facts(), "host2", image_locks=False), "image-locks").hosts == ("host2",)


def test_a_local_volume_need_not_be_shared() -> None:
    volumes = (*facts().volumes, VolumeKnown(name="local", kind="local"))
    assert not_passed(facts(volumes=volumes)) == {}


# Inventory and cluster


def test_a_silent_host_fails() -> None:
    hosts = (*facts().hosts[:2], HostSeen(name="host3", state="down", reason="it is off"))
    found = facts().but(hosts=hosts)
    found = found.but(paths=tuple(p for p in found.paths if not of("host3")(p)))
    check = only(found, "hosts")
    assert (check.result, check.hosts) == ("fail", ("host3",))
    assert "it is off" in check.message


def test_versions_that_differ_warn_and_no_common_machine_fails() -> None:
    qemu = probe("host2").qemu
    assert only(on(facts(), "host2", version="0.2.0"), "godwit-versions").result == "warn"
    old = qemu.but(version=(9, 2, 0), machines=("pc-q35-9.2",))
    assert only(on(facts(), "host2", qemu=old), "qemu-versions").hosts == ("host2",)
    none = on(facts(), "host2", qemu=qemu.but(machines=("pc-q35-7.2",)))
    assert only(none, "machine-versions").result == "fail"


def test_the_newest_common_machine_is_the_one_by_number() -> None:
    checks = {check.name: check for check in judge(facts())}
    assert "pc-q35-10.0" in checks["machine-versions"].message


def test_two_hosts_without_a_witness_are_told() -> None:
    store = facts().store
    assert store
    check = only(facts(HOSTS[:2], store=store.but(members=store.members[:2])), "witness")
    assert (check.result, "no witness" in check.message) == ("fail", True)
    embedded = StoreSeen(kind="embedded", members=store.members[:1], write_s=(0.01,))
    check = only(facts(HOSTS[:2], store=embedded), "witness")
    assert (check.result, "no witness" in check.message) == ("warn", True)
    four = store.but(members=(*store.members, store.members[0]))
    assert only(facts(store=four), "witness").result == "warn"
    assert only(facts(store=store.but(voters=4)), "witness").result == "warn"


def test_two_members_on_one_of_two_hosts_are_no_witness() -> None:
    store = facts().store
    assert store
    one, two, three = store.members
    crowded = (one.but(host="host1"), two.but(host="host1"), three.but(host="host2"))
    check = only(facts(HOSTS[:2], store=store.but(members=crowded)), "witness")
    assert (check.result, check.hosts) == ("fail", ("host1",))
    spread = (one.but(host="host1"), two.but(host="host2"), three)
    assert not_passed(facts(HOSTS[:2], store=store.but(members=spread))) == {}


def test_a_store_member_that_is_away_or_slow_is_found() -> None:
    store = facts().store
    assert store
    first, *rest = store.members

    def with_first(**changes: Any) -> ClusterFacts:
        return facts(store=store.but(members=(first.but(**changes), *rest)))

    assert only(with_first(healthy=False, reason="no answer"), "store").result == "fail"
    assert only(with_first(fsync_p99_s=0.030), "store-fsync").result == "warn"
    assert only(with_first(fsync_p99_s=0.512), "store-fsync").result == "fail"
    assert only(with_first(fsync_p99_s=None), "store-fsync").result == "warn"
    assert only(facts(store=store.but(write_s=(0.2, 0.2, 0.2))), "store-write").result == "warn"
    assert only(facts(store=store.but(write_s=(2.0, 2.0, 0.2))), "store-write").result == "fail"
    assert only(facts(store=store.but(reason="no leader")), "store").result == "fail"
    assert only(facts(store=None), "store").result == "warn"


def test_a_bmc_that_does_not_answer_fails() -> None:
    dead = RungSeen(
        host="host2", rung="power", answers=False, device="the BMC https://b2", reason="timed out"
    )
    good = tuple(one for one in facts().rungs or () if one.host != "host2")
    check = only(facts(rungs=(*good, dead)), "fencing")
    assert (check.result, check.hosts) == ("fail", ("host2",))
    assert "https://b2" in check.message
    assert "timed out" in check.message


def test_a_host_without_any_rung_warns() -> None:
    good = tuple(one for one in facts().rungs or () if one.host != "host2")
    assert only(facts(rungs=good), "fencing").hosts == ("host2",)
    assert only(facts(rungs=None), "fencing").result == "warn"


def test_no_guard_fails() -> None:
    assert only(on(facts(), "host2", guard=False), "guards").result == "fail"


def test_partial_facts_are_judged_by_network_and_system_alone() -> None:
    found = ClusterFacts(hosts=facts().hosts, paths=facts().paths, partial=True)
    assert {check.category for check in judge(found)} == {"network", "system"}
    assert not_passed(found) == {}


# Words


def test_the_odd_one_is_who_differs_from_most() -> None:
    assert odd_ones({"a": 1, "b": 2, "c": 1}) == ["b"]
    assert odd_ones({"a": 1, "b": 2}) == ["a", "b"]
    assert odd_ones({"a": 1, "b": 1}) == []
    assert list(by_value({"a": 2, "b": 1, "c": 1})) == [1, 2]
    assert listed({"a": 2, "b": 1, "c": 1}) == "2 on a; 1 on b, c"
