"""ISO images and seeds in CD drives: what may be named, what is said, who is in the way."""

from __future__ import annotations

from typing import Any

import pytest
from manager_disks import SHARED, make_vm, snapshot

from godwit.manager.work.admit import admit
from godwit.manager.work.define import define_vm
from godwit.manager.work.disk_rules import check_volume_unused
from godwit.model import requests as ask
from godwit.model.disks import SEED, USER_DATA
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.vm import Boot, Cdrom, Pins
from godwit.planner.placement import Need
from godwit.wire.errors import PeerRefused

PINS = Pins(uuid="u-1", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")


def create(**fields: Any) -> ask.CreateVm:
    return ask.CreateVm(name="web", memory_bytes=1 << 28, **fields)


def test_the_drive_holds_what_was_named() -> None:
    request = create(iso="shared:iso/debian.iso")
    admit(snapshot(), request)
    vm = define_vm(snapshot(), request, pins=PINS, boot=Boot(), now=1.0)
    path = f"{SHARED}/iso/debian.iso"
    assert vm.cdroms == (Cdrom(id="cd0", volume="shared", path=path),)
    assert vm.disks == ()
    assert Need.of(vm).volumes == {"shared"}, "a host that does not see it is no place for it"


@pytest.mark.parametrize(
    ("iso", "kind", "words"),
    [
        ("shared:../other/x.iso", InvalidRequest, "no file in a volume"),
        ("shared:a//x.iso", InvalidRequest, "no file in a volume"),
        ("nope:x.iso", NotFound, "no volume nope"),
    ],
)
def test_what_cannot_be_in_it(iso: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        admit(snapshot(), create(iso=iso))
    assert caught.value.hint  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="pattern"):
        create(iso="/etc/shadow")


def test_a_volume_with_such_an_image_is_in_use() -> None:
    cdrom = Cdrom(id="cd0", volume="isos", path="/clusterstorage/isos/x.iso")
    with pytest.raises(Refused, match="the volume isos is used by web"):
        check_volume_unused(snapshot(make_vm("web", cdroms=(cdrom,))), "isos")


SECRET = b"#cloud-config\npassword: very-secret\n"


async def test_user_data_is_on_a_cd_and_in_no_record(api: Any) -> None:
    answer = await api.api.request("POST", "/v1/user-data", content=SECRET)
    path = answer.json()["path"]
    await api.make_vm("web", cloud_init=path)
    agent = api.agents["host1"]
    assert SECRET in agent.files.values()
    vm = (await api.records.vm("web")).value
    assert [one.id for one in vm.cdroms] == [SEED]
    asked = {"user_data": path, "instance_id": vm.pins.uuid, "hostname": "web"}
    assert agent.asked("make-seed") == [asked]
    kept = await api.store.range("")
    assert kept.kvs
    assert not [kv.key for kv in kept.kvs if b"very-secret" in kv.value]
    await api.act("POST", "/v1/vms/web/actions/clone", {"target": "two"})
    assert (await api.records.vm("two")).value.cdroms == (), "a clone is somebody else"
    await api.act("DELETE", "/v1/vms/web")
    assert "delete-disks" in [verb for verb, _ in agent.calls], "its CD goes with it"


def test_user_data_has_to_be_uploaded() -> None:
    for path in ("/etc/shadow", "user-data", USER_DATA + "x"):
        with pytest.raises(InvalidRequest, match="no user data that the cluster keeps"):
            admit(snapshot(), create(image="demo", cloud_init=path))


async def test_too_much_user_data(api: Any) -> None:
    with pytest.raises(PeerRefused) as caught:
        await api.api.request("POST", "/v1/user-data", content=bytes((1 << 20) + 1))
    assert "larger than 1 MiB" in caught.value.problem.detail
