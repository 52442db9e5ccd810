"""The labs that sections run on, and sections made of parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.kit.cluster import Cluster
from tests.faults.kit.report import Section

from godwit.lab.layout import StorageKind, StoreKind

Work = Callable[[], Section]
REPOSITORY = Path(__file__).resolve().parents[3]
BENCH_S = 1500.0
"""Seconds a benchmark may take."""


@contextmanager
def lab(
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


def on_lab(work: Callable[[Cluster], Section], *, storage: StorageKind = "dir") -> Section:
    """A section on a lab of its own."""
    outer = Section("lab")
    with lab(outer, storage=storage) as cluster:
        section = work(cluster)
    section.criteria += [
        dataclasses.replace(c, text=f"{section.name}: {c.text.partition(': ')[2]}")
        for c in outer.criteria
    ]
    return section


def joined(section: Section, parts: dict[str, Section]) -> Section:
    for name, part in parts.items():
        section.figures[name] = part.figures
        section.criteria += [
            dataclasses.replace(c, text=f"{name}: {c.text}") for c in part.criteria
        ]
    return section
