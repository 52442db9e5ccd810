"""Moves back and forth under a guest that would notice a lost page, write or second.

A guest that loses all that it wrote lately looks sound from inside: its pages are as old as what
it expects of them. So its counters and the sum of its pages' stamps are kept outside, too, and must
never fall.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.host.run import run as run_program
from godwit.lab.logcheck import LogCheck, check_log

from .cluster import Cluster
from .guest import Guest
from .report import Say, Section, quantile, tell
from .watching import Watching, watching

VM = "stamp"
STAMP_MIB = 64
DISKS = {"sda": "shared:256M:qcow2", "sdb": "shared:256M:raw"}
RECORDS_PER_S = 50
WRITE_MB_S = 4
QUIET_TLB = "mitigations=off"
"""Without it the guest's kernel empties the soft TLB at each interrupt, which hides what an old
QEMU forgets to do to it."""
P95_MS = 150.0


def words(write_mb_s: int) -> str:
    """What the guest's kernel is told."""
    return f"{QUIET_TLB} godwit.stamp={STAMP_MIB}:{write_mb_s} godwit.clock=1"


def counters(stats: dict[str, Any]) -> dict[str, float]:
    """What can only rise while a guest lives. The log is left out: it changes its disk."""
    stamp, clock = stats["stamp"], stats["clock"]
    return {
        "uptime_s": stats["uptime_s"],
        "pages_written": stamp["writes"],
        "pages_checked": stamp["checked"],
        "clock_samples": clock["samples"],
        "echoed": stats["echo"]["packets"],
    }


def read_pages(guest: Guest, *, timeout: float = 60.0) -> tuple[int, dict[str, float]]:
    """Every page read now: how many are bad, and what of the guest can only rise."""
    said = guest.ask("check", timeout=timeout, each=timeout / 2)
    return said["found"], counters(guest.stats()) | {"stamps": said["stamps"]}


def fallen(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much each counter that fell did."""
    return {key: before[key] - after[key] for key in before if after[key] < before[key]}


def make(cluster: Cluster, vm: str = VM, *, log: bool = True) -> Guest:
    """A guest that stamps memory and samples its clocks, with a disk of each format."""
    return cluster.make(
        vm,
        host="host1",
        append=words(WRITE_MB_S),
        disks=list(DISKS.values()) if log else [],
    )


def run(cluster: Cluster, *, live: int = 50, quick: int = 4, say: Say = tell) -> Section:
    """So many moves of each method; at half of the live ones the log goes to the other disk."""
    cluster.heal()
    guest = make(cluster)
    section = Section("stamp")
    moves: list[dict[str, Any]] = []
    logs: dict[str, dict[str, Any]] = {}
    with watching(cluster.netns, guest.address) as probe:
        _log_to(guest, "sda")
        for number in range(live + quick):
            if number == max(1, live // 2):
                logs["sda"] = _log_end(guest)
                _log_to(guest, "sdb")
            moves.append(_move(cluster, guest, "live" if number < live else "quick"))
            say(f"stamp {number + 1}/{live + quick}: {_line(moves[-1])}")
        logs["sdb"] = _log_end(guest)
        found, _ = read_pages(guest)
    stats = guest.stats()
    checks = _offline(cluster, logs)
    section.figures = {
        "moves": _with_probe(moves, probe),
        "guest": stats,
        "last_check_found": found,
        "logs": {"guest": logs, "offline": {kind: asdict(c) for kind, c in checks.items()}},
    }
    _judge(section, moves, stats, checks, found=found)
    return section


def _move(cluster: Cluster, guest: Guest, method: str) -> dict[str, Any]:
    source = str(cluster.owner(VM).host)
    _, before = read_pages(guest)
    start = time.monotonic_ns()
    move = cluster.move(VM, cluster.other(source), method=method)
    time.sleep(0.3)  # the probe's first answers from the other side belong to this move
    end = time.monotonic_ns()
    # Every page is read here, beside the checker's own passes.
    found, after = read_pages(guest)
    return {
        "id": move.id,
        "method": method,
        "outcome": move.state.value,
        "reason": move.reason,
        "total_ms": move.total_ms,
        "blackout_ms": move.blackout_ms,
        "bytes": move.bytes_transferred,
        "bad_found": found,
        "fallen": fallen(before, after),
        "start_ns": start,
        "end_ns": end,
    }


def _line(move: dict[str, Any]) -> str:
    dark = move["blackout_ms"]
    return (
        f"{move['method']} {move['outcome']} in {(move['total_ms'] or 0) / 1e3:.2f} s, dark "
        f"{dark if dark is None else round(dark)} ms, {move['bad_found']} bad pages"
    )


def _with_probe(moves: list[dict[str, Any]], probe: Watching) -> list[dict[str, Any]]:
    for move in moves:
        seen = probe.between(move.pop("start_ns"), move.pop("end_ns"))
        move["probe_ms"], move["probe_stalled_ms"] = seen.blackout_ms, seen.stalled_ms
        move["probe_silence_ms"] = seen.silence_ms
    return moves


def _log_to(guest: Guest, device: str) -> None:
    guest.ask(f"log dev={device} rate={RECORDS_PER_S} fresh=1", timeout=20.0)


def _log_end(guest: Guest) -> dict[str, Any]:
    before = dict(guest.stats()["log"])
    guest.ask("log dev=off", timeout=20.0, each=5.0)
    after = dict(guest.stats()["log"])
    # Whatever the guest counts once it stopped was acknowledged; keep the larger of both.
    return before | {"acknowledged": max(before["acknowledged"], after["acknowledged"])}


def _offline(cluster: Cluster, logs: dict[str, dict[str, Any]]) -> dict[str, LogCheck]:
    """Stop the VM and read its closed images.

    Which of them the guest called sda is its kernel's choice; the log's own id tells.
    """
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    checks: dict[str, LogCheck] = {}
    with tempfile.TemporaryDirectory(prefix="godwit-log-") as folder:
        raws = {}
        for disk in cluster.client.vms.get(VM).disks:
            path = cluster.lab.layout.volume.parent / Path(disk.path).relative_to("/clusterstorage")
            raw = Path(folder) / disk.id
            argv = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", str(path), str(raw)]
            run_program(argv, timeout=60.0)
            raws[disk.format] = raw
        for logged in logs.values():
            found = {kind: _check(raw, logged) for kind, raw in raws.items() if kind not in checks}
            kind = max(found, key=lambda name: found[name].intact)
            checks[kind] = found[kind]
    return checks


def _check(raw: Path, logged: dict[str, Any]) -> LogCheck:
    with raw.open("rb") as stream:
        return check_log(stream, acknowledged=logged["acknowledged"], log_id=logged["log_id"])


def _judge(
    section: Section,
    moves: list[dict[str, Any]],
    stats: dict[str, Any],
    checks: dict[str, LogCheck],
    *,
    found: int,
) -> None:
    failed = [f"{m['id']}: {m['outcome']}, {m['reason']}" for m in moves if not _completed(m)]
    ids = {move["id"] for move in moves}
    section.judge(
        f"{len(moves)} moves, {len(moves)} ids, each completed at the first try",
        not failed and len(ids) == len(moves),
        {"completed": len(moves) - len(failed), "ids": len(ids), "failed": failed},
    )
    stamp = stats["stamp"]
    bad = stamp["bad"] + found + sum(move["bad_found"] for move in moves)
    section.judge(
        f"0 bad pages of {STAMP_MIB} MiB stamped and re-checked",
        bad == 0 and stamp["passes"] >= len(moves) and stamp["rounds"] + stamp["writes"] > 0,
        {"bad": bad, "pages_checked": stamp["checked"], "pages_written": stamp["writes"]},
    )
    fell = {move["id"]: move["fallen"] for move in moves if move["fallen"]}
    section.judge("no counter of the guest fell, as kept outside", not fell, fell or "none")
    for kind, check in checks.items():
        section.judge(
            f"0 lost acknowledged records on the {kind} disk, read from the closed image",
            check.good and check.acknowledged > 0,
            asdict(check),
        )
    clock = stats["clock"]
    steps = clock["realtime"]["back_steps"] + clock["monotonic"]["back_steps"]
    section.judge("0 clock regressions", steps == 0 and clock["samples"] > 0, clock)
    dark = [move["probe_ms"] for move in moves if move["method"] == "live"]
    p95 = quantile(dark, 0.95)
    section.judge(
        f"blackout as the probe saw it, p95 at most {P95_MS:g} ms",
        p95 is not None and p95 <= P95_MS,
        {"p50_ms": quantile(dark, 0.5), "p95_ms": p95, "max_ms": max(dark, default=None)},
        timing=True,
    )


def _completed(move: dict[str, Any]) -> bool:
    return bool(move["outcome"] == "completed")


def finish(cluster: Cluster) -> None:
    """Forget the guest."""
    cluster.remove(VM)
