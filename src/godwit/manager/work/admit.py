"""May this request begin? Pure: one snapshot and one request in, a subject out, or a clear no.

Runs before a task exists, so that a mistake is answered at once and leaves nothing behind. The
steps that act decide again on fresh records; this is courtesy and queueing, not safety.
"""

from __future__ import annotations

from dataclasses import replace

from godwit.manager.leave_rules import check_empty
from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state, state_of, volume_of
from godwit.manager.work.checkpoint_rules import CheckpointRequest, check_request, check_state
from godwit.manager.work.clone_rules import admit_clone
from godwit.manager.work.define import uefi_of, variables_volume
from godwit.manager.work.disk_rules import (
    admit_disk,
    admit_volume,
    check_disk_action,
    check_kind,
)
from godwit.manager.work.lookup import known as known
from godwit.manager.work.mark_rules import (
    Standing,
    admit_standing,
    check_rules,
    host_that_answers,
)
from godwit.manager.work.power_rules import admit_power
from godwit.manager.work.validation_rules import admit_validation
from godwit.model import requests as ask
from godwit.model.checkpoints import check_whole
from godwit.model.clones import refuse_if_cloned
from godwit.model.disks import is_user_data, iso_path
from godwit.model.errors import Conflict, InvalidRequest, NotFound, Refused, Unavailable
from godwit.model.host import HostInfo, HostState
from godwit.model.host_requests import PowerRequest
from godwit.model.ownership import Owner, OwnerState
from godwit.model.task import Task
from godwit.planner.placement import Need

BOOT_FILES = "/clusterstorage/"  # kernels and initrds must lie where every host sees them

DISK_REQUESTS = (ask.AddDisk, ask.RemoveDisk, ask.ResizeDisk, ask.MoveDisk, ask.ExportDisk)
VmRequest = (
    ask.DeleteVm
    | ask.StartVm
    | ask.StopVm
    | ask.PauseVm
    | ask.ResumeVm
    | ask.SaveVm
    | ask.RestoreVm
    | ask.MigrateVm
    | ask.CloneVm
    | ask.AddDisk
    | ask.RemoveDisk
    | ask.ResizeDisk
    | ask.MoveDisk
    | ask.ExportDisk
    | CheckpointRequest
)
Action = (
    VmRequest
    | ask.CreateVm
    | ask.CreateNetwork
    | ask.DeleteNetwork
    | ask.CancelMigration
    | ask.CancelTask
    | ask.CreateVolume
    | ask.SetVolume
    | ask.DeleteVolume
    | ask.ImportDisk
    | ask.RedirectVolume
    | ask.RestoreVolume
    | ask.ConfirmHostDown
    | ask.RemoveHost
)


def admit(snapshot: Snapshot, request: ask.Request) -> str:
    """The subject of the task to be, or the error that refuses it."""
    subject = ask.subject_of(request)
    if isinstance(request, Standing):
        admit_standing(snapshot, request)
    elif isinstance(request, PowerRequest):
        admit_power(snapshot, request)
    elif isinstance(request, ask.ValidateCluster):
        admit_validation(snapshot, request)  # all the rest only looks
    else:
        _admit_action(snapshot, request)
    if not isinstance(request, ask.CancelMigration | ask.CancelTask):
        _admit_beside(snapshot, request, subject)
    return subject


def _admit_action(snapshot: Snapshot, request: Action) -> None:
    match request:
        case ask.CreateVm():
            _admit_create(snapshot, request)
        case ask.CreateNetwork():
            if request.name in snapshot.networks:
                raise Conflict(
                    f"there is a network {request.name} already",
                    hint="look at it: godwit network list",
                )
        case ask.DeleteNetwork():
            snapshot.check_vms_whole()
            known(snapshot.networks.get(request.name), "network", request.name)
            check_unused(snapshot, request.name)
        case ask.CancelMigration() | ask.CancelTask():
            _admit_cancel(snapshot, request)
        case ask.CreateVolume() | ask.SetVolume() | ask.DeleteVolume() | ask.ImportDisk():
            if isinstance(request, ask.DeleteVolume):
                snapshot.check_vms_whole()
            admit_volume(snapshot, request)
        case ask.RedirectVolume() | ask.RestoreVolume():
            _admit_redirect(snapshot, request)
        case ask.ConfirmHostDown():
            check_silent(snapshot, request.name)
        case ask.RemoveHost():
            check_empty(snapshot, request.name)
        case _:
            _admit_vm_action(snapshot, request)


def _admit_cancel(snapshot: Snapshot, request: ask.CancelMigration | ask.CancelTask) -> None:
    if isinstance(request, ask.CancelMigration):
        known(snapshot.migrations.get(request.id), "migration", request.id)
    else:
        known(snapshot.tasks.get(request.id), "task", request.id)


def host_that_is_up(snapshot: Snapshot, name: str) -> HostInfo:
    """A host that takes VMs now; NotFound or Refused otherwise."""
    info = known(snapshot.hosts.get(name), "host", name)
    state, reason = state_of(snapshot, name)
    if state is not HostState.UP:
        raise Refused(f"{name} is {state.value}: {reason}", hint="choose another host")
    return info


def check_silent(snapshot: Snapshot, name: str) -> HostInfo:
    """A host that may be off for all that is known; NotFound or Refused otherwise."""
    info = known(snapshot.hosts.get(name), "host", name)
    if name in snapshot.leases or name in snapshot.agents:
        _, reason = host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
        raise Refused(
            f"{name} answers{f' ({reason})' if reason else ''}, so it is not down",
            hint="switch it off first, then wait until godwit host list says that it is down",
        )
    return info


def _admit_redirect(snapshot: Snapshot, request: ask.RedirectVolume | ask.RestoreVolume) -> None:
    volume = known(volume_of(snapshot, request.name), "volume", request.name)
    host_that_answers(snapshot, request.host)
    if request.host not in volume.hosts:
        raise NotFound(
            f"{request.host} does not see the volume {request.name}",
            hint=f"look: godwit volume show {request.name}",
        )


def _admit_create(snapshot: Snapshot, request: ask.CreateVm) -> None:
    if request.name in snapshot.vms or request.name in snapshot.owners:
        raise Conflict(
            f"there is a VM {request.name} already",
            hint=f"choose another name, or look at it: godwit vm show {request.name}",
        )
    _check_boot(request)
    for network in request.networks:
        known(snapshot.networks.get(network), "network", network)
    volumes = snapshot.volume_names
    for disk in request.disks:
        known(disk.volume if disk.volume in volumes else None, "volume", disk.volume)
        check_kind(snapshot, disk.volume, lun=False)
    if request.iso is not None:
        volume, _ = iso_path(request.iso)
        if not volume:
            raise InvalidRequest(
                f"{request.iso} is no file in a volume", hint="write it like shared:debian.iso"
            )
        known(volume if volume in volumes else None, "volume", volume)
    if request.cloud_init is not None and not is_user_data(request.cloud_init):
        raise InvalidRequest(
            f"{request.cloud_init} is no user data that the cluster keeps",
            hint="upload it first: POST /v1/user-data answers the path to use",
        )
    check_rules(snapshot, request)
    if request.host is not None:
        known(snapshot.hosts.get(request.host), "host", request.host)
    elif local := {disk.volume for disk in request.disks} & snapshot.local_volumes:
        raise InvalidRequest(
            f"each host has its own volume {min(local)}", hint="say which one: --host HOST"
        )
    if not snapshot.hosts:
        raise Unavailable(
            "no host has joined yet, so nothing is known about what VMs may use",
            hint="wait for a host to come up: godwit host list",
        )
    if request.firmware == "uefi":
        uefi_of(snapshot, request.host)
        volume = variables_volume(snapshot, request)
        known(volume if volume in volumes else None, "volume", volume)
        check_kind(snapshot, volume, lun=False)


def _check_boot(request: ask.CreateVm) -> None:
    if request.image and request.kernel:
        raise InvalidRequest("both an image and a kernel are given", hint="give one of them")
    if request.initrd and not request.kernel:
        raise InvalidRequest("an initrd without a kernel", hint="give the kernel too")
    if request.append and not (request.kernel or request.image):
        raise InvalidRequest(
            "a kernel command line without a kernel", hint="give a kernel or an image"
        )
    if not (request.image or request.kernel or request.disks or request.iso):
        raise InvalidRequest(
            f"{request.name} would have nothing to boot from",
            hint="give an image, a kernel, an ISO or a disk",
        )
    for path in (request.kernel, request.initrd):
        if path and (not path.startswith(BOOT_FILES) or ".." in path.split("/")):
            raise InvalidRequest(
                f"{path} is not a file that every host sees",
                hint="upload it first: POST /v1/boot-files answers the path to use",
            )


def check_unused(snapshot: Snapshot, name: str) -> None:
    """Refused while a VM is plugged into this network."""
    users = sorted(
        vm.name for vm in snapshot.vms.values() if any(nic.network == name for nic in vm.nics)
    )
    if users:
        raise Refused(
            f"the network {name} is used by {', '.join(users)}", hint="delete these VMs first"
        )


def _admit_vm_action(snapshot: Snapshot, request: VmRequest) -> None:
    known(snapshot.vms.get(request.name), "vm", request.name)
    owner = snapshot.owner(request.name)
    wanted = request.to if isinstance(request, ask.MigrateVm) else getattr(request, "host", None)
    if wanted is not None:
        known(snapshot.hosts.get(wanted), "host", wanted)
    check_action(owner, request)
    vm = snapshot.vms[request.name]
    match request:
        case ask.CloneVm():
            admit_clone(snapshot, request)
        case ask.CreateCheckpoint() | ask.RevertCheckpoint() | ask.DeleteCheckpoint():
            check_request(vm, request)
            refuse_if_cloned(vm, snapshot.vms.values(), "change the disks of")
        case ask.StartVm() | ask.RestoreVm():
            check_whole(vm)
            refuse_if_cloned(vm, snapshot.vms.values(), "start")
        case ask.DeleteVm():
            refuse_if_cloned(vm, snapshot.vms.values(), "delete")
    if isinstance(request, DISK_REQUESTS):
        admit_disk(snapshot, request)


def check_action(owner: Owner, request: VmRequest) -> None:
    """May this action begin on a VM with this ownership record? Raises when not."""
    name, state = request.name, owner.state
    if owner.migration is not None:
        raise Conflict(
            f"{name} is being moved by {owner.migration.id}",
            hint=f"wait for it, or run: godwit migration cancel {owner.migration.id}",
        )
    alive = state in (OwnerState.RUNNING, OwnerState.STARTING)
    match request:
        case ask.DeleteVm() if alive:
            raise Refused(f"{name} runs on {owner.host}", hint=f"first: godwit vm stop {name}")
        case ask.StartVm() | ask.RestoreVm() if alive:
            raise Conflict(
                f"{name} already runs on {owner.host}", hint=f"look: godwit vm show {name}"
            )
        case ask.RestoreVm() if state is not OwnerState.SAVED:
            raise Refused(
                f"{name} has no saved state", hint=f"start it instead: godwit vm start {name}"
            )
        case ask.MigrateVm() if state is OwnerState.RUNNING and request.to == owner.host:
            raise Refused(f"{name} already runs on {owner.host}", hint="name another host")
        case ask.MigrateVm() | ask.PauseVm() | ask.ResumeVm() | ask.SaveVm() if (
            state is not OwnerState.RUNNING
        ):
            raise Refused(
                f"{name} is {state.value}, not running", hint=f"first: godwit vm start {name}"
            )
        case ask.CloneVm() if state is not OwnerState.STOPPED:
            first = "restore" if state is OwnerState.SAVED else "stop"
            raise Refused(
                f"{name} is {state.value}: a clone is made of a stopped VM",
                hint=f"first: godwit vm {first} {name}",
            )
        case ask.CreateCheckpoint() | ask.RevertCheckpoint() | ask.DeleteCheckpoint():
            check_state(owner, request)
        case (
            ask.AddDisk() | ask.RemoveDisk() | ask.ResizeDisk() | ask.MoveDisk() | ask.ExportDisk()
        ):
            check_disk_action(owner, request)
        case _:
            return


def _admit_beside(snapshot: Snapshot, request: ask.Request, subject: str) -> None:
    for task in snapshot.active_tasks(subject):
        if not may_join(request, task):
            raise busy(task)


def busy(task: Task) -> Conflict:
    """The refusal that names the task in the way."""
    name, kind = task.subject.partition("/")[2], task.request.get("kind")
    hint = f"wait for it: godwit task wait {task.id}"
    if kind in ("vm.disk.move", "host.drain", "host.maintenance.enter"):
        hint = f"wait for it, or run: godwit task cancel {task.id}"
    if kind == "vm.migrate" and (move := task.progress.get("migration")):
        hint = f"wait for it, or run: godwit migration cancel {move}"
    return Conflict(f"{name} is busy: {kind} is still under way (task {task.id})", hint=hint)


# What a cut of the power would disturb; a change of disks ends well without the machine.
_UNDISTURBED = frozenset({"vm.create", "vm.delete", "vm.migrate", "vm.disk.export"})


def may_join(request: ask.Request, running: Task) -> bool:
    """May ``request`` begin while ``running`` is unfinished? Cutting the power, and rules, may."""
    if isinstance(request, ask.SetVm):
        return running.request.get("kind") not in ("vm.create", "vm.delete", "vm.set")
    forced = isinstance(request, ask.StopVm) and request.force
    kind = running.request.get("kind")
    repeated = kind == "vm.stop" and bool(running.request.get("force"))
    return forced and kind not in _UNDISTURBED and not repeated


def need_of(snapshot: Snapshot, vm: str) -> Need:
    """What the VM asks of a host."""
    owner, spec = snapshot.owner(vm), known(snapshot.vms.get(vm), "vm", vm)
    awake = owner.state is not OwnerState.STOPPED
    need = Need.of(spec, awake=awake)
    return replace(need, stays_on=owner.host) if awake and spec.pins.stays else need
