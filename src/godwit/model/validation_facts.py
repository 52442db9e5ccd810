"""What hosts and the store say of themselves and of each other, for a validation to judge.

Whoever measures fills these in; `godwit.cluster.validation` alone says what they mean. Sizes in
bytes, times in seconds, rates in bits per second. What could not be found out is None or has a
``reason``: it is never left out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Record
from godwit.model.host import QemuFacts
from godwit.model.volume import VolumeKind

TOKEN_BYTES = 16
RUNG_WORDS = {
    "storage": "its storage server shuts it out",
    "deadline": "its own deadline, with a watchdog behind it",
    "power": "its power device",
}
Rung = Literal["storage", "deadline", "power"]


class CpuSeen(Record):
    """Processors as the kernel of that host shows them now."""

    count: int
    vendor: str = ""
    model_name: str = ""
    flags: tuple[str, ...] = ()
    virtualization: str = ""  # "vmx", "svm", or nothing
    slat: str = ""  # "ept", "npt", or nothing


class LinkSeen(Record):
    """The interface that holds one of the host's addresses."""

    name: str
    address: str  # with its prefix length, like 10.92.0.11/24
    mtu: int


class HostProbe(Record):
    """What an agent finds on its host when it is asked."""

    name: Name
    boot_id: str = ""
    kernel: str = ""
    machine: str = ""  # the architecture, like x86_64
    system: str = ""
    version: str = ""
    cpu: CpuSeen
    memory_bytes: int = 0
    kvm: bool = False
    kvm_reason: str = ""
    userfaultfd: bool = False
    qemu: QemuFacts
    management: LinkSeen | None = None
    migration: LinkSeen | None = None
    migration_address: str = ""
    migration_subnet: str = ""
    migration_rate_bits: int = 0  # as its configuration states it, 0 when it does not
    networks: dict[str, int] = Field(default_factory=dict)  # VM network -> MTU of its bridge
    image_locks: bool = True
    guard: bool = False  # its guard answers
    armed: bool | None = None  # it keeps the host's deadline for HA VMs; None: it does not say
    watchdog: bool | None = None  # a watchdog stands behind that deadline


class HostSeen(Record):
    """A host as the cluster knows it, with its own answer."""

    name: Name
    state: str
    probe: HostProbe | None = None
    reason: str = ""  # why there is no probe


class PathSeen(Record):
    """What was measured from one host to another over the migration network.

    ``full_bytes`` is the size of the largest packet the source may send (its MTU);
    ``largest_bytes`` the largest that arrived undivided, None when nothing did.
    """

    source: Name
    destination: Name
    full_bytes: int = 0
    largest_bytes: int | None = None
    reason: str = ""
    bits_per_s: float | None = None
    sent_bytes: int = 0
    sent_s: float = 0.0
    rate_reason: str = ""  # why there is no rate, when one was asked for
    clock_offset_s: float | None = None  # destination's clock less source's
    clock_error_s: float | None = None
    clock_reason: str = ""


class VolumeSeen(Record):
    """A volume as one host found it: ``wrong`` empty when it could write there and read back.

    ``unread`` names hosts whose fresh file was not found, or not found whole, with the reason.
    ``state`` is what the host's agent last said of the volume.
    """

    volume: Name
    host: Name
    wrong: str = ""
    unread: dict[str, str] = Field(default_factory=dict)
    write_s: float | None = None
    state: str = ""
    state_reason: str = ""
    identity: str = ""


class LockSeen(Record):
    """Whether a host saw the lock that another one held on an image of a volume."""

    volume: Name
    holder: Name
    observer: Name
    seen: bool
    reason: str = ""


class VolumeKnown(Record):
    """A volume of the cluster."""

    name: Name
    kind: VolumeKind


class StoreMember(Record):
    """One server of the store. ``fsync_p99_s`` is its own figure for its log's disk."""

    name: str
    endpoint: str = ""
    host: Name | None = None  # the host it shares a machine with, where that is known
    healthy: bool = True
    reason: str = ""
    fsync_p99_s: float | None = None


class StoreSeen(Record):
    """The store: what it is, who it consists of, how long a durable write took.

    ``voters`` is how many members have a vote, as the members say; more than those listed when
    this cluster was not told of one.
    """

    kind: Literal["embedded", "etcd"] = "embedded"
    members: tuple[StoreMember, ...] = ()
    voters: int = 0
    write_s: tuple[float, ...] = ()
    reason: str = ""  # why it could not be written to


class RungSeen(Record):
    """A way to be sure that a host is off, and whether it answered when it was tried."""

    host: Name
    rung: Rung
    answers: bool
    device: str = ""  # in words, like "Redfish at https://10.0.0.5"
    reason: str = ""


class ClusterFacts(Record):
    """Everything that a validation judges. ``partial``: asked only for network and system."""

    hosts: tuple[HostSeen, ...] = ()
    paths: tuple[PathSeen, ...] = ()
    volumes: tuple[VolumeKnown, ...] = ()
    volumes_seen: tuple[VolumeSeen, ...] = ()
    locks: tuple[LockSeen, ...] = ()
    networks: dict[str, int] = Field(default_factory=dict)  # VM network -> MTU as defined
    store: StoreSeen | None = None
    cpu_models: dict[str, int] = Field(default_factory=dict)  # of VMs -> how many have it
    cpu_baseline: str = ""  # as it was set
    rungs: tuple[RungSeen, ...] | None = None  # None: nobody could be asked about them
    partial: bool = False

    @property
    def probes(self) -> tuple[HostProbe, ...]:
        """The hosts that answered."""
        return tuple(host.probe for host in self.hosts if host.probe is not None)


class PeerAt(Record):
    """Another host, and where it is reached: its agent, and its migration address."""

    host: Name
    agent_url: str
    address: str


class PathsAsk(Record):
    """What an agent is to measure to these hosts; ``rate`` to those named there only.

    Without ``packets`` neither packets nor clocks: for a rate of a path that is known already.
    """

    peers: tuple[PeerAt, ...] = Field(max_length=256)
    rate: tuple[Name, ...] = ()
    packets: bool = True
    bytes_limit: int = Field(default=64 << 20, ge=1 << 16, le=1 << 30)
    seconds_limit: float = Field(default=2.0, gt=0, le=30)


class MeasureAsk(Record):
    """An agent asks a peer to listen on the migration network, once, for its measurement."""

    host: Name
    address: str  # where the packets will come from
    token: str = Field(min_length=2 * TOKEN_BYTES, max_length=2 * TOKEN_BYTES)  # hex
    rate: bool = False
    bytes_limit: int = Field(default=64 << 20, ge=1 << 16, le=1 << 30)
    seconds_limit: float = Field(default=2.0, gt=0, le=30)


class MeasurePorts(Record):
    """Where it listens; ``tcp`` 0 when no rate was asked for."""

    udp: int
    tcp: int = 0


class PathsSeen(Record):
    """An agent's answer to ``PathsAsk``."""

    paths: tuple[PathSeen, ...]


class FilesAsk(Record):
    """Marks to write into, look for in, or take away from volumes that are directories.

    ``run`` names the validation; ``hosts`` those whose files are to be there.
    """

    run: str = Field(pattern=r"^[a-z0-9-]{1,63}$")
    volumes: tuple[Name, ...] = Field(max_length=256)
    hosts: tuple[Name, ...] = Field(default=(), max_length=256)


class FilesSeen(Record):
    """An agent's answer: how it found each volume."""

    volumes: tuple[VolumeSeen, ...]


class LocksSeen(Record):
    """An agent's answer: volume -> why the lock was not seen (empty: it was)."""

    volumes: dict[str, str]
