"""Disks on a host's own storage, when their VM moves: made there, sent, and deleted where it left.

The path is the same on both hosts and so is the record; the owner record says whose copy is the
disk. Both hosts note what they have before anything is made. When the owner record no longer names
the move, the host that is the owner keeps its images and the other deletes its own: one rule for
success, failure, cancel and the death of either agent.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from godwit.agent.desk import Desk
from godwit.host.files import load_json, remove_durable, save_json
from godwit.model.base import Name, Record
from godwit.model.errors import Conflict, Refused
from godwit.model.ownership import Owner
from godwit.model.vm import Disk, Vm
from godwit.storage.images import create_image
from godwit.store.errors import StoreError

_log = logging.getLogger("agent")
NOTE: Final = "disks-along.json"
LOOK_S: Final = 1.0
"""Seconds between two looks at the owner record of a move that has not ended."""


class AlongNote(Record):
    """Images of a VM here that may not be its disks any more, or not yet."""

    vm: Name
    uuid: str
    migration: str
    paths: tuple[str, ...]
    marks: tuple[str, ...] = ()


def local_disks(vm: Vm) -> tuple[Disk, ...]:
    """The disks that go along when the VM moves. Pure."""
    return tuple(disk for disk in vm.disks if disk.local)


def keeps(owner: Owner | None, note: AlongNote, host: str) -> bool | None:
    """Whether the host's images are the VM's disks; None while that is being decided. Pure."""
    if owner is None:
        return False
    if owner.migration is not None and owner.migration.id == note.migration:
        return None
    return owner.host == host


def mark_of(path: Path, host: str) -> Path:
    """A file beside an image that says which host it is on: who sees another's shares storage."""
    return path.with_name(f".{path.name}.on-{host}")


async def note_source(desk: Desk, vm: Vm, migration: str) -> None:
    """Before the destination is asked: what is here goes away if the move succeeds."""
    paths = [Path(disk.path) for disk in local_disks(vm)]
    if not paths:
        return
    marks = [mark_of(path, desk.host) for path in paths]
    _save(desk, vm, migration, paths, marks)
    for mark in marks:
        await asyncio.to_thread(mark.touch)


async def make_room(desk: Desk, vm: Vm, migration: str, source: str) -> None:
    """On the destination: empty images for what comes along.

    Refused when the source's own images are seen here: then the storage is no host's own.
    """
    disks = local_disks(vm)
    if not disks:
        return
    async with desk.along:
        before = _load(desk.config.paths.vm_state(vm.name))
        if before is not None:  # of an earlier move, which has ended: the source is the owner now
            if await _kept(desk, before) is not False:
                raise Conflict(f"{desk.host} may have the disks of {vm.name}", hint="ask again")
            await _end(desk, vm.name, before, kept=False)
        await _make(desk, vm, migration, source)


async def _make(desk: Desk, vm: Vm, migration: str, source: str) -> None:
    disks = local_disks(vm)
    paths = [Path(disk.path) for disk in disks]
    for path in paths:
        if mark_of(path, source).exists():
            raise Refused(
                f"{desk.host} sees {path} of {source}: its volume is shared, not local",
                hint="define the volume anew as --kind dir",
            )
        if path.exists():
            raise Conflict(
                f"{path} exists on {desk.host} already",
                hint="look whether anybody needs it, and delete it there",
            )
    _save(desk, vm, migration, paths, [])
    for disk, path in zip(disks, paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        await create_image(
            path,
            format=disk.format,
            size_bytes=disk.size_bytes,
            owner=desk.equipment.binary.user,
        )


def settle_soon(desk: Desk, vm: str) -> None:
    """When the owner record no longer names the move, delete what is not the VM's."""
    if (desk.config.paths.vm_state(vm) / NOTE).exists():
        desk.background(_settle(desk, vm), f"vm {vm}: disks of its move")


def settle_all(desk: Desk) -> None:
    """After a restart of the agent."""
    for path in sorted((desk.config.paths.state / "vms").glob(f"*/{NOTE}")):
        settle_soon(desk, path.parent.name)


async def _settle(desk: Desk, vm: str) -> None:
    state = desk.config.paths.vm_state(vm)
    while True:
        async with desk.along:
            note = _load(state)
            if note is None:
                return
            kept = await _kept(desk, note)
            if kept is not None:
                await _end(desk, vm, note, kept=kept)
                return
        # A watch would tell earlier; nobody waits for this.
        await desk.clock.sleep(LOOK_S)


async def _kept(desk: Desk, note: AlongNote) -> bool | None:
    """As `keeps`, by the record; None also while the store is away."""
    try:
        found = await desk.records.owner(note.vm)
    except StoreError:
        return None
    return keeps(found.value if found else None, note, desk.host)


async def _end(desk: Desk, vm: str, note: AlongNote, *, kept: bool) -> None:
    for path in note.marks if kept else (*note.marks, *note.paths):
        await asyncio.to_thread(Path(path).unlink, missing_ok=True)
    if not kept:
        for folder in {Path(path).parent for path in note.paths}:
            if folder.name == vm and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    remove_durable(desk.config.paths.vm_state(vm) / NOTE)
    _log.info("%s: its images here %s", vm, "are its disks" if kept else "are deleted")


def _save(desk: Desk, vm: Vm, migration: str, paths: list[Path], marks: list[Path]) -> None:
    state = desk.config.paths.vm_state(vm.name)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = AlongNote(
        vm=vm.name,
        uuid=vm.pins.uuid,
        migration=migration,
        paths=tuple(map(str, paths)),
        marks=tuple(map(str, marks)),
    )
    save_json(state / NOTE, note.model_dump(mode="json"))


def _load(state: Path) -> AlongNote | None:
    try:
        content = load_json(state / NOTE)
        return None if content is None else AlongNote.model_validate(content)
    except (ValueError, ValidationError) as error:
        _log.error("%s cannot be read, its images stay: %s", state / NOTE, error)
        return None
