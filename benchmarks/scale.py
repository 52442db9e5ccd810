"""One manager and many simulated hosts: listings, watch fan-out, decisions, memory, store.

    .venv/bin/python benchmarks/scale.py [--quick] [--hosts 1000 --vms 20000]

The manager and the store are the real daemons, each its own process, over TLS; the embedded store
and etcd take their turns in one run. The records are those that the daemons write, the hosts renew
as guards and agents do (`scale_hosts.py`). There is no QEMU behind it and no agent's own work.

Prints what each thing takes and costs, and writes docs/proof/bench-scale.json (a quick run:
build/bench-scale-quick.json). Needs no root and no lab; etcd is the distribution's package.
Exit codes: 0 done, 1 a listing takes a second or longer, 4 something is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import facts
import scale_figures as figures
from measure import Machine
from scale_parts import (
    STORES,
    NotThere,
    Place,
    RunningStore,
    fill,
    hosts,
    manager,
    store,
    usage,
)
from scale_records import Cluster, qemu_facts

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 1.0
NO_GUEST = Machine(machine="none", cpu="none", accel="none", memory_mib=0)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(kind: str, place: Place, cluster: Cluster, given: argparse.Namespace) -> dict[str, Any]:
    """Everything, on one kind of store."""
    records = list(cluster.records())
    with store(kind, place) as running:
        say(f"{kind}: {running.version}; writing {len(records)} records")
        found: dict[str, Any] = {"version": running.version}
        found["fill_s"] = asyncio.run(fill(place, running.endpoint, records))
        found["store_after_fill"] = vars(usage(running.pid))
        say(f"{kind}: the hosts appear")
        with hosts(place, running.endpoint, cluster.boot_ids, slow=given.slow) as alive:
            found |= _with_manager(place, cluster, running, alive, given)
    return found


def _with_manager(
    place: Place,
    cluster: Cluster,
    running: RunningStore,
    alive: Any,
    given: argparse.Namespace,
) -> dict[str, Any]:
    kind, found = running.kind, {}
    with manager(place, running) as serving:
        found["load"] = {
            "seconds": serving.ready_s,
            "cpu_s": serving.started.cpu_s,
            "resident_bytes": serving.started.resident_bytes,
        }
        say(f"{kind}: the manager answers after {serving.ready_s:.1f} s; at rest")
        found["rest"] = figures.rest(running, serving, alive, given.seconds)
        say(f"{kind}: listings")
        found["listings"] = asyncio.run(figures.listings(place, serving, given.rounds))
        found["commands"] = figures.commands(place, serving, given.rounds)
        found["followers"] = []
        for count in given.followers:
            say(f"{kind}: {count} followers")
            row = figures.followers(place, running, serving, count=count, events=given.events)
            found["followers"].append(asyncio.run(row))
        say(f"{kind}: store operations, decisions")
        found["store"] = asyncio.run(
            figures.operations(place, running, rounds=given.operations, writers=16)
        )
        found["after"] = {
            "manager": vars(usage(serving.pid)),
            "store": vars(usage(running.pid)),
        }
    cache, found["cache"] = asyncio.run(figures.read_all(place, running))
    assert len(cache.snapshot.vms) == len(cluster.vms)
    found["decisions"] = figures.decisions(cache, rounds=given.rounds)
    return found


# Printing


def table(rows: list[tuple[str, list[str]]]) -> None:
    wide = max(len(name) for name, _ in rows)
    for name, cells in rows:
        print(f"  {name.ljust(wide)}" + "".join(cell.rjust(22) for cell in cells))


def mib(count: float) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def ms(one: dict[str, Any]) -> str:
    if not one["n"]:
        return "-"
    return f"{1e3 * one['p50']:.1f} / {1e3 * one['p99']:.1f} ms"


def show(result: dict[str, Any]) -> None:
    """Everything side by side, a column for each store."""
    stores = result["stores"]
    print(f"\n{result['hosts']} hosts, {result['vms']} VMs; p50 / p99 where two figures stand")
    if result["slow"] != 1:
        print(f"the hosts renew {result['slow']:g} times slower than they should")
    table([("", list(stores))])

    def row(name: str, tell: Any) -> None:
        table([(name.ljust(34), [tell(one) for one in stores.values()])])

    row("writing all records", lambda s: f"{s['fill_s']:.1f} s")
    row("manager: until it answers", lambda s: f"{s['load']['seconds']:.1f} s")
    row("  processor time of that", lambda s: f"{s['load']['cpu_s']:.1f} s")
    row("  resident then", lambda s: mib(s["load"]["resident_bytes"]))
    for who in ("manager", "store", "hosts"):
        row(f"at rest: {who}, of a core", lambda s, w=who: f"{100 * s['rest']['cores'][w]:.1f} %")
        row("  resident", lambda s, w=who: mib(s["rest"]["resident_bytes"][w]))
    row("renewals", lambda s: f"{s['rest']['renewals_per_s']:.0f} /s")
    row("  from sending to the answer", lambda s: ms(s["rest"]["renewal_s"]))
    row(
        "  failed, leases lost",
        lambda s: f"{s['rest']['renewals_failed']}, {s['rest']['leases_lost']}",
    )
    for name in figures.LISTINGS:
        row(
            f"GET {name}",
            lambda s, n=name: (
                f"{s['listings'][n]['first_s']:.2f} / {s['listings'][n]['again_s']['p50']:.3f} s"
            ),
        )
    for words in figures.COMMANDS:
        name = " ".join(words)
        row(f"godwit {name}", lambda s, n=name: f"{s['commands'][n]['seconds']['p50']:.2f} s")
    for index, one in enumerate(result["followers"]):
        row(f"event to {one} followers", lambda s, i=index: ms(s["followers"][i]["latency_s"]))
        row("  to a watch of the store", lambda s, i=index: ms(s["followers"][i]["store_watch_s"]))
        row(
            "  manager, of a core",
            lambda s, i=index: f"{100 * s['followers'][i]['manager_cores']:.0f} %",
        )
    row("compare-and-swap", lambda s: ms(s["store"]["swap_s"]))
    row("read", lambda s: ms(s["store"]["read_s"]))
    row("16 writers", lambda s: f"{s['store']['writes_per_s']:.0f} /s")
    row("reading all into memory", lambda s: f"{s['cache']['seconds']:.1f} s")
    one = next(iter(stores.values()))["decisions"]
    for name, value in one.items():
        if "p50" in value:
            row(f"decision: {name}", lambda s, n=name: ms(s["decisions"][n]))
    for index, value in enumerate(one["failover"]):
        row(
            f"failover, {value['lost']} hosts lost: {value['swaps']} VMs",
            lambda s, i=index: (
                f"{1e3 * s['decisions']['failover'][i]['listen_s']:.0f}"
                f" + {1e3 * s['decisions']['failover'][i]['decide_s']:.0f} ms"
            ),
        )
    row(
        "decision: placement of every vm",
        lambda s: f"{s['decisions']['placement of every vm']['seconds_for_all']:.1f} s",
    )


def slow(result: dict[str, Any]) -> list[str]:
    """The listings that take a second or longer, each with its store."""
    found = []
    for kind, one in result["stores"].items():
        for name, row in one["listings"].items():
            if row["again_s"]["p50"] >= LIMIT_S:
                found.append(f"{kind}: GET {name}: {row['again_s']['p50']:.2f} s")
        for name, row in one["commands"].items():
            if name in ("vm list", "host list") and row["seconds"]["p50"] >= LIMIT_S:
                found.append(f"{kind}: godwit {name}: {row['seconds']['p50']:.2f} s")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=0)
    parser.add_argument("--vms", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 hosts, 2,000 VMs, few rounds")
    parser.add_argument("--stores", default=",".join(STORES), help="embedded,etcd")
    parser.add_argument("--followers", default="1,10,100")
    parser.add_argument("--seconds", type=float, default=0, help="how long to look at the rest")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument(
        "--slow",
        type=float,
        default=1,
        help="hosts renew so many times slower, with leases as much longer: for a busy machine",
    )
    parser.add_argument("--directory", type=Path, help="where the stores lie (default: temporary)")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.stores = [kind for kind in given.stores.split(",") if kind]
    if unknown := set(given.stores) - set(STORES):
        parser.error(f"no such store: {', '.join(sorted(unknown))}")
    given.followers = [int(count) for count in given.followers.split(",")]
    given.hosts = given.hosts or (100 if given.quick else 1000)
    given.vms = given.vms or 20 * given.hosts
    given.seconds = given.seconds or (6 if given.quick else 30)
    given.rounds = given.rounds or (3 if given.quick else 7)
    given.events = 40 if given.quick else 200
    given.operations = 200 if given.quick else 1000
    name = "build/bench-scale-quick.json" if given.quick else "docs/proof/bench-scale.json"
    given.output = given.output or ROOT / name
    return given


def main() -> int:
    given = arguments()
    # Told to end, everything that was started ends, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * given.hosts + 1000
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    root = Path(tempfile.mkdtemp(prefix="godwit-scale-", dir=given.directory))
    result: dict[str, Any] = {
        "commit": facts.commit(),
        "machine": facts.machine(NO_GUEST),
        "load": {"before": os.getloadavg()},
        "hosts": given.hosts,
        "vms": given.vms,
        "followers": given.followers,
        "slow": given.slow,
        "stores": {},
    }
    try:
        say(f"certificates of {given.hosts} hosts")
        place = Place(root, given.hosts)
        qemu = qemu_facts(ROOT / "build" / "scale")
        cluster = Cluster.of(given.hosts, given.vms, qemu=qemu, urls=place.urls)
        for kind in given.stores:
            result["stores"][kind] = measure(kind, place, cluster, given)
    except NotThere as error:
        say(str(error))
        return 4
    finally:
        shutil.rmtree(root, ignore_errors=True)
    result["load"]["after"] = os.getloadavg()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    for line in slow(result):
        print(f"  LATE  {line}")
    say(f"raw figures: {given.output}")
    return 1 if slow(result) else 0


if __name__ == "__main__":
    sys.exit(main())
