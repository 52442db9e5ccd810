"""Disks that come and go under a running VM, with a live move right after.

Sixty-four of them added, moved, removed, moved; a VHD, a VHDX and a passed-through device that are
added to a VM, written to and moved; and a disk that is taken away by force while the guest writes.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.host.run import run as run_program
from godwit.lab.logcheck import check_log
from godwit.model.vm import DiskFormat, DiskView
from godwit.storage import formats

from . import growth
from .cluster import MIB, Cluster
from .guest import Guest
from .report import Say, Section, tell

VM = "plugged"
SMALL = 8 * MIB
LARGE = 128 * MIB
RECORDS_PER_S = 100
CARRIED: tuple[DiskFormat, ...] = ("vhd-fixed", "vhd", "vhdx")


def run(
    cluster: Cluster,
    *,
    disks: int = 64,
    carried: tuple[DiskFormat, ...] = CARRIED,
    forced: tuple[DiskFormat, ...] = ("qcow2", "vhdx"),
    say: Say = tell,
) -> Section:
    """All of it on one VM after the other; ``disks`` is how many come and go at once."""
    cluster.heal()
    section = Section("hotdisks")
    _many(cluster, section, disks, say)
    for kind in carried:
        _carried(cluster, section, kind, say)
    with _device(cluster) as device:
        _carried(cluster, section, device, say)
    for kind in forced:
        _by_force(cluster, section, kind, say)
    return section


# Many at once


def _many(cluster: Cluster, section: Section, count: int, say: Say) -> None:
    guest = cluster.make(VM, host="host1")
    began = time.monotonic()
    for _ in range(count):
        cluster.client.wait(cluster.client.vms.add_disk(VM, volume="shared", size_bytes=SMALL))
    added = time.monotonic() - began
    have = len(cluster.client.vms.disks(VM))
    last = _name_of(count - 1)
    first_move = _move(cluster, VM)
    after = _records(guest, last, 20)
    began = time.monotonic()
    for disk in cluster.client.vms.disks(VM):
        # The guest wrote to the last one just now, and has it open no more.
        cluster.client.wait(cluster.client.vms.remove_disk(VM, disk.id, force=True))
    removed = time.monotonic() - began
    left = len(cluster.client.vms.disks(VM))
    second_move = _move(cluster, VM)
    images = list((cluster.lab.layout.volume / VM).glob("*"))
    cluster.remove(VM)
    section.figures["many"] = figures = {
        "disks": count,
        "added_s": round(added, 2),
        "removed_s": round(removed, 2),
        "moves": [first_move, second_move],
        "written_to_the_last_after_the_move": after,
        "images_left": [path.name for path in images],
    }
    say(f"{count} disks added in {added:.1f} s, removed in {removed:.1f} s; {first_move}")
    section.judge(
        f"{count} disks added to and removed from one running VM, the last one of use after a move",
        have == count and left == 0 and after > 0 and not images,
        figures,
    )
    section.judge(
        f"a live move right after {count} came, and right after they went",
        first_move["outcome"] == second_move["outcome"] == "completed",
        [first_move, second_move],
    )


def _name_of(number: int) -> str:
    """What Linux calls the disk with this number, from 0: sda, ..., sdz, sdaa, ..."""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return f"sd{letters}"


# One that is carried along


def _carried(cluster: Cluster, section: Section, what: str, say: Say) -> None:
    """A format, or the path of a device: added hot, written to, moved there and back, read."""
    guest = cluster.make(VM, host="host1")
    is_device = what.startswith("/")
    cluster.client.wait(
        cluster.client.vms.add_disk(VM, device=what)
        if is_device
        else cluster.client.vms.add_disk(VM, volume="shared", size_bytes=LARGE, format=what)
    )
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    moves = []
    for _ in range(2):
        before = guest.stats()["log"]["acknowledged"]
        moves.append(_move(cluster, VM))
        moves[-1]["written_on"] = guest.stats()["log"]["acknowledged"] - before
    grown = {} if is_device else _grown(cluster, section, guest, what, say)
    guest.ask("log dev=off", timeout=20.0, each=5.0)
    log = guest.stats()["log"]
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    (disk,) = cluster.client.vms.disks(VM)
    check = _read(cluster, disk, log)
    cluster.client.wait(cluster.client.vms.delete(VM))
    name = "a passed-through device" if is_device else what
    section.figures[name] = {"moves": moves, "grown": grown, "log": log, "offline": check}
    say(f"{name}: {[move['outcome'] for move in moves]}, {log['acknowledged']} records")
    section.judge(
        f"{name}, added while the VM runs, survives live moves: 0 lost, 0 torn, no error",
        all(move["outcome"] == "completed" and move["written_on"] > 0 for move in moves)
        and not (check["lost"] or check["torn"] or log["errors"])
        and check["acknowledged"] > 0,
        section.figures[name],
    )


def _grown(cluster: Cluster, section: Section, guest: Guest, kind: str, say: Say) -> dict[str, Any]:
    """It grows and moves; then the agent dies where it is larger and nobody knows."""
    mib = (LARGE >> 20) + 33
    found = growth.grow(cluster, section, guest, VM, kind, mib, say)
    return found | growth.crash(cluster, section, guest, VM, ("grown", "agent"), mib + 64)


@contextmanager
def _device(cluster: Cluster) -> Iterator[str]:
    """A loop device that every host of the lab sees under one name, as hosts see a shared LUN."""
    with tempfile.NamedTemporaryFile(prefix="godwit-lun-") as backing:
        os.truncate(backing.name, LARGE)
        device = _losetup("--find", "--show", "--direct-io=off", backing.name)
        try:
            number = Path(device).stat().st_rdev
            for host in cluster.hosts:
                seen = cluster.lab.root_of(host) / device.lstrip("/")
                os.mknod(seen, stat.S_IFBLK | 0o600, number)
            yield device
        finally:
            for host in cluster.hosts:
                (cluster.lab.root_of(host) / device.lstrip("/")).unlink(missing_ok=True)
            _losetup("--detach", device)


def _losetup(*words: str) -> str:
    return subprocess.run(
        ["losetup", *words], check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


# One that is taken away


def _by_force(cluster: Cluster, section: Section, kind: DiskFormat, say: Say) -> None:
    guest = cluster.make(VM, host="host1", disks=[f"shared:128M:{kind}"])
    guest.ask("log dev=sda rate=0 fresh=1", timeout=20.0)  # as fast as it can
    _until(guest, 200)
    (disk,) = cluster.client.vms.disks(VM)
    refused = cluster.cli("vm", "disk", "remove", VM, disk.id, "--keep")
    cluster.client.wait(cluster.client.vms.remove_disk(VM, disk.id, force=True, keep=True))
    log = guest.stats()["log"]
    check = _read(cluster, disk, log)
    alive = guest.alive()
    cluster.remove(VM)
    _file(cluster, disk).unlink(missing_ok=True)
    section.figures[f"force {kind}"] = {"log": log, "offline": check, "refused": refused.err}
    say(f"{kind} removed by force under load: {check['acknowledged']} records, {check}")
    section.judge(
        f"{kind}: removal under load is refused without --force, exit 4",
        refused.code == 4 and "--force" in refused.err,
        {"exit": refused.code, "stderr": refused.err},
    )
    section.judge(
        f"{kind}: removed by force under load, every acknowledged record is in the image",
        alive and log["acknowledged"] >= 200 and not (check["lost"] or check["torn"]),
        check,
    )


# Helpers


def _move(cluster: Cluster, vm: str) -> dict[str, Any]:
    move = cluster.move(vm, cluster.other(str(cluster.owner(vm).host)))
    return {
        "outcome": move.state.value,
        "reason": move.reason,
        "blackout_ms": move.blackout_ms,
        "total_ms": move.total_ms,
    }


def _records(guest: Guest, device: str, count: int) -> int:
    """How many records a device took; it is closed again."""
    guest.ask(f"log dev={device} rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    _until(guest, count)
    guest.ask("log dev=off", timeout=20.0, each=5.0)
    return int(guest.stats()["log"]["acknowledged"])


def _until(guest: Guest, count: int) -> None:
    until = time.monotonic() + 20.0
    while guest.stats()["log"]["acknowledged"] < count:
        assert time.monotonic() < until, f"the guest does not write: {guest.stats()['log']}"
        time.sleep(0.05)  # the guest has no event for an acknowledged record


def _file(cluster: Cluster, disk: DiskView) -> Path:
    if disk.source == "device":
        return Path(disk.path)
    return cluster.lab.layout.volume.parent / Path(disk.path).relative_to("/clusterstorage")


def _read(cluster: Cluster, disk: DiskView, log: dict[str, Any]) -> dict[str, Any]:
    """The records as the image holds them, read from outside."""
    driver = "raw" if disk.source == "device" else formats.FORMATS[disk.format].driver
    with tempfile.TemporaryDirectory(prefix="godwit-log-") as folder:
        raw = Path(folder) / "raw"
        argv = ["qemu-img", "convert", "-f", driver, "-O", "raw"]
        run_program([*argv, str(_file(cluster, disk)), str(raw)], timeout=60.0)
        with raw.open("rb") as stream:
            return asdict(check_log(stream, acknowledged=log["acknowledged"], log_id=log["log_id"]))
