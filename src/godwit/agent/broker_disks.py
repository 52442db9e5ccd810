"""The disks of a VM as its storage broker knows them, and as the engine of migration does."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from godwit.model.disks import tier_of
from godwit.model.errors import GodwitError
from godwit.model.vm import Disk, Vm
from godwit.qemu.blocks import stored_size
from godwit.qemu.launch import Binary
from godwit.qemu.layout import broker_id
from godwit.storage.broker_daemon import DaemonPlace, end_recorded, forget_recorded
from godwit.storage.broker_life import LABEL, Opening
from godwit.storage.broker_record import load_broker
from godwit.storage.images import image_info
from godwit.storage.nodes import BrokerDisk, Node

if TYPE_CHECKING:
    from godwit.agent.brokers import Brokers
    from godwit.agent.catalog import Catalog
    from godwit.agent.desk import Desk
    from godwit.storage.broker import Broker

ASK_S = 1.0
PROGRAM = "qemu-storage-daemon"
_log = logging.getLogger("agent")


def brokered(vm: Vm) -> list[Disk]:
    """The disks of a VM that its broker serves. Pure."""
    return [disk for disk in vm.disks if tier_of(disk) == "brokered"]


def broker_disk(disk: Disk, served: Node | None = None) -> BrokerDisk:
    """A disk as its broker knows it; ``served`` is its node on a volume of the network. Pure."""
    return BrokerDisk(
        id=broker_id(disk),
        path=disk.path,
        format=disk.format,
        size_bytes=stored_size(disk.size_bytes),
        device=disk.source == "device",
        served=served,
        backing=disk.backing,
        volume=disk.volume,
    )


def first_opening(disk: BrokerDisk, epoch: int) -> Opening:
    """How its gate opens when nobody here knows of a broker before: that one may have died. Pure.

    With its host, for one. What it wrote is lost or on the disk then, but a VHDX has to be mended.
    """
    return Opening(epoch, after_crash=disk.format == "vhdx")


def broker_place(desk: Desk, vm: str) -> DaemonPlace:
    """Where on this host the VM's broker lives."""
    paths, qemu = desk.config.paths, desk.config.qemu
    return DaemonPlace(
        host=desk.host,
        run=paths.vm_run(vm),
        state=paths.vm_state(vm),
        binary=Binary.named(PROGRAM, user=qemu.user),
        cgroup=f"{desk.config.cgroup.root}/{vm}-broker",
        boot_id=desk.equipment.info.boot_id,
        locking=desk.locks(vm),
    )


async def settle_growth(broker: Broker, catalog: Catalog) -> None:
    """What was to grow is served with the size that it really has. No daemon has it open."""
    for name, served in tuple(broker.record.disks.items()):
        if served.grows_to:
            disk, files = served.disk, catalog.files(served.disk.volume)
            info = await image_info(Path(disk.path), format=disk.format, in_use=True, files=files)
            broker.settle_growth(name, info.virtual_size)


async def delivered(desk: Desk, broker: Broker) -> None:
    """Return when nothing of a daemon that ended unseen is under way; two minutes at most."""
    told = False
    while True:
        try:
            broker.check_left()
        except GodwitError as error:
            if not told:
                await desk.event("vm.broker", broker.record.vm, error.message, level="warning")
            told = True
            await desk.clock.sleep(ASK_S)  # the kernel announces nothing
        else:
            return


async def end_left_over(desk: Desk, keep: set[str]) -> list[str]:
    """End the brokers that a dead agent left, but those of the VMs to ``keep``; whose they were."""
    gone = []
    for path in sorted((desk.config.paths.run / "vms").glob("*/broker.json")):
        vm = path.parent.name
        record = load_broker(path.parent)
        if vm in keep or record is None:
            continue
        monitor = path.parent / f"{LABEL}.sock"
        try:
            await end_recorded(record, monitor, name=f"broker of {vm}")
        except GodwitError as error:  # it may still write: its record stays, and says so
            await desk.event("vm.broker", vm, str(error), level="error")
            continue
        forget_recorded(record, monitor)
        with contextlib.suppress(OSError):  # not empty: its QEMU left something to look at
            path.parent.rmdir()
        gone.append(vm)
        _log.info("%s: its broker was left over and is gone", vm)
    return gone


class VmDisks:
    """Implements ``godwit.migration.world.DiskGate`` for one VM."""

    def __init__(self, brokers: Brokers, vm: str) -> None:
        self._brokers, self._vm = brokers, vm

    async def close(self, *, sync: bool = True) -> None:
        await self._brokers.close(self._vm, sync=sync)

    async def open(self, epoch: int, *, unsynced: bool = False) -> None:
        await self._brokers.open(self._vm, epoch, unsynced=unsynced)
