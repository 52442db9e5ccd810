"""Godwit's moves beside bare QMP and virsh, interleaved round by round on one lab link.

    (a) godwit      `godwit vm migrate -o json`, with all it does: plan, TLS, ownership, report
    (b) floor       `floor.move`: QEMU and QMP alone, its best fixed downtime limit of 5 to 50 ms,
                    the destination spawned inside its span; once without TLS and once with
    (c) virsh       `virsh migrate --live --p2p` between two libvirtd, when libvirt is installed

Scenarios: an idle guest of 256 MiB; a guest of 1 GiB that writes 16 MB/s; one that writes at twice
the link's speed. Everything printed is measured in the run. Run it with `scripts/bench`.

Exit codes: 0 all promises kept, 1 one is not, or the floor is too slow for a fair comparison,
2 usage, 4 this machine cannot run it. Whatever ends it, nothing is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import facts
import floor
import idle
import plot
import report
import virsh
from ground import Ground, raised
from measure import Machine, Peer, Row, measured
from peers import VIRSH, VIRSH_APART, Floor, Godwit, Virsh, choose_limit

from godwit.model.errors import GodwitError

SCENARIOS = ("cost", "idle", "busy", "hot")
RATE = "1gbit"
IDLE_MIB, BUSY_MIB = 256, 1024
BUSY_WRITES = (16, 256)
"""MB/s, and MiB of the guest's memory that they go round."""
HOT_FACTOR, HOT_MIB = 2, 512
BUDGET_MS = 300
VIRSH_FORCED_AT_S = 45
HOT_TIMEOUT_S = 300.0
IDLE_VMS, COST_S = 4, 20.0
ADDRESSES = {
    "godwit": "10.91.0.101",
    "floor": "10.91.0.102",
    "floor, TLS": "10.91.0.103",
    VIRSH: "10.91.0.104",
    VIRSH_APART: "10.91.0.105",
}
AGAINST = {"hot": ("godwit --allow-postcopy", "godwit --allow-throttle")}
"""Which cases of a scenario are held against the other peers'; else the one named godwit."""
_FULL = Path("docs/proof/bench-A.json")
_QUICK = Path("build/bench-quick.json")


class Bench:
    """One run: its peers, its rows, and what came of each scenario."""

    def __init__(self, ground: Ground, options: argparse.Namespace) -> None:
        self._ground = ground
        self._options = options
        self._stack = contextlib.ExitStack()
        self._floors: list[Floor] = []
        self._virsh: list[Virsh] = []
        self.godwit = Godwit(ground, ADDRESSES["godwit"])
        self.machine: Machine | None = None
        self.rows: dict[str, list[Row]] = {}
        self.sweeps: dict[str, Any] = {}
        self.cost: idle.Cost | None = None
        self.memory: dict[str, dict[str, int]] = {}
        self.listing: dict[str, Any] | None = None
        self.broken = ""
        """What ended the run early; what was measured before it still counts."""

    def run(self) -> None:
        """All chosen scenarios."""
        chosen = self._options.only
        if "cost" in chosen:
            say(f"agent and guard with no VM and with {IDLE_VMS} idle ones")
            self.cost = idle.cost(self._ground, vms=IDLE_VMS, seconds=self._options.cost_seconds)
        # The first guest shows what machine Godwit makes; every peer makes the same.
        self.godwit.boot(IDLE_MIB)
        self.machine = self.godwit.machine(IDLE_MIB)
        if set(chosen) & {"idle", "busy", "hot"}:
            self._prepare(self.machine)
        if "idle" in chosen:
            say(f"an idle guest of {IDLE_MIB} MiB, {self._options.rounds} rounds")
            self._boot_all(IDLE_MIB)
            self._sweep("idle", rounds=self._options.sweep_rounds)
            self._rounds("idle", self._options.rounds)
            self.listing = idle.listing(self._ground)
        if "busy" in chosen:
            rounds = self._options.busy_rounds
            rate, _ = BUSY_WRITES
            say(f"a guest of {BUSY_MIB} MiB that writes {rate} MB/s, {rounds} rounds")
            self._boot_all(BUSY_MIB)
            self._sweep("busy", rounds=1, writes=BUSY_WRITES)
            self._rounds("busy", rounds, writes=BUSY_WRITES)
        if "hot" in chosen:
            self._hot()
        if self.rows:
            self.memory = idle.memory(self._ground)

    def close(self) -> None:
        """End all guests and libvirtds; the lab goes after them."""
        self._stack.close()

    def _prepare(self, machine: Machine) -> None:
        for tls in (False, True):
            name = "floor, TLS" if tls else "floor"
            peer = Floor(self._ground, ADDRESSES[name], machine, tls=tls)
            self._stack.callback(peer.end)
            self._floors.append(peer)
        lacks = virsh.missing()
        if lacks or self._options.no_virsh:
            say(f"without virsh: {lacks or '--no-virsh'}")
            return
        for groups in (True, False):
            address = ADDRESSES[VIRSH if groups else VIRSH_APART]
            try:
                pair = Virsh(self._ground, address, machine, groups=groups)
            except virsh.VirshError as error:
                say(f"without virsh ({'as it comes' if groups else 'groups apart'}): {error}")
                continue
            self._stack.callback(pair.stop)
            self._virsh.append(pair)
            say(f"two libvirtd are up ({pair.name}): {pair.pair.version()}")

    def _peers(self) -> list[Peer]:
        return [self.godwit, *self._floors, *self._virsh]

    def _boot_all(self, memory_mib: int) -> None:
        for peer in self._peers():
            peer.boot(memory_mib)
        time.sleep(2.0)  # guests are done with booting before anything is measured

    def _sweep(self, scenario: str, *, rounds: int, writes: tuple[int, int] | None = None) -> None:
        for peer in self._floors:
            limit, results = choose_limit(self._ground, peer, rounds=rounds, writes=writes)
            self.sweeps[f"{scenario}: {peer.name}"] = {
                "best_limit_ms": limit,
                "moves": {name: [_short(m) for m in moves] for name, moves in results.items()},
            }
            say(f"{peer.name}: the best of {len(results)} fixed limits is {limit} ms")

    def _rounds(self, scenario: str, rounds: int, writes: tuple[int, int] | None = None) -> None:
        rows = self.rows.setdefault(scenario, [])
        for number in range(rounds):
            peers = self._peers()
            first = number % len(peers)
            for peer in peers[first:] + peers[:first]:
                row = measured(self._ground, peer, number=number, writes=writes)
                rows.append(row)
                say(f"{number + 1:>3}  {told(row)}")

    def _hot(self) -> None:
        rate = HOT_FACTOR * self._ground.link_bits // 8_000_000
        say(f"a guest of {BUSY_MIB} MiB that writes {rate} MB/s, faster than the link")
        budget = ("--max-blackout", f"{BUDGET_MS}ms")
        plans: list[tuple[Peer, str, tuple[str, ...]]] = [
            (self.godwit, "godwit", budget),
            (self.godwit, "godwit --allow-postcopy", (*budget, "--allow-postcopy")),
            (self.godwit, "godwit --allow-throttle", (*budget, "--allow-throttle")),
        ]
        if self._virsh:
            forced = ("--timeout", str(VIRSH_FORCED_AT_S), "--timeout-suspend")
            postcopy = ("--postcopy", "--postcopy-after-precopy")
            plans.append((self._virsh[0], f"virsh, forced at {VIRSH_FORCED_AT_S} s", forced))
            plans.append((self._virsh[0], "virsh --postcopy", postcopy))
        for other in self._peers()[1:]:
            other.end()
        rows = self.rows.setdefault("hot", [])
        for number in range(self._options.hot_rounds):
            for peer, case, options in plans:
                peer.boot(BUSY_MIB)
                row = measured(
                    self._ground, peer, case=case, number=number, options=options,
                    writes=(rate, HOT_MIB), timeout=HOT_TIMEOUT_S,
                )  # fmt: skip
                rows.append(row)
                say(f"{number + 1:>3}  {told(row)}")

    # What came of it

    def criteria(self) -> list[report.Criterion]:
        """Every promise this run can say something about."""
        quiet = self.rows.get("idle", [])
        everything = [row for rows in self.rows.values() for row in rows]
        found: list[report.Criterion] = []
        if self.broken:
            found.append(report.Criterion("the run came to its end", False, self.broken, {}))
        if quiet:
            found += [report.fairness(quiet), *report.idle_promises(quiet)]
        if everything:
            found.append(report.other_networks(everything))
        found += report.cost_promises(self.cost, self.memory, self.listing)
        return found + report.hot_promises(
            self.rows.get("hot", []), budget_ms=BUDGET_MS, link_mb_s=self._ground.link_bits / 8e6
        )

    def panels(self) -> list[plot.Panel]:
        """Total and blackout of each scenario."""
        found = []
        for scenario, rows in self.rows.items():
            for title, unit, figure in (
                ("total time", "s", report.total_s), ("blackout seen by the probe", "ms",
                                                      report.blackout_ms),
            ):  # fmt: skip
                strips = tuple(
                    (case, tuple(v for row in report.of(rows, case)
                                 if (v := figure(row)) is not None))
                    for case in report.cases(rows)
                )  # fmt: skip
                found.append(plot.Panel(f"{scenario}: {title}", unit, strips))
        return found


def told(row: Row) -> str:
    """A move in one line."""
    own = row.trip.reported_blackout_ms
    writes = ""
    if row.writes_mb_s is not None and row.wrote_mb_s is not None:
        writes = f", writing {row.writes_mb_s:.0f}, meanwhile {row.wrote_mb_s:.0f} MB/s"
    end = "" if row.trip.outcome == "completed" else f"; {row.trip.outcome}: {row.trip.reason}"
    return (
        f"{row.case:26} {row.trip.total_s:6.2f} s  dark {row.blackout_ms:6.1f} ms"
        f" (said {'-' if own is None else f'{own:.0f}'})"
        f"  {row.network_bytes['mig'] / 1e6:6.1f} MB{writes}{end}"
    )


def _short(move: floor.Move) -> dict[str, float]:
    return {"total_s": move.total, "blackout_ms": move.blackout * 1e3}


def say(line: str) -> None:
    """Progress goes to standard error: standard output has the result."""
    print(line, file=sys.stderr, flush=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=(__doc__ or "").partition("\n")[0],
        epilog="Exit codes: 0 all promises kept, 1 one is not or the floor is unfair, 2 usage, "
        "4 this machine cannot.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="of the idle guest (15)")
    parser.add_argument("--busy-rounds", type=int, help="of the guest that writes 16 MB/s (5)")
    parser.add_argument("--hot-rounds", type=int, help="of the guest faster than the link (1)")
    parser.add_argument("--sweep-rounds", type=int, help="to choose the floor's limit (3)")
    parser.add_argument("--quick", action="store_true", help="a few rounds: to see that it works")
    parser.add_argument("--only", default=",".join(SCENARIOS), metavar="A,B",
                        help=f"scenarios, of {', '.join(SCENARIOS)}")  # fmt: skip
    parser.add_argument("--no-virsh", action="store_true", help="leave virsh out")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help=f"the figures as JSON, a plot beside it ({_FULL}; quick: {_QUICK})"
                        )  # fmt: skip
    given = parser.parse_args(argv)
    given.only = [name for name in given.only.split(",") if name]
    if unknown := set(given.only) - set(SCENARIOS):
        parser.error(f"unknown scenario: {', '.join(sorted(unknown))}")
    quick = given.quick
    for name, full, few in (
        ("rounds", 15, 3), ("busy_rounds", 5, 1), ("hot_rounds", 1, 1), ("sweep_rounds", 3, 1),
    ):  # fmt: skip
        value = getattr(given, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: at least 1")
        setattr(given, name, value or (few if quick else full))
    given.cost_seconds = COST_S
    given.output = given.output or (_QUICK if quick else _FULL)
    return given


@contextlib.contextmanager
def undisturbed_end() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run once; taking things away is then not disturbed."""

    def end(number: int, _frame: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, end)
    try:
        yield
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code."""
    options = arguments(argv)
    load = os.getloadavg()
    if load[0] > 0.5:
        say(f"the load of this machine is {load[0]:.1f}: figures of a busy machine mean little")
    try:
        with raised(say, rate=RATE) as ground:
            bench = Bench(ground, options)
            with contextlib.closing(bench), undisturbed_end():
                run_or_note(bench)
    except GodwitError as error:
        say(f"{error.message}\n{error.hint}")
        return 4 if error.code == "refused" else 1
    return publish(bench, options, load)


def run_or_note(bench: Bench) -> None:
    """Run it; a failure in the middle does not throw away what was measured before."""
    try:
        bench.run()
    except Exception as error:
        traceback.print_exc()
        bench.broken = f"{type(error).__name__}: {error}"


def publish(bench: Bench, options: argparse.Namespace, load: tuple[float, float, float]) -> int:
    """Print and write what came of the run; the exit code."""
    lines: list[str] = []
    against: dict[str, Any] = {}
    for scenario, rows in bench.rows.items():
        ours = AGAINST.get(scenario, ("godwit",))
        pairs, against[scenario] = report.comparison(rows, ours)
        within = [line for case in ours for line in report.stages(rows, case)]
        lines += [f"\n{scenario}", *report.table(rows), *pairs, *within]
    criteria = bench.criteria()
    lines += ["\npromises", *(criterion.line() for criterion in criteria)]
    print("\n".join(lines))
    document = {
        "commit": facts.commit(),
        "machine": facts.machine(bench.machine) if bench.machine else {},
        "load": {"before": load, "after": os.getloadavg()},
        "options": {key: str(value) for key, value in vars(options).items()},
        "link": RATE,
        "criteria": [asdict(criterion) for criterion in criteria],
        "against": against,
        "sweeps": bench.sweeps,
        "moves": {name: [asdict(row) for row in rows] for name, rows in bench.rows.items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    picture = options.output.with_suffix(".svg")
    picture.write_text(plot.svg("Live migration of a VM", bench.panels()))
    say(f"figures: {options.output}, plot: {picture}")
    return 0 if all(criterion.ok is not False for criterion in criteria) else 1


if __name__ == "__main__":
    sys.exit(main())
