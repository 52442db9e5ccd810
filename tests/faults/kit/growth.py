"""A busy disk grows while its VM runs, whatever its format and whoever opens it.

The guest writes checksummed records; after each growth it has heard of the new size by itself, must
go on, and move live. At the end the closed image is read from outside. Agent, QEMU and broker are
killed where a growth is held: the image alone says how large the disk is, and everybody says so.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import asdict
from typing import Any

from godwit.agent.disk_journal import GROWTH_HOLDS
from godwit.storage.images import image_info

from .clones import follow
from .cluster import Cluster
from .diskmoves import _goes_on
from .formats import RECORDS_PER_S, image_check, log_end, outside, read_log
from .guest import Guest
from .report import Say, Section, tell

MIB = 1 << 20
KINDS = (
    "raw", "qcow2", "vhd-fixed", "vhd", "vhdx",
    "raw brokered", "qcow2 brokered", "vhd-fixed brokered",
)  # fmt: skip
BROKER_DIES = ("served", "broker")
SIZES = (96, 1024, 1025, 1600)
"""MiB after each growth; the last one while the VM is stopped. It begins with 64."""
CRASHES = (*((point, who) for point in GROWTH_HOLDS for who in ("agent", "qemu")), BROKER_DIES)
HEARD_S = 10.0
STALL_MS = 2000.0


def run(
    cluster: Cluster,
    *,
    kinds: tuple[str, ...] = KINDS,
    sizes: tuple[int, ...] = SIZES,
    crashes: tuple[tuple[str, str], ...] = CRASHES,
    crashed: tuple[str, ...] = ("vhdx", "qcow2 brokered", "vhd-fixed"),
    say: Say = tell,
) -> Section:
    """Each kind of disk through all sizes; some through the crashes too."""
    cluster.heal()
    section = Section("growth")
    for kind in kinds:
        deaths = crashes if kind in crashed else ()
        section.figures[kind] = _one(cluster, section, kind, sizes, deaths, say)
        _starts_again(cluster, section, kind, section.figures[kind])
        cluster.remove(_name(kind))
    return section


def _one(
    cluster: Cluster,
    section: Section,
    kind: str,
    sizes: tuple[int, ...],
    crashes: tuple[tuple[str, str], ...],
    say: Say,
) -> dict[str, Any]:
    vm, guest = _name(kind), _begin(cluster, kind)
    found: dict[str, Any] = {}
    for mib in sizes[:-1]:
        found[f"{mib} MiB"] = grow(cluster, section, guest, vm, kind, mib, say)
    size = sizes[-2]
    for point, victim in crashes:
        if (point, victim) == BROKER_DIES and kind == "vhd-fixed":
            continue  # QEMU opens that by itself
        size += 64
        found[f"{victim} at {point}"] = crash(cluster, section, guest, vm, (point, victim), size)
        say(f"{kind}: {victim} killed at {point}: {found[f'{victim} at {point}']}")
    logged = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(vm, timeout_s=30.0))
    last = max(sizes[-1], size)
    said = cluster.cli("vm", "disk", "resize", vm, "disk0", f"{last}M")
    section.judge(f"{kind}: it grows while its VM is stopped", said.code == 0, said.err[-300:])
    (disk,) = cluster.client.vms.get(vm).disks
    path = outside(cluster, disk)
    check = asdict(read_log(path, disk, logged))
    good = not check["lost"] and not check["torn"] and check["acknowledged"] > 0
    section.judge(f"{kind}: 0 lost, 0 torn acknowledged records", good, check)
    verdict = image_check(path, disk)
    section.judge(f"{kind}: image check clean", verdict in ("clean", "none"), verdict)
    return found | {"log": logged, "offline": check, "size": last * MIB}


def _starts_again(cluster: Cluster, section: Section, kind: str, found: dict[str, Any]) -> None:
    now = follow(cluster.boot(_name(kind), host="host1"), "sda")
    section.judge(f"{kind}: it starts in its last size", now["device_bytes"] == found["size"], now)
    held = now["first"] > found["log"]["acknowledged"]
    section.judge(f"{kind}: and goes on with its records", held, now)


def _name(kind: str) -> str:
    return "grows-" + kind.replace(" ", "-")


def _begin(cluster: Cluster, kind: str) -> Guest:
    vm, (image, *brokered) = _name(kind), kind.split()
    cluster.define(vm)
    cluster.client.wait(
        cluster.client.vms.add_disk(
            vm,
            volume="shared",
            size_bytes=64 * MIB,
            format=image,  # type: ignore[arg-type]
            tier="brokered" if brokered else "auto",
        )
    )
    guest = cluster.boot(vm, host="host1")
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    return guest


def grow(
    cluster: Cluster, section: Section, guest: Guest, vm: str, kind: str, mib: int, say: Say
) -> dict[str, Any]:
    """To so many MiB under the guest's writes, and a live move right after."""

    def judge(text: str, good: bool, figure: Any, *, timing: bool = False) -> None:
        section.judge(f"{kind}, {mib} MiB: {text}", good, figure, timing=timing)

    guest.ask("reset", timeout=5.0)
    before = guest.stats()["log"]
    said = cluster.cli("vm", "disk", "resize", vm, "disk0", f"{mib}M")
    judge("it grows while its VM runs", said.code == 0, said.err[-300:])
    heard = _heard(guest, mib * MIB)
    judge("the guest hears of it by itself", heard is not None, guest.stats()["log"])
    goes_on, after = _goes_on(guest), guest.stats()["log"]
    judge("the guest writes on and sees no error", goes_on and not after["errors"], after)
    (disk,) = cluster.client.vms.get(vm).disks
    judge("the record says so", disk.size_bytes == mib * MIB, disk.size_bytes)
    move = cluster.move(vm, cluster.other(str(cluster.owner(vm).host)), method="live")
    judge("it moves live right after", move.state.value == "completed", move.reason)
    cluster.await_task(vm)
    gap = after["largest_gap_ms"]
    judge(f"the guest waits at most {STALL_MS / 1e3:g} s", gap <= STALL_MS, gap, timing=True)
    found = {
        "seconds": round(said.wall_s, 2),
        "guest_gap_ms": gap,
        "heard_s": heard,
        "written_on": after["acknowledged"] - before["acknowledged"],
        "move": move.state.value,
        "blackout_ms": move.blackout_ms,
    }
    say(f"{kind} to {mib} MiB: {found}")
    return found


def _heard(guest: Guest, size_bytes: int) -> float | None:
    """Seconds until the guest's kernel takes its disk for that large; None when it never does."""
    began = time.monotonic()
    while time.monotonic() < began + HEARD_S:
        if guest.stats()["log"]["device_bytes"] == size_bytes:
            return round(time.monotonic() - began, 3)
        time.sleep(0.02)  # the guest tells nobody
    return None


def crash(
    cluster: Cluster, section: Section, guest: Guest, vm: str, cell: tuple[str, str], mib: int
) -> dict[str, Any]:
    """Killed while a growth is held: the disk has the old size or the new one, everywhere."""
    point, victim = cell
    text = f"{vm}: {victim} killed at {point}"
    host, before = str(cluster.owner(vm).host), guest.stats()["log"]["acknowledged"]
    cluster.hold(host, point, "disk")
    task = cluster.client.vms.resize_disk(vm, "disk0", mib * MIB)
    cluster.await_held(host, point, "disk", timeout=60.0)
    what = {"agent": "agent", "qemu": f"qemu:{vm}", "broker": f"broker:{vm}"}[victim]
    os.kill(cluster.lab.process(host, what).pid, signal.SIGKILL)
    if victim != "agent":
        cluster.release(host)
    cluster.heal()
    until = time.monotonic() + 90.0
    while not (ended := cluster.client.tasks.get(task.id)).state.final:
        assert time.monotonic() < until, f"the task does not end: {ended.reason}"
        time.sleep(0.1)
    if victim == "qemu":
        while cluster.owner(vm).state.value != "stopped":
            assert time.monotonic() < until, "its host does not notice that its QEMU died"
            time.sleep(0.05)
        cluster.client.wait(cluster.client.vms.start(vm, host=host))
        guest.await_answer(90.0)
        guest.ask(f"log dev=sda rate={RECORDS_PER_S}", timeout=20.0)
    on = _goes_on(guest)
    (disk,) = cluster.client.vms.get(vm).disks
    image = asyncio.run(image_info(outside(cluster, disk), format=disk.format, in_use=True))
    heard = _heard(guest, image.virtual_size)
    log = guest.stats()["log"]
    section.judge(
        f"{text}: image, record and guest agree",
        image.virtual_size == disk.size_bytes and heard is not None,
        {"image": image.virtual_size, "record": disk.size_bytes, "guest": log["device_bytes"]},
    )
    kept = on and log["acknowledged"] >= before and not log["errors"]
    section.judge(f"{text}: the guest goes on with its records", kept, log)
    again = cluster.cli("vm", "disk", "resize", vm, "disk0", f"{mib}M")
    section.judge(f"{text}: asked again it has grown", again.code == 0, again.err[-300:])
    section.judge(f"{text}: and the guest hears of it", _heard(guest, mib * MIB) is not None, "")
    return {"task": ended.state.value, "reason": ended.reason, "size": image.virtual_size}
