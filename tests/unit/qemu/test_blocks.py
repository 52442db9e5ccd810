"""A disk's nodes for each format, source and tier."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from godwit.model.errors import InvalidRequest
from godwit.model.vm import Cdrom, Disk
from godwit.qemu.blocks import cdrom_node, disk_device, disk_nodes, node_names, stored_size
from godwit.storage.nodes import BrokerDisk, image_node


def _disk(**more: Any) -> Disk:
    values: dict[str, Any] = {
        "id": "disk1",
        "volume": "shared",
        "path": "/clusterstorage/shared/web/disk1.img",
        "size_bytes": (1 << 30) + 1,
        "format": "raw",
        "serial": "GW1",
        "lun": 1,
    }
    return Disk.model_validate(values | more)


@pytest.mark.parametrize(
    ("shape", "drivers"),
    [
        ({"format": "raw"}, ["file", "raw"]),
        ({"format": "qcow2"}, ["file", "qcow2"]),
        ({"format": "vhd-fixed"}, ["file", "raw"]),
        ({"source": "device", "path": "/dev/sdz"}, ["host_device", "raw"]),
        ({"format": "vhd"}, ["nbd"]),
        ({"format": "vhdx"}, ["nbd"]),
        ({"format": "qcow2", "tier": "brokered"}, ["nbd"]),
    ],
)
def test_drivers(shape: dict[str, Any], drivers: list[str]) -> None:
    disk = _disk(**shape)
    nodes = disk_nodes(disk, vm="web", broker="/run/b.sock")
    assert [node["driver"] for node in nodes] == drivers
    assert tuple(node["node-name"] for node in nodes) == node_names(disk)
    assert disk_device(disk)["drive"] == nodes[-1]["node-name"]
    for node in nodes:
        assert node["cache"] == {"direct": True, "no-flush": False}
        assert node["read-only"] is False


def test_a_fixed_vhd_ends_before_its_footer() -> None:
    _, image = disk_nodes(_disk(format="vhd-fixed"), vm="web")
    assert (image["offset"], image["size"]) == (0, (1 << 30) + 512)
    assert stored_size(512) == 512
    assert stored_size(513) == 1024
    assert "size" not in disk_nodes(_disk(), vm="web")[1], "a raw image may grow"


def test_only_qcow2_names_its_backing() -> None:
    assert disk_nodes(_disk(format="qcow2"), vm="web")[1]["backing"] is None
    assert "backing" not in disk_nodes(_disk(), vm="web")[1]


def test_a_brokered_disk_asks_the_socket_of_its_own_vm() -> None:
    (node,) = disk_nodes(_disk(format="vhdx"), vm="web", broker="/run/b.sock")
    assert node["server"] == {"type": "unix", "path": "/run/b.sock"}
    assert node["export"] == "web-disk1"
    assert node["reconnect-delay"] == 600
    with pytest.raises(InvalidRequest, match="storage broker"):
        disk_nodes(_disk(format="vhdx"), vm="web")


def test_what_is_served_over_the_network_stands_under_the_same_format() -> None:
    far = {"driver": "nfs", "server": {"type": "inet", "host": "h"}, "path": "/e/web/a"}
    lower, upper = disk_nodes(_disk(format="qcow2"), vm="web", served=far)
    assert lower.items() >= {**far, "node-name": "file-disk1"}.items()
    assert lower["cache"] == {"direct": True, "no-flush": False}
    assert (upper["driver"], upper["file"]) == ("qcow2", "file-disk1")
    lun = _disk(source="lun", volume="luns", path="/clusterstorage/luns/lun-2", passthrough=True)
    assert disk_device(lun)["driver"] == "scsi-block"
    with pytest.raises(InvalidRequest, match="which this host does not know"):
        disk_nodes(lun, vm="web")


def test_the_guest_sees_the_same_device_whatever_lies_under_it() -> None:
    shapes: list[dict[str, Any]] = [{}, {"format": "vhdx"}, {"source": "device"}]
    first, *others = (disk_device(_disk(**shape)) for shape in shapes)
    assert all(other == first for other in others)
    assert (first["werror"], first["rerror"]) == ("stop", "stop")
    assert (first["channel"], first["scsi-id"], first["lun"]) == (0, 1, 0)
    lun = disk_device(_disk(source="device", passthrough=True))
    assert lun["driver"] == "scsi-block"
    assert "serial" not in lun, "it has its own"
    assert {key: lun[key] for key in lun if key != "driver"}.items() <= first.items()
    assert disk_device(_disk(), boot=True) == {**first, "bootindex": 1}


@pytest.mark.parametrize("tier", ["direct", "brokered"])
def test_a_linked_clone_names_the_image_under_it_and_only_reads_it(tier: str) -> None:
    backing = {"path": "/clusterstorage/shared/base/disk0.qcow2", "format": "qcow2"}
    disk = _disk(format="qcow2", tier=tier, backing=backing)
    if tier == "direct":
        upper = dict(disk_nodes(disk, vm="web")[-1])
    else:
        served = BrokerDisk(
            id=disk.id, path=disk.path, format="qcow2", size_bytes=512, backing=disk.backing
        )
        upper = image_node(served)
    base: Any = upper["backing"]
    assert (base["driver"], base["read-only"], base["backing"]) == ("qcow2", True, None)
    assert (base["file"]["filename"], base["file"]["read-only"]) == (backing["path"], True)
    assert not upper.get("read-only", False)
    with pytest.raises(ValidationError, match="only a qcow2 image"):
        _disk(format="raw", backing=backing)


def test_without_locks_nothing_of_a_disk_is_locked() -> None:
    backing = {"path": "/clusterstorage/shared/gold.raw", "format": "raw"}
    for shape in (
        {"format": "qcow2", "backing": backing},
        {"source": "device", "path": "/dev/sdz"},
    ):
        disk = _disk(**shape)
        assert '"locking"' not in json.dumps(disk_nodes(disk, vm="web"))
        file, image = disk_nodes(disk, vm="web", locking=False)
        assert file["locking"] == "off"
        if "backing" in shape:
            assert image["backing"]["file"]["locking"] == "off"  # type: ignore[index]
    cdrom = Cdrom.model_validate(
        {"id": "cd0", "volume": "shared", "path": "/clusterstorage/shared/a.iso"}
    )
    assert cdrom_node(cdrom, locking=False)["file"]["locking"] == "off"  # type: ignore[index]
    served = {"driver": "nfs", "path": "/shared/a", "server": {"type": "inet", "host": "h"}}
    (file, _) = disk_nodes(_disk(), vm="web", served=served, locking=False)
    assert "locking" not in file, "no client of QEMU's own knows the word"
