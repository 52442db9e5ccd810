"""A VM is cloned, in full and linked; the clones have its records, and it has them untouched.

The guest finds the log that a disk holds and goes on with it: where it began says exactly how many
records a clone had from the start. (Which disk the guest calls sda differs from boot to boot: a log
is known by its id.) One disk is opened by QEMU itself, one by the storage broker.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.lab.logcheck import RECORD_BYTES, Record, check_log, parse_record

from .cluster import Cluster
from .formats import RECORDS_PER_S, log_end
from .guest import Guest
from .report import Say, Section, tell

VM, FULL, LINKED = "original", "copy", "link"
RECORDS = 150
DEVICES, DISKS = ("sda", "sdb"), ("disk0", "disk1")
Log = dict[str, Any]


def run(cluster: Cluster, *, moves: int = 1, say: Say = tell) -> Section:
    """Each clone runs, moves live so many times, and is read from outside."""
    section = Section("clones")
    guest = cluster.make(VM, host="host1", disks=["shared:64M"])
    cluster.client.wait(
        cluster.client.vms.add_disk(VM, volume="shared", size_bytes=64 << 20, tier="brokered")
    )
    logs = [write_some(guest, device, RECORDS) for device in DEVICES]
    cluster.client.wait(cluster.client.vms.stop(VM, force=True))
    before = _digests(cluster)
    for clone, words in ((FULL, ()), (LINKED, ("--linked",))):
        began = time.monotonic()
        append = f"godwit.ip={cluster.address(clone)}/22 godwit.host={clone}"
        said = cluster.cli("vm", "clone", VM, clone, "--append", append, *words, "-o", "json")
        spent = round(time.monotonic() - began, 2)
        section.judge(f"{clone}: it is made", said.code == 0, said.err[-300:])
        section.figures[clone] = {"made_s": spent}
        say(f"{clone}: made in {spent} s")
    _refused(cluster, section)
    for clone in (FULL, LINKED):
        section.figures[clone] |= _live(cluster, section, clone, logs, moves)
    section.judge("the original's images are untouched", _digests(cluster) == before, before)
    for clone in (FULL, LINKED):
        cluster.remove(clone)
    again = cluster.boot(VM, host="host1")
    for device in DEVICES:
        section.judge(
            f"without clones the original goes on, {device}", *_goes_on(again, device, logs)
        )
    cluster.remove(VM)
    return section


def write_some(guest: Guest, device: str, records: int) -> dict[str, Any]:
    """Begin a log and end it after that many records; what was acknowledged."""
    guest.ask(f"log dev={device} rate={RECORDS_PER_S * 2} fresh=1", timeout=20.0)
    await_records(guest, records)
    return log_end(guest)


def follow(guest: Guest, device: str) -> dict[str, Any]:
    """Go on with the log that a disk holds; where that began."""
    guest.ask(f"log dev={device} rate={RECORDS_PER_S}", timeout=20.0)
    until = time.monotonic() + 20.0
    while (now := guest.stats()["log"])["state"] != "running":
        assert time.monotonic() < until, f"the log of {device} does not begin: {now}"
        time.sleep(0.05)
    return dict(now)


def await_records(guest: Guest, count: int) -> None:
    """Return once so many are acknowledged."""
    until = time.monotonic() + 60.0
    while (now := guest.stats()["log"])["acknowledged"] < count:
        assert time.monotonic() < until, f"the guest does not write: {now}"
        time.sleep(0.05)


def _digests(cluster: Cluster) -> dict[str, str]:
    folder = cluster.lab.layout.volume / VM
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def _refused(cluster: Cluster, section: Section) -> None:
    """What a linked clone stands on neither starts nor changes nor goes."""
    for words in (
        ("vm", "start", VM),
        ("vm", "delete", VM),
        ("vm", "disk", "resize", VM, "disk0", "128M"),
        ("vm", "disk", "remove", VM, "disk1"),
        ("vm", "clone", LINKED, "another", "--linked"),
    ):
        said = cluster.cli(*words)
        named = LINKED in said.err
        section.judge(f"refused: {' '.join(words)}", said.code == 4 and named, said.err[-300:])


def _goes_on(guest: Guest, device: str, logs: list[Log]) -> tuple[bool, Log]:
    """Whether a disk holds all of one of the logs."""
    now = follow(guest, device)
    before = {log["log_id"]: log["acknowledged"] for log in logs}
    return now["first"] > before.get(now["log_id"], 1 << 60), now


def _live(
    cluster: Cluster, section: Section, clone: str, logs: list[Log], moves: int
) -> dict[str, Any]:
    guest = cluster.boot(clone, host="host1")
    found: dict[str, Log] = {}
    for device in DEVICES:
        same, now = _goes_on(guest, device, logs)
        section.judge(f"{clone}, {device}: it has the original's records", same, now)
        for _ in range(moves):
            source = str(cluster.owner(clone).host)
            move = cluster.move(clone, cluster.other(source), method="live")
            done = move.state.value == "completed"
            cluster.await_task(clone)
            section.judge(f"{clone}, {device}: it moves live", done, move.reason)
        found[now["log_id"]] = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(clone, timeout_s=30.0))
    for disk in DISKS:
        checked = exported(cluster, clone, disk, found)
        section.judge(f"{clone}, {disk}: 0 lost, 0 torn records", checked["good"], checked)
    return found


def exported(cluster: Cluster, vm: str, disk: str, logs: dict[str, Log]) -> dict[str, Any]:
    """A stopped VM's disk read from outside, by way of an export that stands for itself."""
    name = f"{vm}-{disk}.raw"
    cluster.client.wait(
        cluster.client.vms.export_disk(vm, disk, f"/clusterstorage/shared/{name}", format="raw")
    )
    path: Path = cluster.lab.layout.volume / name
    with path.open("rb") as stream:
        first = parse_record(stream.read(RECORD_BYTES))
        log = logs.get(f"{first.log_id:016x}") if isinstance(first, Record) else None
        stream.seek(0)
        count = log["acknowledged"] if log else 1
        result = check_log(stream, acknowledged=count, log_id=log["log_id"] if log else None)
    path.unlink()
    return asdict(result) | {"good": log is not None and result.good}
