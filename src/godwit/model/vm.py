"""A virtual machine: what was asked for, what is pinned, what is seen."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from godwit.model.base import Name, OpenWord, Record
from godwit.model.firmware import FirmwareImage
from godwit.model.rules import Rules

DiskFormat = Literal["raw", "qcow2", "vhd-fixed", "vhd", "vhdx"]
DiskTier = Literal["auto", "direct", "brokered"]
DiskSource = Literal["image", "device", "lun"]


class VmState(OpenWord):
    """What ``vm list`` says of a VM. Readers ignore values they do not know."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SAVED = "saved"
    MIGRATING = "migrating"
    FROZEN = "frozen"
    IO_ERROR = "io-error"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Boot(Record):
    """What the VM starts from: a named image, a kernel, or (neither) its first disk.

    ``kernel`` and ``initrd`` are paths that every host sees, put there by content hash when the VM
    was created, so that a destination can never start another kernel than the source did.
    """

    image: Name | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""


class Backing(Record):
    """The image that a linked clone's image stands on: only read, and only what this names.

    Godwit wrote it into the clone itself; a name found in an image is never followed otherwise.
    """

    path: str
    format: Literal["raw", "qcow2"]


class Disk(Record):
    """A disk on the VM's virtio-scsi controller. ``path`` is the same on every host.

    ``source``: an image in a volume; a block device as it is, which is raw and lies in no volume
    (``volume`` is empty); or a LUN of an iscsi volume, raw as well.  ``passthrough``: that device
    or LUN answers the guest's SCSI commands itself.  ``tier`` is what was asked for;
    `model.disks.tier_of` says what holds.
    ``local``: the path leads to its host's own storage, and the disk goes along when its VM moves.
    ``generation`` counts the images the disk has had: block nodes and exports are called by it, so
    that the old image and the new one can be open side by side while one takes the other's place.
    ``backing``: the image of another VM under a linked clone's.
    """

    id: Name
    volume: Name | Literal[""] = ""
    path: str
    size_bytes: int = Field(gt=0)
    format: DiskFormat = "qcow2"
    source: DiskSource = "image"
    tier: DiskTier = "auto"
    serial: str
    lun: int = Field(ge=0, lt=256)
    passthrough: bool = False
    generation: int = Field(default=0, ge=0)
    backing: Backing | None = None
    local: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.source != "device" and not self.volume:
            raise ValueError("an image or a LUN lies in a volume")
        if self.source != "image" and self.format != "raw":
            raise ValueError("a block device or a LUN is raw")
        if self.local and self.source != "image":
            raise ValueError("only an image lies on a host's own storage")
        if self.passthrough and (self.source == "image" or self.tier == "brokered"):
            raise ValueError("only a block device without a broker can be passed through")
        if self.backing is not None and self.format != "qcow2":
            raise ValueError("only a qcow2 image stands on another")
        return self


class Cdrom(Record):
    """An ISO image in a volume, which the VM only reads; many VMs may have the same one."""

    id: Name
    volume: Name
    path: str


class Firmware(Record):
    """UEFI: the host's ``code``, only read, and the VM's own ``variables``, an image in a volume.

    ``code`` is what the VM was last powered on with. A running or saved VM needs that very one on
    every host; the next power-on takes the host's, as long as its size is the same.
    """

    code: FirmwareImage
    variables: Disk


class DiskView(Disk):
    """One row of ``vm disk list -o json``: ``effective_tier`` is the way its I/O goes."""

    effective_tier: Literal["direct", "brokered"]


class Nic(Record):
    """A virtio network card on a named network."""

    id: Name
    network: Name
    mac: str = Field(pattern=r"^([0-9a-f]{2}:){5}[0-9a-f]{2}$")
    mtu: int = Field(default=1500, ge=576, le=9216)
    queues: int = Field(default=1, ge=1, le=8)


OWN_CPU = frozenset({"host", "max"})


class Pins(Record):
    """What must be the same on every host the VM ever runs on, fixed at creation.

    A machine alias (``q35``) would mean another thing on another QEMU. So do the CPUs ``host`` and
    ``max``: a VM that has one ``stays``, for what runs on it can go on nowhere else.
    """

    uuid: str
    machine: str
    cpu_model: str
    accelerator: Literal["kvm", "tcg"]
    qemu_quirks: tuple[str, ...] = ()

    @property
    def stays(self) -> bool:
        """Its CPU is its host's own: it starts anywhere, and then goes nowhere else."""
        return self.cpu_model in OWN_CPU


class Checkpoint(Record):
    """What a VM's disks held at one instant; their qcow2 images keep it, called ``tag``.

    ``disks`` are those it has. ``running``: the guest ran on; its disks are as after a power cut.
    """

    name: Name
    tag: str
    disks: tuple[Name, ...]
    running: bool
    created_at: float


class Vm(Record):
    """The definition of a VM: everything needed to start it the same way anywhere."""

    name: Name
    cpus: int = Field(ge=1, le=256)
    memory_bytes: int = Field(ge=16 << 20)
    boot: Boot = Boot()
    firmware: Firmware | None = None  # None: the BIOS that comes with QEMU
    guest_agent: bool = False  # it has the port through which the guest's own agent is reached
    disks: tuple[Disk, ...] = ()
    cdroms: tuple[Cdrom, ...] = Field(default=(), max_length=4)
    nics: tuple[Nic, ...] = ()
    ha: bool = False
    rules: Rules = Rules()
    pins: Pins
    created_at: float
    checkpoints: tuple[Checkpoint, ...] = ()
    reverting: Name | None = None  # to this checkpoint, begun and not yet known to have ended

    @property
    def written(self) -> tuple[Disk, ...]:
        """All that its QEMU writes: the disks and, with UEFI, the variables."""
        return self.disks if self.firmware is None else (*self.disks, self.firmware.variables)

    @property
    def volumes(self) -> frozenset[str]:
        """The volumes that a host has to see for it."""
        disks = {disk.volume for disk in self.written if disk.volume}
        return frozenset(disks | {cdrom.volume for cdrom in self.cdroms})


class VmStatus(Record):
    """What the owner's agent last saw of the running VM; a hint for lists, never for decisions.

    Of one that stands still it tells why: ``by_guest``: its guest shut it down. ``restarting``: its
    QEMU died, and its host is about to start it again by itself.
    """

    state: VmState
    host: Name | None
    epoch: int = 0
    reason: str = ""
    since: float = 0.0
    migration: str | None = None
    by_guest: bool = False
    restarting: bool = False


class VmView(Record):
    """One row of ``vm list -o json``."""

    name: Name
    state: VmState
    host: Name | None
    epoch: int
    cpus: int
    memory_bytes: int
    ha: bool
    rules: Rules = Rules()
    reason: str = ""
    uuid: str = ""
    cpu_model: str = ""
    boot: Boot = Boot()
    firmware: Firmware | None = None
    guest_agent: bool = False
    disks: tuple[Disk, ...] = ()
    cdroms: tuple[Cdrom, ...] = ()
    nics: tuple[Nic, ...] = ()
    migration: str | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    clones: tuple[Name, ...] = ()  # VMs whose images stand on this one's
    created_at: float = 0.0
