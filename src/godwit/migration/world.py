"""What the engine needs from the agent: small protocols, so that tests can stand in.

The engine never reaches for a global: time, store, QEMU, network gate, guard, peer and hold
points come in here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Protocol

from godwit.migration.peer import Peer
from godwit.model.host import HostInfo
from godwit.model.migration import Migration
from godwit.model.vm import Vm
from godwit.model.world import Clock
from godwit.qemu.machine import Machine
from godwit.storage.files import LOCAL, VolumeFiles
from godwit.store.records import Records

LEASE_MARGIN_S = 5.0
"""Seconds a host's own lease must still last for it to commit to, or take over, a VM."""

PRE_SWITCHOVER_S = 1.0
"""Seconds the peer's agent *and QEMU* have to answer while the VM is dark and nothing is decided.

The answer costs nothing while the destination is healthy: its QEMU must get through the last pages
anyway. A bound of 100-150 ms called off one move in five on a host with four runnable processes
per core; see docs/design/0004.
"""


SETTLE_S = 0.01
"""Seconds after RESUME in which neither side does anything else; only for emulated guests."""


async def settle(vm: Vm, clock: Clock) -> None:
    """Leave the processors to the VM for a moment before anything is told or cleaned up.

    An emulated guest translates its code anew after RESUME, and work beside it (ending a QEMU,
    writing records that wake every watcher) keeps it from its first answers (docs/design/0003).
    """
    if vm.pins.accelerator == "tcg":
        await clock.sleep(SETTLE_S)


class Gate(Protocol):
    """The VM's way to the world on this host: its taps' place in their bridges.

    Closing and opening are idempotent and quick (they happen while the VM is dark).
    """

    def close(self) -> None:
        """Take the taps out of their bridges: nothing this QEMU sends leaves the host."""
        ...

    def open(self) -> None:
        """Put the taps into their bridges."""
        ...

    def announce(self) -> None:
        """Make switches learn the VM's MACs here, at once, without the guest's help."""
        ...


class DiskGate(Protocol):
    """What stands between this host and the VM's brokered disks; direct ones need none.

    Closing returns only when nothing of this host can write them any more. Both are idempotent.
    """

    async def close(self, *, sync: bool = True) -> None:
        """Let nothing through: flush, close the images, or end the broker.

        What a broker that had to be ended had written is synced, which needs this host's path to
        the storage; without ``sync`` that is left to who opens them next (``unsynced``).
        """
        ...

    async def open(self, epoch: int, *, unsynced: bool = False) -> None:
        """Let the VM's QEMU write, as owner at this epoch."""
        ...


class NoDisks:
    """A VM all of whose disks its QEMU opens by itself: its own life is the gate."""

    async def close(self, *, sync: bool = True) -> None:
        """Nothing stands open."""

    async def open(self, epoch: int, *, unsynced: bool = False) -> None:
        """Nothing to open."""


class CarriedDisks(Protocol):
    """The VM's disks that only the source has: sent to the destination while it runs."""

    async def copy(
        self, host: str, port: int, *, tls_hostname: str, heard: Callable[[int, int], None]
    ) -> None:
        """Return when the destination holds the same; ``heard`` gets bytes, copied and in all."""
        ...

    async def settle(self) -> None:
        """With the VM standing: both sides equal and flushed, nothing under way any more."""
        ...

    async def drop(self) -> None:
        """Call it off; never raises. The disks here stay as they are."""
        ...


class NothingCarried:
    """All disks are where both hosts see them."""

    async def copy(
        self, host: str, port: int, *, tls_hostname: str, heard: Callable[[int, int], None]
    ) -> None:
        """Nothing to copy."""

    async def settle(self) -> None:
        """Nothing is under way."""

    async def drop(self) -> None:
        """Nothing to call off."""


async def _takes_nothing(_machine: Machine) -> int:
    return 0


async def _took_nothing(_machine: Machine) -> None:
    return None


def _unstrained(_machine: Machine | None = None) -> float:
    return 1.0


class GuardLink(Protocol):
    """The host's guard, as far as a move needs it."""

    async def arm(self, vm: str, migration: str, role: str) -> None:
        """From now on the guard cancels or yanks when this agent dies or hangs."""
        ...

    async def disarm(self, vm: str) -> None:
        """The move is over; leave the VM alone."""
        ...

    def lease_left(self) -> float:
        """Seconds this host's own lease still lasts, by the last answered renewal."""
        ...


class Holds(Protocol):
    """Named hold points, armed only in a lab; elsewhere ``reach`` returns at once."""

    async def reach(self, point: str, *, vm: str, role: str) -> None:
        """Wait here while the point is held."""
        ...


class NoHolds:
    """Outside a lab nothing is ever held."""

    async def reach(self, point: str, *, vm: str, role: str) -> None:
        """Return at once."""


SOURCE_HOLDS = (
    "setup",
    "precopy",
    "pre-switchover",
    "committing",
    "completed",
    "swapped",
    "running",
)
"""Where the source can be held: before preparing, while copying, at QEMU's pause, after
COMMITTING is recorded and before QEMU is told to go on, after the proof point, after the swap,
and when the destination runs but the source is not yet cleaned up."""

DESTINATION_HOLDS = ("prepared", "take-over", "started")
"""Where the destination can be held: after preparing, after the record names it and before the
durable note, and after the note and before ``cont``."""


@dataclass(frozen=True)
class SourceWorld:
    """Everything a source needs to move one VM away."""

    host: str
    info: HostInfo
    clock: Clock
    records: Records
    machine: Machine
    gate: Gate
    guard: GuardLink
    peer: Peer
    publish: Callable[[Migration], Awaitable[None]]
    throttle: Callable[[float], None]  # vCPU quota as a share of a core each; 1.0 lifts it
    dial: Callable[[str, int], Awaitable[socket]]  # a stream's socket, from the migration network
    disks: DiskGate = field(default_factory=NoDisks)
    carried: CarriedDisks = field(default_factory=NothingCarried)
    holds: Holds = field(default_factory=NoHolds)
    migration_tls_dir: Path | None = None
    volumes: Path = Path("/clusterstorage")
    files: VolumeFiles = LOCAL  # of the volume that a saved memory goes to
    past_overhead_ms: tuple[float, ...] = ()
    strain: Callable[[], float] = _unstrained  # of the agent and the VM's QEMU since the last call


@dataclass(frozen=True)
class DestinationWorld:
    """Everything a destination needs to receive one VM; its QEMU is spawned by ``spawn``."""

    host: str
    info: HostInfo
    clock: Clock
    records: Records
    spawn: Callable[[bool], Awaitable[Machine]]  # post-copy wanted? -> QEMU -S -incoming defer
    gate: Callable[[Machine], Gate]
    guard: GuardLink
    note_started: Callable[[int, str], Awaitable[None]]  # durable: (epoch, migration id)
    forget_note: Callable[[], Awaitable[None]]
    noted_epoch: Callable[[], int]  # highest epoch a durable note says may have run here
    announced: Callable[[Machine], Awaitable[None]]  # adopted: the VM is this agent's now
    gone: Callable[[str], Awaitable[None]]  # the copy was killed; clean up
    disks: DiskGate = field(default_factory=NoDisks)
    take_in: Callable[[Machine], Awaitable[int]] = _takes_nothing  # disks that come along: a port
    taken_in: Callable[[Machine], Awaitable[None]] = _took_nothing  # before the first ``cont``
    holds: Holds = field(default_factory=NoHolds)
    migration_address: str = ""
    migration_tls_dir: Path | None = None
    tls_hostname: str = ""  # the name in this host's migration certificate
    files: VolumeFiles = LOCAL  # of the volume that a saved memory comes from
    strain: Callable[[Machine], float] = _unstrained  # of the agent and this QEMU, as above
