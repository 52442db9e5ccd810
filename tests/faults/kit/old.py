"""QEMU 7.2 under emulation loses memory: it is refused, and the stamping guest's check can fail."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from . import stamping
from .cluster import Cluster
from .guest import NoAnswer
from .report import Say, Section, tell

VM = "aged"
WRITE_MB_S = 30
WARM_S = 2.0


def run(binary: Path, *, moves: int = 4, say: Say = tell) -> Section:
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
        "oldq", qemu={"binary": str(binary), "allow_tcg_migration_on_old_qemu": True}
    )
    rows: list[dict[str, Any]] = []
    try:
        guest = cluster.make(VM, host="host1", append=stamping.words(WRITE_MB_S))
        for number in range(1, moves + 1):
            time.sleep(WARM_S)  # to write what can be lost
            before = stamping.counters(guest.stats())
            move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)))
            row: dict[str, Any] = {"id": move.id, "outcome": move.state.value}
            rows.append(row)
            try:
                row["bad"] = guest.ask("check", timeout=30.0, each=10.0)["found"]
                row["fallen"] = stamping.fallen(before, stamping.counters(guest.stats()))
            except NoAnswer:
                row["silent"] = True  # too damaged to say anything
            say(f"old QEMU, move {number}: {row}")
            if move.state.value == "completed" and (row.get("bad") or row.get("fallen")):
                break
    finally:
        cluster.close()
    section.figures["moves"] = rows
    section.judge(
        "the same guest on QEMU 7.2 with the refusal overridden shows lost pages (bad ones, or "
        "counters of written pages that fell)",
        any(row.get("bad") or (row.get("fallen") or {}).get("pages_written") for row in rows),
        rows,
    )
