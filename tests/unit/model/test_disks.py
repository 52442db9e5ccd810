"""Disks by rule: which way their I/O goes, what they are called, what makes no sense."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from godwit.model import disks
from godwit.model.errors import InvalidRequest
from godwit.model.requests import parse_request
from godwit.model.vm import Disk, DiskFormat
from godwit.model.volume import Volume, VolumeState


def disk(**changes: Any) -> Disk:
    fields: dict[str, Any] = {
        "id": "disk0",
        "volume": "shared",
        "path": "/clusterstorage/shared/web/disk0.qcow2",
        "size_bytes": 1 << 30,
        "serial": "GW1",
        "lun": 0,
    }
    return Disk(**{**fields, **changes})


@pytest.mark.parametrize(
    ("image_format", "tier", "holds"),
    [
        ("raw", "auto", "direct"),
        ("qcow2", "auto", "direct"),
        ("vhd-fixed", "auto", "direct"),
        ("vhd", "auto", "brokered"),
        ("vhdx", "auto", "brokered"),
        ("raw", "brokered", "brokered"),
        ("qcow2", "direct", "direct"),
        ("vhdx", "direct", "brokered"),
    ],
)
def test_the_tier_follows_the_format(image_format: str, tier: str, holds: str) -> None:
    assert disks.tier_of(disk(format=image_format, tier=tier)) == holds


def test_every_format_has_its_suffix() -> None:
    assert set(disks.FORMATS) == set(get_args(DiskFormat))
    assert [disks.suffix_of(one) for one in disks.FORMATS] == [
        *(".raw", ".qcow2", ".vhd", ".vhd", ".vhdx")
    ]


@pytest.mark.parametrize(
    ("path", "volume"),
    [
        ("/clusterstorage/shared/web/disk0.raw", "shared"),
        ("/clusterstorage/shared/x", "shared"),
        ("/clusterstorage/shared", None),
        ("/clusterstorage/shared/", None),
        ("/clusterstorage/shared/../other/x", None),
        ("/clusterstorage/shared/./x", None),
        ("/clusterstorage//shared/x", None),
        ("clusterstorage/shared/x", None),
        ("xclusterstorage/shared/x/y", None),
        ("/etc/shared/x", None),
        ("", None),
    ],
)
def test_the_volume_of_a_path(path: str, volume: str | None) -> None:
    assert disks.volume_of(path) == volume


@pytest.mark.parametrize(
    "changes",
    [
        {"volume": ""},
        {"source": "device", "volume": "", "format": "qcow2"},
        {"passthrough": True},
        {"source": "device", "format": "raw", "passthrough": True, "tier": "brokered"},
    ],
)
def test_disks_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image|device"):
        disk(**changes)


def test_a_device_lies_in_no_volume() -> None:
    found = disk(source="device", volume="", path="/dev/sdb", format="raw", passthrough=True)
    assert Disk.model_validate_json(found.model_dump_json(exclude_none=True)) == found


def test_an_old_record_of_a_disk_reads_as_before() -> None:
    old = {"id": "disk0", "volume": "v", "path": "/p", "size_bytes": 1, "serial": "s", "lun": 0}
    found = Disk.model_validate(old)
    assert (found.tier, found.source, found.passthrough) == ("auto", "image", False)
    assert Volume.model_validate({"name": "shared"}).kind == "dir"
    assert VolumeState("redirected") is VolumeState.REDIRECTED


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "name a volume"),
        ({"volume": "v"}, "needs a size"),
        ({"size_bytes": 1}, "name a volume"),
        ({"volume": "v", "path": "x"}, "never guessed"),
        ({"volume": "v", "size_bytes": 1, "passthrough": True}, "only a block device"),
        ({"volume": "v", "size_bytes": 1, "format": "vhd", "tier": "direct"}, "storage broker"),
        ({"volume": "v", "size_bytes": 0}, "size_bytes"),
        ({"volume": "v", "size_bytes": 1, "format": "vdi"}, "format"),
        ({"device": "/dev/sdb", "volume": "v"}, "no volume"),
        ({"device": "/dev/sdb", "format": "qcow2"}, "raw"),
        ({"device": "/etc/shadow"}, "by its path"),
        ({"device": "/dev/../etc/shadow"}, "by its path"),
        ({"device": "/dev/sdb", "passthrough": True, "tier": "brokered"}, "no storage broker"),
    ],
)
def test_orders_for_disks_that_make_no_sense(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_request({"kind": "vm.disk.add", "name": "web", **fields})
    assert caught.value.hint
