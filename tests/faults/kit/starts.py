"""VMs start from an ISO image, or find user data on a CD, and move with it."""

from __future__ import annotations

import time
from pathlib import Path

from tests.system.qemu.conftest import guest_code
from tests.system.qemu.iso import bootable_iso

from .cluster import Cluster
from .report import Section

VM, ISO = "from-iso", "tiny.iso"
SAYS = b"GW"
SEEDED, SECRET = "seeded", "a-very-secret-word"
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
    section.judge("it starts from it", *_says(cluster, "host1", SAYS))
    move = cluster.move(VM, "host2", method="live")
    cluster.await_task(VM)
    section.judge("it moves live with it", move.state.value == "completed", move.reason)
    section.judge("it goes on there", *_says(cluster, "host2", b"."))
    cluster.remove(VM)
    section.judge("the image stays when the VM is deleted", path.exists(), str(path))
    path.unlink()
    _seeded(cluster, section)
    return section


def _seeded(cluster: Cluster, section: Section) -> None:
    """A VM with user data on a CD of its own; the secret in it is nowhere else."""
    data = cluster.home / "user-data"
    data.write_text(f"#cloud-config\npassword: {SECRET}\n")
    address = f"godwit.ip={cluster.address(SEEDED)}/22 godwit.host={SEEDED}"
    words = ("vm", "create", SEEDED, "--memory", "256M", "--image", "demo", "--network", "lan")
    made = cluster.cli(*words, "--append", address, "--cloud-init", str(data))
    section.judge("a VM with user data is made", made.code == 0, made.err[-300:])
    cluster.boot(SEEDED, host="host1")
    folder = cluster.lab.layout.volume / SEEDED
    (seed,) = folder.iterdir()
    mode = seed.stat().st_mode & 0o777
    section.judge("its CD is QEMU's alone", mode == 0o400, [seed.name, oct(mode)])
    section.judge("the user data is on it", SECRET.encode() in seed.read_bytes(), seed.name)
    records = cluster.dump("").values()
    told = cluster.cli("task", "list", "-o", "json").out + cluster.cli("vm", "show", SEEDED).out
    hidden = SECRET not in told and not any(SECRET.encode() in value for value in records)
    section.judge("and in no record", hidden and len(records) > 0, told[-200:])
    move = cluster.move(SEEDED, "host2", method="live")
    cluster.await_task(SEEDED)
    section.judge("it moves live with it, too", move.state.value == "completed", move.reason)
    cluster.remove(SEEDED)
    section.judge("the CD goes when the VM is deleted", not folder.exists(), str(folder))


def _says(cluster: Cluster, host: str, words: bytes) -> tuple[bool, str]:
    until = time.monotonic() + START_S
    while words not in (said := _console(cluster, host)) and time.monotonic() < until:
        time.sleep(0.1)
    return words in said, said[-80:].decode(errors="replace")


def _console(cluster: Cluster, host: str) -> bytes:
    path: Path = cluster.lab.root_of(host) / f"var/lib/godwit/vms/{VM}/console.log"
    return path.read_bytes() if path.exists() else b""
