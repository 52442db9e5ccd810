"""VMs with UEFI: what is pinned, which hosts can have them, and what becomes of the variables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from manager_disks import PINS, SHARED, disk, make_vm, snapshot
from manager_fakes import host_info

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import admit, need_of
from godwit.manager.work.checkpoint_rules import check_request
from godwit.manager.work.clone_rules import define_clone
from godwit.manager.work.define import define_vm
from godwit.manager.work.disk_rules import check_volume_unused
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import NotFound, Refused
from godwit.model.firmware import FirmwareImage, UefiFacts
from godwit.model.host import HostInfo
from godwit.model.ownership import Owner, OwnerState
from godwit.model.vm import Boot, Disk, Firmware, Vm
from godwit.model.volume import Volume
from godwit.planner.placement import Need, Room, reasons_against
from godwit.store.records import encode

CODE = FirmwareImage(path="/fw/code.fd", size_bytes=4096, sha256="a" * 64)
UEFI = UefiFacts(
    code=CODE, template=FirmwareImage(path="/fw/vars.fd", size_bytes=512, sha256="b" * 64)
)
NEWER = UEFI.but(code=CODE.but(sha256="c" * 64))


def cluster(**uefi: UefiFacts | None) -> Snapshot:
    """Two hosts with that firmware."""
    hosts = {name: host_info(name, uefi=uefi.get(name, UEFI)) for name in ("host1", "host2")}
    return snapshot(hosts=hosts)


def create(**fields: Any) -> ask.CreateVm:
    return ask.CreateVm(
        name="web",
        memory_bytes=1 << 28,
        firmware="uefi",
        **({"disks": (ask.NewDisk(volume="shared", size_bytes=1 << 30),)} | fields),
    )


def made(**fields: Any) -> Vm:
    """A VM with a disk and variables."""
    variables = Disk(
        id="vars0",
        volume="shared",
        path=f"{SHARED}/web/vars0.qcow2",
        size_bytes=512,
        serial="GWV",
        lun=0,
    )
    return make_vm("web", disk(0), firmware=Firmware(code=CODE, variables=variables), **fields)


def test_variables_lie_beside_the_first_disk() -> None:
    admit(cluster(), create())
    vm = define_vm(cluster(), create(), pins=PINS, boot=Boot(), now=1.0)
    assert vm.firmware is not None
    assert vm.firmware.code == CODE
    variables = vm.firmware.variables
    assert (variables.path, variables.size_bytes) == (f"{SHARED}/web/vars0.qcow2", 512)
    assert (variables.format, variables.id) == ("qcow2", "vars0")
    assert vm.written == (*vm.disks, variables)
    bios = create().but(firmware="bios")
    assert define_vm(cluster(), bios, pins=PINS, boot=Boot(), now=1.0).firmware is None


def test_a_disk_of_the_hosts_own_does_not_take_them_along() -> None:
    mine = replace(cluster(), volumes={"mine": Volume(name="mine", kind="local")})
    request = create(disks=(ask.NewDisk(volume="mine", size_bytes=1 << 30),), host="host1")
    vm = define_vm(mine, request, pins=PINS, boot=Boot(), now=1.0)
    assert vm.volumes == {"mine", "shared"}


def test_hosts_without_firmware_are_told_what_to_install() -> None:
    with pytest.raises(Refused, match="no host has UEFI firmware") as caught:
        admit(cluster(host1=None, host2=None), create())
    assert "ovmf" in caught.value.hint
    with pytest.raises(Refused, match="host1 has no UEFI firmware"):
        admit(cluster(host1=None), create(host="host1"))
    admit(cluster(host1=None), create())


def test_luns_have_no_room_for_them() -> None:
    luns = replace(cluster(), volumes={"luns": Volume(name="luns", kind="iscsi")})
    with pytest.raises(Refused):
        admit(luns, create(disks=(ask.NewDisk(volume="luns", size_bytes=1 << 30),)))
    with pytest.raises(NotFound, match="no volume nope"):
        admit(cluster(), create(disks=(ask.NewDisk(volume="nope", size_bytes=1 << 30),)))


def against(info: HostInfo, need: Need) -> str:
    return "; ".join(reasons_against(Room(info=info, memory_free_bytes=1 << 40), need))


def test_one_that_sleeps_takes_what_there_is_and_one_that_runs_does_not() -> None:
    asleep, awake = Need.of(made()), Need.of(made(), awake=True)
    assert "has no UEFI firmware (package ovmf)" in against(host_info("h"), asleep)
    assert against(host_info("h", uefi=NEWER), asleep) == ""
    assert "cccccccccccc" in against(host_info("h", uefi=NEWER), awake)
    assert against(host_info("h", uefi=UEFI), awake) == ""
    larger = UEFI.but(code=CODE.but(size_bytes=8192))
    assert "8192 bytes, 4096 are needed" in against(host_info("h", uefi=larger), asleep)
    for state, expected in ((OwnerState.STOPPED, False), (OwnerState.SAVED, True)):
        now = replace(snapshot(made()), owners={"web": Owner(host="host1", state=state)})
        assert need_of(now, "web").awake is expected


def test_a_clone_has_a_copy_of_its_own_also_when_it_is_linked() -> None:
    request = ask.CloneVm(name="web", target="two", linked=True)
    new = define_clone(made(), request, uuid="u-2", mark="abc", taken=[], now=9.0)
    assert new.firmware is not None
    variables = new.firmware.variables
    assert (variables.path, variables.backing) == (f"{SHARED}/two/vars0-abc.qcow2", None)
    assert new.disks[0].backing is not None
    assert new.firmware.code == CODE


def test_a_checkpoint_has_them_and_a_volume_is_in_use_by_them() -> None:
    request = ask.CreateCheckpoint(name="web", checkpoint="one")
    check_request(made(), request)
    firmware = made().firmware
    assert firmware is not None
    elsewhere = firmware.but(variables=firmware.variables.but(volume="other"))
    with pytest.raises(Refused, match="the volume other is used by web"):
        check_volume_unused(snapshot(made().but(firmware=elsewhere)), "other")


async def _hosts(api: Any) -> None:
    for name, agent in api.agents.items():
        found = await api.records.get(keys.host_info(name), HostInfo)
        await api.store.put(keys.host_info(name), encode(found.value.but(uefi=UEFI)))
        agent.calls.clear()


async def test_made_and_deleted_with_the_vm(api: Any) -> None:
    await _hosts(api)
    body = {"disks": [{"volume": "shared", "size_bytes": 1 << 30}], "firmware": "uefi"}
    await api.make_vm("web", **body)
    agent = api.agents["host1"]
    (asked,) = agent.asked("make-variables")
    assert asked["disk"]["id"] == "vars0"
    assert [one["id"] for one in agent.asked("create-disks")[0]["disks"]] == ["disk0"]
    row = (await api.api.request("GET", "/v1/vms/web")).json()
    assert row["firmware"]["code"]["sha256"] == "a" * 64
    task = await api.act("POST", "/v1/vms/web/checkpoints", {"checkpoint": "one"})
    assert task["state"] == "completed"
    assert (await api.records.vm("web")).value.checkpoints[0].disks == ("disk0", "vars0")
    await api.act("DELETE", "/v1/vms/web")
    (gone,) = agent.asked("delete-disks")
    assert [one["id"] for one in gone["disks"]] == ["disk0", "vars0"]


async def test_what_fails_leaves_nothing(api: Any) -> None:
    await _hosts(api)
    for agent in api.agents.values():
        agent.refuse["make-variables"] = Refused("no room", hint="make some")
    request = {"name": "web", "memory_bytes": 1 << 28, "firmware": "uefi", "image": "demo"}
    task = await api.act("POST", "/v1/vms", request)
    assert task["state"] == "failed"
    assert await api.records.vm("web") is None
    (gone,) = api.agents["host1"].asked("delete-disks")
    assert [one["id"] for one in gone["disks"]] == ["vars0"]
