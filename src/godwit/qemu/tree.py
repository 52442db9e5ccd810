"""The realised machine as QEMU itself describes it, in a form two hosts can compare.

A device missing on the destination makes the load fail; one too many is *not* noticed by QEMU, so
the trees are compared before the stream starts.  Only what a guest can see is in here: no
descriptors, no paths, nothing the guest itself may change (BARs, link state, balloon).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from godwit.model.base import Record
from godwit.qmp import Monitor

# What is asked of each device by its driver; the rest comes from the list commands. Each question
# costs a round trip in the middle of a move. ``vectors`` tells the number of queue pairs.
# One that is added later is compared only with an agent that asks for it too (``_TOLD_BY_ALL``).
_PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "virtio-net-pci": ("mac", "vectors", "parent_bus"),
    "virtio-scsi-pci": ("num_queues",),
    "scsi-hd": ("scsi-id", "serial"),
    "scsi-block": ("scsi-id",),
    "scsi-cd": ("scsi-id", "lun"),
}

# What every version tells of a device: it is compared even where one side has none of it.
_TOLD_BY_ALL = frozenset({"mac", "vectors", "num_queues", "scsi-id", "serial", "lun", "size"})


class Device(Record):
    """One device: ``address`` is bus:slot.function as PCI has it, empty for others."""

    id: str
    driver: str
    address: str = ""
    properties: dict[str, str] = Field(default_factory=dict)


class DeviceTree(Record):
    """Everything a guest can see of its machine; equal trees mean a load can succeed."""

    machine: str
    cpu_model: str
    cpus: int
    memory_bytes: int
    devices: tuple[Device, ...]

    def differences(self, other: DeviceTree) -> tuple[str, ...]:
        """What is different in ``other``, one sentence each; empty when nothing is."""
        return tuple(_differences(self, other))


def _differences(mine: DeviceTree, other: DeviceTree) -> Iterator[str]:
    for name in ("machine", "cpu_model", "cpus", "memory_bytes"):
        ours, theirs = getattr(mine, name), getattr(other, name)
        if ours != theirs:
            yield f"{name} is {ours} here and {theirs} there"
    here = {device.id: device for device in mine.devices}
    there = {device.id: device for device in other.devices}
    for name in sorted(here.keys() - there.keys()):
        yield f"{name} ({here[name].driver}) is missing there"
    for name in sorted(there.keys() - here.keys()):
        yield f"{name} ({there[name].driver}) is there but not here"
    told = _TOLD_BY_ALL | (_told(mine) & _told(other))
    for name in sorted(here.keys() & there.keys()):
        if _comparable(here[name], told) != _comparable(there[name], told):
            yield f"{name} is {_describe(here[name])} here and {_describe(there[name])} there"


def _told(tree: DeviceTree) -> frozenset[str]:
    """What is told of any device: an agent of another version asks for more, or for less."""
    return frozenset(key for device in tree.devices for key in device.properties)


def _comparable(device: Device, told: frozenset[str]) -> tuple[str, str, dict[str, str]]:
    known = {key: value for key, value in device.properties.items() if key in told}
    return device.driver, device.address, known


def _describe(device: Device) -> str:
    words = [device.driver, device.address]
    words += [f"{key}={value}" for key, value in device.properties.items()]
    return " ".join(word for word in words if word)


async def read_device_tree(monitor: Monitor) -> DeviceTree:
    """Ask a QEMU for its tree; commands go out together, so this takes a few milliseconds."""
    peripherals, buses, blocks, cpus, memory, machine = await asyncio.gather(
        monitor.execute("qom-list", {"path": "/machine/peripheral"}),
        monitor.execute("query-pci"),
        monitor.execute("query-block"),
        monitor.execute("query-cpus-fast"),
        monitor.execute("query-memory-size-summary"),
        monitor.execute("qom-get", {"path": "/machine", "property": "type"}),
    )
    drivers = dict(_children(peripherals))
    addresses = dict(_addresses(buses))
    sizes = {
        str(block["qdev"]): int(block["inserted"]["image"]["virtual-size"])
        for block in blocks
        if block.get("qdev") and block.get("inserted")
    }
    model, asked = await asyncio.gather(
        monitor.execute("qom-get", {"path": cpus[0]["qom-path"], "property": "type"}),
        _properties(monitor, drivers),
    )
    devices = []
    for name, driver in sorted(drivers.items()):
        properties = asked.get(name, {})
        if name in sizes:
            properties["size"] = str(sizes[name])
        address = _address(properties) or addresses.get(name, "")
        devices.append(Device(id=name, driver=driver, address=address, properties=properties))
    return DeviceTree(
        machine=str(machine).removesuffix("-machine"),
        cpu_model=str(model).removesuffix("-x86_64-cpu"),
        cpus=len(cpus),
        memory_bytes=int(memory["base-memory"]) + int(memory.get("plugged-memory", 0)),
        devices=tuple(devices),
    )


def _children(answer: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for entry in answer:
        kind = str(entry["type"])
        if kind.startswith("child<"):
            yield str(entry["name"]), kind[len("child<") : -1]


def _addresses(buses: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    # Only the root bus: QEMU lists what is behind a bridge only once the guest's firmware has
    # numbered it, which a destination's never has.
    for device in (device for bus in buses if bus["bus"] == 0 for device in bus["devices"]):
        if device.get("qdev_id"):
            yield str(device["qdev_id"]), f"pcie.0:{device['slot']:02x}.{device['function']}"


def _address(properties: dict[str, str]) -> str:
    """The place of a device behind a port (it is alone there), out of what it told of itself."""
    bus = properties.pop("parent_bus", "")
    return f"{bus.rsplit('/', 1)[-1]}:00.0" if bus else ""


async def _properties(monitor: Monitor, drivers: Mapping[str, str]) -> dict[str, dict[str, str]]:
    wanted = [
        (name, key) for name, driver in drivers.items() for key in _PROPERTIES.get(driver, ())
    ]
    answers = await asyncio.gather(
        *(
            monitor.execute("qom-get", {"path": f"/machine/peripheral/{name}", "property": key})
            for name, key in wanted
        )
    )
    found: dict[str, dict[str, str]] = {}
    for (name, key), value in zip(wanted, answers, strict=True):
        found.setdefault(name, {})[key] = str(value)
    return found
