"""All hosts lose their power and get it back: every VM runs once, what matters most first."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from godwit.lab import fault

from . import evidence
from .cluster import MIB, Cluster
from .report import Section

# Name, high availability, priority, starts by itself: in the order in which they are to start.
VMS = (
    ("first", True, 90, False),
    ("second", True, 50, False),
    ("third", False, 20, True),
)
STAYS = "stays"  # neither highly available nor autostart: it had been running, so it runs again
STOPPED = "was-stopped"
MEMORY_MIB = 128
PATIENCE_S = 180.0


def run(cluster: Cluster) -> Section:
    """VMs on every host, and one that does not run."""
    section = Section("cold-start")
    made = [*VMS, (STAYS, False, 10, False), (STOPPED, False, 50, False)]
    for number, (name, ha, priority, autostart) in enumerate(made):
        words = f"godwit.ip={cluster.address(name)}/22 godwit.host={name}"
        made_by = cluster.client.vms.create(
            name, memory_bytes=MEMORY_MIB * MIB, image="demo", append=words, networks=["lan"],
            ha=ha, priority=priority, autostart=autostart,
        )  # fmt: skip
        cluster.client.wait(made_by)
        if name != STOPPED:
            cluster.boot(name, host=cluster.hosts[number % len(cluster.hosts)])
    before = {name: cluster.owner(name).epoch for name, *_ in made}
    at = time.time()
    for host in cluster.hosts:
        fault.power_off(cluster.lab, host)
        cluster.refresh()
    for host in cluster.hosts:
        fault.power_on(cluster.lab, host, wait=False)
        cluster.refresh()
    running = [name for name, *_ in made if name != STOPPED]
    with ThreadPoolExecutor(len(running)) as pool:
        answers = dict(
            zip(running, pool.map(lambda vm: _answers(cluster, vm), running), strict=True)
        )
    cluster.heal()
    spans = {name: evidence.spans(cluster, name, since=at) for name, *_ in made}
    started = {
        name: round(min(span.start for span in seen if span.start > at) - at, 2)
        for name, seen in spans.items()
        if any(span.start > at for span in seen)
    }
    copies = {name: len(evidence.copies(cluster, name)) for name, *_ in made}
    section.figures = {
        "answers": answers,
        "started_after_s": started,
        "copies": copies,
        "epochs": {name: (before[name], cluster.owner(name).epoch) for name in before},
        "told": [e.message for name, *_ in VMS for e in cluster.events(name) if e.time >= at],
    }
    _judge(section, running, section.figures)
    for name, *_ in made:
        cluster.remove(name)
    return section


def _answers(cluster: Cluster, vm: str) -> bool:
    return cluster.guest(vm).alive(timeout=PATIENCE_S)


def _judge(section: Section, running: list[str], found: dict[str, Any]) -> None:
    section.judge(
        "all power lost and back: every VM that ran runs again", all(found["answers"].values()),
        found["answers"],
    )  # fmt: skip
    section.judge(
        "each of them once, and none that did not run",
        all(number == (name in running) for name, number in found["copies"].items()),
        found["copies"],
    )
    times = [found["started_after_s"].get(name) for name, *_ in VMS]
    section.judge(
        "what matters most starts first",
        None not in times and times == sorted(times, key=lambda at: at or 0.0),
        found["started_after_s"],
    )
