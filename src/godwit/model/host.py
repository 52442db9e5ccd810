"""A host: what it is, how it is reached, what state it is in."""

from __future__ import annotations

from pydantic import Field

from godwit.model.base import Name, OpenWord, Record
from godwit.model.firmware import UefiFacts
from godwit.model.skew import Speaks


class HostState(OpenWord):
    """Membership states; issue-proof words, shown as they are."""

    UP = "up"
    UNMANAGED = "unmanaged"  # its guard renews the lease, its agent is away; its VMs run on
    ISOLATED = "isolated"
    DOWN = "down"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"
    QUARANTINED = "quarantined"


class QemuFacts(Record):
    """What this host's QEMU can do, read from its QMP schema, not guessed from its version."""

    version: tuple[int, int, int]
    accelerator: str  # "kvm" or "tcg"
    accelerator_reason: str = ""
    machines: tuple[str, ...] = ()
    cpu_models: tuple[str, ...] = ()  # those without unavailable features here
    live_migration_refusal: str = ""  # empty, or the reason why this QEMU must not move guests


class HostInfo(Record):
    """What a host's agent publishes about it, renewed when it changes."""

    name: Name
    agent_url: str  # https://ADDRESS:PORT on the management network
    cpus: int
    cpu_vendor: str = ""
    cpu_model_name: str = ""
    memory_bytes: int
    boot_id: str = ""
    kernel: str = ""
    qemu: QemuFacts
    migration_address: str
    migration_subnet: str = ""
    migration_rate_bits: int = 0  # measured or configured link speed; 0 = not known
    networks: dict[str, int] = Field(default_factory=dict)  # VM network -> MTU of its bridge here
    volumes: tuple[str, ...] = ()
    uefi: UefiFacts | None = None  # None: no VM with UEFI runs here
    cgroup: str = ""  # "v1" or "v2"
    userfaultfd: bool = False
    version: str = ""
    level: int = 0  # what its daemons understand, see ``model.skew``; 0: it does not tell
    started_at: float = 0.0

    @property
    def speaks(self) -> Speaks:
        """What its agent says of itself."""
        return Speaks(version=self.version, level=self.level)


class ConfirmedDown(Record):
    """An administrator's word that this boot of a host is over and nothing of it writes any more.

    It says nothing of the host's next boot. ``time`` is when it was given, ``by`` who gave it.
    """

    boot_id: str
    time: float
    by: str = ""


class HostView(Record):
    """One row of ``host list -o json``."""

    name: Name
    state: HostState
    vms: int
    cpus: int
    memory_bytes: int
    memory_free_bytes: int
    reason: str = ""
    cpu_model_name: str = ""
    kernel: str = ""
    qemu_version: str = ""
    accelerator: str = ""
    migration_address: str = ""
    networks: dict[str, int] = Field(default_factory=dict)
    volumes: tuple[str, ...] = ()
    version: str = ""  # of Godwit; empty: its agent does not tell
    level: int = 0
