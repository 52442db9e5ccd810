"""QEMU 7.2 under emulation loses memory: it is refused, and the stamping guest's check can fail.

What is lost is what was written between two passes after the first, so there must be some: a writer
on a slow link makes four or more of them. With one pass and the last, nothing is lost.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from . import stamping
from .cluster import Cluster
from .guest import Guest, NoAnswer
from .report import Say, Section, tell

VM = "aged"
WRITE_MB_S = 15
LINK = "300mbit"
WARM_S = 2.0


def run(binary: Path, *, moves: int = 8, say: Say = tell) -> Section:
    """Two labs with the old QEMU: one as it is, one with the refusal overridden."""
    section = Section("old-qemu")
    _refused(binary, section, say)
    _overridden(binary, section, moves, say)
    return section


def _refused(binary: Path, section: Section, say: Say) -> None:
    cluster = Cluster.up("oldq", qemu={"binary": str(binary)})
    try:
        cluster.client.wait(
            cluster.client.vms.create(VM, memory_bytes=256 << 20, image="demo", networks=["lan"])
        )
        cluster.client.wait(cluster.client.vms.start(VM, host="host1"))
        before = cluster.owner(VM)
        said = cluster.cli("vm", "migrate", VM, "--to", "host2")
        same = cluster.owner(VM) == before
    finally:
        cluster.close()
    say(f"old QEMU without the override: exit {said.code}: {said.err.splitlines()[:1]}")
    section.figures["refusal"] = {"exit": said.code, "stderr": said.err}
    section.judge(
        "QEMU 7.2 under emulation: a live move is refused with the reason, exit 4",
        said.code == 4 and "loses pages" in said.err and same,
        section.figures["refusal"],
    )


def _overridden(binary: Path, section: Section, moves: int, say: Say) -> None:
    cluster = Cluster.up(
        "oldq",
        rate=LINK,
        qemu={"binary": str(binary), "allow_tcg_migration_on_old_qemu": True},
    )
    rows: list[dict[str, Any]] = []
    try:
        guest = _aged(cluster)
        for number in range(1, moves + 1):
            time.sleep(WARM_S)  # to write what can be lost
            _, before = stamping.read_pages(guest, timeout=20.0)
            move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)))
            row: dict[str, Any] = {"id": move.id, "outcome": move.state.value}
            rows.append(row)
            try:
                bad, after = stamping.read_pages(guest, timeout=20.0)
            except NoAnswer:
                row["silent"] = True  # too damaged to say anything
                say(f"old QEMU, move {number}: {row}")
                cluster.remove(VM)
                guest = _aged(cluster)
                continue
            row |= {"bad": bad, "fallen": stamping.fallen(before, after)}
            say(f"old QEMU, move {number}: {row}")
            if _lost(row):
                break
    finally:
        cluster.close()
    section.figures["moves"] = rows
    section.judge(
        "QEMU 7.2 with the refusal overridden: the same guest has bad pages (wrong in themselves "
        "or older than they were read before the move)",
        any(_lost(row) for row in rows),
        rows,
    )


def _lost(row: dict[str, Any]) -> bool:
    """Memory of a guest that moved is wrong, or older than it was; its clock proves nothing."""
    older = (row.get("fallen") or {}).keys() & {"pages_written", "stamps"}
    return row["outcome"] == "completed" and bool(row.get("bad") or older)


def _aged(cluster: Cluster) -> Guest:
    return cluster.make(VM, host="host1", append=stamping.words(WRITE_MB_S))
