"""Runs the full counts of an issue's proof and writes raw figures; called by ``scripts/prove``.

Each section is a part of its own with a lab of its own; what a section found is written at once, so
that ``--only`` can repeat one of them and keep the others, as long as the commit is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.kit import (
    adoption,
    along,
    brokers,
    busy,
    cancels,
    checkpoints,
    clones,
    coldstart,
    deadline,
    debian,
    decisions,
    diskmoves,
    drains,
    etcd_members,
    everyday,
    eviction,
    failover,
    formats,
    full,
    growth,
    handover,
    hotdisks,
    lent,
    many,
    matrix,
    membership,
    mutation,
    old,
    outages,
    outrun,
    rbd,
    redirect,
    refusals,
    served,
    skew,
    stamping,
    starts,
    uefi,
    validation,
)
from tests.faults.kit.cells import VM
from tests.faults.kit.cluster import Cluster
from tests.faults.kit.report import Section, tell
from tests.system.qemu.old_qemu import NoOldQemu, old_qemu

from godwit.host.facts import memory_facts
from godwit.lab.layout import StorageKind, StoreKind

REPOSITORY = Path(__file__).resolve().parents[2]
PROOFS = REPOSITORY / "docs" / "proof"
BENCH_S = 1500.0
CANCELS = 5
BUSY_MOVES = 10
MOVES, QUICK_MOVES = 50, 4
FORMAT_MOVES = 20
BROKER_REPEATS = 5
CLONE_MOVES = 3
CHECKPOINT_ROUNDS = 3
REDIRECTS = 3
CUTS, HANGS = 12, 5
ROUNDS = 5
POWER_LOSSES = 7
EVICTIONS: tuple[eviction.Loss, ...] = ("isolated", "power") * 5
FAILOVER_HOSTS, LOSSES = 4, 20
ADOPTIONS, STARTS_ANEW = 5, 2
DRAIN_HOSTS, DRAIN_VMS = 4, 12
FEW_CELLS = (*handover.sample(1), *handover.sample(2))
DIRECT_CELLS = tuple(c for n in (1, 2, 3) for c in handover.sample(n, brokers=False))
LENT_CELLS = (*lent.lender_cells(), *FEW_CELLS, *handover.sample(3), *handover.sample(4))


@contextmanager
def _lab(
    section: Section,
    *,
    storage: StorageKind = "dir",
    image_locks: bool = True,
    hosts: int = 2,
    store: StoreKind = "sqlite",
    managers: int = 0,
    watchdog: bool = True,
    agent_source: Path | None = None,
) -> Iterator[Cluster]:
    cluster = Cluster.up(
        "prove",
        hosts=hosts,
        storage=storage,
        image_locks=image_locks,
        store=store,
        managers=managers,
        watchdog=watchdog,
        agent_source=agent_source,
    )
    try:
        yield cluster
    finally:
        left = cluster.close()
        section.judge(f"{section.name}: the lab leaves nothing behind", not left, left or "nothing")


def _on_lab(work: Callable[[Cluster], Section], *, storage: StorageKind = "dir") -> Section:
    """A section on a lab of its own."""
    outer = Section("lab")
    with _lab(outer, storage=storage) as cluster:
        section = work(cluster)
    section.criteria += [
        dataclasses.replace(c, text=f"{section.name}: {c.text.partition(': ')[2]}")
        for c in outer.criteria
    ]
    return section


def _everyday(cluster: Cluster) -> Section:
    both = Section("everyday")
    for part in (everyday.adoption, everyday.scripting):
        found = part(cluster)
        both.figures[found.name] = found.figures
        both.criteria += found.criteria
    found = everyday.traffic(cluster, moves=10)
    both.figures[found.name] = found.figures
    both.criteria += found.criteria
    return both


def _checkpoints(cluster: Cluster) -> Section:
    """Disks that QEMU opens, that the broker opens, and one of each."""
    section = Section("checkpoints")
    for tiers in (("direct", "direct"), ("brokered", "brokered"), checkpoints.MIXED):
        part = checkpoints.run(cluster, rounds=CHECKPOINT_ROUNDS, tiers=tiers)
        name = " and ".join(tiers)
        section.figures[name] = part.figures
        section.criteria += [
            dataclasses.replace(c, text=f"{name}: {c.text}") for c in part.criteria
        ]
    return section


def _old() -> Section:
    try:
        return old.run(old_qemu())
    except NoOldQemu as problem:
        section = Section("old-qemu")
        section.judge("QEMU 7.2 can be had", False, str(problem))
        return section


def _bench() -> Section:
    """The comparison with others, by its own script; it judges its own promises."""
    section = Section("bench")
    script = REPOSITORY / "scripts" / "bench"
    if not script.exists():
        section.judge("scripts/bench is there", False, "missing")
        return section
    start = time.monotonic()
    done = subprocess.run([script], cwd=REPOSITORY, capture_output=True, text=True, timeout=BENCH_S)
    section.figures = {
        "exit": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "output": done.stdout.splitlines()[-60:],
        "errors": done.stderr.splitlines()[-20:],
    }
    section.judge("scripts/bench holds its promises", done.returncode == 0, done.returncode)
    return section


def _served() -> Section:
    """NFS images and iSCSI LUNs, each in a lab that serves them, beside raw on a directory."""
    section = Section("served")
    parts: dict[str, Section] = {}
    with _lab(section, storage="iscsi") as cluster:
        parts["iscsi"] = served.luns(cluster, moves=FORMAT_MOVES)
    with _lab(section, storage="nfs") as cluster:
        parts["nfs"] = served.images(cluster, moves=FORMAT_MOVES)
        parts["cut"] = served.cut(cluster)
        cells = handover.run(cluster, FEW_CELLS, setting=handover.SERVED, starts=BROKER_REPEATS)
        parts["on NFS, where openings are not watched"] = cells
    return _joined(section, parts)


def _handover() -> Section:
    """All cells where no image lock helps; some with locks, of QEMU's own disks, and over NBD."""
    section = Section("handover")
    parts: dict[str, Section] = {}
    with _lab(section, image_locks=False) as cluster:
        parts["without image locks"] = handover.run(cluster, setting=handover.UNLOCKED)
        parts["without image locks, the disk opened by QEMU itself"] = handover.run(
            cluster, DIRECT_CELLS, setting=handover.DIRECT, starts=BROKER_REPEATS
        )
        parts["without image locks, over NBD through the other host"] = handover.run(
            cluster, LENT_CELLS, setting=handover.LENT, starts=BROKER_REPEATS
        )
    with _lab(section) as cluster:
        parts["with image locks"] = handover.run(cluster, FEW_CELLS, starts=BROKER_REPEATS)
    return _joined(section, parts)


def _joined(section: Section, parts: dict[str, Section]) -> Section:
    for name, part in parts.items():
        section.figures[name] = part.figures
        section.criteria += [
            dataclasses.replace(c, text=f"{name}: {c.text}") for c in part.criteria
        ]
    return section


def _uefi() -> Section:
    """Variables on a directory, and on a volume that is served to QEMU alone."""
    section = _on_lab(lambda cluster: uefi.run(cluster, every_way=True))
    served_part = _on_lab(uefi.on_nfs, storage="nfs")
    section.criteria += [
        dataclasses.replace(c, text=f"on NFS: {c.text}") for c in served_part.criteria
    ]
    return section


def _redirect() -> Section:
    """A host loses its path: to a directory, an NFS server, a LUN; brokered, and opened by QEMU."""
    section = Section("redirect")
    for storage in ("dir", "nfs", "iscsi"):
        with _lab(section, storage=storage) as cluster:
            parts = [redirect.run(cluster, repeats=REDIRECTS, strikes=1)]
            if storage != "dir":
                parts.append(outages.run(cluster, say=tell))
        for part in parts:
            section.figures[f"{part.name} {storage}"] = part.figures
            section.criteria += [
                dataclasses.replace(c, text=f"{storage}: {c.text}") for c in part.criteria
            ]
    return section


def _failover(
    loss: failover.Loss, rounds: int, *, store_leader: int = 0, manager_leader: int = 0
) -> Section:
    """Hosts are lost, also those of the store's leader and of the leading manager."""
    outer = Section("lab")
    with _lab(outer, hosts=FAILOVER_HOSTS, store="etcd", managers=3) as cluster:
        section = failover.run(
            cluster,
            loss=loss,
            rounds=rounds,
            store_leader=store_leader,
            manager_leader=manager_leader,
        )
    section.criteria += outer.criteria
    return section


def _adoption() -> Section:
    """Sources of moves lose their power in the middle of the hand-over."""
    outer = Section("lab")
    with _lab(outer, hosts=3, store="etcd", managers=3) as cluster:
        section = adoption.run(cluster, rounds=ADOPTIONS, anew=STARTS_ANEW)
    section.criteria += outer.criteria
    return section


def _evicted(storage: StorageKind) -> Section:
    """Hosts are lost for which nothing but their storage server can answer."""
    outer = Section("lab")
    with _lab(outer, hosts=3, storage=storage, watchdog=False) as cluster:
        section = eviction.run(cluster, losses=EVICTIONS)
    section.criteria += outer.criteria
    return section


def _many() -> Section:
    """Sixteen hosts on etcd."""
    outer = Section("lab")
    with _lab(outer, hosts=many.HOSTS, store="etcd", managers=3) as cluster:
        section = many.run(cluster)
    section.criteria += outer.criteria
    return section


def _cold() -> Section:
    """All hosts lose their power."""
    outer = Section("lab")
    with _lab(outer, hosts=3) as cluster:
        section = coldstart.run(cluster)
    section.criteria += outer.criteria
    return section


def _etcd() -> Section:
    """Members of a real three-member store go: under 20 VMs, and with their hosts' power."""
    section = Section("etcd")
    parts: dict[str, Section] = {}
    with _lab(section, hosts=3, store="etcd", managers=3) as cluster:
        parts["20 VMs"] = etcd_members.run(cluster)
        for number in range(1, POWER_LOSSES + 1):
            parts[f"power {number}"] = etcd_members.run(cluster, vms=0, parts=("power",))
    with _lab(section, hosts=2, store="etcd") as cluster:
        parts["2 hosts and a witness"] = etcd_members.run(cluster, vms=0, parts=("member", "power"))
    return _joined(section, parts)


def _store_rates() -> Section:
    """The embedded store and etcd side by side, by their own script."""
    section = Section("store-rates")
    script = REPOSITORY / "benchmarks" / "store_ops.py"
    done = subprocess.run(
        [sys.executable, script, "--json"], capture_output=True, text=True, timeout=BENCH_S
    )
    section.judge("the benchmark of stores ends", done.returncode == 0, done.stderr[-500:])
    if done.returncode == 0:
        section.figures = json.loads(done.stdout)
        rates = {name: found["per_second"] for name, found in section.figures["stores"].items()}
        section.judge(
            "every store answered", all(min(r.values()) > 0 for r in rates.values()), rates
        )
    return section


def _drain() -> Section:
    """Twelve VMs of mixed sizes on one of four hosts."""
    outer = Section("lab")
    with _lab(outer, hosts=DRAIN_HOSTS) as cluster:
        section = drains.run(cluster, vms=DRAIN_VMS)
    section.criteria += outer.criteria
    return section


def _validation() -> Section:
    """Each fault alone on three hosts, an old QEMU among them; two hosts, and a canary."""
    section = Section("validation")
    program: Path | None = None
    try:
        program = old_qemu()
    except NoOldQemu as problem:
        section.judge("QEMU 7.2 is there to be found", False, str(problem))
    with _lab(section, hosts=3) as cluster:
        parts = {"three hosts": validation.each(cluster, program)}
        parts["live"] = validation.live(cluster)
        parts["live failover"] = validation.failover(cluster)
    with _lab(section) as cluster:
        parts["two hosts"] = validation.witness(cluster)
    with _lab(section, store="etcd") as cluster:
        parts["two hosts on etcd"] = validation.on_etcd(cluster)
    return _joined(section, parts)


def _skew() -> Section:
    """Agents and guards of an earlier commit, upgraded one host after the other."""
    section = Section("skew")
    try:
        with skew.old_source() as tree, _lab(section, agent_source=tree) as cluster:
            found = skew.run(cluster)
    except skew.NoHistory as problem:
        section.judge("skew: the earlier commit is there", False, str(problem))
        return section
    return _joined(section, {"run": found})


def _membership() -> Section:
    """A host leaves and joins again, over and over, beside a VM that runs on."""
    section = Section("membership")
    with _lab(section) as cluster:
        cluster.make(VM, host="host1")
        parts = {f"round {number}": membership.run(cluster) for number in range(1, ROUNDS + 1)}
    return _joined(section, parts)


Work = Callable[[], Section]
_A: dict[str, Work] = {
    "matrix": lambda: _on_lab(matrix.run),
    "cancel": lambda: _on_lab(lambda cluster: cancels.run(cluster, repeats=CANCELS)),
    "hung-agent": lambda: _on_lab(lambda cluster: cancels.hung(cluster, repeats=CANCELS)),
    "stamp": lambda: _on_lab(lambda c: stamping.run(c, live=MOVES, quick=QUICK_MOVES)),
    "everyday": lambda: _on_lab(_everyday),
    "refusals": lambda: _on_lab(refusals.run),
    "outrun": outrun.run,
    "old-qemu": _old,
    "bench": _bench,
}
_B: dict[str, Work] = {
    "formats": lambda: _on_lab(lambda cluster: formats.run(cluster, moves=FORMAT_MOVES)),
    "served": _served,
    "rbd": lambda: _on_lab(lambda c: rbd.run(c, moves=FORMAT_MOVES), storage="nfs"),
    "brokers": lambda: _on_lab(lambda cluster: brokers.run(cluster, repeats=BROKER_REPEATS)),
    "hotdisks": lambda: _on_lab(hotdisks.run),
    "handover": _handover,
    "disk-move": lambda: _on_lab(diskmoves.run),
    "growth": lambda: _on_lab(growth.run),
    "full-volume": lambda: full.run(kinds=full.EVERY),
    "starts": lambda: _on_lab(starts.run),
    "uefi": _uefi,
    "debian": lambda: _on_lab(debian.run),
    "checkpoints": lambda: _on_lab(_checkpoints),
    "clones": lambda: _on_lab(lambda cluster: clones.run(cluster, moves=CLONE_MOVES)),
    "shared-nothing": lambda: _on_lab(along.run),
    "redirect": _redirect,
}
_C: dict[str, Work] = {
    "deadline": lambda: _on_lab(lambda c: deadline.run(c, cuts=CUTS, hangs=HANGS)),
    "failover-power": lambda: _failover("power", LOSSES, store_leader=7, manager_leader=5),
    "failover-management": lambda: _failover("management", LOSSES),
    "adoption": _adoption,
    "failover-iscsi": lambda: _evicted("iscsi"),
    "failover-nfs": lambda: _evicted("nfs"),
    "cold-start": _cold,
    "many-hosts": _many,
    "busy-processors": lambda: _on_lab(lambda c: busy.run(c, moves=BUSY_MOVES)),
    "etcd": _etcd,
    "store-rates": _store_rates,
    "drain": _drain,
    "validation": _validation,
    "membership": _membership,
    "skew": _skew,
    "decisions": decisions.run,
    "mutation": mutation.run,
}
ISSUES = {"A": _A, "B": _B, "C": _C}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()


def _facts() -> dict[str, Any]:
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpus": os.cpu_count(),
        "cpu": model[0] if model else platform.machine(),
        "memory_bytes": memory_facts().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.stdout.splitlines()[0] if qemu.stdout else "missing",
        "load_at_start": os.getloadavg()[0],
    }


def _before(proof: Path, issue: str) -> dict[str, Any]:
    """The sections of earlier runs, each with the commit that it is of."""
    try:
        kept = json.loads(proof.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    found = {name: part for name, part in kept["sections"].items() if name in ISSUES[issue]}
    return {name: {"commit": kept["commit"], **part} for name, part in found.items()}


def _write(issue: str, commit: str, facts: dict[str, Any], done: dict[str, Any]) -> None:
    sections = ISSUES[issue]
    proof = {
        "issue": issue,
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts,
        "complete": {part["commit"] for part in done.values()} == {commit}
        and set(done) == set(sections),
        "criteria": [c for name in sections if name in done for c in done[name]["criteria"]],
        "sections": {name: done[name] for name in sections if name in done},
    }
    path = _proof(issue)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(proof, indent=1, default=str) + "\n")
    fresh.replace(path)


def _proof(issue: str) -> Path:
    return PROOFS / f"{issue}.json"


def _carry_out(name: str, work: Work) -> dict[str, Any]:
    """A section to its end; what it stumbles over is a criterion that does not hold."""
    start = time.monotonic()
    tell(f"== {name}")
    try:
        section = work()
    except Exception as error:
        traceback.print_exc()
        section = Section(name)
        section.judge(f"{name}: carried out", False, f"{type(error).__name__}: {error}")
    spent = round(time.monotonic() - start, 1)
    for criterion in section.criteria:
        tell(f"{'✓' if criterion.passed else '✗'} {criterion.text}")
        if not criterion.passed:
            tell(f"    {json.dumps(criterion.figure, default=str)[:600]}")
    tell(f"== {name}: {spent:.0f} s")
    return {
        "seconds": spent,
        "figures": section.figures,
        "criteria": [criterion.as_json() for criterion in section.criteria],
    }


def main() -> int:
    """1 when a criterion does not hold; a run with ``--only`` judges those sections alone."""
    parser = argparse.ArgumentParser(prog="scripts/prove", description=__doc__)
    parser.add_argument("issue", choices=sorted(ISSUES))
    parser.add_argument("--only", default="", help="some of the issue's sections: NAME,NAME")
    given = parser.parse_args()
    sections = ISSUES[given.issue]
    names = [name for name in given.only.split(",") if name] or list(sections)
    if unknown := set(names) - set(sections):
        parser.error(f"no section {sorted(unknown)[0]}; there are: {', '.join(sections)}")
    # The figures themselves lie in docs/proof: writing them changes nothing that was measured.
    changed = _git("status", "--porcelain", "--", ".", ":!docs/proof")
    commit = _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    facts = _facts()
    done = _before(_proof(given.issue), given.issue) if given.only else {}
    start = time.monotonic()
    for name in names:
        done[name] = {"commit": commit, **_carry_out(name, sections[name])}
        _write(given.issue, commit, facts, done)
    bad = [c["text"] for name in names for c in done[name]["criteria"] if not c["pass"]]
    tell(f"{len(names)} sections in {time.monotonic() - start:.0f} s, {len(bad)} criteria fail")
    tell(f"written: {_proof(given.issue).relative_to(REPOSITORY)}")
    return 1 if bad else 0


if __name__ == "__main__":
    if shutil.which("qemu-system-x86_64") is None or os.geteuid() != 0:
        sys.exit("root and QEMU are needed: run scripts/setup")
    sys.exit(main())
