"""Volumes that QEMU itself reaches over the storage network: NFS images and iSCSI LUNs.

No image lock protects them: two QEMUs could open one image, and nobody would say a word. Gates and
ownership alone keep two writers apart.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from godwit.lab import fault
from godwit.model.vm import VmState

from .cluster import Cluster
from .formats import LUN, SIZE, judge, log_end, moved_in_turn, outside, read_log
from .redirect import until
from .report import Say, Section, tell

NFS = ("raw", "qcow2", "vhdx")
BROKERED = ("vhdx",)
CUT_S = 3.0
AWAY_S = 60.0
VM = "served"
RECORDS_PER_S = 50


def images(
    cluster: Cluster, *, moves: int, only: tuple[str, ...] = NFS, say: Say = tell
) -> Section:
    """Live moves of VMs whose images lie on an NFS server, beside some on a plain directory."""
    section = Section("served")
    disks = {"raw": f"other:{SIZE}:raw"}
    disks |= {kind: f"other:{SIZE}:{kind}" for kind in only if kind in BROKERED}
    disks |= {f"nfs-{kind}": f"shared:{SIZE}:{kind}" for kind in only}
    section.figures |= moved_in_turn(cluster, disks, moves, say)
    judge(section, moves)
    return section


def luns(cluster: Cluster, *, moves: int, say: Say = tell) -> Section:
    """The same of a LUN that is passed through."""
    section = Section("served")
    disks = {"raw": f"shared:{SIZE}:raw", LUN: ""}
    section.figures |= moved_in_turn(cluster, disks, moves, say)
    judge(section, moves)
    return section


def cut(cluster: Cluster, *, say: Say = tell) -> Section:
    """A host's storage link goes and comes back under a guest that writes; two starts at once."""
    section = Section("served")
    cluster.define(VM, disks=["shared:128M:qcow2"])
    _two_starts(cluster, section)
    guest = cluster.boot(VM, host="host1")
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    _until_written(guest, 20)
    fault.cut_network(cluster.lab, "host1", "stor")
    time.sleep(0.5)  # what was on its way arrives
    before = guest.stats()["log"]["acknowledged"]
    time.sleep(CUT_S)
    during = guest.stats()["log"]["acknowledged"] - before
    section.judge("storage link cut: nothing is acknowledged", during == 0, during)
    fault.restore_network(cluster.lab, "host1", "stor")
    healed = time.monotonic()
    went_on = _until_written(guest, before + RECORDS_PER_S)
    section.figures["back_after_s"] = round(time.monotonic() - healed, 2)
    say(f"storage link back: the guest writes again after {section.figures['back_after_s']} s")
    section.judge("storage link back: the guest goes on", went_on, section.figures)
    moved_to = cluster.client.wait(cluster.client.vms.move_disk(VM, "disk0", format="vhdx"))
    section.judge("its disk moves to another format there", moved_to.state.value == "completed", "")
    logged = log_end(guest)
    section.judge("storage link cut: the guest sees no error", not logged["errors"], logged)
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    (disk,) = cluster.client.vms.get(VM).disks
    check = asdict(read_log(outside(cluster, disk), disk, logged))
    good = not check["lost"] and not check["torn"] and check["acknowledged"] > 0
    section.judge("storage link cut: 0 lost, 0 torn acknowledged records", good, check)
    cluster.client.wait(cluster.client.vms.delete(VM))
    left = sorted(str(path) for path in cluster.lab.layout.volume.glob(f"{VM}*"))
    section.judge("the VM's files are gone from the server", not left, left)
    for host in cluster.hosts:  # a path that was cut has to hold before a VM may start on it
        direct = until(cluster, host, "direct")
        section.judge(f"storage link back: {host}'s path is its own again", direct, direct)
    return section


def _two_starts(cluster: Cluster, section: Section) -> None:
    """Both agents are told to start the VM at one moment, past the manager."""
    said = cluster.start_at_once(VM)
    won = [host for host, why in said.items() if not why]
    section.judge("two starts at once without any lock: exactly one wins", len(won) == 1, said)
    owner = cluster.owner(VM)
    section.judge("the winner is the owner", [owner.host] == won, [owner.host, won])
    cluster.client.wait(cluster.client.vms.stop(VM, force=True))
    until = time.monotonic() + AWAY_S
    while cluster.client.vms.get(VM).state is not VmState.STOPPED:
        assert time.monotonic() < until, "it did not stop"
        time.sleep(0.05)


def _until_written(guest: Any, count: int) -> bool:
    until = time.monotonic() + AWAY_S
    while guest.stats()["log"]["acknowledged"] < count:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)  # the guest has no event for an acknowledged record
    return True
