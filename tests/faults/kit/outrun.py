"""A guest that writes at twice the link's speed: refused in time, or moved by what was allowed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from godwit.lab import fault
from godwit.model.migration import Migration

from .cluster import Cluster
from .guest import Guest
from .report import Say, Section, tell
from .watching import watching

VM = "busy"
RATE = "200mbit"
DIRTY_MB_S = 50
DIRTY_MIB = 96
BUDGET_MS = 300.0
STALL_S = 60.0
UNHARMED_MS = 100.0
CUT_S = 5.0


EVERY = ("default", "allow_throttle", "allow_postcopy", "cut_in_postcopy")


def run(*, only: Sequence[str] = EVERY, say: Say = tell) -> Section:
    """On a lab of its own with a slow link."""
    cluster = Cluster.up("outrun", rate=RATE)
    section = Section("outrun")
    try:
        guest = cluster.make(
            VM, host="host1", append=f"godwit.stamp=16:1 godwit.dirty={DIRTY_MB_S}:{DIRTY_MIB}"
        )
        time.sleep(3.0)  # its own figure is a mean over a second
        section.figures["achieved_mb_s"] = guest.stats()["dirty"]["achieved_mb_s"]
        section.judge(
            "the guest writes at least at 1.5 times the link's speed",
            section.figures["achieved_mb_s"] >= 1.5 * 25,
            section.figures["achieved_mb_s"],
        )
        for name in only:
            if name == "default":
                default(cluster, guest, section, say)
            elif name == "cut_in_postcopy":
                cut_in_postcopy(cluster, guest, section, say)
            else:
                allowed(cluster, guest, section, say, name)
    finally:
        cluster.close()
    return section


def _watched(cluster: Cluster, guest: Guest, **fields: Any) -> tuple[Migration, dict[str, Any]]:
    source = str(cluster.owner(VM).host)
    with watching(cluster.netns, guest.address) as probe:
        move = cluster.move(VM, cluster.other(source), timeout=200.0, **fields)
    figures = {
        "outcome": move.state.value,
        "reason": move.reason,
        "strategy": move.strategy,
        "total_ms": move.total_ms,
        "blackout_ms": move.blackout_ms,
        "probe_ms": probe.report.blackout_ms,
        "probe_silence_ms": probe.report.silence_ms,
        "probe_lost": probe.report.lost,
        "probe_windows": [(w.start_s, w.duration_ms) for w in probe.report.windows],
        "stages": [(s.name.value, s.start_s, s.duration_ms) for s in move.stages],
        "passes": [(p.number, p.bytes, p.duration_ms) for p in move.passes],
        "stalled_s": _stalled(move),
        "log": list(move.log),
        "owner": cluster.owner(VM).host,
        "from": source,
        "bad_pages": guest.ask("check", timeout=60.0, each=20.0)["found"],
    }
    return move, figures


def _stalled(move: Migration) -> float | None:
    """Seconds from the end of the first pass, when it could first be seen, to the end."""
    precopy = next((stage for stage in move.stages if stage.name.value == "precopy"), None)
    if precopy is None or not move.passes or move.ended_at is None:
        return None
    first = precopy.start_s + move.passes[0].duration_ms / 1000
    return round(move.ended_at - move.accepted_at - first, 2)


def default(cluster: Cluster, guest: Guest, section: Section, say: Say) -> None:
    """Nothing allowed: a clear refusal, the VM unharmed."""
    _, found = _watched(cluster, guest)
    section.figures["default"] = found
    say(f"outrun, default: {found['outcome']} after {found['stalled_s']} s: {found['reason']}")
    section.judge(
        f"default settings: a clear refusal within {STALL_S:g} s of stalling, with what would help",
        found["outcome"] == "failed"
        and "--allow-" in found["reason"]
        and (found["stalled_s"] or STALL_S + 1) <= STALL_S,
        {k: found[k] for k in ("outcome", "reason", "stalled_s")},
    )
    section.judge(
        "default settings: the VM is unharmed",
        found["owner"] == found["from"] and found["bad_pages"] == 0,
        {k: found[k] for k in ("owner", "bad_pages")},
    )
    section.judge(
        f"default settings: the guest was never dark for {UNHARMED_MS:g} ms",
        found["probe_ms"] <= UNHARMED_MS,
        {k: found[k] for k in ("probe_ms", "probe_silence_ms")},
        timing=True,
    )


def allowed(cluster: Cluster, guest: Guest, section: Section, say: Say, word: str) -> None:
    """With one means allowed it moves, within the budget."""
    _, found = _watched(cluster, guest, **{word: True}, max_blackout_ms=BUDGET_MS)
    section.figures[word] = found
    option = "--" + word.replace("_", "-")
    say(f"outrun, {option}: {found['outcome']}, dark {found['blackout_ms']} ms: {found['reason']}")
    dark = found["blackout_ms"]
    section.judge(
        f"{option}: it moves within {BUDGET_MS:g} ms of blackout",
        found["outcome"] == "completed"
        and found["owner"] != found["from"]
        and dark is not None
        and dark <= BUDGET_MS
        and found["bad_pages"] == 0,
        {k: found[k] for k in ("outcome", "reason", "blackout_ms", "probe_ms", "total_ms")},
    )


def cut_in_postcopy(cluster: Cluster, guest: Guest, section: Section, say: Say) -> None:
    """While pages are still fetched the network goes away for seconds: it is recovered."""
    source = str(cluster.owner(VM).host)
    destination = cluster.other(source)
    cluster.hold(source, "running", "source")
    migration = cluster.begin(VM, destination, allow_postcopy=True)
    cluster.await_held(source, "running", "source", timeout=120.0)
    phase = cluster.owner(VM).migration
    fault.cut_network(cluster.lab, destination, "mig")
    cluster.release(source)
    time.sleep(CUT_S)
    fault.restore_network(cluster.lab, destination, "mig")
    move = cluster.await_end(migration, timeout=120.0)
    alive = guest.alive(timeout=20.0)
    found = {
        "phase_at_cut": phase.phase.value if phase else None,
        "outcome": move.state.value if move else "no record",
        "reason": move.reason if move else "",
        "log": list(move.log) if move else [],
        "alive": alive,
        "bad_pages": guest.ask("check", timeout=60.0, each=20.0)["found"] if alive else None,
        "total_ms": move.total_ms if move else None,
    }
    section.figures["cut_in_postcopy"] = found
    say(f"outrun, cut in mid post-copy: {found['outcome']}: {found['reason']}")
    section.judge(
        f"the migration network cut for {CUT_S:g} s in mid post-copy: it recovers",
        found["phase_at_cut"] == "page-source"
        and found["outcome"] == "completed"
        and found["bad_pages"] == 0,
        {k: found[k] for k in ("phase_at_cut", "outcome", "reason", "alive", "bad_pages")},
    )
