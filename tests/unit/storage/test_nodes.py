"""Block nodes: what a closed gate refuses, what an image is opened as, what QEMU asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from godwit.model.vm import DiskFormat
from godwit.storage import nodes
from godwit.storage.nodes import BrokerDisk, PeerTarget

LONG = "a-very-long-name-of-a-disk-as-somebody-may-well-choose-it-1"
SIZE = 1 << 30


def _disk(**more: object) -> BrokerDisk:
    values: dict[str, Any] = {"id": "disk0", "path": "/x/d", "format": "vhdx", "size_bytes": SIZE}
    return BrokerDisk.model_validate(values | more)


def test_a_closed_gate_fails_all_that_a_guest_can_ask_and_swallows_nothing() -> None:
    null, failing = nodes.placeholder_nodes(_disk())
    assert null["driver"] == "null-co"
    assert null["size"] == SIZE
    assert failing["image"] == null["node-name"]
    rules = {rule["iotype"]: rule for rule in failing["inject-error"]}
    assert rules.keys() >= {"read", "write", "write-zeroes", "discard"}
    assert all(rule["errno"] == 5 and rule["event"] == "none" for rule in rules.values())
    assert "once" not in str(failing)
    # blockdev-reopen flushes what it leaves: a gate that fails it could never be opened again.
    assert "flush" not in rules


@pytest.mark.parametrize("image", get_args(DiskFormat))
def test_images_are_neither_probed_nor_followed_nor_cached(image: str) -> None:
    node = nodes.image_node(_disk(format=image))
    assert (
        node["driver"]
        == {
            "raw": "raw",
            "qcow2": "qcow2",
            "vhd-fixed": "raw",
            "vhd": "vpc",
            "vhdx": "vhdx",
        }[image]
    )
    for part in (node, node["file"]):
        assert part["cache"] == {"direct": True, "no-flush": False}
    assert "locking" not in node["file"]
    assert ("backing" in node) == (image == "qcow2")
    assert node.get("backing") is None


def test_the_footer_of_a_fixed_vhd_is_out_of_reach() -> None:
    node = nodes.image_node(_disk(format="vhd-fixed"))
    assert (node["driver"], node["offset"], node["size"]) == ("raw", 0, SIZE)


def test_a_device_is_opened_as_one() -> None:
    node = nodes.image_node(_disk(format="raw", path="/dev/vg/lv", device=True), aio="native")
    assert node["file"]["driver"] == "host_device"
    assert node["file"]["aio"] == "native"


def test_io_uring_is_no_choice() -> None:
    assert set(get_args(nodes.Aio)) == {"threads", "native"}


def test_locks_are_left_out_only_when_it_is_said() -> None:
    assert nodes.image_node(_disk(), locking=False)["file"]["locking"] == "off"


@pytest.mark.parametrize(("image", "through"), [("qcow2", True), ("vhdx", False), ("vhd", False)])
def test_a_format_that_keeps_metadata_in_memory_is_written_through(
    image: str, through: bool
) -> None:
    made = nodes.export(_disk(format=image), name="n", node="exp-disk0")
    assert made["writethrough"] is through
    assert made["writable"] is True


def test_node_names_fit_and_differ() -> None:
    makers = (
        nodes.export_node_name,
        nodes.image_node_name,
        nodes.file_node_name,
        nodes.peer_node_name,
        nodes.failing_node_name,
        nodes.null_node_name,
    )
    names = [make(disk) for make in makers for disk in (LONG, LONG + "0", "d")]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 31


def test_export_names() -> None:
    assert nodes.export_name("web", "disk0") == "web-disk0"
    assert nodes.peer_export_name("web", "disk0", 7) == "web-disk0@7"


def test_a_peer_is_reached_with_tls_by_the_name_in_its_certificate() -> None:
    peer = PeerTarget(host="10.0.0.2", port=10900, export="web-disk0@7", tls_dir="/t")
    node = nodes.peer_node(_disk(), peer)
    assert node["server"]["port"] == "10900"
    assert (node["tls-creds"], node["tls-hostname"]) == (nodes.PEER_TLS, "10.0.0.2")
    named = nodes.peer_node(_disk(), peer.but(tls_hostname="host2"))
    assert named["tls-hostname"] == "host2"
    assert "tls-creds" not in nodes.peer_node(_disk(), peer.but(tls_dir=""))


def test_qemu_waits_for_its_broker() -> None:
    node = nodes.client_node("disk-disk0", socket=Path("/run/x.sock"), export="web-disk0")
    assert node["server"] == {"type": "unix", "path": "/run/x.sock"}
    assert node["reconnect-delay"] == 600
    assert node["open-timeout"] == 10


def test_sizes_are_whole_sectors() -> None:
    with pytest.raises(ValidationError):
        _disk(size_bytes=1000)
