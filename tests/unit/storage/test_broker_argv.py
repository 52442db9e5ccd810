"""The storage daemon's command line is the one on file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from godwit.qemu.argv import one_per_line
from godwit.storage import gate as gates
from godwit.storage.broker_argv import Plugs, broker_argv, peer_argv
from godwit.storage.broker_record import Served
from godwit.storage.gate import Gate
from godwit.storage.nodes import BrokerDisk, PeerTarget

GOLDEN = Path(__file__).parents[2] / "golden" / "broker"
PLUGS = Plugs(monitor=10, clients=11)
PEER = PeerTarget(
    host="10.1.0.2", port=10900, export="web-disk0@5", tls_dir="/tls", tls_hostname="h2"
)
OPENING = gates.acquire(Gate(), epoch=5)
TO_PEER = gates.acquire(Gate(), epoch=5, via="peer")


def _disk(number: int, image: str, **more: object) -> BrokerDisk:
    suffix = image.partition("-")[0]
    values: dict[str, object] = {
        "id": f"disk{number}",
        "path": f"/clusterstorage/shared/web/disk{number}.{suffix}",
        "format": image,
        "size_bytes": 1 << 30,
    }
    return BrokerDisk.model_validate(values | more)


CASES = {
    "no-disk": broker_argv("web", [], PLUGS),
    "closed": broker_argv("web", [Served(disk=_disk(0, "vhdx"))], PLUGS),
    "open-every-format": broker_argv(
        "web",
        [
            Served(disk=_disk(n, image), gate=OPENING)
            for n, image in enumerate(("vhdx", "vhd", "vhd-fixed", "qcow2", "raw"))
        ],
        PLUGS,
        aio="native",
    ),
    "device": broker_argv(
        "web",
        [Served(disk=_disk(0, "raw", path="/dev/vg0/web", device=True), gate=OPENING)],
        PLUGS,
    ),
    "no-image-locks": broker_argv(
        "web",
        [
            Served(disk=_disk(0, "vhdx"), gate=OPENING),
            Served(disk=_disk(1, "raw", path="/dev/vg0/web", device=True), gate=OPENING),
        ],
        PLUGS,
        locking=False,
    ),
    "redirected": broker_argv(
        "web",
        [
            Served(disk=_disk(0, "vhdx"), gate=TO_PEER, peer=PEER),
            Served(disk=_disk(1, "vhd")),
        ],
        PLUGS,
    ),
    "at-its-latch": broker_argv(
        "web",
        [Served(disk=_disk(0, "vhdx"), gate=OPENING)],
        PLUGS,
        latch={"driver": "nbd", "node-name": "latch", "server": {"type": "fd", "str": "12"}},
    ),
    "peer": peer_argv(PLUGS, tls_dir="/tls"),
    "peer-without-tls": peer_argv(PLUGS, tls_dir=""),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line_is_the_one_on_file(name: str) -> None:
    text = one_per_line(CASES[name])
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("GODWIT_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_no_golden_file_is_forgotten() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


def test_a_gate_that_is_not_to_open_has_no_image() -> None:
    """Whatever a record says: only ``opening`` opens."""
    opened = gates.done(OPENING)
    for gate in (Gate(), opened, gates.release(opened), gates.lost(opened, "x")):
        words = broker_argv("web", [Served(disk=_disk(0, "vhdx"), gate=gate)], PLUGS)
        assert "vhdx" not in " ".join(words)


def test_exports_stand_before_the_first_client() -> None:
    words = CASES["open-every-format"]
    assert words.index("--nbd-server") < words.index("--export")
    nodes = {json.loads(w)["node-name"] for w in words if w.startswith("{") and "node-name" in w}
    exported = {json.loads(w)["node-name"] for w in words if '"type":"nbd"' in w}
    assert len(exported) == 5
    assert exported <= nodes


def test_nothing_is_opened_before_the_latch() -> None:
    words = CASES["at-its-latch"]
    latch = next(n for n, word in enumerate(words) if '"latch"' in word)
    opened = [n for n, word in enumerate(words) if word.startswith("{") and n != latch]
    assert opened
    assert min([*opened, words.index("--nbd-server")]) > latch


def test_the_daemon_inherits_two_sockets() -> None:
    assert PLUGS.descriptors() == (10, 11)
