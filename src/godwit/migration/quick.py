"""The quick way: stop, save the memory to the VM's volume, restore it on the other host.

Dark for as long as the memory takes to be written and read, but it needs no migration network
and moves what cannot be moved live. The same two functions save and restore a VM in place.

A saved image is one VM at one epoch with one set of disks; a side file says which. It is
consumed by the transaction that raises the epoch and never restored twice.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.migration.handover import OwnerLink
from godwit.migration.move import Move, fail
from godwit.migration.peer import PrepareAsk, Prepared
from godwit.migration.stream import ENDED, Stream, end_stream, wait_status
from godwit.migration.world import LEASE_MARGIN_S
from godwit.model.migration import Progress, Stage
from godwit.model.vm import Vm
from godwit.qemu.machine import Machine
from godwit.qmp import EventStream, QmpError
from godwit.storage.files import LOCAL, Channel, VolumeFiles

SAVE_S = 600.0
_LARGEST_LABEL = 1 << 20
_SAMPLE_S = 0.2


def image_path(volumes: Path, vm: Vm, *, epoch: int) -> Path:
    """Where the memory of this epoch is saved: beside the VM's first image."""
    return volumes / memory_volume(vm) / vm.name / f"saved-{epoch}.mem"


def memory_volume(vm: Vm) -> str:
    """The volume a VM's memory is saved to; LUNs have no room for it."""
    found = (disk.volume for disk in vm.disks if disk.volume and disk.source == "image")
    return next(found, "shared")


def describe(vm: Vm, *, epoch: int) -> dict[str, Any]:
    """What a saved image belongs to; restored only where all of it matches."""
    return {
        "vm": vm.name,
        "uuid": vm.pins.uuid,
        "epoch": epoch,
        "machine": vm.pins.machine,
        "memory_bytes": vm.memory_bytes,
        "disks": [disk.serial for disk in vm.disks],
    }


@dataclass(frozen=True, slots=True)
class Saving:
    """A save under way: ``events`` tell of QEMU's end, then `settle` waits for the volume's."""

    events: EventStream
    channel: Channel

    async def settle(self) -> None:
        """The finished image and its name survive a power cut; OSError when it is not whole."""
        await self.channel.done(timeout=SAVE_S)

    def close(self) -> None:
        """Hear no more of it; what is not finished is given up."""
        self.events.close()
        self.channel.stop()


async def save_memory(
    machine: Machine, path: Path, *, label: dict[str, Any], files: VolumeFiles = LOCAL
) -> Saving:
    """Start writing the stopped VM's memory to ``path``, a file of ``files``.

    It is made for the QEMU user alone: it holds the guest's secrets.
    """
    stream = Stream(machine.monitor)
    channel = await files.write_through(path, owner=_ids(machine.pid))
    try:
        await stream.set_capabilities({"events"})
        await stream.set_parameters(max_bandwidth=0, tls_creds="", tls_hostname="")
        await files.write(_label_path(path), json.dumps(label).encode(), mode=0o600)
        await _pass(machine, channel)
        events = machine.monitor.events("MIGRATION")
        try:
            await stream.connect(channel.uri)
        except BaseException:
            events.close()
            raise
    except BaseException:
        channel.stop()
        raise
    return Saving(events, channel)


async def _pass(machine: Machine, channel: Channel) -> None:
    if channel.descriptor is not None:
        await machine.monitor.pass_fd(channel.descriptor, channel.uri.removeprefix("fd:"))
        channel.passed()


async def load_memory(
    machine: Machine, path: Path, *, label: dict[str, Any], files: VolumeFiles = LOCAL
) -> None:
    """Read a saved memory into a waiting QEMU. ValueError when the label does not match."""
    found = json.loads(await files.read(_label_path(path), 0, _LARGEST_LABEL))
    if found != label:
        raise ValueError(f"{path} was saved from another VM, epoch or set of disks")
    stream = Stream(machine.monitor)
    await stream.set_capabilities({"events"})
    channel = await files.read_through(path)
    try:
        with machine.monitor.events("MIGRATION") as events:
            await _pass(machine, channel)
            await machine.monitor.execute("migrate-incoming", {"uri": channel.uri})
            event = await wait_status(events, ENDED, timeout=SAVE_S)
    finally:
        channel.stop()
    if event.data["status"] != "completed":
        now = await stream.read()
        raise QmpError(
            "migrate-incoming", error_class="GenericError", desc=now.error or "load failed"
        )


async def discard(path: Path, *, files: VolumeFiles = LOCAL) -> None:
    """A consumed or void image goes.

    One that cannot be removed stays: its epoch is over, so nobody will restore it.
    """
    for name in (path, _label_path(path)):
        with contextlib.suppress(OSError):
            await files.remove(name)


def _label_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _ids(pid: int) -> tuple[int, int]:
    """User and group a process runs as."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {line.partition(":")[0]: line.split() for line in lines}
    return int(fields["Uid"][1]), int(fields["Gid"][1])


class QuickWay:
    """Save here, swap, restore there; the same stages as a live move."""

    postcopy = False

    def __init__(self, move: Move, link: OwnerLink) -> None:
        self.move = move
        self.link = link
        self._events: EventStream | None = None
        self._saving: Saving | None = None

    @property
    def _path(self) -> Path:
        return image_path(self.move.world.volumes, self.move.vm, epoch=self.link.epoch)

    def ask(self) -> PrepareAsk:
        """The same VM, paused, which will read its memory from the file."""
        order = self.move.order
        return PrepareAsk(
            migration=order.id,
            vm=self.move.vm,
            epoch=0,
            source=order.source,
            method="quick",
            image=str(self._path),
        )

    async def make_ready(self) -> None:
        """Nothing to set before the VM is stopped."""

    async def transfer(self, prepared: Prepared) -> None:
        """Stop, save, sync: after this the memory exists in the file and nothing runs here."""
        move, world = self.move, self.move.world
        await move.enter(Stage.PRECOPY, "nothing is copied ahead: the VM is saved and restored")
        await move.hold("precopy")
        await move.enter(Stage.SWITCHOVER, "stopping the VM and saving its memory")
        if not self.link.owner.paused:
            await world.machine.stop()
        await move.hold("pre-switchover")
        label = describe(move.vm, epoch=self.link.epoch)
        self._saving = await save_memory(world.machine, self._path, label=label, files=world.files)
        self._events = self._saving.events
        await move.until_stopped(self._follow(self._events), what="save")
        try:
            await move.until_stopped(self._saving.settle(), what="sync")
        except OSError as error:
            raise fail(f"the memory could not be saved: {error.strerror or error}") from error
        left = world.guard.lease_left()
        if left < LEASE_MARGIN_S:
            raise fail(f"{world.host}'s own lease lasts only {left:.1f} s: not committing")
        await self.link.commit(timeout=5.0)
        move.committed = True
        await move.hold("committing")

    async def _follow(self, events: EventStream) -> None:
        move = self.move
        stream = Stream(move.world.machine.monitor)
        until = move.world.clock.monotonic() + SAVE_S
        while move.world.clock.monotonic() < until:
            try:
                event = await wait_status(events, ENDED, timeout=_SAMPLE_S)
            except TimeoutError:
                now = await stream.read()
                share = now.transferred / max(1, now.transferred + now.remaining)
                await move.tell(
                    Progress(
                        stage=Stage.SWITCHOVER,
                        percent=share * 80,
                        bytes_transferred=now.transferred,
                        bytes_remaining=now.remaining,
                        sentence="saving",
                    )
                )
                continue
            now = await stream.read()
            if event.data["status"] != "completed":
                raise fail(f"the memory could not be saved: {now.error or event.data['status']}")
            progress = move.record.progress.but(bytes_transferred=now.transferred, percent=80.0)
            move.record = move.record.but(progress=progress)
            return
        raise fail(f"the memory was not saved within {SAVE_S:g} s")

    async def end(self) -> str:
        """End a save; a finished one counts as ``completed``: the VM must be let go on."""
        if self.move.world.machine.exited.is_set():
            return "gone"
        status = "completed"
        if self._events is not None:
            status = await end_stream(Stream(self.move.world.machine.monitor), self._events)
            if status in ("cancelled", "failed", "none"):
                status = "completed"  # stopped by us: nobody but us lets it run again
        return status

    async def adopt(self) -> bool:
        """Find the save of a move whose agent died; there is always a way back."""
        self._events = self.move.world.machine.monitor.events("MIGRATION")
        return False

    async def undone(self) -> None:
        """The VM stays here: its saved memory is void from now on."""
        if self._saving is not None:
            self._saving.channel.stop()
        await discard(self._path, files=self.move.world.files)

    async def drain(self) -> None:
        """The destination has read the file: it has served."""
        await discard(self._path, files=self.move.world.files)
