"""A volume runs full under guests that write: they wait, are told of, and go on; nothing is lost.

On a lab whose ``shared`` is a file system of its own. A QEMU that opens its image by itself (qcow2)
hears of the full volume from the kernel; one that writes through a broker (vhdx) hears over NBD.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from godwit.lab import small_volume

from .cluster import Cluster
from .formats import RECORDS_PER_S, image_check, log_end, outside, read_log
from .guest import Guest
from .report import Say, Section, tell

SIZE, GROWTH = 160 << 20, 80 << 20
ONE_OF_EACH = ("qcow2", "vhdx")
EVERY = ("raw", "qcow2", "vhd", "vhdx")
"""A fixed VHD has all of its room from the start; and a tmpfs wants requests of whole pages, of
which its footer makes no whole number."""
DISK = "256M"
LEFT = 2 << 20
STALL_S, RESUME_S = 60.0, 20.0


def run(
    *,
    ways: tuple[str, ...] = ("grown", "freed", "resumed"),
    kinds: tuple[str, ...] = ONE_OF_EACH,
    say: Say = tell,
) -> Section:
    """Fill it once for each way out: it grows, room is made, somebody says ``vm resume``."""
    cluster = Cluster.up("full", volume_bytes=SIZE)
    section = Section("full-volume")
    try:
        guests = {
            f"full-{kind}": cluster.make(
                f"full-{kind}", host="host1", disks=[f"shared:{DISK}:{kind}"]
            )
            for kind in kinds
        }
        for guest in guests.values():
            guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
        for way in ways:
            _once(cluster, section, guests, way, say)
        for vm, guest in guests.items():
            _judge_image(cluster, section, vm, guest)
    finally:
        left = cluster.close()
    section.judge("full-volume: the lab leaves nothing behind", not left, left or "nothing")
    return section


def _once(cluster: Cluster, section: Section, guests: dict[str, Guest], way: str, say: Say) -> None:
    before = {vm: guest.stats()["log"] for vm, guest in guests.items()}
    told = {vm: _told(cluster, vm) for vm in guests}
    small_volume.fill(cluster.lab, "shared", leave_bytes=LEFT)
    seen: dict[str, Any] = {}
    for vm in guests:
        state, waited = _await_state(cluster, vm, "io-error", STALL_S)
        view = cluster.client.vms.get(vm)
        listed = cluster.cli("vm", "list").out
        seen[vm] = {"state": state, "after_s": waited, "reason": view.reason}
        section.judge(f"{vm}, {way}: it is paused as io-error", state == "io-error", seen[vm])
        words = "volume shared is full" in view.reason and "MiB free" in view.reason
        section.judge(f"{vm}, {way}: vm list says why", words and "is full" in listed, listed)
    began = time.monotonic()
    _WAYS[way](cluster, tuple(guests))
    for vm, guest in guests.items():
        state, waited = _await_state(cluster, vm, "running", RESUME_S)
        now = guest.stats()["log"]
        seen[vm] |= {
            "resumed_after_s": round(time.monotonic() - began, 2),
            "events": _told(cluster, vm) - told[vm],
            "errors": now["errors"] - before[vm]["errors"],
        }
        section.judge(f"{vm}, {way}: it runs again", state == "running", seen[vm])
        section.judge(f"{vm}, {way}: one event tells of it", seen[vm]["events"] == 1, seen[vm])
        section.judge(f"{vm}, {way}: the guest saw no error", not seen[vm]["errors"], seen[vm])
        went_on = _goes_on(guest, now["acknowledged"])
        section.judge(f"{vm}, {way}: its writer goes on", went_on, now)
    section.figures[way] = seen
    say(f"{way}: {seen}")


def _freed(cluster: Cluster, _vms: Sequence[str]) -> None:
    small_volume.free(cluster.lab, "shared")


def _grown(cluster: Cluster, vms: Sequence[str]) -> None:
    small_volume.grow(cluster.lab, "shared", SIZE + len(vms) * GROWTH)


def _resumed(cluster: Cluster, vms: Sequence[str]) -> None:
    """A person who does not wait."""
    small_volume.free(cluster.lab, "shared")
    for vm in vms:
        cluster.client.wait(cluster.client.vms.resume(vm))


_WAYS: dict[str, Callable[[Cluster, Sequence[str]], None]] = {
    "grown": _grown,
    "freed": _freed,
    "resumed": _resumed,
}


def _told(cluster: Cluster, vm: str) -> int:
    return sum(event.kind == "vm.io-error" for event in cluster.events(vm))


def _await_state(cluster: Cluster, vm: str, wanted: str, timeout: float) -> tuple[str, float]:
    """The state and the seconds it took; the reason comes with it."""
    began = time.monotonic()
    while True:
        view = cluster.client.vms.get(vm)
        waited = round(time.monotonic() - began, 2)
        good = view.state.value == wanted and (bool(view.reason) or wanted != "io-error")
        if good or waited > timeout:
            return view.state.value, waited
        time.sleep(0.1)


def _goes_on(guest: Guest, count: int) -> bool:
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        if guest.stats()["log"]["acknowledged"] > count + RECORDS_PER_S // 2:
            return True
        time.sleep(0.05)  # the guest has no event for an acknowledged record
    return False


def _judge_image(cluster: Cluster, section: Section, vm: str, guest: Guest) -> None:
    logged = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(vm, timeout_s=30.0))
    (disk,) = cluster.client.vms.get(vm).disks
    path = outside(cluster, disk)
    offline, check = asdict(read_log(path, disk, logged)), image_check(path, disk)
    good = not offline["lost"] and not offline["torn"] and offline["acknowledged"] > 0
    section.judge(f"{vm}: 0 lost, 0 torn acknowledged records", good, offline)
    section.judge(f"{vm}: image check clean", check in ("clean", "none"), check)
    section.figures[vm] = {"offline": offline, "check": check}
