"""A VM starts from an ISO image, moves with it, and leaves it when it is deleted."""

from __future__ import annotations

import time
from pathlib import Path

from tests.system.qemu.conftest import guest_code
from tests.system.qemu.iso import bootable_iso

from .cluster import Cluster
from .report import Section

VM, ISO = "from-iso", "tiny.iso"
SAYS = b"GW"
START_S = 60.0


def run(cluster: Cluster) -> Section:
    """With an empty disk before the drive, as for an installation."""
    section = Section("starts")
    path = cluster.lab.layout.volume / ISO
    path.write_bytes(bootable_iso(guest_code()))
    path.chmod(0o444)
    words = ("vm", "create", VM, "--memory", "64M", "--disk", "shared:16M")
    missing = cluster.cli(*words, "--iso", "shared:none.iso")
    assert missing.code == 0, missing.err
    refused = cluster.cli("vm", "start", VM)
    good = refused.code == 4 and "none.iso" in refused.err
    section.judge("an ISO image that is not there is refused", good, refused.err[-300:])
    cluster.remove(VM)
    made = cluster.cli(*words, "--iso", f"shared:{ISO}")
    section.judge("a VM with an ISO image is made", made.code == 0, made.err[-300:])
    cluster.client.wait(cluster.client.vms.start(VM, host="host1"))
    section.judge(
        "it starts from it", _says(cluster, "host1", SAYS), _console(cluster, "host1")[-80:]
    )
    move = cluster.move(VM, "host2", method="live")
    cluster.await_task(VM)
    section.judge("it moves live with it", move.state.value == "completed", move.reason)
    section.judge(
        "it goes on there", _says(cluster, "host2", b"."), _console(cluster, "host2")[-80:]
    )
    cluster.remove(VM)
    section.judge("the image stays when the VM is deleted", path.exists(), str(path))
    path.unlink()
    return section


def _says(cluster: Cluster, host: str, words: bytes) -> tuple[bool, str]:
    until = time.monotonic() + START_S
    while words not in (said := _console(cluster, host)) and time.monotonic() < until:
        time.sleep(0.1)
    return words in said, said[-80:].decode(errors="replace")


def _console(cluster: Cluster, host: str) -> bytes:
    path: Path = cluster.lab.root_of(host) / f"var/lib/godwit/vms/{VM}/console.log"
    return path.read_bytes() if path.exists() else b""
