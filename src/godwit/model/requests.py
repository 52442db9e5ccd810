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
from godwit.model.errors import InvalidRequest
from godwit.model.vm import DiskFormat


class NewDisk(Value):
    """A disk to create with a VM: ``VOLUME:SIZE[:FORMAT]``."""

    volume: Name
    size_bytes: int = Field(gt=0, le=1 << 50)
    format: DiskFormat = "qcow2"


class CreateVm(Value):
    """Define a VM; it is not started. ``host`` is where the first start prefers to go."""

    kind: Literal["vm.create"] = "vm.create"
    name: Name
    memory_bytes: int = Field(ge=16 << 20, le=1 << 44)
    cpus: int = Field(default=1, ge=1, le=256)
    image: Name | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    disks: tuple[NewDisk, ...] = ()
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
    | CancelMigration
    | CreateNetwork
    | DeleteNetwork
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
    "migration.cancel": ("POST", "/v1/migrations/{id}/actions/cancel"),
    "network.create": ("POST", "/v1/networks"),
    "network.delete": ("DELETE", "/v1/networks/{name}"),
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
