"""QEMU 7.2 under emulation loses pages: the check of the stamping guest can fail, and we refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import stamping
from .cluster import Cluster
from .report import Say, Section, tell

VM = "aged"
WRITE_MB_S = 30
"""As fast as it can: a page is lost when it is written in two passes that follow each other."""


def run(binary: Path, *, moves: int = 6, say: Say = tell) -> Section:
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
    bad = 0
    try:
        guest = cluster.make(
            VM, host="host1", append=f"mitigations=off godwit.stamp={stamping.STAMP_MIB}:{WRITE_MB_S} godwit.clock=1"
        )
        for number in range(moves):
            move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)))
            # A guest that lost pages may be too damaged to answer at all.
            if not guest.alive(timeout=10.0):
                rows.append({"id": move.id, "outcome": move.state.value, "bad": None})
                say(f"old QEMU, move {number + 1}: {move.state.value}, the guest is silent")
                break
            bad = guest.ask("check", timeout=60.0, each=30.0)["found"]
            bad = max(bad, guest.stats()["stamp"]["bad"])
            rows.append({"id": move.id, "outcome": move.state.value, "bad": bad, "reason": move.reason, "passes": len(move.passes), "clock": guest.stats()["clock"], "writes": guest.stats()["stamp"]["writes"]})
            say(str(rows[-1]))
            say(f"old QEMU, move {number + 1}: {move.state.value}, {bad} bad pages")
            if bad:
                break
    finally:
        cluster.close()
    section.figures["moves"] = rows
    section.judge(
        "the same guest on QEMU 7.2 with the refusal overridden shows bad pages", bad > 0, rows
    )
