"""Images of a Ceph pool, as far as goes without a Ceph: what QEMU takes, what Ceph's client says.

`tests.faults.kit.rbd` has the rest, on a Ceph of one node; ``scripts/prove B --only rbd`` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from godwit.model.volume import Volume
from godwit.storage.places import Access, served_node
from godwit.storage.served_paths import ServedProber, rbd_size

pytestmark = pytest.mark.system

POOL = Volume(name="ceph", kind="rbd", pool="vms/mine", client="godwit")
AWAY = """[global]
mon host = v1:127.0.0.1:1
client mount timeout = 1
auth client required = none
"""
IMAGE = "/clusterstorage/ceph/web"


def _qemu(node: object) -> str:
    """What QEMU says when it is to open the node."""
    done = subprocess.run(
        ["qemu-img", "info", "json:" + json.dumps({"driver": "raw", "file": node})],
        capture_output=True,
        text=True,
        timeout=30.0,
    )
    assert done.returncode != 0
    return done.stderr


@pytest.fixture
def access() -> Iterator[Access]:
    """A Ceph that is not there: its monitor's port is refused, and nobody waits for long."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    with tempfile.TemporaryDirectory(prefix="gwq-") as folder:
        Path(folder).chmod(0o755)  # it is read without rights
        conf = Path(folder) / "ceph.conf"
        conf.write_text(AWAY)
        yield Access(user=(65534, 65534), ceph_conf=str(conf))


def test_qemu_takes_the_node_and_asks_ceph(access: Access) -> None:
    node = served_node(POOL, IMAGE, access)
    assert node is not None
    said = _qemu(node)
    if "Unknown driver" in said:
        pytest.skip("QEMU's driver for Ceph is not installed (qemu-block-extra)")
    assert "error connecting" in said, said
    gone = _qemu({**node, "conf": "/nowhere/ceph.conf"})
    assert "error reading conf file /nowhere/ceph.conf" in gone
    # So is a wrong option told apart from a wrong place.
    assert "unexpected" in _qemu({**node, "keyring": "/x"})


async def test_a_ceph_that_is_away_is_told_in_words(access: Access) -> None:
    prober = ServedProber(POOL, access, "host1")
    try:
        found = await prober.probe(20.0)
    finally:
        await prober.close()
    assert not found.ok
    if "not installed" in found.reason:
        pytest.skip("Ceph's libraries are not installed")
    assert found.reason.startswith("ceph: Ceph does not let client.godwit in"), found.reason
    with pytest.raises(OSError, match=r"ceph\.conf cannot be read"):
        await rbd_size(POOL, "web", Access(user=(65534, 65534), ceph_conf="/nowhere/ceph.conf"))


async def test_one_that_is_silent_costs_only_the_time_out(access: Access) -> None:
    """A socket that nobody accepts on: librados waits, and its process is killed."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        text = AWAY.replace("127.0.0.1:1", f"127.0.0.1:{port}").replace("= 1\n", "= 60\n")
        Path(access.ceph_conf).write_text(text)
        prober = ServedProber(POOL, access, "host1")
        try:
            await prober.probe(0.0)  # its process is there afterwards
            began = time.monotonic()
            found = await prober.probe(1.0)
            spent = time.monotonic() - began
        finally:
            await prober.close()
    if "not installed" in found.reason:
        pytest.skip("Ceph's libraries are not installed")
    assert (found.ok, found.hung) == (False, True)
    assert 1.0 <= spent < 8.0
