"""One typed request per action: a value that is validated, stored, carried out and rendered.

The manager carries a request out, the task stores it, and ``godwit.model.render`` prints it as a
command line, curl, Python or an Ansible task. ``kind`` tells them apart; the HTTP route of each
kind is data in ``ROUTES``.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from godwit.model.base import Name, Value
from godwit.model.disks import BROKERED_ONLY
from godwit.model.errors import InvalidRequest
from godwit.model.firmware import FirmwareKind
from godwit.model.host_requests import CheckHostPower as CheckHostPower
from godwit.model.host_requests import ConfirmHostDown as ConfirmHostDown
from godwit.model.host_requests import RemoveHostPower as RemoveHostPower
from godwit.model.host_requests import ResetHost as ResetHost
from godwit.model.host_requests import SetHostPower as SetHostPower
from godwit.model.host_requests import SwitchHostOff as SwitchHostOff
from godwit.model.host_requests import SwitchHostOn as SwitchHostOn
from godwit.model.validation_requests import ValidateCluster as ValidateCluster
from godwit.model.vm import DiskFormat, DiskTier
from godwit.model.volume_requests import (
    CreateVolume as CreateVolume,
)
from godwit.model.volume_requests import (
    DeleteVolume as DeleteVolume,
)
from godwit.model.volume_requests import (
    ImportDisk as ImportDisk,
)
from godwit.model.volume_requests import (
    RedirectVolume as RedirectVolume,
)
from godwit.model.volume_requests import (
    RestoreVolume as RestoreVolume,
)

LARGEST_DISK = 1 << 50


class NewDisk(Value):
    """A disk to create with a VM: ``VOLUME:SIZE[:FORMAT]``."""

    volume: Name
    size_bytes: int = Field(gt=0, le=LARGEST_DISK)
    format: DiskFormat = "qcow2"


class CreateVm(Value):
    """Define a VM; it is not started. ``host`` is where the first start prefers to go.

    ``iso`` (``VOLUME:PATH``) is an image in its CD drive, which it starts from while its first disk
    holds nothing to start from. With ``firmware`` uefi it has UEFI variables in an image beside its
    first disk. ``cloud_init`` is user data for the guest's cloud-init, as
    ``POST /v1/user-data`` answered it; the guest finds it on a CD of its own (NoCloud).
    With ``guest_agent`` it has a port for qemu-guest-agent.
    """

    kind: Literal["vm.create"] = "vm.create"
    name: Name
    memory_bytes: int = Field(ge=16 << 20, le=1 << 44)
    cpus: int = Field(default=1, ge=1, le=256)
    image: Name | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    firmware: FirmwareKind = "bios"
    guest_agent: bool = False
    disks: tuple[NewDisk, ...] = ()
    cloud_init: str | None = None
    iso: str | None = Field(default=None, pattern=r"^[a-z0-9-]{1,63}:[^/].*$")
    networks: tuple[Name, ...] = ()
    host: Name | None = None
    ha: bool = False


class DeleteVm(Value):
    """Forget a stopped VM and delete its disks."""

    kind: Literal["vm.delete"] = "vm.delete"
    name: Name


class StartVm(Value):
    """Power on, or restore when a saved state exists; without ``host`` it is placed."""

    kind: Literal["vm.start"] = "vm.start"
    name: Name
    host: Name | None = None


class StopVm(Value):
    """Ask the guest to shut down (ACPI); ``force`` cuts the power at once."""

    kind: Literal["vm.stop"] = "vm.stop"
    name: Name
    force: bool = False
    timeout_s: float = Field(default=60.0, gt=0, le=86400)


class PauseVm(Value):
    """Hold the vCPUs; memory stays."""

    kind: Literal["vm.pause"] = "vm.pause"
    name: Name


class ResumeVm(Value):
    """Let the vCPUs of a paused VM run."""

    kind: Literal["vm.resume"] = "vm.resume"
    name: Name


class SaveVm(Value):
    """Write the VM's memory to its volume and end its QEMU."""

    kind: Literal["vm.save"] = "vm.save"
    name: Name


class RestoreVm(Value):
    """Go on from the saved memory, on ``host`` or where it is placed."""

    kind: Literal["vm.restore"] = "vm.restore"
    name: Name
    host: Name | None = None


class MigrateVm(Value):
    """Move a running VM to another host."""

    kind: Literal["vm.migrate"] = "vm.migrate"
    name: Name
    to: Name | None = None
    method: Literal["live", "quick"] = "live"
    max_blackout_ms: float = Field(default=300.0, gt=0, le=3_600_000)
    deadline_s: float = Field(default=600.0, gt=0, le=31_622_400)
    allow_postcopy: bool = False
    allow_throttle: bool = False
    allow_unvalidated: bool = False  # also where a first look at the hosts found what forbids it


class CloneVm(Value):
    """Make a second VM out of a stopped one, with an identity and images of its own.

    ``linked``: its images hold only what changes and stand on the first one's, which can neither
    start nor change as long as such clones exist. ``append`` replaces the kernel command line.
    """

    kind: Literal["vm.clone"] = "vm.clone"
    name: Name
    target: Name
    linked: bool = False
    append: str | None = None


class AddDisk(Value):
    """Give a VM one more disk, also while it runs.

    A new image (``volume`` and ``size_bytes``), an image that is there (``volume``, ``path`` below
    it and its ``format``), a LUN of an iscsi volume (``volume``, ``lun``), or a block device of the
    host (``device``, the same on every host). ``format`` defaults to qcow2 for a new image.
    ``passthrough``: the device is a SCSI LUN which answers the guest's commands itself; the LUN of
    a volume does so unless it goes through the storage broker.
    """

    kind: Literal["vm.disk.add"] = "vm.disk.add"
    name: Name
    volume: Name | None = None
    size_bytes: int | None = Field(default=None, gt=0, le=LARGEST_DISK)
    format: DiskFormat | None = None
    path: str | None = None
    lun: int | None = Field(default=None, ge=0, lt=16384)
    device: str | None = None
    tier: DiskTier = "auto"
    passthrough: bool = False

    @model_validator(mode="after")
    def _is_one_disk(self) -> Self:
        if self.device is not None:
            self._check_device(self.device)
        elif self.lun is not None:
            self._check_lun()
        elif self.volume is None:
            raise ValueError("name a volume (VOLUME:SIZE), or a block device with --device")
        elif self.path is None and self.size_bytes is None:
            raise ValueError("a new disk needs a size: VOLUME:SIZE[:FORMAT]")
        elif self.path is not None and self.format is None:
            raise ValueError("say the format of the image: it is never guessed")
        if self.passthrough and self.device is None:
            raise ValueError("only a block device can be passed through")
        if self.tier == "direct" and self.format in BROKERED_ONLY:
            raise ValueError(f"{self.format} always goes through the storage broker")
        return self

    def _check_lun(self) -> None:
        if self.volume is None:
            raise ValueError("say the volume that the LUN belongs to")
        if self.path is not None or self.size_bytes is not None:
            raise ValueError("a LUN has no image, and its own size")
        if self.format not in (None, "raw"):
            raise ValueError("a LUN is raw")

    def _check_device(self, device: str) -> None:
        if {self.lun, self.volume, self.path, self.size_bytes} != {None}:
            raise ValueError("a block device has no volume, image or size of its own")
        if not device.startswith("/dev/") or ".." in device.split("/") or "\0" in device:
            raise ValueError("a block device is named by its path, like /dev/disk/by-id/...")
        if self.format not in (None, "raw"):
            raise ValueError("a block device is raw")
        if self.passthrough and self.tier == "brokered":
            raise ValueError("a device that is passed through needs no storage broker")


class RemoveDisk(Value):
    """Take a disk from a VM and delete its image, unless ``keep``.

    While the VM runs a disk that the guest writes to is refused unless ``force``.
    """

    kind: Literal["vm.disk.remove"] = "vm.disk.remove"
    name: Name
    disk: Name
    force: bool = False
    keep: bool = False


class ResizeDisk(Value):
    """Let a disk grow to ``size_bytes``, also while its VM runs; none shrinks."""

    kind: Literal["vm.disk.resize"] = "vm.disk.resize"
    name: Name
    disk: Name
    size_bytes: int = Field(gt=0, le=LARGEST_DISK)


class MoveDisk(Value):
    """Move a disk to another volume (``to``), another ``format`` or both, also while its VM runs.

    The old image is deleted at the end unless ``keep``. ``max_bytes_per_s`` holds the copy back
    while the VM runs.
    """

    kind: Literal["vm.disk.move"] = "vm.disk.move"
    name: Name
    disk: Name
    to: Name | None = None
    format: DiskFormat | None = None
    keep: bool = False
    max_bytes_per_s: int | None = Field(default=None, ge=1 << 20, le=1 << 40)

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if self.to is None and self.format is None:
            raise ValueError("say where to: another volume (--to), another format (--format)")
        return self


class ExportDisk(Value):
    """Write a copy of a stopped VM's disk to ``target``, a new file below /clusterstorage."""

    kind: Literal["vm.disk.export"] = "vm.disk.export"
    name: Name
    disk: Name
    target: str
    format: DiskFormat = "qcow2"


class CreateCheckpoint(Value):
    """Keep what a VM's disks hold at this instant, also while it runs."""

    kind: Literal["vm.checkpoint.create"] = "vm.checkpoint.create"
    name: Name
    checkpoint: Name


class RevertCheckpoint(Value):
    """Let a stopped VM's disks hold again what they held at a checkpoint, which stays."""

    kind: Literal["vm.checkpoint.revert"] = "vm.checkpoint.revert"
    name: Name
    checkpoint: Name


class DeleteCheckpoint(Value):
    """Forget a checkpoint; what the disks hold now stays."""

    kind: Literal["vm.checkpoint.delete"] = "vm.checkpoint.delete"
    name: Name
    checkpoint: Name


class CancelMigration(Value):
    """Call a move off; possible until the owner swap."""

    kind: Literal["migration.cancel"] = "migration.cancel"
    id: str = Field(pattern=r"^[a-z0-9-]{1,63}$")


class CreateNetwork(Value):
    """Define a VM network; each host makes its bridge."""

    kind: Literal["network.create"] = "network.create"
    name: Name
    mtu: int = Field(default=1500, ge=576, le=9216)
    subnet: str = ""
    uplink: str = ""


class DeleteNetwork(Value):
    """Remove a VM network that no VM uses."""

    kind: Literal["network.delete"] = "network.delete"
    name: Name


class CancelTask(Value):
    """Ask a task to stop; what cannot be stopped says so."""

    kind: Literal["task.cancel"] = "task.cancel"
    id: str = Field(pattern=r"^[a-z0-9-]{1,63}$")


Request = Annotated[
    CreateVm
    | DeleteVm
    | StartVm
    | StopVm
    | PauseVm
    | ResumeVm
    | SaveVm
    | RestoreVm
    | MigrateVm
    | CloneVm
    | AddDisk
    | RemoveDisk
    | ResizeDisk
    | MoveDisk
    | ExportDisk
    | CreateCheckpoint
    | RevertCheckpoint
    | DeleteCheckpoint
    | CancelMigration
    | CreateNetwork
    | DeleteNetwork
    | CreateVolume
    | DeleteVolume
    | RedirectVolume
    | RestoreVolume
    | ImportDisk
    | ConfirmHostDown
    | SetHostPower
    | RemoveHostPower
    | CheckHostPower
    | SwitchHostOn
    | SwitchHostOff
    | ResetHost
    | ValidateCluster
    | CancelTask,
    Field(discriminator="kind"),
]


@cache
def _adapter() -> TypeAdapter[Request]:
    # Built on first use: it costs tens of milliseconds that most command lines need not pay.
    return TypeAdapter(Request)


# kind -> (HTTP method, path template). The fields named in the path are left out of the body.
ROUTES: dict[str, tuple[str, str]] = {
    "vm.create": ("POST", "/v1/vms"),
    "vm.delete": ("DELETE", "/v1/vms/{name}"),
    "vm.start": ("POST", "/v1/vms/{name}/actions/start"),
    "vm.stop": ("POST", "/v1/vms/{name}/actions/stop"),
    "vm.pause": ("POST", "/v1/vms/{name}/actions/pause"),
    "vm.resume": ("POST", "/v1/vms/{name}/actions/resume"),
    "vm.save": ("POST", "/v1/vms/{name}/actions/save"),
    "vm.restore": ("POST", "/v1/vms/{name}/actions/restore"),
    "vm.migrate": ("POST", "/v1/vms/{name}/actions/migrate"),
    "vm.clone": ("POST", "/v1/vms/{name}/actions/clone"),
    "vm.disk.add": ("POST", "/v1/vms/{name}/disks"),
    "vm.disk.remove": ("POST", "/v1/vms/{name}/disks/{disk}/actions/remove"),
    "vm.disk.resize": ("POST", "/v1/vms/{name}/disks/{disk}/actions/resize"),
    "vm.disk.move": ("POST", "/v1/vms/{name}/disks/{disk}/actions/move"),
    "vm.disk.export": ("POST", "/v1/vms/{name}/disks/{disk}/actions/export"),
    "vm.checkpoint.create": ("POST", "/v1/vms/{name}/checkpoints"),
    "vm.checkpoint.revert": ("POST", "/v1/vms/{name}/checkpoints/{checkpoint}/actions/revert"),
    "vm.checkpoint.delete": ("DELETE", "/v1/vms/{name}/checkpoints/{checkpoint}"),
    "migration.cancel": ("POST", "/v1/migrations/{id}/actions/cancel"),
    "network.create": ("POST", "/v1/networks"),
    "network.delete": ("DELETE", "/v1/networks/{name}"),
    "volume.create": ("POST", "/v1/volumes"),
    "volume.delete": ("DELETE", "/v1/volumes/{name}"),
    "volume.redirect": ("POST", "/v1/volumes/{name}/actions/redirect"),
    "volume.restore": ("POST", "/v1/volumes/{name}/actions/restore"),
    "volume.disk.import": ("POST", "/v1/volumes/{volume}/actions/import"),
    "host.confirm-down": ("POST", "/v1/hosts/{name}/actions/confirm-down"),
    "host.power.set": ("POST", "/v1/hosts/{name}/power"),
    "host.power.remove": ("DELETE", "/v1/hosts/{name}/power"),
    "host.power.test": ("POST", "/v1/hosts/{name}/power/actions/test"),
    "host.power.on": ("POST", "/v1/hosts/{name}/power/actions/on"),
    "host.power.off": ("POST", "/v1/hosts/{name}/power/actions/off"),
    "host.power.reset": ("POST", "/v1/hosts/{name}/power/actions/reset"),
    "cluster.validate": ("POST", "/v1/cluster/actions/validate"),
    "task.cancel": ("POST", "/v1/tasks/{id}/actions/cancel"),
}


def explain(error: ValidationError) -> InvalidRequest:
    """The first fault of a validation error as one line a person can act on."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).count(".")) or "request"
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{where}: {message}", hint="correct the value and ask again")


def parse_request(data: dict[str, Any]) -> Request:
    """The typed request of a JSON object with ``kind``; InvalidRequest with the first fault."""
    try:
        return _adapter().validate_python(data)
    except ValidationError as error:
        raise explain(error) from None


def http_call(request: Request) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and JSON body (fields at their default left out) of a request."""
    method, template = ROUTES[request.kind]
    fields = request.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    path = template.format(**request.model_dump(mode="json"))
    body = {key: value for key, value in fields.items() if "{" + key + "}" not in template}
    return method, path, (body if method == "POST" else None)
