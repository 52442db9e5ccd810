"""ISO images in CD drives: what may be named, what the definition says, who is in the way."""

from __future__ import annotations

from typing import Any

import pytest
from manager_disks import SHARED, make_vm, snapshot

from godwit.manager.placement import Need
from godwit.manager.work.admit import admit
from godwit.manager.work.define import define_vm
from godwit.manager.work.disk_rules import check_volume_unused
from godwit.model import requests as ask
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.vm import Boot, Cdrom, Pins

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
