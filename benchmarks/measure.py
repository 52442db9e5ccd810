"""One probed move, whoever makes it: what is kept of it, and how it is watched.

The guest may be made to write meanwhile. Everything in a `Row` but its `trip` was seen from
outside: by the probe, by the switch's counters, by the guest itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from ground import AFTER_S, Ground, around

SETTLE_S = 0.3
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Machine:
    """What every peer's guest is made of; read from the QEMU that Godwit started."""

    machine: str
    cpu: str
    accel: str
    memory_mib: int
    devices: tuple[str, ...] = ()  # -device and what stands behind them, but for card and console


@dataclass
class Trip:
    """One move as its peer tells it. Times in seconds, `started`/`finished` monotonic."""

    started: float
    finished: float
    total_s: float
    outcome: str
    reason: str = ""
    wall_s: float | None = None
    reported_blackout_ms: float | None = None
    reported_bytes: int | None = None
    strategy: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One move as measured from outside; what the bench keeps."""

    peer: str
    case: str
    round: int
    trip: Trip
    blackout_ms: float
    lost: int
    prober_stalled_ms: float
    p50_rtt_ms: float
    network_bytes: dict[str, int]
    link_use: float
    writes_mb_s: float | None = None
    """What the guest wrote just before; beside it what it got to write during the move."""
    wrote_mb_s: float | None = None
    alive: bool = True
    uptime_s: float | None = None


class Peer(Protocol):
    """One way to move a VM."""

    name: str
    address: str

    def boot(self, memory_mib: int) -> None:
        """Have a fresh guest of this size running on the first host."""

    def move(self, *options: str, timeout: float = 120.0) -> Trip:
        """Move it to the other host."""

    def end(self) -> None:
        """End the guest."""


def measured(
    ground: Ground,
    peer: Peer,
    *,
    case: str = "",
    number: int = 0,
    options: tuple[str, ...] = (),
    writes: tuple[int, int] | None = None,
    timeout: float = 120.0,
) -> Row:
    """One probed move. `writes`: MB/s and MiB that the guest writes meanwhile."""
    achieved = start_writing(ground, peer.address, *writes) if writes else None
    watch = ground.watch(peer.address)
    try:
        time.sleep(SETTLE_S)
        written = Written(ground, peer.address) if writes else None
        before = ground.sent()
        trip = peer.move(*options, timeout=timeout)
        after = ground.sent()
        wrote = written.mb_s() if written else None
        time.sleep(AFTER_S + 0.1)
        samples = watch.stop()
    except BaseException:
        watch.kill()
        raise
    seen = around(samples, trip.started, trip.finished)
    moved = {name: after[name] - before[name] for name in after}
    row = Row(
        peer=peer.name, case=case or peer.name, round=number, trip=trip,
        blackout_ms=seen.blackout_ms, lost=seen.lost, prober_stalled_ms=seen.stalled_ms,
        p50_rtt_ms=seen.p50_rtt_ms, network_bytes=moved,
        link_use=moved["mig"] * 8 / (trip.total_s * ground.link_bits),
        writes_mb_s=achieved, wrote_mb_s=wrote,
    )  # fmt: skip
    try:
        row.uptime_s = float(ground.stats(peer.address, patience=10.0)["uptime_s"])
    except TimeoutError:
        row.alive = False
    if writes and row.alive:
        ground.ask(peer.address, "dirty rate=0")
    return row


class Written:
    """How much a guest writes from now on, by its own count of pages."""

    def __init__(self, ground: Ground, address: str) -> None:
        self._ground, self._address = ground, address
        self._pages, self._at = self._count(), time.monotonic()

    def mb_s(self) -> float | None:
        """The rate since; None when the guest does not answer."""
        try:
            pages = self._count() - self._pages
        except TimeoutError:
            return None
        return pages * PAGE_BYTES / 1e6 / (time.monotonic() - self._at)

    def _count(self) -> int:
        return int(self._ground.stats(self._address)["dirty"]["pages"])


def start_writing(ground: Ground, address: str, rate: int, mib: int) -> float:
    """Have a guest write `rate` MB/s into `mib` MiB; the rate it reaches, MB/s."""
    ground.ask(address, f"dirty rate={rate} mib={mib}", patience=30.0)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        time.sleep(0.5)
        reached = float(ground.stats(address)["dirty"]["achieved_mb_s"])
        if reached > 0:  # the guest's own figure is of a whole second
            return reached
    raise RuntimeError(f"the guest at {address} does not write")
