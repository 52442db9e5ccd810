"""What source and destination say to each other.

    S (drives)                                  D (answers)
    | check(ask) ------------------------------> |  facts only, nothing changes
    | intent -> store                            |
    | prepare(ask) ----------------------------> |  memory held, QEMU -S -incoming, gate closed
    | <-------------------- Prepared{port, tree} |
    | ping(id) --------------------------------> |  any time: is your QEMU alive, where is it
    | released(id) ----------------------------> |  only while the swap is slow: S has let go
    | swap -> store                              |  (D watches the record: this is what wakes it)
    | take_over(id, vm) ------------------------> |  answers once the VM runs there
    | abort(id, reason) -----------------------> |  kill the copy, forget everything

Compatibility: a peer of another version ignores fields it does not know and fills in defaults;
verbs are only ever added. Every message names the migration id; a peer refuses an id that its own
reading of the owner record contradicts. The store is the truth, a message only wakes.
"""

from __future__ import annotations

from typing import Literal, Protocol

from godwit.model.base import Record
from godwit.model.migration import Check
from godwit.model.vm import Vm
from godwit.qemu.tree import DeviceTree

PeerPhase = Literal["preparing", "ready", "loaded", "starting", "running", "gone"]


class CheckAsk(Record):
    """May this VM come to you? Asked before anything is changed."""

    vm: Vm
    source: str
    method: Literal["live", "quick"]
    postcopy: bool = False
    source_qemu: tuple[int, int, int] = (0, 0, 0)
    migration_subnet: str = ""


class CheckAnswer(Record):
    """Every check the destination can make by itself, and what a forecast needs to know."""

    checks: tuple[Check, ...] = ()
    link_bytes_per_s: float | None = None


class PrepareAsk(Record):
    """Start the same VM, paused, waiting for its memory."""

    migration: str
    vm: Vm
    epoch: int  # the epoch the VM has now; it will run at epoch + 1
    source: str
    method: Literal["live", "quick"]
    paused: bool = False
    postcopy: bool = False
    tls: bool = True
    multifd_channels: int = 0
    image: str = ""  # quick migration: the file the memory will be in


class Prepared(Record):
    """The destination waits: where the stream goes and what its devices look like."""

    uri_host: str = ""
    uri_port: int = 0
    tls_hostname: str = ""
    disk_port: int = 0  # where it takes in the disks that come along; 0 for none
    devices: DeviceTree


class PeerState(Record):
    """The destination's view: its agent's phase and what its QEMU answers."""

    phase: PeerPhase
    # query-status of D's QEMU (asked out-of-band: "alive"); empty when it does not answer
    qemu_status: str = ""
    stream_status: str = ""  # query-migrate of D's QEMU
    started: bool = False  # a durable note says that the new epoch may have run
    # how many times longer than they computed its agent and D's QEMU took since the last ping
    strain: float = 1.0
    reason: str = ""


class TakenOver(Record):
    """The VM runs on the destination (or stands paused there, as wanted)."""

    epoch: int
    resumed_at: float | None  # D's QEMU's RESUME stamp, D's wall clock
    started_at: float  # when D's agent saw the record and began


class Recovered(Record):
    """Where a broken post-copy stream may be picked up."""

    uri_host: str
    uri_port: int
    tls_hostname: str = ""


class Peer(Protocol):
    """The destination's agent as the source sees it. Errors are ``PeerSilent`` or GodwitError."""

    async def check(self, ask: CheckAsk, *, timeout: float) -> CheckAnswer: ...
    async def prepare(self, ask: PrepareAsk, *, timeout: float) -> Prepared: ...
    async def ping(self, migration: str, *, oob: bool = False, timeout: float) -> PeerState:
        """Is its agent there and its QEMU alive? ``oob`` does not wait for QEMU's main loop."""
        ...

    async def released(self, migration: str, *, timeout: float) -> None:
        """The source's word: its QEMU said ``completed``, its gate and its disks are closed.

        From then on it runs the VM again only after it has changed the owner record. Refused while
        the copy there is not whole; again is harmless.
        """
        ...

    async def take_over(self, migration: str, vm: str, *, timeout: float) -> TakenOver: ...
    async def abort(self, migration: str, reason: str, *, timeout: float) -> None: ...
    async def recover(self, migration: str, *, timeout: float) -> Recovered: ...
    async def clock(self, *, timeout: float) -> float:
        """The peer's wall clock, for measuring the offset."""
        ...


class PeerSilent(Exception):
    """The peer's agent did not answer in time, or its connection broke. Outcome unknown."""
