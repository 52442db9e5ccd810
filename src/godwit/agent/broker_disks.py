"""The disks of a VM as its storage broker knows them, and as the engine of migration does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from godwit.model.disks import tier_of
from godwit.model.errors import GodwitError
from godwit.model.vm import Disk, Vm
from godwit.qemu.blocks import stored_size
from godwit.qemu.layout import broker_id
from godwit.storage.images import image_info
from godwit.storage.nodes import BrokerDisk, Node

if TYPE_CHECKING:
    from godwit.agent.brokers import Brokers
    from godwit.agent.catalog import Catalog
    from godwit.agent.desk import Desk
    from godwit.storage.broker import Broker

ASK_S = 1.0


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


class VmDisks:
    """Implements ``godwit.migration.world.DiskGate`` for one VM."""

    def __init__(self, brokers: Brokers, vm: str) -> None:
        self._brokers, self._vm = brokers, vm

    async def close(self, *, sync: bool = True) -> None:
        await self._brokers.close(self._vm, sync=sync)

    async def open(self, epoch: int, *, unsynced: bool = False) -> None:
        await self._brokers.open(self._vm, epoch, unsynced=unsynced)
