"""VMs with UEFI: what a guest writes into a variable goes wherever the VM goes, and comes back.

The guest counts its boots in a variable and tells what it reads there, over and over; asked to shut
down it writes a 5 first (`tests.system.qemu.uefi_guest.c`).
"""

from __future__ import annotations

import os
import pwd
import re
import tempfile
from pathlib import Path

from tests.system.qemu.uefi import fat_volume, uefi_program

from godwit.lab.layout import QEMU_USER

from .cluster import Cluster
from .report import Section
from .serial import await_said, length

VM, COPY, DISK = "uefi", "uefi-copy", "uefi-guest.raw"
SAYS_S = 60.0


def run(cluster: Cluster, *, every_way: bool = False) -> Section:
    """Made, moved live, stopped, cloned, moved quick; ``every_way``: and whatever else there is."""
    section = Section("uefi")
    _seen.clear()
    _define(cluster, section)
    client = cluster.client
    client.wait(client.vms.start(VM, host="host1"))
    _says(cluster, section, "it starts and writes a variable", VM, "host1", "UEFI 1.1.")
    _move(cluster, section, VM, "host2", "live")
    _says(cluster, section, "it reads it after a live move", VM, "host2", "1.1.")
    if every_way:
        _checkpoint(cluster, section)
    client.wait(client.vms.stop(VM, timeout_s=30.0))
    client.wait(client.vms.clone(VM, COPY))
    client.wait(client.vms.start(COPY, host="host1"))
    text = "a clone has the variables as they were written last"
    _says(cluster, section, text, COPY, "host1", "UEFI 6.6.")
    _move(cluster, section, COPY, "host2", "quick")
    _says(cluster, section, "it reads them after a quick move", COPY, "host2", "6.6.")
    if every_way:
        _saved(cluster, section)
        _reverted(cluster, section)
    folders = [cluster.lab.layout.volume / vm for vm in (VM, COPY)]
    there = [(folder / "vars0.qcow2").exists() for folder in folders[:1]]
    for vm in (VM, COPY):
        cluster.remove(vm)
    left = [str(one) for folder in folders if folder.exists() for one in folder.iterdir()]
    section.judge("the variables go with the VM", there == [True] and not left, left)
    return section


def on_nfs(cluster: Cluster) -> Section:
    """The same where only QEMU reaches the variables; the guest's disk lies in a directory."""
    section, client = Section("uefi"), cluster.client
    _seen.clear()
    words = ("vm", "create", VM, "--memory", "64M", "--firmware", "uefi")
    made = cluster.cli(*words, "--disk", "shared:16M")
    section.judge("a VM with UEFI is made", made.code == 0, made.err[-300:])
    path = cluster.lab.layout.volume.parent / "other" / DISK
    path.write_bytes(_image())
    account = pwd.getpwnam(QEMU_USER)
    os.chown(path, account.pw_uid, account.pw_gid)
    client.wait(client.vms.remove_disk(VM, "disk0"))
    client.wait(client.vms.add_disk(VM, volume="other", path=DISK, format="raw"))
    client.wait(client.vms.start(VM, host="host1"))
    _says(cluster, section, "it starts and writes a variable", VM, "host1", "UEFI 1.1.")
    _move(cluster, section, VM, "host2", "live")
    _says(cluster, section, "it reads it after a live move", VM, "host2", "1.1.")
    client.wait(client.vms.stop(VM, timeout_s=30.0))
    client.wait(client.vms.start(VM, host="host1"))
    _says(cluster, section, "it has what it wrote last", VM, "host1", "UEFI 6.6.")
    _move(cluster, section, VM, "host2", "quick")
    _says(cluster, section, "it reads it after a quick move", VM, "host2", "6.6.")
    cluster.remove(VM)
    return section


def _image() -> bytes:
    """The guest as a disk that starts by itself."""
    with tempfile.TemporaryDirectory(prefix="godwit-uefi-") as scratch:
        return fat_volume(uefi_program(Path(scratch)))


def _define(cluster: Cluster, section: Section) -> None:
    path = cluster.lab.layout.volume / DISK
    path.write_bytes(_image())
    words = ("vm", "create", VM, "--memory", "64M", "--firmware", "uefi")
    made = cluster.cli(*words, "--disk", "shared:16M")
    section.judge("a VM with UEFI is made", made.code == 0, made.err[-300:])
    client = cluster.client
    source = f"/clusterstorage/shared/{DISK}"
    brought = cluster.cli(
        *("volume", "disk", "import", "shared", VM, source),
        *("--format", "raw", "--target-format", "qcow2"),
    )
    section.judge("its disk is imported", brought.code == 0, brought.err[-300:])
    path.unlink()
    client.wait(client.vms.remove_disk(VM, "disk0"))
    client.wait(
        client.vms.add_disk(VM, volume="shared", path=f".godwit/images/{VM}.qcow2", format="qcow2")
    )


def _checkpoint(cluster: Cluster, section: Section) -> None:
    said = cluster.cli("vm", "checkpoint", "create", VM, "one", timeout=60.0)
    section.judge("a checkpoint takes the variables along", said.code == 0, said.err[-300:])
    _move(cluster, section, VM, "host1", "live")
    _says(cluster, section, "it reads them after one more move", VM, "host1", "1.1.")


def _saved(cluster: Cluster, section: Section) -> None:
    client = cluster.client
    client.wait(client.vms.save(COPY))
    client.wait(client.vms.restore(COPY, host="host1"))
    _says(cluster, section, "it reads them after save and restore", COPY, "host1", "6.6.")


def _reverted(cluster: Cluster, section: Section) -> None:
    client = cluster.client
    client.wait(client.vms.revert_checkpoint(VM, "one"))
    client.wait(client.vms.start(VM, host="host2"))
    text = "after a revert they are as the checkpoint held them"
    _says(cluster, section, text, VM, "host2", "UEFI 2.2.")


def _move(cluster: Cluster, section: Section, vm: str, to: str, method: str) -> None:
    _mark(cluster, vm, to)
    move = cluster.move(vm, to, method=method)
    cluster.await_task(vm)
    good = move.state.value == "completed"
    section.judge(f"{vm} moves {method} to {to}", good, move.reason or move.blackout_ms)


_seen: dict[tuple[str, str], int] = {}
"""(VM, host) -> bytes of its serial port's log there that count no more."""


def _says(cluster: Cluster, section: Section, text: str, vm: str, host: str, wanted: str) -> None:
    after = _seen.get((vm, host), 0)
    found = await_said(cluster, vm, host, re.escape(wanted), after=after, timeout=SAYS_S)
    section.judge(text, *found)
    _mark(cluster, vm, host)


def _mark(cluster: Cluster, vm: str, host: str) -> None:
    """Only what is said from now on counts."""
    _seen[vm, host] = length(cluster, vm, host)
