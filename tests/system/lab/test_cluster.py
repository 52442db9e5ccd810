"""A lab with the real daemons: hosts join, faults reach a running VM's processes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.client.settings import resolve
from godwit.client.sync import Client
from godwit.host.process import is_alive, rss_bytes
from godwit.lab import fault, leaks
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.layout import Layout
from godwit.lab.options import Options
from godwit.lab.up import up
from godwit.model.errors import InvalidRequest
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
