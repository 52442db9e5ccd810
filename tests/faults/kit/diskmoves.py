"""A busy disk that moves between volumes and formats while its VM runs, and a cancel half-way.

The guest writes checksummed records as fast as it can (or so many a second); after each move of the
disk the VM moves to the other host. At the end the closed image is read from outside.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.agent.disk_journal import HOLDS
from godwit.host.run import run as run_program
from godwit.model.vm import Disk

from .cluster import Cluster
from .formats import image_check, log_end, read_log
from .guest import Guest
from .redirect import until
from .report import Say, Section, tell

VM = "mover"
OTHER = "other"
WAY = (("qcow2", "other"), ("raw", "shared"), ("vhdx", "other"), ("qcow2", "shared"))
"""Format and volume after each move; it begins as qcow2 in ``shared``."""
FILL_FROM = 8
"""The part of the disk (one in so many) that is left for the log; the rest is full of data."""
STALL_MS = 2000.0
CRASHES = tuple((point, victim) for point in HOLDS for victim in ("agent", "qemu"))
RATE_AGAIN = 100
"""Records a second after a restart; the guest finds its log on the disk and goes on with it."""
COPY_S = 20
"""Seconds that a copy takes which is to be called off on its way."""


def run(
    cluster: Cluster,
    *,
    size_mib: int = 2048,
    rate: int = 200,
    crashes: tuple[tuple[str, str], ...] = CRASHES,
    say: Say = tell,
) -> Section:
    """The whole way, with a cancel and crashes on it."""
    cluster.heal()
    section = Section("disk-move")
    guest = _begin(cluster, size_mib, rate)
    section.figures["moves"] = [_move(cluster, guest, kind, volume, say) for kind, volume in WAY]
    section.figures["cancel"] = _cancel(cluster, guest, say)
    section.figures["exclusion"] = section.figures["cancel"].pop("refusals")
    section.figures["crashes"] = [_crash(cluster, guest, *crash, say) for crash in crashes]
    logged = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    offline = _stopped(cluster, say)
    (disk,) = cluster.client.vms.get(VM).disks
    path = _outside(cluster, disk)
    section.figures |= {
        "log": logged,
        "offline": asdict(read_log(path, disk, logged)),
        "check": image_check(path, disk),
        "stopped": offline,
        "files": _files(cluster),
    }
    cluster.client.wait(cluster.client.vms.delete(VM))
    section.figures["left"] = _files(cluster)
    _judge(section, disk)
    return section


def _begin(cluster: Cluster, size_mib: int, rate: int) -> Guest:
    """A VM whose disk is full of data behind the part for its log."""
    words = f"godwit.ip={cluster.address(VM)}/22 godwit.host={VM}"
    cluster.client.wait(
        cluster.client.vms.create(
            VM,
            memory_bytes=256 << 20,
            image="demo",
            append=words,
            networks=["lan"],
            disks=[f"shared:{size_mib}M:qcow2"],
        )
    )
    (disk,) = cluster.client.vms.get(VM).disks
    path, step = _outside(cluster, disk), 64
    writes = [
        word
        for at in range(size_mib // FILL_FROM, size_mib, step)
        for word in ("-c", f"write -q -P {1 + at // step % 255} {at}M {min(step, size_mib - at)}M")
    ]
    run_program(["qemu-io", "-f", "qcow2", *writes, str(path)], timeout=300.0)
    guest = cluster.boot(VM, host="host1")
    guest.ask(f"log dev=sda rate={rate} fresh=1", timeout=20.0)
    return guest


def _move(cluster: Cluster, guest: Guest, kind: str, volume: str, say: Say) -> dict[str, Any]:
    guest.ask("reset", timeout=5.0)
    before = guest.stats()["log"]
    (old,) = cluster.client.vms.get(VM).disks
    words = ["vm", "disk", "move", VM, "disk0", "--to", volume, "--format", kind]
    said = cluster.cli(*words, timeout=540.0)
    after = guest.stats()["log"]
    (disk,) = cluster.client.vms.get(VM).disks
    newest = max(cluster.client.rows("tasks"), key=lambda task: task["id"])
    found = {
        "to": f"{volume}:{kind}",
        "code": said.code,
        "said": said.err[-400:],
        "seconds": round(said.wall_s, 2),
        "stood_ms": (newest["result"] or {}).get("stood_ms"),
        # The guest's clock stands while it does: how long it waited for its disk beside that.
        "guest_gap_ms": after["largest_gap_ms"],
        "errors": after["errors"] - before["errors"],
        "written_on": after["acknowledged"] - before["acknowledged"],
        "is": f"{disk.volume}:{disk.format}",
        "old_gone": not _outside(cluster, old).exists(),
    }
    source = str(cluster.owner(VM).host)
    move = cluster.move(VM, cluster.other(source), method="live")
    found["live_move"] = {"outcome": move.state.value, "reason": move.reason}
    found["goes_on"] = _goes_on(guest)
    say(
        f"disk to {found['to']}: {found['seconds']} s, stood {found['stood_ms']} ms, "
        f"gap {found['guest_gap_ms']} ms; then live: {move.state.value}"
    )
    return found


def _goes_on(guest: Guest) -> bool:
    """Whether the guest's disk takes records."""
    before, given_up = guest.stats()["log"]["acknowledged"], time.monotonic() + 15.0
    while time.monotonic() < given_up:
        if guest.stats()["log"]["acknowledged"] > before + 20:
            return True
        time.sleep(0.05)  # the guest has no event for an acknowledged record
    return False


def _begin_slowly(cluster: Cluster) -> tuple[Any, Disk]:
    """A move of the disk that has begun to copy and takes ``COPY_S`` to its end."""
    (old,) = cluster.client.vms.get(VM).disks
    cluster.await_task(VM)  # the task of the last live move ends a little after its record
    task = cluster.client.vms.move_disk(
        VM, "disk0", to=OTHER, format="raw", max_bytes_per_s=old.size_bytes // COPY_S
    )
    given_up = time.monotonic() + 30.0
    while True:
        now = cluster.client.tasks.get(task.id)
        if now.progress.get("copied_bytes", 0) > old.size_bytes // COPY_S:
            return now, old
        assert not now.state.final, f"too quick, or it failed: {now.reason}"
        assert time.monotonic() < given_up, "the copy does not begin"
        time.sleep(0.01)


def _cancel(cluster: Cluster, guest: Guest, say: Say) -> dict[str, Any]:
    """Called off half-way; meanwhile nothing else may happen to the VM's disks or place."""
    task, old = _begin_slowly(cluster)
    refusals = {
        words[1]: cluster.cli(*words).code
        for words in (
            ("vm", "migrate", VM),
            ("vm", "save", VM),
        )
    }
    refusals["resize"] = cluster.cli("vm", "disk", "resize", VM, "disk0", "16G").code
    said = cluster.cli("task", "cancel", task.id)
    ended = cluster.client.tasks.get(task.id)
    (now,) = cluster.client.vms.get(VM).disks
    new = Path(str(task.progress["disk"]["path"]))
    found = {
        "code": said.code,
        "said": said.err[-300:],
        "state": ended.state.value,
        "reason": ended.reason,
        "copied_bytes": ended.progress.get("copied_bytes"),
        "same": now == old,
        "new_gone": not _inside(cluster, new).exists(),
        "old_there": _outside(cluster, old).exists(),
        "goes_on": _goes_on(guest),
        "refusals": refusals,
    }
    say(f"cancelled: {found['state']}, as it was: {found['same']}")
    move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)), method="live")
    found["live_move"] = {"outcome": move.state.value, "reason": move.reason}
    return found


def _crash(cluster: Cluster, guest: Guest, point: str, victim: str, say: Say) -> dict[str, Any]:
    """The agent or QEMU dies while the move is held: one image is the disk, the other is gone."""
    (old,) = cluster.client.vms.get(VM).disks
    host = str(cluster.owner(VM).host)
    volume, kind = ("shared", "qcow2") if old.volume == OTHER else (OTHER, "vhdx")
    cluster.await_task(VM)
    cluster.hold(host, point, "disk")
    before = guest.stats()["log"]["acknowledged"]
    task = cluster.client.vms.move_disk(VM, "disk0", to=volume, format=kind)  # type: ignore[arg-type]
    cluster.await_held(host, point, "disk", timeout=120.0)
    what = "agent" if victim == "agent" else f"qemu:{VM}"
    os.kill(cluster.lab.process(host, what).pid, signal.SIGKILL)
    if victim != "agent":
        cluster.release(host)
    cluster.heal()
    given_up = time.monotonic() + 90.0
    while not (ended := cluster.client.tasks.get(task.id)).state.final:
        assert time.monotonic() < given_up, f"the task does not end: {ended.reason}"
        time.sleep(0.1)
    if victim != "agent":
        _await_stopped(cluster)
        for name in {volume, old.volume}:  # a disk at work may have been silent for a second
            assert until(cluster, host, "direct", volume=name), f"{host} has no path to {name}"
        cluster.client.wait(cluster.client.vms.start(VM, host=host))
        guest.await_answer(90.0)
        guest.ask(f"log dev=sda rate={RATE_AGAIN}", timeout=20.0)
    (now,) = cluster.client.vms.get(VM).disks
    # Killed with both images equal, and before the record was written by an agent that lives.
    forwards = point in ("recorded", "switched") or (point, victim) == ("equal", "qemu")
    wanted = "new" if forwards else "old"
    new = str(ended.progress["disk"]["path"])
    found = {
        "at": point,
        "victim": victim,
        "state": ended.state.value,
        "reason": ended.reason,
        "is": "new" if now.path == new else "old" if now == old else now.path,
        "wanted": wanted,
        "files": _files(cluster),
        "path": now.path,
        "before": before,
        "goes_on": _goes_on(guest),
        "after": guest.stats()["log"],
    }
    say(f"{victim} killed at {point}: {found['state']}, the {found['is']} image is the disk")
    return found


def _await_stopped(cluster: Cluster) -> None:
    given_up = time.monotonic() + 30.0
    while cluster.owner(VM).state.value != "stopped":
        assert time.monotonic() < given_up, "its host does not notice that its QEMU died"
        time.sleep(0.05)  # the record is read past every network; nobody tells this process


def _stopped(cluster: Cluster, say: Say) -> dict[str, Any]:
    """There and back with the VM stopped."""
    codes = []
    for kind, volume in (("raw", OTHER), ("qcow2", "shared")):
        words = ["vm", "disk", "move", VM, "disk0", "--to", volume, "--format", kind]
        said = cluster.cli(*words, timeout=540.0)
        codes.append({"code": said.code, "said": said.err[-300:], "s": round(said.wall_s, 2)})
    say(f"stopped: {codes}")
    return {"moves": codes}


def _inside(cluster: Cluster, path: Path) -> Path:
    return cluster.lab.layout.volume.parent / path.relative_to("/clusterstorage")


def _outside(cluster: Cluster, disk: Disk) -> Path:
    """A disk's image as the real machine sees it."""
    return _inside(cluster, Path(disk.path))


def _files(cluster: Cluster) -> list[str]:
    """The images of the VM on all volumes, whether or not they are its disks."""
    root = cluster.lab.layout.volume.parent
    return sorted(str(path.relative_to(root)) for path in root.glob(f"*/{VM}/*"))


def _judge(section: Section, disk: Disk) -> None:
    figures = section.figures
    for one in figures["moves"]:
        to = one["to"]
        good = one["code"] == 0 and one["is"] == to and one["old_gone"]
        section.judge(f"{to}: the disk moves while its VM runs", good, one)
        section.judge(
            f"{to}: the guest writes on and sees no error",
            one["goes_on"] and one["written_on"] > 0 and not one["errors"],
            one,
        )
        live = one["live_move"]
        section.judge(f"{to}: the VM moves live right after", live["outcome"] == "completed", live)
        stood = (one["stood_ms"] or 0.0) + one["guest_gap_ms"]
        section.judge(
            f"{to}: the guest waits at most {STALL_MS / 1e3:g} s for its disk",
            one["stood_ms"] is not None and stood <= STALL_MS,
            stood,
            timing=True,
        )
    cancel = figures["cancel"]
    as_it_was = cancel["same"] and cancel["new_gone"] and cancel["old_there"] and cancel["goes_on"]
    section.judge(
        "cancelled half-way: all is as it was, the new image is gone",
        as_it_was and cancel["state"] == "cancelled" and cancel["code"] == 0,
        cancel,
    )
    section.judge(
        "cancelled: the VM moves live right after",
        cancel["live_move"]["outcome"] == "completed",
        cancel["live_move"],
    )
    refused = figures["exclusion"]
    section.judge(
        "while a disk moves, a move, a save and a growth are refused",
        all(code == 4 for code in refused.values()),
        refused,
    )
    for one in figures["crashes"]:
        text = f"{one['victim']} killed at {one['at']}"
        section.judge(
            f"{text}: the {one['wanted']} image is the disk", one["is"] == one["wanted"], one
        )
        left = [one["path"].removeprefix("/clusterstorage/")]
        section.judge(f"{text}: the other one is gone", one["files"] == left, one)
        kept = one["after"]["acknowledged"] >= one["before"] and not one["after"]["errors"]
        section.judge(f"{text}: the guest goes on with its records", one["goes_on"] and kept, one)
    check = figures["offline"]
    good = not check["lost"] and not check["torn"] and check["acknowledged"] > 0
    section.judge("0 lost, 0 torn acknowledged records", good, check)
    section.judge("image check clean", figures["check"] in ("clean", "none"), figures["check"])
    codes = [one["code"] for one in figures["stopped"]["moves"]]
    section.judge("the disk moves there and back while its VM is stopped", codes == [0, 0], codes)
    section.judge(
        "one image is left, and none after the VM is deleted",
        figures["files"] == [disk.path.removeprefix("/clusterstorage/")] and not figures["left"],
        {"files": figures["files"], "left": figures["left"]},
    )
