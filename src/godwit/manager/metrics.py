"""What Prometheus reads: counts and durations seen by this process, states as of the scrape."""

from __future__ import annotations

from collections import Counter

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from godwit.manager.cache import Cache, Change
from godwit.manager.snapshot import Snapshot
from godwit.manager.views import all_volumes, host_state, state_of_vm
from godwit.model.host import HostState
from godwit.model.migration import Migration
from godwit.model.task import Task
from godwit.model.vm import VmState

_BLACKOUT_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_TOTAL_S = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60, 180, 600)


class Metrics:
    """One registry of our own. Moves and tasks are counted when they end while we watch."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = prometheus.Counter(
            "godwit_api_requests", "API requests answered", ("method", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._tasks = prometheus.Counter(
            "godwit_tasks_ended", "Tasks ended", ("kind", "state"), registry=self.registry
        )
        self._moves = prometheus.Counter(
            "godwit_migrations_ended", "Moves ended", ("method", "strategy", "outcome"),
            registry=self.registry,
        )  # fmt: skip
        self._bytes = prometheus.Counter(
            "godwit_migration_bytes", "Bytes sent by moves", ("method",), registry=self.registry
        )
        self._blackout = Histogram(
            "godwit_migration_blackout_seconds", "How long VMs were dark", ("method",),
            buckets=_BLACKOUT_S, registry=self.registry,
        )  # fmt: skip
        self._total = Histogram(
            "godwit_migration_total_seconds", "How long moves took", ("method",),
            buckets=_TOTAL_S, registry=self.registry,
        )  # fmt: skip
        self._vms = Gauge("godwit_vms", "VMs by state", ("state",), registry=self.registry)
        self._hosts = Gauge("godwit_hosts", "Hosts by state", ("state",), registry=self.registry)
        self._volumes = Gauge(
            "godwit_volume_state", "1 for the way in which a host reaches a volume",
            ("volume", "host", "state"), registry=self.registry,
        )  # fmt: skip
        self._used = Gauge(
            "godwit_volume_used_bytes", "Used bytes of a volume", ("volume",),
            registry=self.registry,
        )  # fmt: skip
        self._capacity = Gauge(
            "godwit_volume_capacity_bytes", "Capacity of a volume", ("volume",),
            registry=self.registry,
        )  # fmt: skip
        self._revision = Gauge(
            "godwit_store_revision", "Store revision this manager has seen", registry=self.registry
        )

    def take(self, changes: tuple[Change, ...]) -> None:
        """The cache's listener."""
        for change in changes:
            if change.first:
                continue
            new, old = change.new, change.old
            if isinstance(new, Task) and new.state.final and not _ended(old):
                self._tasks.labels(str(new.request.get("kind")), new.state.value).inc()
            if isinstance(new, Migration) and new.state.final and not _ended(old):
                self._count(new)

    def _count(self, move: Migration) -> None:
        self._moves.labels(move.method, move.strategy, move.state.value).inc()
        self._bytes.labels(move.method).inc(move.bytes_transferred)
        if move.blackout_ms is not None:
            self._blackout.labels(move.method).observe(move.blackout_ms / 1000)
        if move.total_ms is not None:
            self._total.labels(move.method).observe(move.total_ms / 1000)

    def render(self, cache: Cache) -> bytes:
        """The text that Prometheus reads."""
        snapshot: Snapshot = cache.snapshot
        vms = Counter(state_of_vm(snapshot, name)[0] for name in snapshot.vms)
        for state in VmState:
            self._vms.labels(state.value).set(vms[state])
        hosts = Counter(
            host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)[0]
            for name in snapshot.hosts
        )
        for kind in HostState:
            self._hosts.labels(kind.value).set(hosts[kind])
        self._render_volumes(snapshot)
        self._revision.set(cache.revision)
        return generate_latest(self.registry)

    def _render_volumes(self, snapshot: Snapshot) -> None:
        for gauge in (self._volumes, self._used, self._capacity):
            gauge.clear()
        for volume in all_volumes(snapshot):
            for host, seen in volume.hosts.items():
                self._volumes.labels(volume.name, host, seen.state.value).set(1)
            for size, sizes in (
                (volume.used_bytes, self._used),
                (volume.capacity_bytes, self._capacity),
            ):
                if size is not None:
                    sizes.labels(volume.name).set(size)


def _ended(value: object) -> bool:
    return isinstance(value, Task | Migration) and value.state.final
