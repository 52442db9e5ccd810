"""The sections of issue C: a cluster that owns its VMs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.kit import (
    adoption,
    busy,
    coldstart,
    deadline,
    decisions,
    drains,
    etcd_members,
    eviction,
    failover,
    many,
    membership,
    mutation,
    skew,
    validation,
)
from tests.faults.kit.cells import VM
from tests.faults.kit.report import Section
from tests.faults.proofs.setting import BENCH_S, REPOSITORY, Work, joined, lab, on_lab
from tests.system.qemu.old_qemu import NoOldQemu, old_qemu

from godwit.lab.layout import StorageKind

BUSY_MOVES = 10
CUTS, HANGS = 12, 5
ROUNDS = 5
POWER_LOSSES = 7
EVICTIONS: tuple[eviction.Loss, ...] = ("isolated", "power") * 5
FAILOVER_HOSTS, LOSSES = 4, 20
ADOPTIONS, STARTS_ANEW = 5, 2
DRAIN_HOSTS, DRAIN_VMS = 4, 12


def _failover(
    loss: failover.Loss, rounds: int, *, store_leader: int = 0, manager_leader: int = 0
) -> Section:
    """Hosts are lost, also those of the store's leader and of the leading manager."""
    outer = Section("lab")
    with lab(outer, hosts=FAILOVER_HOSTS, store="etcd", managers=3) as cluster:
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
    with lab(outer, hosts=3, store="etcd", managers=3) as cluster:
        section = adoption.run(cluster, rounds=ADOPTIONS, anew=STARTS_ANEW)
    section.criteria += outer.criteria
    return section


def _evicted(storage: StorageKind) -> Section:
    """Hosts are lost for which nothing but their storage server can answer."""
    outer = Section("lab")
    with lab(outer, hosts=3, storage=storage, watchdog=False) as cluster:
        section = eviction.run(cluster, losses=EVICTIONS)
    section.criteria += outer.criteria
    return section


def _many() -> Section:
    """Sixteen hosts on etcd."""
    outer = Section("lab")
    with lab(outer, hosts=many.HOSTS, store="etcd", managers=3) as cluster:
        section = many.run(cluster)
    section.criteria += outer.criteria
    return section


def _cold() -> Section:
    """All hosts lose their power."""
    outer = Section("lab")
    with lab(outer, hosts=3) as cluster:
        section = coldstart.run(cluster)
    section.criteria += outer.criteria
    return section


def _etcd() -> Section:
    """Members of a real three-member store go: under 20 VMs, and with their hosts' power."""
    section = Section("etcd")
    parts: dict[str, Section] = {}
    with lab(section, hosts=3, store="etcd", managers=3) as cluster:
        parts["20 VMs"] = etcd_members.run(cluster)
        for number in range(1, POWER_LOSSES + 1):
            parts[f"power {number}"] = etcd_members.run(cluster, vms=0, parts=("power",))
    with lab(section, hosts=2, store="etcd") as cluster:
        parts["2 hosts and a witness"] = etcd_members.run(cluster, vms=0, parts=("member", "power"))
    return joined(section, parts)


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
    with lab(outer, hosts=DRAIN_HOSTS) as cluster:
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
    with lab(section, hosts=3) as cluster:
        parts = {"three hosts": validation.each(cluster, program)}
        parts["live"] = validation.live(cluster)
        parts["live failover"] = validation.failover(cluster)
    with lab(section) as cluster:
        parts["two hosts"] = validation.witness(cluster)
    with lab(section, store="etcd") as cluster:
        parts["two hosts on etcd"] = validation.on_etcd(cluster)
    return joined(section, parts)


def _skew() -> Section:
    """Agents and guards of an earlier commit, upgraded one host after the other."""
    section = Section("skew")
    try:
        with skew.old_source() as tree, lab(section, agent_source=tree) as cluster:
            found = skew.run(cluster)
    except skew.NoHistory as problem:
        section.judge("skew: the earlier commit is there", False, str(problem))
        return section
    return joined(section, {"run": found})


def _membership() -> Section:
    """A host leaves and joins again, over and over, beside a VM that runs on."""
    section = Section("membership")
    with lab(section) as cluster:
        cluster.make(VM, host="host1")
        parts = {f"round {number}": membership.run(cluster) for number in range(1, ROUNDS + 1)}
    return joined(section, parts)


SECTIONS: dict[str, Work] = {
    "deadline": lambda: on_lab(lambda c: deadline.run(c, cuts=CUTS, hangs=HANGS)),
    "failover-power": lambda: _failover("power", LOSSES, store_leader=7, manager_leader=5),
    "failover-management": lambda: _failover("management", LOSSES),
    "adoption": _adoption,
    "failover-iscsi": lambda: _evicted("iscsi"),
    "failover-nfs": lambda: _evicted("nfs"),
    "cold-start": _cold,
    "many-hosts": _many,
    "busy-processors": lambda: on_lab(lambda c: busy.run(c, moves=BUSY_MOVES)),
    "etcd": _etcd,
    "store-rates": _store_rates,
    "drain": _drain,
    "validation": _validation,
    "membership": _membership,
    "skew": _skew,
    "decisions": decisions.run,
    "mutation": mutation.run,
}
