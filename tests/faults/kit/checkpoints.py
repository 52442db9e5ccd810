"""Checkpoints of a running VM: what its disks held then is there after a revert, and nothing later.

The guest goes on with the log that a disk holds, so where it begins after a revert counts the
records that the checkpoint has.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from godwit.host.errors import HostError
from godwit.host.run import run as run_program

from .clones import await_records, exported, follow
from .cluster import Cluster
from .formats import RECORDS_PER_S, log_end
from .guest import Guest
from .report import Say, Section, tell

VM = "kept"
DISKS = ("disk0", "disk1")
RECORDS = 100
SIZE = 64 << 20
Tier = Literal["auto", "direct", "brokered"]
MIXED: tuple[Tier, Tier] = ("brokered", "direct")
AGENT_S = 20.0


def run(
    cluster: Cluster, *, rounds: int = 1, tiers: Sequence[Tier] = MIXED, say: Say = tell
) -> Section:
    """Make, move, revert, move, delete, move: so many times on one VM, whose two disks go these
    ways."""
    section = Section("checkpoints")
    cluster.define(VM)
    for tier in tiers:
        cluster.client.wait(
            cluster.client.vms.add_disk(VM, volume="shared", size_bytes=SIZE, tier=tier)
        )
    guest = cluster.boot(VM, host="host1")
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    for number in range(1, rounds + 1):
        section.figures[f"round {number}"] = _round(cluster, section, guest, number)
        say(f"round {number}: {section.figures[f'round {number}']}")
    _refused(cluster, section)
    _agent_dies(cluster, section, guest)
    cluster.remove(VM)
    return section


def _round(cluster: Cluster, section: Section, guest: Guest, number: int) -> dict[str, Any]:
    """A checkpoint under a writer, and the way back to it."""
    name = f"r{number}"

    def section_says(text: str, good: bool, figure: Any) -> None:
        section.judge(f"round {number}: {text}", good, figure)

    await_records(guest, guest.stats()["log"]["acknowledged"] + RECORDS)
    guest.ask("reset", timeout=5.0)
    before = guest.stats()["log"]
    began = time.monotonic()
    made = cluster.cli("vm", "checkpoint", "create", VM, name)
    spent = time.monotonic() - began
    after = guest.stats()["log"]
    section_says("a running VM gets a checkpoint", made.code == 0, made.err[-300:])
    section_says("the guest sees no error", after["errors"] == before["errors"], after)
    moved = _move(cluster, section, f"round {number}: it moves live right after")
    await_records(guest, after["acknowledged"] + RECORDS)
    log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(VM, force=True))
    section_says("image check clean", not (bad := _checks(cluster)), bad)
    reverted = cluster.cli("vm", "checkpoint", "revert", VM, name)
    section_says("a stopped VM goes back", reverted.code == 0, reverted.err[-300:])
    section_says("image check clean after it", not (bad := _checks(cluster)), bad)
    held = [exported(cluster, VM, disk, {before["log_id"]: before}) for disk in DISKS]
    mine = max(held, key=lambda one: one["intact"])
    section_says("all records before it are there", mine["good"] and mine["lost"] == 0, held)
    has = before["acknowledged"] + mine["unacknowledged"]
    section_says("none after it is", has <= after["acknowledged"] + 1, [before, after, mine])
    again = cluster.boot(VM, host="host1")
    device = _device_of(again, before["log_id"])
    now = again.stats()["log"]
    section_says("the guest goes on from there", now["first"] == has + 1, [now, has])
    _move(cluster, section, f"round {number}: it moves live after a revert")
    gone = cluster.cli("vm", "checkpoint", "delete", VM, name)
    section_says("a running VM loses a checkpoint", gone.code == 0, gone.err[-300:])
    _move(cluster, section, f"round {number}: it moves live right after that")
    section_says("none is left", not cluster.client.vms.checkpoints(VM), "")
    return {
        "create_s": round(spent, 3),
        "largest_gap_ms": after["largest_gap_ms"],
        "records_at_checkpoint": [before["acknowledged"], has, after["acknowledged"]],
        "move_after_ms": moved,
        "device": device,
    }


def _device_of(guest: Guest, log_id: str) -> str:
    """Go on with that log, wherever the guest has its disk now."""
    for device in ("sda", "sdb"):
        if follow(guest, device)["log_id"] == log_id:
            return device
        log_end(guest)
    raise AssertionError(f"no disk holds the log {log_id}")


def _move(cluster: Cluster, section: Section, text: str) -> float | None:
    move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)), method="live")
    section.judge(text, move.state.value == "completed", move.reason)
    cluster.await_task(VM)
    return move.blackout_ms


def _checks(cluster: Cluster) -> list[str]:
    """What qemu-img finds wrong with the images."""
    bad = []
    for path in _images(cluster):
        try:
            run_program(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], timeout=60.0)
        except HostError as error:
            bad.append(str(error))
    return bad


def _images(cluster: Cluster) -> list[Path]:
    return sorted((cluster.lab.layout.volume / VM).glob("*.qcow2"))


def _tags(cluster: Cluster) -> int:
    """Snapshots in all images together, whatever the record says."""
    count = 0
    for path in _images(cluster):
        out = run_program(["qemu-img", "snapshot", "-l", "-U", str(path)], timeout=20.0)
        count += out.count(b"godwit-")
    return count


def _refused(cluster: Cluster, section: Section) -> None:
    made = cluster.cli("vm", "checkpoint", "create", VM, "keep")
    section.judge("another checkpoint is made", made.code == 0, made.err[-300:])
    for words, code in (
        (("vm", "checkpoint", "revert", VM, "keep"), 4),
        (("vm", "checkpoint", "create", VM, "keep"), 4),
        (("vm", "checkpoint", "delete", VM, "nothing"), 3),
        (("vm", "disk", "remove", VM, "disk1"), 4),
    ):
        said = cluster.cli(*words)
        good = said.code == code and len(said.err.strip().splitlines()) == 2
        section.judge(f"refused: {' '.join(words)}", good, [said.code, said.err[-300:]])
    gone = cluster.cli("vm", "checkpoint", "delete", VM, "keep")
    section.judge("and it goes", gone.code == 0, gone.err[-300:])
    section.judge("images hold none either", _tags(cluster) == 0, _tags(cluster))


def _agent_dies(cluster: Cluster, section: Section, guest: Guest) -> None:
    """Killed while it makes one: all disks have it, or the record does not and the next one leaves
    no rest. (QEMU and the broker are asked one after the other.)"""
    host = str(cluster.owner(VM).host)
    agent = cluster.lab.process(host, "agent")
    task = cluster.client.vms.create_checkpoint(VM, "cut")
    os.kill(agent.pid, signal.SIGKILL)
    cluster.heal()
    try:
        cluster.client.wait(task)
        how = "made"
    except Exception as error:  # whatever it ended in: the images are looked at
        how = str(error)
    left = _tags(cluster)
    count = guest.stats()["log"]["acknowledged"]
    await_records(guest, count + 10)
    known = {one.name for one in cluster.client.vms.checkpoints(VM)}
    whole = left == 2 or "cut" not in known
    section.judge("agent killed: both disks have it, or no record does", whole, [how, left])
    made = cluster.cli("vm", "checkpoint", "create", VM, "next")
    section.judge("agent killed: the next one is made", made.code == 0, made.err[-300:])
    wanted = 2 * (len(known) + 1)
    section.judge("agent killed: no rest stays", _tags(cluster) == wanted, [_tags(cluster), wanted])
    section.figures["agent killed"] = {"task": how, "known": sorted(known)}
