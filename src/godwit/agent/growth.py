"""Disks of VMs that run here get larger, whatever opens their images.

    by itself  QEMU makes raw and qcow2 larger, and takes a device as it is
    brokered   the VM stands still: gates closed, daemon ended -> image -> daemon anew -> QEMU
    vhd-fixed  the VM stands still: image -> QEMU

    begun -> image -> guest -> slot's record, the VM's record -> forgotten

What is begun is noted in ``disk-growth.json`` first. The image alone says how large the disk is:
whatever is cut short is ended by measuring it and telling the others (`settle_running`,
`settle_others`), also by the next agent of this host.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from godwit.agent.desk import Desk, Slot
from godwit.agent.disk_journal import replaced
from godwit.agent.files import Files, asked
from godwit.agent.images import TOOL
from godwit.agent.standing import standing_still, to_its_end
from godwit.host.files import load_json, remove_durable, save_json
from godwit.model import keys
from godwit.model.base import Name, Record
from godwit.model.disks import tier_of
from godwit.model.errors import GodwitError, OperationFailed
from godwit.model.units import format_size
from godwit.model.vm import Disk, Vm
from godwit.qemu import growing
from godwit.qemu.devices import device_size
from godwit.qemu.launch import Binary
from godwit.qemu.runtime import load_runtime
from godwit.qmp import MonitorError
from godwit.storage.formats import stored_size
from godwit.storage.growth import check_room, grow
from godwit.storage.images import image_info
from godwit.store.errors import StoreError

_log = logging.getLogger("agent")
NOTE: Final = "disk-growth.json"


class Note(Record):
    """A growth as it was begun: the disk before it. Durable, in the VM's state directory."""

    vm: Name
    uuid: str
    disk: Disk


class Growth:
    """How disks grow. The caller holds the VM's lock, and no move can begin."""

    def __init__(self, desk: Desk, files: Files) -> None:
        self._desk = desk
        self._files = files

    async def grow(self, slot: Slot, disk: Disk, size_bytes: int) -> Disk:
        """The disk as it is when its guest has heard of it; both records say so.

        Refused for a smaller size and where its format has no room; after an error the records
        say what the image really holds.
        """
        wanted = stored_size(disk.format, size_bytes)
        now = await growing.check_growth(slot.machine, disk, wanted)
        if wanted == now == disk.size_bytes:
            return disk
        if disk.source == "image":
            await check_room(
                self._files.disk_path(disk),
                format=disk.format,
                size_bytes=wanted,
                files=self._desk.catalog.files(disk.volume),
            )
        return await to_its_end(self._grow(slot, disk, wanted))

    async def _grow(self, slot: Slot, disk: Disk, wanted: int) -> Disk:
        state = self._desk.config.paths.vm_state(slot.vm.name)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        note = Note(vm=slot.vm.name, uuid=slot.vm.pins.uuid, disk=disk)
        save_json(state / NOTE, note.model_dump(mode="json"))
        try:
            grown = disk.but(size_bytes=await self._enlarge(slot, disk, wanted))
        except BaseException:
            # An error here is left to the next agent; the first one is told.
            with contextlib.suppress(GodwitError, MonitorError, StoreError):
                await _settle(self._desk, slot, disk, state)
            raise
        slot.vm = replaced(slot.vm, grown)
        with contextlib.suppress(StoreError):  # the manager says it too, and the next agent
            await _record(self._desk, slot.vm, grown)
            remove_durable(state / NOTE)
        return grown

    async def _enlarge(self, slot: Slot, disk: Disk, wanted: int) -> int:
        desk, machine = self._desk, slot.machine
        if growing.grows_by_itself(disk):
            return await growing.resize_disk(machine, disk, wanted)
        async with standing_still(desk, slot):
            if tier_of(disk) == "brokered":
                work = functools.partial(self._held_image, slot.vm.name)
                size = await desk.brokers.grow(slot.vm.name, disk, wanted, work)
            else:
                await self._held_image(slot.vm.name, disk, wanted, held=True)
                size = wanted
            await desk.holds.reach("served", vm=slot.vm.name, role="disk")
            await _tell_guest(desk, slot, disk.but(size_bytes=size))
        return size

    async def _held_image(
        self, vm: str, disk: Disk, size_bytes: int, *, held: bool = False
    ) -> None:
        await self._desk.holds.reach("closed", vm=vm, role="disk")
        await self._image(disk, size_bytes, held=held)
        await self._desk.holds.reach("grown", vm=vm, role="disk")

    async def _image(self, disk: Disk, size_bytes: int, *, held: bool = False) -> None:
        if disk.source != "image":
            found = await _measured(self._desk, disk)
            if found < size_bytes:
                raise OperationFailed(
                    f"{disk.path} has {format_size(found)}", hint="grow it on its storage first"
                )
            return
        await grow(
            self._files.disk_path(disk),
            format=disk.format,
            size_bytes=size_bytes,
            held=held,
            tool=Binary.named(TOOL, user=self._desk.config.qemu.user),
            files=self._desk.catalog.files(disk.volume),
        )


async def settle_running(desk: Desk, slot: Slot) -> None:
    """After a restart: end what was begun with a disk of a VM whose QEMU was found."""
    state, name = desk.config.paths.vm_state(slot.vm.name), slot.vm.name
    try:
        note = _load(state)
        if note is None:
            return
        here = [disk for disk in slot.vm.disks if disk.path == note.disk.path]
        if slot.vm.pins.uuid != note.uuid or not here:
            remove_durable(state / NOTE)
            return
        async with desk.lock(name):
            size = await _settle(desk, slot, here[0], state)
    except (GodwitError, MonitorError, StoreError) as error:  # it runs on; its note stays
        await desk.event("vm.disk-resized", name, str(error), level="error")
        return
    words = f"the growth of {note.disk.id} was cut short: it has {format_size(size)} now"
    await desk.event("vm.disk-resized", name, words)


async def settle_others(desk: Desk) -> None:
    """Of VMs that have no QEMU here: the record says what the image holds."""
    for path in sorted((desk.config.paths.state / "vms").glob(f"*/{NOTE}")):
        name = path.parent.name
        if name in desk.slots or load_runtime(desk.config.paths.vm_run(name)) is not None:
            continue  # settled, or not adopted: then nothing is known
        try:
            note = _load(path.parent)
            spec = await desk.records.vm(name)
            if note is not None and spec is not None and spec.value.pins.uuid == note.uuid:
                await desk.catalog.sync()  # where it lies, should the store have been away before
                size = await _measured(desk, note.disk)
                await _record(desk, spec.value, note.disk.but(size_bytes=size))
            remove_durable(path)
        except (GodwitError, OSError, StoreError) as error:
            await desk.event("vm.disk-resized", name, str(error), level="error")


async def _settle(desk: Desk, slot: Slot, disk: Disk, state: Path) -> int:
    """What the image holds is what everybody says; its bytes."""
    found = disk.but(size_bytes=await _measured(desk, disk))
    if found.size_bytes > disk.size_bytes and not slot.machine.exited.is_set():
        async with standing_still(desk, slot):
            await _tell_guest(desk, slot, found)
    slot.vm = replaced(slot.vm, found)
    await _record(desk, slot.vm, found)
    remove_durable(state / NOTE)
    return found.size_bytes


async def _tell_guest(desk: Desk, slot: Slot, grown: Disk) -> None:
    facts = None
    if grown.format == "vhd-fixed":
        files = desk.catalog.files(grown.volume)
        facts = await asked(files.look(Path(grown.path)), Path(grown.path))
    length = 0 if facts is None else facts.size
    await growing.take_size(slot.machine, grown, desk.place(slot.vm), file_bytes=length)


async def _measured(desk: Desk, disk: Disk) -> int:
    path, files = Path(disk.path), desk.catalog.files(disk.volume)
    if disk.source == "device":
        return await asyncio.to_thread(device_size, path)
    return (await image_info(path, format=disk.format, in_use=True, files=files)).virtual_size


async def _record(desk: Desk, vm: Vm, grown: Disk) -> None:
    """The VM's record says how large that image is; one that names another image stays."""

    def change(spec: Vm) -> Vm:
        if spec.pins.uuid != vm.pins.uuid:
            return spec
        found = (one for one in spec.disks if (one.id, one.path) == (grown.id, grown.path))
        for disk in found:
            return replaced(spec, disk.but(size_bytes=grown.size_bytes))
        return spec

    await desk.records.update(keys.vm_spec(vm.name), Vm, change)


def _load(state: Path) -> Note | None:
    try:
        content = load_json(state / NOTE)
        return None if content is None else Note.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise OperationFailed(
            f"{state / NOTE} cannot be read: {error}",
            hint="compare the disk's size in the record with its image, and delete this file",
        ) from None
