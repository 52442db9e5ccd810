"""One typed request per action: a value that is validated, stored, carried out and rendered.

The manager carries a request out, the task stores it, and ``godwit.model.render`` prints it as a
command line, curl, Python or an Ansible task. ``kind`` tells them apart; the HTTP route of each
kind is data in ``ROUTES``.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from godwit.model.base import Name, Value
from godwit.model.cluster_requests import CPU_MODEL
from godwit.model.cluster_requests import RemoveHost as RemoveHost
from godwit.model.cluster_requests import SetCluster as SetCluster
from godwit.model.cluster_requests import UpdateCluster as UpdateCluster
from godwit.model.disk_requests import AddDisk as AddDisk
from godwit.model.disk_requests import ExportDisk as ExportDisk
from godwit.model.disk_requests import MoveDisk as MoveDisk
from godwit.model.disk_requests import NewDisk as NewDisk
from godwit.model.disk_requests import RemoveDisk as RemoveDisk
from godwit.model.disk_requests import ResizeDisk as ResizeDisk
from godwit.model.errors import InvalidRequest
from godwit.model.firmware import FirmwareKind
from godwit.model.host_requests import CheckHostPower as CheckHostPower
from godwit.model.host_requests import ConfirmHostDown as ConfirmHostDown
from godwit.model.host_requests import RemoveHostPower as RemoveHostPower
from godwit.model.host_requests import ResetHost as ResetHost
from godwit.model.host_requests import SetHostPower as SetHostPower
from godwit.model.host_requests import SwitchHostOff as SwitchHostOff
from godwit.model.host_requests import SwitchHostOn as SwitchHostOn
from godwit.model.maintenance_requests import DrainHost as DrainHost
from godwit.model.maintenance_requests import EnterMaintenance as EnterMaintenance
from godwit.model.maintenance_requests import ExitMaintenance as ExitMaintenance
from godwit.model.maintenance_requests import ReturnHost as ReturnHost
from godwit.model.rule_requests import SetVm as SetVm
from godwit.model.rule_requests import WithRules as WithRules
from godwit.model.validation_requests import ValidateCluster as ValidateCluster
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
from godwit.model.volume_requests import (
    SetVolume as SetVolume,
)


class CreateVm(WithRules):
    """Define a VM; it is not started. ``host`` is where the first start prefers to go.

    ``iso`` (``VOLUME:PATH``) is an image in its CD drive, which it starts from while its first disk
    holds nothing to start from. With ``firmware`` uefi it has UEFI variables in an image beside its
    first disk. ``cloud_init`` is user data for the guest's cloud-init, as
    ``POST /v1/user-data`` answered it; the guest finds it on a CD of its own (NoCloud).
    ``cpu``: the cluster's ``baseline``, its ``host``'s own, or a named model.
    With ``guest_agent`` it has a port for qemu-guest-agent. Its rules are those of
    `model.rules.Rules`.
    """

    kind: Literal["vm.create"] = "vm.create"
    name: Name
    memory_bytes: int = Field(ge=16 << 20, le=1 << 44)
    cpus: int = Field(default=1, ge=1, le=256)
    cpu: str = Field(default="baseline", pattern=rf"^(baseline|host|{CPU_MODEL})$")
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
    | SetVm
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
    | SetVolume
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
    | DrainHost
    | ReturnHost
    | EnterMaintenance
    | ExitMaintenance
    | SetCluster
    | UpdateCluster
    | ValidateCluster
    | RemoveHost
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
    "vm.set": ("POST", "/v1/vms/{name}/actions/set"),
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
    "volume.set": ("POST", "/v1/volumes/{name}/actions/set"),
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
    "host.drain": ("POST", "/v1/hosts/{name}/actions/drain"),
    "host.return": ("POST", "/v1/hosts/{name}/actions/return"),
    "host.maintenance.enter": ("POST", "/v1/hosts/{name}/actions/enter-maintenance"),
    "host.maintenance.exit": ("POST", "/v1/hosts/{name}/actions/exit-maintenance"),
    "cluster.set": ("POST", "/v1/cluster/actions/set"),
    "cluster.update": ("POST", "/v1/cluster/actions/update"),
    "cluster.validate": ("POST", "/v1/cluster/actions/validate"),
    "cluster.remove": ("POST", "/v1/hosts/{name}/actions/remove"),
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


def subject_of(request: Request) -> str:
    """What a request, its task and their events are about: ``kind/name``."""
    match request:
        case CancelMigration():
            return f"migration/{request.id}"
        case CancelTask():
            return f"task/{request.id}"
        case ValidateCluster():
            return "cluster/validation"
        case ImportDisk():
            return f"image/{request.volume}/{request.name}"
        case SetCluster():
            return "cluster/settings"
        case UpdateCluster():
            return "cluster/update"
        case RemoveHost():
            return f"host/{request.name}"
        case _:
            return f"{request.kind.partition('.')[0]}/{request.name}"


def http_call(request: Request) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and JSON body (fields at their default left out) of a request."""
    method, template = ROUTES[request.kind]
    fields = request.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    path = template.format(**request.model_dump(mode="json"))
    body = {key: value for key, value in fields.items() if "{" + key + "}" not in template}
    return method, path, (body if method == "POST" else None)
