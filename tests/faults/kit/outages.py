"""The storage goes away under a VM whose QEMU opens its disks itself: it waits and sees no error.

    link      its host's storage link is cut, and comes back
    killed    the server's daemon is killed, and started again by its node
    frozen    the server's daemon stands still, and goes on

An image of an NFS server, or a LUN that is passed through to the guest. Nobody can redirect these:
the volume is told as paused, the VM goes on by itself, and can be moved then.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from godwit.lab import fault, serving
from godwit.lab.layout import STOR, STORAGE
from godwit.model.migration import Outcome

from .cluster import Cluster
from .formats import log_end, outside, read_log
from .guest import Guest
from .report import Say, Section, tell

VM = "unbrokered"
RECORDS_PER_S = 50
LINK_S, FROZEN_S = 40.0, 12.0
"""Longer than a guest's SCSI layer waits for a request (30 s), and than a look at the volume."""
BACK_S = 60.0
DAEMONS = {"nfs": "nfs", "iscsi": "tgtd"}


def run(
    cluster: Cluster, *, link_s: float = LINK_S, frozen_s: float = FROZEN_S, say: Say = tell
) -> Section:
    """Each outage once under a writer; then a live move, and the records are read from outside."""
    cluster.heal()
    storage = cluster.lab.layout.storage
    section = Section("outages")
    cluster.define(VM, disks=["shared:128M:qcow2"] if storage == "nfs" else [])
    if storage == "iscsi":
        added = cluster.client.vms.add_disk(VM, volume=serving.LUNS, lun=2)
        cluster.client.wait(added)
    guest = cluster.boot(VM, host="host1")
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    daemon = DAEMONS[storage]
    for what, lasts_s in (("link", link_s), ("killed", 0.0), ("frozen", frozen_s)):
        found = _outage(cluster, guest, what, daemon, lasts_s)
        section.figures[what] = found
        say(f"{storage}, opened by QEMU, {what}: {found}")
        section.judge(f"outage, {what}: the guest goes on by itself", found["went_on"], found)
        section.judge(f"outage, {what}: the guest sees no error", not found["errors"], found)
        if lasts_s:
            paused = found["told"] == "paused"
            section.judge(f"outage, {what}: the volume is told as paused", paused, found)
    for host in cluster.hosts:  # a server that stood still did so for all of them
        _until_direct(cluster, host)
    move = cluster.move(VM, cluster.other("host1"))
    section.judge(
        "outage: afterwards the VM moves live", move.outcome is Outcome.COMPLETED, move.reason
    )
    logged = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    (disk,) = cluster.client.vms.get(VM).disks
    check = asdict(read_log(outside(cluster, disk), disk, logged))
    good = not check["lost"] and not check["torn"] and check["acknowledged"] > 0
    section.judge("outage: 0 lost, 0 torn acknowledged records", good, check)
    cluster.client.wait(cluster.client.vms.delete(VM))
    return section


def _outage(
    cluster: Cluster, guest: Guest, what: str, daemon: str, lasts_s: float
) -> dict[str, Any]:
    before = guest.stats()["log"]
    guest.ask("reset", timeout=20.0)
    lab, told = cluster.lab, ""
    began = time.monotonic()
    if what == "link":
        fault.cut_network(lab, "host1", STOR.name)
    elif what == "frozen":
        fault.freeze_process(lab, STORAGE, daemon, hold=True)
    else:
        fault.kill_process(lab, STORAGE, daemon)
    try:
        while time.monotonic() < began + lasts_s:
            told = _told(cluster)
            time.sleep(0.2)  # the outage lasts as long as it is meant to
        at_end = guest.stats()["log"]["acknowledged"]
    finally:
        if what == "link":
            fault.restore_network(lab, "host1", STOR.name)
        elif what == "frozen":
            fault.thaw_process(lab, STORAGE, daemon)
    healed = time.monotonic()
    first = _written(guest, at_end + 1)
    back_s = time.monotonic() - healed
    went_on = first and _written(guest, at_end + RECORDS_PER_S)
    after = guest.stats()["log"]
    return {
        "went_on": went_on,
        "lasted_s": round(healed - began, 1),
        "back_after_s": round(back_s, 1),
        "longest_by_its_own_clock_ms": after["largest_gap_ms"],
        "errors": after["errors"] - before["errors"],
        "told": told,
    }


def _told(cluster: Cluster, host: str = "host1") -> str:
    volume = serving.LUNS if cluster.lab.layout.storage == "iscsi" else "shared"
    return cluster.client.volumes.get(volume).hosts[host].state.value


def _until_direct(cluster: Cluster, host: str) -> None:
    until = time.monotonic() + BACK_S
    while _told(cluster, host) != "direct" and time.monotonic() < until:
        time.sleep(0.1)  # asked for as people do; the move says what is wrong otherwise


def _written(guest: Guest, count: int) -> bool:
    until = time.monotonic() + BACK_S
    while guest.stats()["log"]["acknowledged"] < count:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)  # the guest has no event for an acknowledged record
    return True
