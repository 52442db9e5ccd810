"""Live moves under a writer, once for each disk format, beside raw in the same run.

The guest writes checksummed records and counts those its disk acknowledged; afterwards the closed
image is read from outside. A guest whose disk goes through a broker must notice no more than one
whose disk QEMU opens by itself.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.host.errors import HostError
from godwit.host.run import run as run_program
from godwit.lab import serving
from godwit.lab.configs import STATE
from godwit.lab.layout import STORAGE
from godwit.lab.logcheck import LogCheck, check_log
from godwit.model.vm import Disk
from godwit.storage import formats

from .cluster import Cluster
from .guest import Guest
from .report import Say, Section, quantile, tell
from .watching import watching

FORMATS = ("raw", "qcow2", "vhd-fixed", "vhd", "vhdx")
LUN = "lun"
SIZE = "256M"
RECORDS_PER_S = 100
WITHIN_MS = 15.0
"""How much darker than raw's the median move of a format may be."""


def run(
    cluster: Cluster, *, moves: int = 20, only: tuple[str, ...] = FORMATS, say: Say = tell
) -> Section:
    """So many live moves of one VM per format, the VMs turn by turn."""
    section = Section("formats")
    disks = {kind: f"shared:{SIZE}:{kind}" for kind in only}
    section.figures |= moved_in_turn(cluster, disks, moves, say)
    judge(section, moves)
    return section


def moved(cluster: Cluster, kind: str, moves: int, say: Say) -> dict[str, Any]:
    """What a VM with one disk of that kind went through; ``lun`` is one of the volume ``luns``."""
    return moved_in_turn(cluster, {kind: f"shared:{SIZE}:{kind}"}, moves, say)[kind]


def moved_in_turn(
    cluster: Cluster, disks: dict[str, str], moves: int, say: Say
) -> dict[str, dict[str, Any]]:
    """The same of several VMs, one for each kind and its disk, that are moved turn by turn.

    So what the machine does beside it meets all of them alike. Whose turn it is not stands paused:
    five writers on two cores would measure each other.
    """
    guests = {}
    for kind, disk in disks.items():
        guests[kind] = _writing(cluster, kind, disk)
        cluster.client.wait(cluster.client.vms.pause(f"disk-{kind}"))
    done: dict[str, list[dict[str, Any]]] = {kind: [] for kind in disks}
    for number in range(moves):
        for kind, guest in guests.items():
            cluster.client.wait(cluster.client.vms.resume(f"disk-{kind}"))
            with watching(cluster.netns, guest.address):  # it has something to answer
                done[kind].append(_one_move(cluster, kind, guest))
            cluster.await_task(f"disk-{kind}")  # the record is final a moment earlier
            cluster.client.wait(cluster.client.vms.pause(f"disk-{kind}"))
            last = done[kind][-1]
            dark = last["blackout_ms"]
            say(f"{kind} {number + 1}/{moves}: {last['outcome']}, dark {dark} ms")
    ended = {}
    for kind, guest in guests.items():
        cluster.client.wait(cluster.client.vms.resume(f"disk-{kind}"))
        ended[kind] = _ended(cluster, kind, guest, done[kind])
    return ended


def _writing(cluster: Cluster, kind: str, disk: str) -> Guest:
    vm = f"disk-{kind}"
    cluster.define(vm, disks=[] if kind == LUN else [disk])
    if kind == LUN:
        cluster.client.wait(cluster.client.vms.add_disk(vm, volume=serving.LUNS, lun=1))
    guest = cluster.boot(vm, host="host1")
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    return guest


def _one_move(cluster: Cluster, kind: str, guest: Guest) -> dict[str, Any]:
    vm = f"disk-{kind}"
    before = guest.stats()["log"]["acknowledged"]
    source = str(cluster.owner(vm).host)
    move = cluster.move(vm, cluster.other(source), method="live")
    return {
        "id": move.id,
        "outcome": move.state.value,
        "reason": move.reason,
        "blackout_ms": move.blackout_ms,
        "total_ms": move.total_ms,
        "written_on": guest.stats()["log"]["acknowledged"] - before,
    }


def _ended(cluster: Cluster, kind: str, guest: Guest, done: list[dict[str, Any]]) -> dict[str, Any]:
    vm = f"disk-{kind}"
    logged = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(vm, timeout_s=30.0))
    (disk,) = cluster.client.vms.get(vm).disks
    path = outside(cluster, disk)
    found = {
        "moves": done,
        "log": logged,
        "offline": asdict(read_log(path, disk, logged)),
        "check": image_check(path, disk),
    }
    cluster.client.wait(cluster.client.vms.delete(vm))
    return found


def outside(cluster: Cluster, disk: Disk) -> Path:
    """Where the real machine keeps a disk, whoever serves it."""
    layout = cluster.lab.layout
    if disk.source == "lun":
        kept = serving.lun_file(int(disk.path.rpartition("-")[2]))
        return layout.node_dir(STORAGE) / "state" / kept.relative_to(STATE)
    return layout.volume.parent / Path(disk.path).relative_to("/clusterstorage")


def log_end(guest: Guest) -> dict[str, Any]:
    """End the guest's log; what it counted."""
    before = dict(guest.stats()["log"])
    guest.ask("log dev=off", timeout=20.0, each=5.0)
    after = dict(guest.stats()["log"])
    return before | {"acknowledged": max(before["acknowledged"], after["acknowledged"])}


def read_log(path: Path, disk: Disk, logged: dict[str, Any]) -> LogCheck:
    """The records as the closed image holds them."""
    driver = formats.FORMATS[disk.format].driver
    with tempfile.TemporaryDirectory(prefix="godwit-log-") as folder:
        raw = Path(folder) / "raw"
        run_program(
            ["qemu-img", "convert", "-f", driver, "-O", "raw", str(path), str(raw)], timeout=60.0
        )
        with raw.open("rb") as stream:
            return check_log(stream, acknowledged=logged["acknowledged"], log_id=logged["log_id"])


def image_check(path: Path, disk: Disk) -> str:
    """qemu-img's verdict; "none" for a format that has no check."""
    if not formats.FORMATS[disk.format].has_check:
        return "none"
    try:
        run_program(
            ["qemu-img", "check", "-q", "-f", formats.FORMATS[disk.format].driver, str(path)],
            timeout=60.0,
        )
    except HostError as error:
        return str(error)
    return "clean"


def judge(section: Section, moves: int) -> None:
    """Every kind that the section has figures of, beside its ``raw``.

    One that lies elsewhere (``nfs-vhdx``) is beside the same format on a directory, where the
    section has that: what a format costs is judged there.
    """
    medians = {
        kind: quantile([m["blackout_ms"] for m in found["moves"]], 0.5)
        for kind, found in section.figures.items()
    }
    for kind, found in section.figures.items():
        plain = kind.rpartition("-")[2]
        beside = plain if plain != kind and plain in medians else "raw"
        raw = medians[beside]
        failed = [m for m in found["moves"] if m["outcome"] != "completed"]
        section.judge(f"{kind}: {moves} live moves under a writer complete", not failed, failed)
        idle = [m["id"] for m in found["moves"] if m["written_on"] <= 0]
        section.judge(f"{kind}: the guest went on writing through every move", not idle, idle)
        check = found["offline"]
        good = not check["lost"] and not check["torn"] and check["acknowledged"] > 0
        section.judge(f"{kind}: 0 lost, 0 torn acknowledged records", good, check)
        section.judge(
            f"{kind}: image check clean", found["check"] in ("clean", "none"), found["check"]
        )
        dark = medians[kind]
        section.judge(
            f"{kind}: median blackout within {WITHIN_MS:g} ms of {beside}'s",
            raw is not None and dark is not None and dark <= raw + WITHIN_MS,
            {"median_ms": dark, f"{beside}_ms": raw},
            timing=True,
        )
