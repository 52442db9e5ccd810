"""A lab with the real daemons: hosts join, faults reach a running VM's processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from godwit.client.settings import resolve
from godwit.client.sync import Client
from godwit.guard.deadline import FREEZE_S, RESET_S
from godwit.host.cgroup import Cgroup, open_cgroup, wait_until
from godwit.host.process import is_alive, rss_bytes
from godwit.lab import fault, groups, leaks, network
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.layout import MGMT, Layout
from godwit.lab.options import Options
from godwit.lab.up import up
from godwit.model import keys
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotFound,
    Refused,
    Unavailable,
)
from godwit.model.membership import Renewal
from godwit.model.vm import VmState
from godwit.store.records import Records

from .conftest import environment

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def lab(root: Path) -> Iterator[Lab]:
    name = "c" + uuid.uuid4().hex[:5]
    contexts = root / "config/godwit/contexts.toml"
    with environment(root):
        before = leaks.take(name)
        up(
            Options(Layout(name, 2, "1gbit", root, storage="dir"), contexts_file=contexts),
            say=print,
        )
        assert resolve(context=name).url == Lab.load(name).record.url
        try:
            yield Lab.load(name)
        finally:
            down(name)
        assert leaks.compare(before, leaks.take(name)) == []
        assert not contexts.exists()


@pytest.fixture
def client(lab: Lab) -> Iterator[Client]:
    with Client(context=lab.record.name) as client:
        yield client


def test_hosts_are_up_and_see_the_network_and_the_volume(lab: Lab, client: Client) -> None:
    hosts = client.hosts.list()
    assert [(host.name, host.state.value) for host in hosts] == [("host1", "up"), ("host2", "up")]
    assert all(host.networks == {"lan": 1500} for host in hosts)
    assert all(host.volumes == ("shared",) for host in hosts)
    assert client.networks.get("lan").uplink == "lan0"
    assert [volume.name for volume in client.volumes.list()] == ["shared"]


def test_the_store_is_reached_from_outside(lab: Lab) -> None:
    async def look() -> set[str]:
        store = lab.store_client()
        try:
            return set(await Records(store).networks())
        finally:
            await store.aclose()

    assert asyncio.run(look()) == {"lan"}


def test_hold_points_are_armed_though_the_network_is_cut(lab: Lab) -> None:
    fault.cut_network(lab, "host1", "mgmt")
    try:
        armed = fault.hold(lab, "precopy", "host1")
        assert armed["armed"] == [{"point": "precopy", "role": "source"}]
        assert fault.held(lab, "host1")["held"] == []
        with pytest.raises(InvalidRequest, match="nowhere"):
            fault.hold(lab, "nowhere", "host1")
        assert fault.release(lab, "host1")["armed"] == []
    finally:
        fault.restore_network(lab, "host1", "mgmt")


def test_a_vm_outlives_its_agent_and_its_qemu_is_found(lab: Lab, client: Client) -> None:
    task = client.vms.create(
        "web",
        memory_bytes=128 << 20,
        image="demo",
        networks=["lan"],
        append="godwit.ip=10.91.0.100/22",
    )
    client.wait(task)
    client.wait(client.vms.start("web", host="host1"))
    qemu = lab.process("host1", "qemu:web")
    assert "qemu-system" in Path(f"/proc/{qemu.pid}/cmdline").read_text()
    with pytest.raises(Refused, match="host1 runs web"):
        client.hosts.off_power("host1")

    fault.kill_process(lab, "host1", "agent")
    lab.tell("host1", "wait-ready")
    assert lab.process("host1", "qemu:web") == qemu

    fault.kill_process(lab, "host1", "qemu:web")
    limit = time.monotonic() + 20
    while client.vms.get("web").state.value == "running":
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert not is_alive(qemu)
    client.wait(client.vms.delete("web"))


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[None]:
    """On host1 a VM that is highly available, and one that is not."""
    with Client(context=lab.record.name) as client:
        for name in ("web", "plain"):
            task = client.vms.create(name, memory_bytes=128 << 20, image="demo", ha=name == "web")
            client.wait(task)
            client.wait(client.vms.start(name, host="host1"))
        yield
        without(client)


def without(client: Client) -> None:
    """Take the pair away, as far as it is there."""
    for name in {vm.name for vm in client.vms.list()} & {"web", "plain"}:
        with contextlib.suppress(GodwitError):  # it may have stopped by itself
            client.wait(client.vms.stop(name, force=True))
        client.wait(client.vms.delete(name))


def group(lab: Lab, vm: str) -> Cgroup:
    return open_cgroup(f"{lab.layout.cgroup('host1')}/godwit/host1/{vm}")


def until(true: Callable[[], bool], seconds: float) -> float:
    """Wait, and return when it came true, on the clock of guards."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def counts_from(lab: Lab) -> float:
    """Since when the guard of host1 counts, as it noted."""
    notes = lab.root_of("host1") / "run/godwit/guard.json"
    return float(json.loads(notes.read_text())["counts_from"])


def renewal(lab: Lab) -> Renewal:
    async def look() -> Renewal:
        store = lab.store_client()
        try:
            found = await Records(store).get(keys.host_renewal("host1"), Renewal)
        finally:
            await store.aclose()
        assert found is not None
        return found.value

    return asyncio.run(look())


def test_a_host_that_is_cut_off_stops_what_may_be_started_elsewhere(
    lab: Lab, client: Client, pair: None
) -> None:
    until(lambda: renewal(lab).guard == "armed", 20)
    assert renewal(lab).watchdog
    web, plain = group(lab, "web"), group(lab, "plain")
    fault.cut_network(lab, "host1", "mgmt")
    try:
        late = until(web.frozen, 13) - counts_from(lab)
        assert FREEZE_S - 0.1 <= late < FREEZE_S + 1, late
        used = web.cpu_seconds(), plain.cpu_seconds()
        time.sleep(1.0)
        assert web.cpu_seconds() == used[0]
        assert plain.cpu_seconds() > used[1]
        assert not plain.frozen()
    finally:
        fault.restore_network(lab, "host1", "mgmt")
    back = time.clock_gettime(time.CLOCK_BOOTTIME)
    thawed = until(lambda: not web.frozen(), 15) - back
    print(f"frozen after {late:.2f} s, thawed {thawed:.2f} s after the network was back")
    until(lambda: web.cpu_seconds() > used[0], 15)
    until(lambda: client.vms.get("web").state is VmState.RUNNING, 30)
    assert lab.process("host1", "qemu:web")
    log = lab.layout.node_dir("host1") / "state/guard.log"

    def acts() -> list[tuple[str, str]]:
        lines = map(json.loads, log.read_text().splitlines())
        return [(line["vm"], line["act"]) for line in lines]

    until(lambda: acts()[-1:] == [("web", "thaw")], 10)
    assert set(acts()) == {("web", "freeze"), ("web", "thaw")}

    def told() -> bool:
        events = client.events(since="0", subject="vm/web", follow=False)
        return any(event.kind == "vm.thawed" for event in events)

    until(told, 30)


def test_a_guard_that_hangs_costs_the_host_at_the_deadline(
    lab: Lab, client: Client, pair: None
) -> None:
    until(lambda: renewal(lab).watchdog, 20)
    first, counts = lab.init("host1"), counts_from(lab)
    fault.freeze_process(lab, "host1", "guard", hold=True)
    counts = max(counts, counts_from(lab))
    over = until(lambda: not is_alive(first), 20) - counts
    print(f"reset {over:.2f} s after the last renewal")
    assert RESET_S - 2 < over < RESET_S + 1
    until(lambda: lab.reload().status()["hosts"][0]["state"] == "off", 10)
    fault.power_on(lab.reload(), "host1")
    until(lambda: client.hosts.get("host1").state.value == "up", 60)
    # Nothing else ran in this cluster: it is as if all power had been lost, and both start again.
    for name in ("web", "plain"):
        until(lambda name=name: client.vms.get(name).state is VmState.RUNNING, 60)  # type: ignore[misc]
    without(client)


def test_the_manager_comes_back_at_its_address(lab: Lab, client: Client) -> None:
    url = lab.record.url
    fault.power_on(fault.power_off(lab, "control"), "control")
    limit = time.monotonic() + 20
    while True:
        try:
            hosts = [host.state.value for host in client.hosts.list()]
        except Exception:
            hosts = []
        if hosts == ["up", "up"]:
            break
        assert time.monotonic() < limit, hosts
        time.sleep(0.2)
    assert lab.reload().record.url == url


def test_a_host_is_small(lab: Lab) -> None:
    lab = lab.reload()
    for host in lab.layout.host_names:
        sizes = {unit: rss_bytes(lab.process(host, unit).pid) >> 20 for unit in lab.units(host)}
        sizes["supervisor"] = rss_bytes(lab.init(host).pid) >> 20
        print(host, sizes, "MiB")
        assert sizes["supervisor"] < 15
        assert sum(sizes.values()) < 160
        assert rss_bytes(lab.process(host, "bmc").pid) >> 20 < 40


def test_a_bmc_outlives_its_host_and_proves_its_end(lab: Lab, client: Client) -> None:
    client.wait(client.hosts.on_power("host1"))  # a watchdog may have ended it before
    lab = lab.reload()
    first = lab.init("host1")
    tested = client.wait(client.hosts.test_power("host1"))
    assert (tested.result or {})["state"] == "on"
    off = client.wait(client.hosts.off_power("host1", force=True))
    assert (off.result or {})["state"] == "off"
    assert not is_alive(first)
    assert groups.members(lab.layout.cgroup("host1")) == ()
    fault.freeze_process(lab, "host1", "bmc")
    with pytest.raises(Unavailable):
        client.wait(client.hosts.on_power("host1", timeout_s=1.0))
    fault.thaw_process(lab, "host1", "bmc")
    network.cut(lab.layout, "bmc1", MGMT)
    with pytest.raises(Unavailable):
        client.wait(client.hosts.off_power("host1", timeout_s=1.0))
    network.restore(lab.layout, "bmc1", MGMT)
    on = client.wait(client.hosts.on_power("host1"))
    assert (on.result or {})["state"] == "on"
    assert is_alive(lab.reload().init("host1"))
    killed = fault.kill_process(lab, "host1", "bmc")
    assert wait_until(lambda: not is_alive(killed), 5.0)
    with pytest.raises(NotFound, match="BMC of host1 does not run"):
        lab.process("host1", "bmc")
    fault.restart_daemon(lab, "host1", "bmc")
    assert client.wait(client.hosts.test_power("host1")).result
