"""What two QEMUs must agree on, shown by real streams between them."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from godwit.host.run import run_async
from godwit.model.errors import OperationFailed
from godwit.model.vm import Vm
from godwit.qemu import intervals
from godwit.qemu.facts import BinaryFacts, facts_of, probe
from godwit.qemu.launch import Binary
from godwit.qemu.machine import Machine
from godwit.qemu.pins import choose_pins
from godwit.qemu.start import Place
from godwit.qemu.tls import ensure_dh_params
from godwit.qmp import Monitor

pytestmark = pytest.mark.system

MakeVm = Callable[..., Vm]
MakePlace = Callable[..., Place]
StartOne = Callable[..., Awaitable[Machine]]


async def _move(source: Machine, target: Machine) -> str:
    """Stream the machine over; the final status as the source sees it."""
    caps = [{"capability": name, "state": True} for name in ("events", "return-path")]
    for machine in (source, target):
        await machine.monitor.execute("migrate-set-capabilities", {"capabilities": caps})
    await target.monitor.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    address = (await target.query_migrate())["socket-address"][0]
    with source.monitor.events("MIGRATION") as events:
        await source.monitor.execute("migrate", {"uri": f"tcp:127.0.0.1:{address['port']}"})
        end = await events.wait(
            lambda event: event.data["status"] in ("completed", "failed"), timeout=30
        )
    return str(end.data["status"])


async def _quickest(ask: Callable[[], Awaitable[object]]) -> float:
    took = []
    for _ in range(7):
        began = time.perf_counter()
        await ask()
        took.append(time.perf_counter() - began)
    return min(took)


async def test_trees_are_equal_and_the_move_loads(
    make_vm: MakeVm,
    make_place: MakePlace,
    start: StartOne,
    wait_for_console: Callable[[Machine, str], Awaitable[None]],
) -> None:
    vm = make_vm(disks=2, nics=2, cpus=2)
    source = await start(vm, make_place("h1"))
    # The tap of a card has one name on every host; one machine can hold it once.
    target = await start(vm.but(name="web2"), make_place("h2"), incoming=True)
    here, there = await asyncio.gather(source.device_tree(), target.device_tree())
    assert here.differences(there) == ()
    by_id = {device.id: device for device in here.devices}
    await source.cont()
    await wait_for_console(source, "GW")
    assert (await source.device_tree()).differences(there) == (), "firmware has run there only"
    assert by_id["net1"].address == "port1:00.0"
    assert by_id["net1"].properties["mac"] == "02:00:00:00:99:01"
    assert by_id["disk1"].properties == {
        "scsi-id": "1",
        "serial": "GWTEST1",
        "size": str(4 << 20),
    }
    assert by_id["scsi0"].properties["num_queues"] == "2"
    assert by_id["scsi0"].address == "pcie.0:01.0"
    assert (here.machine, here.cpu_model, here.cpus) == ("pc-q35-7.2", "Nehalem-v1", 2)
    assert here.memory_bytes == 64 << 20

    await source.stop()
    asked: list[str] = []
    execute = Monitor.execute

    async def counted(self: Monitor, command: str, *rest: Any, **more: Any) -> Any:
        asked.append(command)
        return await execute(self, command, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "execute", counted)
        await target.device_tree()
    tree = await _quickest(target.device_tree)
    print(f"device tree: {tree * 1000:.1f} ms for {len(asked)} questions")
    assert len(asked) <= 18, "each is a round trip in the middle of a move"
    await source.cont()

    assert await _move(source, target) == "completed"
    assert (await target.status()).status == "paused"
    resumed = await target.cont()
    for machine in (source, target):
        await machine.quit()
    spans = [
        span
        for machine in (source, target)
        for span in intervals.running_spans(machine.runtime.state, until=time.time())
    ]
    assert [span.host for span in spans] == ["h1", "h1", "h2"]
    assert spans[-1].start == pytest.approx(resumed, abs=0.005)
    assert intervals.overlaps(spans) == []


async def test_two_running_copies_are_seen(
    make_vm: MakeVm, make_place: MakePlace, start: StartOne
) -> None:
    machines = [await start(make_vm(), make_place(host)) for host in ("h1", "h2")]
    for machine in machines:
        await machine.cont()
    spans = [
        span
        for machine in machines
        for span in intervals.running_spans(machine.runtime.state, until=time.time())
    ]
    assert len(intervals.overlaps(spans)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nic", "net1 (virtio-net-pci) is there but not here"),
        ("mac", "mac="),
        ("disk", "disk0 (scsi-hd) is missing there"),
        ("memory", "memory_bytes"),
        ("cpu", "cpu_model"),
    ],
)
async def test_a_different_machine_is_told_apart(
    change: str, words: str, make_vm: MakeVm, make_place: MakePlace, start: StartOne
) -> None:
    vm = make_vm(disks=1, nics=1)
    changed = {
        "nic": lambda: make_vm(disks=1, nics=2),
        "mac": lambda: vm.but(nics=(vm.nics[0].but(mac="02:00:00:00:77:77"),)),
        "disk": lambda: vm.but(disks=()),
        "memory": lambda: vm.but(memory_bytes=72 << 20),
        "cpu": lambda: vm.but(pins=vm.pins.but(cpu_model="Westmere-v1")),
    }[change]()
    source = await start(vm, make_place("h1"))
    target = await start(changed.but(name="web2"), make_place("h2"), incoming=True)
    said = (await source.device_tree()).differences(await target.device_tree())
    assert len(said) == 1
    assert words in said[0]


async def test_probe_of_this_qemu(facts: BinaryFacts, qemu: Binary, tmp_path: Path) -> None:
    assert facts.version >= (9, 0, 0)
    assert {"avail-switchover-bandwidth", "mapped-ram", "virtio-net-uso"} <= facts.features
    assert "Nehalem-v1" in facts.cpu_models
    assert facts.public().live_migration_refusal == ""
    first = await facts_of(qemu, "tcg", cache=tmp_path)
    began = time.perf_counter()
    assert await facts_of(qemu, "tcg", cache=tmp_path) == first == facts
    assert time.perf_counter() - began < 0.05
    (tmp_path / "qemu-facts-tcg.json").write_text("{damaged")
    assert await facts_of(qemu, "tcg", cache=tmp_path) == first


async def test_probe_says_why_it_cannot(qemu: Binary, tmp_path: Path) -> None:
    with pytest.raises(OperationFailed, match="nosuchaccel"):
        await probe(qemu, "nosuchaccel")
    with pytest.raises(OperationFailed, match="cannot start"):
        await probe(Binary(path=str(tmp_path / "missing")), "tcg")


async def test_old_qemu_is_known_for_what_it_is(old_qemu: Binary, facts: BinaryFacts) -> None:
    old = await probe(old_qemu, "tcg")
    assert old.version[:2] == (7, 2)
    assert {"multifd", "return-path", "pause-before-switchover", "yank"} <= old.features
    absent = {"mapped-ram", "migrate-channels", "avail-switchover-bandwidth", "virtio-net-uso"}
    assert not absent & old.features
    assert "loses pages" in old.public().live_migration_refusal
    assert old.public(allow_tcg_migration_on_old_qemu=True).live_migration_refusal == ""
    both = {"h1": facts.public(), "h2": old.public()}
    assert choose_pins(both, uuid="u").machine == "pc-q35-7.2"


async def test_old_and_new_qemu_build_the_same_machine(
    old_qemu: Binary, facts: BinaryFacts, make_vm: MakeVm, make_place: MakePlace, start: StartOne
) -> None:
    vm = make_vm(disks=1, nics=1)
    source = await start(vm, make_place("h1", binary=old_qemu))
    target = await start(
        vm.but(name="web2"), make_place("h2", features=facts.features), incoming=True
    )
    assert source.monitor.version[:2] == (7, 2)
    assert (await source.device_tree()).differences(await target.device_tree()) == ()
    await source.cont()
    await asyncio.sleep(0.2)
    assert await _move(source, target) == "completed"
    await target.cont()
    assert (await target.status()).running


async def test_credentials_cost_no_time(make_vm: MakeVm, start: StartOne, root: Path) -> None:
    folder = root / "tls"
    folder.mkdir()
    await _certificates(folder)
    ensure_dh_params(folder)
    ensure_dh_params(folder)
    for path in folder.iterdir():
        os.chown(path, 65534, 65534)
    machine = await start(make_vm(), incoming=True)
    assert await machine.add_tls("server", folder) == "migration-tls-server"
    assert await machine.add_tls("client", folder) == "migration-tls-client"
    server = await _quickest(lambda: machine.add_tls("server", folder))
    client = await _quickest(lambda: machine.add_tls("client", folder))
    print(f"credentials: server {server * 1000:.1f} ms, client {client * 1000:.1f} ms")
    assert server < 3 * client + 0.02, "QEMU makes Diffie-Hellman parameters of its own"


async def _certificates(folder: Path) -> None:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    ca, ca_key, request = folder / "ca-cert.pem", folder / "ca-key.pem", folder / "request"
    for command in (
        ["req", "-x509", *key, "-keyout", ca_key, "-out", ca, "-subj", "/CN=ca", "-days", "2"],
        ["req", *key, "-keyout", folder / "server-key.pem", "-out", request, "-subj", "/CN=h1"],
        [
            *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial"),
            *("-out", folder / "server-cert.pem", "-days", "1"),
        ],
    ):
        await run_async(["openssl", *map(str, command)], timeout=20)
    for kind in ("cert", "key"):
        shutil.copy(folder / f"server-{kind}.pem", folder / f"client-{kind}.pem")
