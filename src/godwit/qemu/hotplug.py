"""Disks added to and removed from a machine that lives; how they grow is in `godwit.qemu.growing`.

    add     blockdev-add file, format ...  --all well-->  device_add ...      undone in reverse
    remove  [is it in use?]  device_del ...  --DEVICE_DELETED-->  blockdev-del format, file ...

A disk comes to the very place (channel, SCSI id, LUN, names) it has at a cold start, so that a
destination built from the record is the same machine. Many disks go together: commands of one
kind are sent without waiting for each, as QEMU carries them out in their order anyway.

Not while a move is under way: QEMU refuses device commands then. QEMU's "no" comes out as an error
for people; a `MonitorError` otherwise means that the outcome is unknown: compare with `list_disks`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from godwit.model.disks import tier_of
from godwit.model.errors import (
    Conflict,
    GodwitError,
    NotFound,
    OperationFailed,
    Refused,
)
from godwit.model.vm import Disk
from godwit.qemu.blocks import DISK_DRIVERS, disk_device, disk_nodes, node_names, stored_size
from godwit.qemu.devices import grant_device, take_back_device
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.qmp import MonitorError, QmpError

COMMAND_TIMEOUT: Final = 30.0
"""Seconds for one command: opening an image on a slow volume takes its time."""

REMOVE_TIMEOUT: Final = 10.0
"""Seconds for the machine to let go of a disk."""

QUIET_S: Final = 0.5
"""Seconds without a write after which a disk counts as not written to."""

_AT_REST: Final = frozenset({"none", "completed", "failed", "cancelled"})
_WRITES: Final = ("wr_operations", "unmap_operations", "flush_operations")


@dataclass(frozen=True, slots=True)
class PluggedDisk:
    """A disk as QEMU has it; ``file`` as QEMU writes it, a path where it is a plain file."""

    id: str
    lun: int
    serial: str
    size_bytes: int
    driver: str
    node: str
    file: str


async def add_disk(machine: Machine, disk: Disk, place: Place) -> None:
    """Give the machine one more disk; see `add_disks`."""
    await add_disks(machine, (disk,), place)


async def add_disks(machine: Machine, disks: Sequence[Disk], place: Place) -> None:
    """Give the machine disks, all or none; their images exist.

    Refused while a move is under way; Conflict when an id or a LUN is taken; OperationFailed
    with QEMU's words otherwise. After any failure no node and no device of these disks is left.
    """
    await check_at_rest(machine)
    nodes = {
        str(node["node-name"]): node
        for disk in disks
        for node in disk_nodes(
            disk,
            vm=machine.vm,
            aio=place.aio,
            broker=place.broker,
            served=place.served.get(disk.id),
            locking=place.locking,
        )
    }
    devices = {disk.id: disk_device(disk) for disk in disks}
    granted: list[Disk] = []
    made: list[str] = []
    plugged: list[str] = []
    try:
        for disk in _devices(disks):
            grant_device(Path(disk.path), place.binary.user)
            granted.append(disk)
        # Devices only once every node is right: the guest never sees a disk that is taken back.
        await _each(machine, "blockdev-add", nodes, done=made)
        await _each(machine, "device_add", devices, done=plugged)
    except BaseException as error:
        await asyncio.shield(_undo(machine, plugged, made))
        for disk in granted:
            take_back_device(Path(disk.path))
        if isinstance(error, QmpError):
            raise _refusal(machine, disks, error) from error
        raise


async def remove_disk(
    machine: Machine, disk: Disk, *, force: bool = False, timeout: float = REMOVE_TIMEOUT
) -> None:
    """Take one disk out of the machine; see `remove_disks`."""
    await remove_disks(machine, (disk,), force=force, timeout=timeout)


async def remove_disks(
    machine: Machine,
    disks: Sequence[Disk],
    *,
    force: bool = False,
    timeout: float = REMOVE_TIMEOUT,
) -> None:
    """Take disks out of the machine; returns when their images are closed.

    Without ``force`` a disk that the guest writes to is refused: the guest loses it at once, and
    only what it had acknowledged is in the image. ``timeout`` is in seconds. NotFound when the
    machine has nothing of them; what an earlier, interrupted removal left is removed.
    OperationFailed when the machine keeps one; the others are gone then.
    """
    await check_at_rest(machine)
    if not force:
        await _check_unused(machine, disks)
    unplugged = await _unplug(machine, [disk.id for disk in disks], timeout=timeout)
    loose = [disk for disk in disks if disk.id not in unplugged.kept]
    names = [name for disk in reversed(loose) for name in reversed(node_names(disk))]
    dropped = await drop_nodes(machine, names)
    for disk in _devices(loose):
        take_back_device(Path(disk.path))
    if unplugged.kept:
        name, why = next(iter(unplugged.kept.items()))
        raise OperationFailed(
            f"{machine.vm} keeps its disk {name}: {why}", hint="ask again, or stop the VM first"
        )
    if not unplugged.gone and not dropped:
        names = [disk.id for disk in disks]
        raise NotFound(f"the machine of {machine.vm} has no disk {', '.join(names)}")


async def list_disks(machine: Machine) -> tuple[PluggedDisk, ...]:
    """The disks the machine really has, by LUN."""
    tree, blocks = await asyncio.gather(
        machine.device_tree(), machine.monitor.execute("query-block")
    )
    inserted = {str(block.get("qdev")): block.get("inserted") or {} for block in blocks}
    found = []
    for device in tree.devices:
        if device.driver not in DISK_DRIVERS:
            continue
        block, properties = inserted.get(device.id, {}), device.properties
        found.append(
            PluggedDisk(
                id=device.id,
                lun=int(properties["scsi-id"]),
                serial=properties.get("serial", ""),
                size_bytes=int(properties.get("size", 0)),
                driver=str(block.get("drv", "")),
                node=str(block.get("node-name", "")),
                file=str(block.get("file", "")),
            )
        )
    return tuple(sorted(found, key=lambda disk: disk.lun))


def differences(record: Sequence[Disk], plugged: Sequence[PluggedDisk]) -> tuple[str, ...]:
    """Where the machine's disks are not the record's, one sentence each; empty when equal."""
    return tuple(_differences(record, plugged))


def _differences(record: Sequence[Disk], plugged: Sequence[PluggedDisk]) -> Iterator[str]:
    wanted = {disk.id: disk for disk in record}
    here = {disk.id: disk for disk in plugged}
    for name in sorted(wanted.keys() - here.keys()):
        yield f"{name} is in the record but not in the machine"
    for name in sorted(here.keys() - wanted.keys()):
        yield f"{name} is in the machine but not in the record"
    for name in sorted(wanted.keys() & here.keys()):
        disk, found = wanted[name], here[name]
        if found.lun != disk.lun:
            yield f"{name} has LUN {found.lun}, the record says {disk.lun}"
        if found.serial not in ("", disk.serial):
            yield f"{name} has the serial number {found.serial}, the record says {disk.serial}"
        if found.size_bytes != stored_size(disk.size_bytes):
            yield f"{name} holds {found.size_bytes} bytes, the record says {disk.size_bytes}"
        if found.file.startswith("/") and found.file != disk.path:
            yield f"{name} is {found.file}, the record says {disk.path}"


# Steps.


def _devices(disks: Iterable[Disk]) -> list[Disk]:
    return [disk for disk in disks if disk.source == "device"]


async def check_at_rest(machine: Machine) -> None:
    """Refused while a move is under way."""
    status = str((await machine.query_migrate()).get("status", "none"))
    if status not in _AT_REST:
        raise Refused(
            f"{machine.vm} is being moved ({status}): its disks stay as they are",
            hint="wait for the move to end, or cancel it: godwit migration list",
        )


async def _each(
    machine: Machine, command: str, asked: Mapping[str, Mapping[str, object]], *, done: list[str]
) -> None:
    """One command for each, in order; ``done`` gets all that were not refused, at any end."""
    done.extend(asked)
    answers = await asyncio.gather(
        *(
            machine.monitor.execute(command, arguments, timeout=COMMAND_TIMEOUT)
            for arguments in asked.values()
        ),
        return_exceptions=True,
    )
    errors: list[BaseException] = []
    for name, answer in zip(asked, answers, strict=True):
        if isinstance(answer, QmpError):
            done.remove(name)
        if isinstance(answer, BaseException):
            errors.append(answer)
    if errors:
        raise errors[0]


async def _undo(machine: Machine, plugged: list[str], made: list[str]) -> None:
    # What stays because QEMU does not answer is found by comparing; the first error is told.
    try:
        await _unplug(machine, plugged, timeout=REMOVE_TIMEOUT)
        await drop_nodes(machine, made[::-1])
    except (MonitorError, GodwitError):
        return


def _refusal(machine: Machine, disks: Sequence[Disk], error: QmpError) -> GodwitError:
    what = ", ".join(disk.id for disk in disks)
    text = f"{machine.vm} cannot have {what}: {error.desc}"
    if "already used" in error.desc or "uplicate" in error.desc:
        return Conflict(text, hint="choose another id or LUN: godwit vm disk list")
    if "lock" in error.desc:
        return Conflict(text, hint="another VM has this image open; a disk belongs to one VM")
    if any(tier_of(disk) == "brokered" for disk in disks) and "connect" in error.desc:
        return OperationFailed(text, hint="does the VM's storage broker run?")
    if "SG_IO" in error.desc or "SCSI device" in error.desc:
        hint = "give it as a plain device, without --passthrough"
        return OperationFailed(text, hint=hint)
    return OperationFailed(text, hint="is the image there, and may the QEMU user open it?")


async def _check_unused(machine: Machine, disks: Sequence[Disk]) -> None:
    before = await _writes(machine)
    # A rate is asked for, and QEMU has no event for a write: there is nothing else to wait for.
    await asyncio.sleep(QUIET_S)
    after = await _writes(machine)
    busy = [disk.id for disk in disks if before.get(disk.id) != after.get(disk.id)]
    if busy:
        raise Refused(
            f"the guest of {machine.vm} writes to {', '.join(busy)}",
            hint="unmount it in the guest first; --force takes it away all the same",
        )


async def _writes(machine: Machine) -> dict[str, tuple[int, ...]]:
    answer: list[dict[str, Any]] = await machine.monitor.execute("query-blockstats")
    return {
        str(entry["qdev"]): tuple(int(entry["stats"].get(key, 0)) for key in _WRITES)
        for entry in answer
        if entry.get("qdev")
    }


@dataclass(slots=True)
class _Unplugged:
    """What became of devices: gone now, not there before, or kept (with the reason)."""

    gone: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    kept: dict[str, str] = field(default_factory=dict)


async def _unplug(machine: Machine, names: Sequence[str], *, timeout: float) -> _Unplugged:
    result = _Unplugged()
    waiting: set[str] = set()
    # Subscribed before the command: the event may overtake its answer.
    with machine.monitor.events("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") as events:
        answers = await asyncio.gather(
            *(machine.monitor.execute("device_del", {"id": name}) for name in names),
            return_exceptions=True,
        )
        for name, answer in zip(names, answers, strict=True):
            if not isinstance(answer, BaseException):
                waiting.add(name)
            elif not isinstance(answer, QmpError):
                raise answer
            elif answer.error_class == "DeviceNotFound":
                result.absent.add(name)
            elif "in the process of unplug" in answer.desc:
                waiting.add(name)  # asked before; its event is still to come
            else:
                result.kept[name] = answer.desc
        try:
            async with asyncio.timeout(timeout):
                while waiting:
                    event = await anext(events)
                    name = str(event.data.get("device", ""))
                    if name in waiting:
                        waiting.discard(name)
                        if event.name == "DEVICE_DELETED":
                            result.gone.add(name)
                        else:
                            result.kept[name] = "the guest does not let go of it"
        except TimeoutError:
            words = f"it did not let go within {timeout:g} s"
            result.kept |= dict.fromkeys(sorted(waiting), words)
    return result


async def drop_nodes(machine: Machine, names: Sequence[str]) -> list[str]:
    """Close block nodes, upper ones first; those that were there. A missing one is no fault."""
    answers = await asyncio.gather(
        *(
            machine.monitor.execute("blockdev-del", {"node-name": name}, timeout=COMMAND_TIMEOUT)
            for name in names
        ),
        return_exceptions=True,
    )
    dropped: list[str] = []
    errors: list[BaseException] = []
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, BaseException):
            dropped.append(name)
        elif not (isinstance(answer, QmpError) and "find node" in answer.desc):
            errors.append(answer)
    if errors:
        first = errors[0]
        if isinstance(first, QmpError):
            raise OperationFailed(
                f"{machine.vm} still holds an image: {first.desc}",
                hint="a backup or copy of this disk may be under way; ask again after it",
            ) from first
        raise first
    return dropped
