"""Disks and volumes: what may be asked for and what it comes to, exactly. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from godwit.manager.snapshot import Snapshot
from godwit.model.checkpoints import check_movable, check_removal, check_whole
from godwit.model.clones import refuse_if_cloned
from godwit.model.disks import (
    BROKERED_ONLY,
    CLUSTER_STORAGE,
    DEFAULT_FORMAT,
    image_path,
    imported_path,
    lun_path,
    volume_of,
)
from godwit.model.errors import Conflict, InvalidRequest, NotFound, Refused
from godwit.model.fencing import place_of
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import (
    AddDisk,
    CreateVolume,
    DeleteVolume,
    ExportDisk,
    ImportDisk,
    MoveDisk,
    RemoveDisk,
    ResizeDisk,
    SetVolume,
)
from godwit.model.units import format_size
from godwit.model.vm import Disk, DiskFormat, DiskSource, Vm
from godwit.model.volume import SERVED, Volume
from godwit.qemu.pins import new_serial, next_disk
from godwit.storage.formats import stored_size

DiskRequest = AddDisk | RemoveDisk | ResizeDisk | MoveDisk | ExportDisk


def define_disk(
    vm: Vm,
    request: AddDisk,
    *,
    size_bytes: int,
    mark: str,
    local: frozenset[str] = frozenset(),
    rbd: frozenset[str] = frozenset(),
) -> Disk:
    """The disk that ``request`` stands for; Refused when the VM has too many already.

    ``mark`` keeps the name of a new image apart from that of an earlier disk in the same place,
    which may have been kept: what has our mark is ours to delete when something fails. An image
    in one of the ``rbd`` volumes is as a LUN: neither made nor deleted, but no guest's to command.
    """
    disk_id, lun = next_disk(vm.disks)
    source: DiskSource = "image"
    if request.device is not None or request.lun is not None or request.volume in rbd:
        source = "lun" if request.device is None else "device"
    image_format: DiskFormat = request.format or DEFAULT_FORMAT if source == "image" else "raw"
    volume = "" if source == "device" else request.volume or ""
    wanted = given_path(request)
    return Disk(
        id=disk_id,
        volume=volume,
        path=wanted or image_path(volume, vm.name, f"{disk_id}-{mark}", image_format),
        size_bytes=size_bytes,
        format=image_format,
        serial=new_serial(vm.pins.uuid, disk_id),
        lun=lun,
        tier=request.tier,
        source=source,
        passthrough=request.passthrough or (request.lun is not None and request.tier != "brokered"),
        local=volume in local,
    )


def given_path(request: AddDisk) -> str | None:
    """The image, LUN or device that is to be used as it is; None for an image to be made.

    An image is named by its whole path or by that below its volume. InvalidRequest when it lies
    elsewhere.
    """
    if request.lun is not None and request.volume is not None:
        return lun_path(request.volume, request.lun)
    if request.device is not None or request.path is None:
        return request.device
    path = request.path
    if not path.startswith("/"):
        path = f"{CLUSTER_STORAGE}/{request.volume}/{path}"
    if volume_of(path) != request.volume:
        raise InvalidRequest(
            f"{request.path} does not lie in the volume {request.volume}",
            hint=f"give a path below {CLUSTER_STORAGE}/{request.volume}",
        )
    return path


def moved_disk(
    vm: Vm, request: MoveDisk, *, mark: str, local: frozenset[str] = frozenset()
) -> Disk:
    """What the disk will be; Refused for one that cannot move, or is there already."""
    disk = find_disk(vm, request.disk)
    if disk.source != "image":
        raise Refused(
            f"{disk.id} of {vm.name} is a {disk.source}, {disk.path}, and no image",
            hint="only images move; a stopped VM's disk can be exported: godwit vm disk export",
        )
    check_movable(vm, disk)
    volume, image_format = request.to or disk.volume, request.format or disk.format
    if (volume, image_format) == (disk.volume, disk.format):
        raise Refused(
            f"{disk.id} of {vm.name} is {disk.format} in {disk.volume} already",
            hint="name another volume or format",
        )
    stored_size(image_format, disk.size_bytes)
    direct = disk.tier == "direct" and image_format in BROKERED_ONLY
    return disk.but(
        volume=volume,
        format=image_format,
        path=image_path(volume, vm.name, f"{disk.id}-{mark}", image_format),
        tier="auto" if direct else disk.tier,
        generation=disk.generation + 1,
        local=volume in local,
    )


def find_disk(vm: Vm, disk_id: str) -> Disk:
    """The VM's disk of that name; NotFound otherwise."""
    for disk in vm.disks:
        if disk.id == disk_id:
            return disk
    raise NotFound(
        f"{vm.name} has no disk {disk_id}", hint=f"look with: godwit vm disk list {vm.name}"
    )


def with_disk(vm: Vm, disk: Disk) -> Vm:
    """The VM with this disk, in its old place if it had one: order is boot order."""
    if any(one.id == disk.id for one in vm.disks):
        return vm.but(disks=tuple(disk if one.id == disk.id else one for one in vm.disks))
    return vm.but(disks=(*vm.disks, disk))


def without_disk(vm: Vm, disk_id: str) -> Vm:
    """The VM without that disk."""
    return vm.but(disks=tuple(one for one in vm.disks if one.id != disk_id))


def check_disk_action(owner: Owner, request: DiskRequest) -> None:
    """May the disks of a VM with this ownership record change (or be copied) now?"""
    name = request.name
    if owner.state is OwnerState.STARTING:
        raise Conflict(f"{name} is just starting on {owner.host}", hint="try again when it runs")
    if owner.state is OwnerState.SAVED:
        raise Refused(
            f"{name} is saved: its memory expects its disks as they are",
            hint=f"first: godwit vm restore {name}",
        )
    if isinstance(request, ExportDisk) and owner.state is OwnerState.RUNNING:
        raise Refused(f"{name} runs and writes to its disks", hint=f"first: godwit vm stop {name}")


def check_growth(vm: Vm, request: ResizeDisk) -> Disk:
    """The disk that is to grow; Refused when it would shrink, InvalidRequest when its format
    cannot hold as much."""
    disk = find_disk(vm, request.disk)
    if request.size_bytes < disk.size_bytes:
        raise Refused(
            f"{disk.id} of {vm.name} has {format_size(disk.size_bytes)}: a disk only grows",
            hint="what lies beyond the new end would be lost",
        )
    stored_size(disk.format, request.size_bytes)
    return disk


def check_free(vms: Iterable[Vm], path: str) -> None:
    """Refused while a VM has this image or device: two writers would destroy it."""
    for vm in vms:
        for disk in vm.disks:
            if disk.path == path:
                raise Refused(
                    f"{path} is {disk.id} of {vm.name}", hint="a disk belongs to one VM at a time"
                )


def admit_disk(snapshot: Snapshot, request: DiskRequest) -> None:
    """Refuse at once what cannot be done to the VM's disks."""
    vm = snapshot.vms[request.name]
    check_whole(vm)
    if not isinstance(request, ExportDisk):
        refuse_if_cloned(vm, snapshot.vms.values(), "change the disks of")
    match request:
        case AddDisk():
            if request.device is None:
                _know_volume(snapshot, request.volume or "")
                check_kind(
                    snapshot,
                    request.volume or "",
                    lun=request.lun is not None,
                    image=request.path if request.format == "raw" else None,
                )
            path = given_path(request)
            if path is not None:
                check_free(snapshot.vms.values(), path)
            next_disk(vm.disks)
        case ResizeDisk():
            check_growth(vm, request)
        case MoveDisk():
            volume = moved_disk(vm, request, mark="").volume
            _know_volume(snapshot, volume)
            if volume in snapshot.volumes and snapshot.volumes[volume].kind in ("iscsi", "rbd"):
                raise Refused(
                    f"the volume {volume} takes no images from here",
                    hint="name another volume",
                )
        case ExportDisk():
            find_disk(vm, request.disk)
            _check_place(snapshot, request.target)
        case RemoveDisk():
            check_removal(vm, find_disk(vm, request.disk).id)


def admit_volume(
    snapshot: Snapshot, request: CreateVolume | SetVolume | DeleteVolume | ImportDisk
) -> None:
    """Refuse at once what cannot be done with the volume."""
    match request:
        case CreateVolume():
            if request.name in snapshot.volumes:
                raise Conflict(
                    f"there is a volume {request.name} already",
                    hint=f"look at it: godwit volume show {request.name}",
                )
            define_volume(snapshot, request, now=0.0)
        case SetVolume():
            changed_volume(snapshot.volumes.get(request.name), request)
        case DeleteVolume():
            if request.name not in snapshot.volumes:
                raise NotFound(
                    f"no volume {request.name} is defined", hint="look with: godwit volume list"
                )
            check_volume_unused(snapshot, request.name)
        case ImportDisk():
            _know_volume(snapshot, request.volume)
            check_kind(snapshot, request.volume, lun=False)
            _check_source(snapshot, request.source)
            check_free(snapshot.vms.values(), import_target(request))


def check_kind(snapshot: Snapshot, volume: str, *, lun: bool, image: str | None = None) -> None:
    """Refused when images are asked of a volume of LUNs, or a LUN of one that has files.

    ``image`` is the name of a raw one that is there already: all that a Ceph pool may be asked.
    """
    if volume in snapshot.rbd_volumes and image is None:
        raise Refused(
            f"in the Ceph pool of {volume} Godwit makes no images",
            hint=f"make one with rbd create, then: {volume} --existing IMAGE --format raw",
        )
    known = snapshot.volumes.get(volume)
    iscsi = known is not None and known.kind == "iscsi"
    if iscsi and not lun:
        raise Refused(
            f"{volume} holds LUNs, no images", hint=f"name one: {volume} --lun N, or another volume"
        )
    if lun and not iscsi:
        raise Refused(f"{volume} has no LUNs", hint="name an iscsi volume: godwit volume list")


def import_target(request: ImportDisk) -> str:
    """Where the imported image will lie."""
    return imported_path(request.volume, request.name, request.target_format)


def define_volume(snapshot: Snapshot, request: CreateVolume, *, now: float) -> Volume:
    """The volume that ``request`` stands for; Refused when hosts do not see what it promises."""
    if request.path and not request.path.startswith("/"):
        raise InvalidRequest(f"{request.path!r} is no whole path", hint="begin it with /")
    if request.type in SERVED:
        # Each host finds out by itself whether it reaches the server.
        up = sorted(name for name in snapshot.hosts if name in snapshot.agents)
        return Volume(
            name=request.name,
            kind=request.type,
            server=request.server,
            export=request.export,
            portal=request.portal,
            pool=request.pool,
            client=request.client,
            target=request.target,
            fence_url=request.fence_url,
            created_at=now,
            coordinator=next(iter(up), None),
        )
    seen = sorted(i.name for i in snapshot.hosts.values() if request.name in i.volumes)
    alive = [name for name in seen if name in snapshot.agents]
    place = f"{CLUSTER_STORAGE}/{request.name}"
    if request.type == "dir" and not seen:
        raise Refused(
            f"no host sees {place}",
            hint=f"mount the shared file system at {place} on the hosts first",
        )
    return Volume(
        name=request.name,
        kind=request.type,
        path=request.path,
        created_at=now,
        coordinator=next(iter(alive), None),
    )


def changed_volume(volume: Volume | None, request: SetVolume) -> Volume:
    """The definition as it is to be. NotFound; Refused where nothing is served."""
    if volume is None:
        raise NotFound(f"no volume {request.name} is defined", hint="look with: godwit volume list")
    if request.fence_url and not place_of(volume):
        raise Refused(
            f"{volume.name} is of kind {volume.kind}, and no fencing daemon guards that",
            hint="only an nfs or iscsi volume has one",
        )
    return volume if request.fence_url is None else volume.but(fence_url=request.fence_url)


def check_volume_unused(snapshot: Snapshot, name: str) -> None:
    """Refused while a disk, a boot file or a saved memory lies in the volume, or work goes on."""
    users = sorted(vm.name for vm in snapshot.vms.values() if _uses(vm, snapshot.owners, name))
    if users:
        raise Refused(
            f"the volume {name} is used by {', '.join(users)}",
            hint="delete these VMs, or remove their disks there first",
        )
    for task in snapshot.tasks.values():
        if not task.state.final and task.subject.startswith(f"image/{name}/"):
            raise Conflict(
                f"the volume {name} is busy: task {task.id} writes to it",
                hint=f"wait for it: godwit task wait {task.id}",
            )


def _uses(vm: Vm, owners: Mapping[str, Owner], volume: str) -> bool:
    owner = owners.get(vm.name)
    saved = owner.saved.path if owner and owner.saved else None
    places = (vm.boot.kernel, vm.boot.initrd, saved)
    return volume in vm.volumes or any(
        path is not None and volume_of(path) == volume for path in places
    )


def _know_volume(snapshot: Snapshot, name: str) -> None:
    if name not in snapshot.volume_names:
        raise NotFound(f"no volume {name}", hint="look with: godwit volume list")


def _check_place(snapshot: Snapshot, path: str) -> None:
    """A file of ours lies in a volume that is known, and under no name that leads elsewhere."""
    volume = volume_of(path)
    if volume is None:
        raise InvalidRequest(
            f"{path} is not a file in a volume", hint=f"give a path like {CLUSTER_STORAGE}/V/FILE"
        )
    _know_volume(snapshot, volume)


def _check_source(snapshot: Snapshot, source: str) -> None:
    if source.startswith("/"):
        _check_place(snapshot, source)
        check_free(snapshot.vms.values(), source)
        return
    try:
        url = urlsplit(source)
        usable = url.scheme in ("http", "https") and bool(url.hostname)
    except ValueError:
        usable = False
    if not usable or not source.isprintable():
        raise InvalidRequest(
            f"{source!r} is neither a path nor a URL",
            hint=f"give a path below {CLUSTER_STORAGE}, or an http(s) URL",
        )
