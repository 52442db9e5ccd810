"""Disks of a VM: added, removed and grown, whether it runs or not.

    add     image made -> record -> machine          taken back in reverse when the machine says no
    remove  machine -> record -> image deleted
    resize  image (and machine) -> record

The record always has what the machine may have: a disk is in it before the guest sees it, and until
the guest has let go, so that neither a start nor a move ever builds another machine. Each write
compares the ownership record too: a start or a move that began meanwhile makes it fail. Agents take
the same order twice without harm, so a task that was taken over asks again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from godwit.manager.work.admit import check_action
from godwit.manager.work.define_acts import on_some_host
from godwit.manager.work.disk_rules import (
    DiskRequest,
    check_free,
    check_growth,
    define_disk,
    find_disk,
    given_path,
    with_disk,
    without_disk,
)
from godwit.manager.work.fresh import vms_since
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.work.vms import host_of
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.checkpoints import check_removal, check_whole
from godwit.model.clones import refuse_if_cloned
from godwit.model.errors import Conflict, GodwitError, NotFound, OperationFailed, OutcomeUnknown
from godwit.model.host import HostInfo
from godwit.model.ownership import Owner, OwnerState
from godwit.model.requests import AddDisk, RemoveDisk, ResizeDisk
from godwit.model.units import format_size
from godwit.model.vm import Disk, Vm
from godwit.store.api import Compare, absent, mod_is, put
from godwit.store.records import CasFailed, Versioned, encode

_HOT_S = 60.0
_MEASURE_S = 30.0
_GROW_S = 600.0
_UNMEASURED = 512
"""Bytes that a device's record says until the host that has it answers with its size."""


class Work:
    """A VM's records as read, and what may be written on the strength of them."""

    def __init__(
        self, world: World, run: TaskRun, spec: Versioned[Vm], owner: Versioned[Owner] | None
    ) -> None:
        self.world = world
        self.run = run
        self.spec = spec
        self._owner = owner

    @staticmethod
    async def of(world: World, run: TaskRun, request: DiskRequest) -> Work:
        """Read both records; refused when the VM's disks may not change now."""
        name = request.name
        spec = await world.records.vm(name)
        if spec is None:
            raise NotFound(f"no vm {name}", hint="look with: godwit vm list")
        owner = await world.records.owner(name)
        check_action(owner.value if owner else Owner(), request)
        # Making a clone writes the owner record, too, which is compared when this is written.
        vms = await vms_since(world, max(spec.revision, owner.revision if owner else 0))
        check_whole(spec.value)
        refuse_if_cloned(spec.value, vms, "change the disks of")
        return Work(world, run, spec, owner)

    @property
    def vm(self) -> Vm:
        """The definition as read."""
        return self.spec.value

    @property
    def owner(self) -> Owner:
        """The ownership record as read."""
        return self._owner.value if self._owner else Owner()

    @property
    def local_volumes(self) -> frozenset[str]:
        """Volumes of which each host has its own."""
        return self.world.cache.snapshot.local_volumes

    @property
    def runs(self) -> bool:
        """The machine is there, so its host has to change it too."""
        return self.owner.state is OwnerState.RUNNING

    def host(self) -> HostInfo:
        """The host the VM runs on; Unavailable when its agent cannot be asked."""
        return host_of(self.world.cache.snapshot, self.owner)

    def unchanged(self) -> list[Compare]:
        """That definition and ownership are still as they were read."""
        owner_key = keys.vm_owner(self.vm.name)
        mine = mod_is(owner_key, self._owner.revision) if self._owner else absent(owner_key)
        return [mod_is(keys.vm_spec(self.vm.name), self.spec.revision), mine]

    async def write(self, vm: Vm, reason: str) -> None:
        """The new definition, in one transaction with the task's record. Conflict when the VM
        has begun something else meanwhile."""
        try:
            await self.run.say(
                reason,
                progress={"written": True},
                compare=self.unchanged(),
                also=[put(keys.vm_spec(vm.name), encode(vm))],
            )
        except CasFailed:
            raise Conflict(
                f"{vm.name} was started, stopped or moved at the same moment",
                hint="look, and ask again",
            ) from None

    async def ask_owner(self, verb: str, body: dict[str, Any], *, deadline_s: float) -> Any:
        """Have the host that runs the VM change its machine."""
        path = f"/v1/vms/{self.vm.name}/disks/{verb}"
        host = self.host()
        return await self.world.agents.call(host, "POST", path, body, deadline_s=deadline_s)


async def add(world: World, run: TaskRun, request: AddDisk) -> Done:
    """Give the VM one more disk. A failure leaves nothing of it behind."""
    work = await Work.of(world, run, request)
    noted = run.task.progress.get("disk")
    disk = Disk.model_validate(noted) if noted else await _plan(work, request)
    if not any(one.id == disk.id for one in work.vm.disks):
        await _record(work, disk, made=given_path(request) is None)
        work = await Work.of(world, run, request)
    if work.runs:
        await _plug(work, disk, made=given_path(request) is None)
    name, size = request.name, format_size(disk.size_bytes)
    now = await world.records.vm(name)
    if now is not None and any(one.id == disk.id for one in now.value.disks):
        size = format_size(find_disk(now.value, disk.id).size_bytes)
    message = f"{disk.id} ({size}, {disk.format}) added to {name}"
    await _log(world, "vm.disk-added", name, f"{message} by {run.task.by}")
    return Done(message, {"vm": name, "disk": disk.id, "path": disk.path})


async def _plan(work: Work, request: AddDisk) -> Disk:
    """What the new disk is; an image or device that is there says its size."""
    size, mark = request.size_bytes, work.run.task.id[-6:]
    disk = define_disk(
        work.vm,
        request,
        size_bytes=size or _UNMEASURED,
        mark=mark,
        local=work.local_volumes,
        rbd=work.world.cache.snapshot.rbd_volumes,
    )
    if size is None and not (disk.source == "device" and work.runs):
        disk = disk.but(size_bytes=await _measured(work, disk))
    await work.run.say(
        f"{disk.id} of {work.vm.name} will be {disk.path}",
        progress={"disk": disk.model_dump(mode="json")},
    )
    return disk


async def _measured(work: Work, disk: Disk) -> int:
    """Bytes that an image or device holds, as a host sees it."""
    answer = await on_some_host(
        work.world,
        work.vm,
        "POST",
        f"/v1/vms/{work.vm.name}/disks/inspect",
        {"disk": disk.model_dump(mode="json")},
        prefer=work.owner.host,
        volumes=_volumes(disk),
        deadline_s=_MEASURE_S,
    )
    return int(answer["size_bytes"])


async def _record(work: Work, disk: Disk, *, made: bool) -> None:
    """Make the image, then write the disk into the VM's record."""
    if made:
        if work.run.adopted:
            await delete_image(work, disk)  # begun by the manager before us; nothing has run on it
        await _image(work, disk, "create-disks")
    try:
        # Two VMs that ask for one image at once have no record in common: one after the other.
        async with work.world.lock(f"disk {disk.path}"):
            check_free((await work.world.records.vms()).values(), disk.path)
            await work.write(with_disk(work.vm, disk), f"{disk.id} is in the record")
    except GodwitError:
        if made:
            with contextlib.suppress(GodwitError):
                await delete_image(work, disk)
        raise


async def _plug(work: Work, disk: Disk, *, made: bool) -> None:
    """Have the machine get the disk; on its refusal the record and the image go again."""
    try:
        answer = await work.ask_owner(
            "add", {"disk": disk.model_dump(mode="json")}, deadline_s=_HOT_S
        )
    except OutcomeUnknown:
        raise  # the guest may have it: the record, which has it too, is the safe side
    except GodwitError:
        await _change(work.world, work.vm.name, lambda vm: without_disk(vm, disk.id))
        if made:
            with contextlib.suppress(GodwitError):
                await delete_image(work, disk)
        raise
    await _keep_answer(work, disk, answer)


async def _keep_answer(work: Work, disk: Disk, answer: Any) -> None:
    """The size that the host found goes into the record."""
    size = answer.get("size_bytes") if isinstance(answer, dict) else None
    if isinstance(size, int) and size != disk.size_bytes:
        now = disk.but(size_bytes=size)
        await _change(work.world, work.vm.name, lambda vm: with_disk(vm, now))


async def remove(world: World, run: TaskRun, request: RemoveDisk) -> Done:
    """Take a disk from the VM; then, unless it is to be kept, its image is deleted."""
    work = await Work.of(world, run, request)
    name = request.name
    if run.task.progress.get("written"):
        disk = Disk.model_validate(run.task.progress["disk"])
    else:
        disk = find_disk(work.vm, request.disk)
        check_removal(work.vm, disk.id)
        await run.say(
            f"taking {disk.id} from {name}", progress={"disk": disk.model_dump(mode="json")}
        )
        if work.runs:
            body = {"disk": disk.id, "force": request.force}
            # Gone from the machine already is what was asked for: an earlier try was cut short.
            with contextlib.suppress(NotFound):
                await work.ask_owner("remove", body, deadline_s=_HOT_S)
        await work.write(without_disk(work.vm, disk.id), f"{disk.id} is out of the record")
    await _log(world, "vm.disk-removed", name, f"{disk.id} removed from {name} by {run.task.by}")
    if request.keep or disk.source != "image":
        return Done(f"{disk.id} removed, {disk.path} stays", {"vm": name, "path": disk.path})
    try:
        await delete_image(work, disk)
    except OutcomeUnknown:
        raise
    except GodwitError as error:
        raise OperationFailed(
            f"{disk.id} is no disk of {name} any more, but {disk.path} could not be deleted: "
            f"{error.message}",
            hint="delete the file when its volume can be reached",
        ) from error
    return Done(f"{disk.id} removed and {disk.path} deleted", {"vm": name})


async def resize(world: World, run: TaskRun, request: ResizeDisk) -> Done:
    """Let a disk grow; the record says the size that its host found afterwards."""
    work = await Work.of(world, run, request)
    name = request.name
    disk = check_growth(work.vm, request)
    await run.say(f"growing {disk.id} of {name} to {format_size(request.size_bytes)}")
    if work.runs:
        body: dict[str, Any] = {"disk": disk.id, "size_bytes": request.size_bytes}
        answer = await work.ask_owner("resize", body, deadline_s=_GROW_S)
    else:
        answer = await on_some_host(
            world,
            work.vm,
            "POST",
            f"/v1/vms/{name}/disks/grow",
            {"disk": disk.model_dump(mode="json"), "size_bytes": request.size_bytes},
            deadline_s=_GROW_S,
        )
    size = answer.get("size_bytes") if isinstance(answer, dict) else None
    grown = disk.but(size_bytes=size if isinstance(size, int) else request.size_bytes)
    # The image has grown: whatever the owner does meanwhile, the record has to say so.
    await _change(world, name, lambda vm: with_disk(vm, grown))
    text = f"{disk.id} of {name} has {format_size(grown.size_bytes)} now"
    await _log(world, "vm.disk-resized", name, f"{text}, asked by {run.task.by}")
    return Done(text, {"vm": name, "disk": disk.id, "size_bytes": grown.size_bytes})


async def _image(work: Work, disk: Disk, verb: str) -> None:
    await on_some_host(
        work.world,
        None,
        "POST",
        f"/v1/vms/{work.vm.name}/{verb}",
        {"disks": [disk.model_dump(mode="json")]},
        prefer=work.owner.host,
        volumes=_volumes(disk),
    )


async def delete_image(work: Work, disk: Disk) -> None:
    await _image(work, disk, "delete-disks")


async def _change(world: World, vm: str, change: Callable[[Vm], Vm]) -> None:
    """Change the definition whatever else happens to the VM: what it says is already so."""
    if await world.records.update(keys.vm_spec(vm), Vm, change) is None:
        raise NotFound(f"no vm {vm}", hint="look with: godwit vm list")


def _volumes(disk: Disk) -> tuple[str, ...]:
    return (disk.volume,) if disk.volume else ()


async def _log(world: World, kind: str, vm: str, message: str) -> None:
    await world.records.append_event(kind, f"vm/{vm}", message, at=world.clock.realtime())
