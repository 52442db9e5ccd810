"""Choose a host for a VM: pure, with the reason in words and every reason against the others.

A host qualifies when it is up, knows what the VM is pinned to, has its networks and volumes, and
has the memory. Among those the one whose scarcer resource (memory or CPUs promised to VMs) is
least used afterwards wins; names break ties, so the same facts always give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.model.errors import Refused
from godwit.model.firmware import FirmwareImage
from godwit.model.host import HostInfo, HostState
from godwit.model.migration import Candidate
from godwit.model.units import MIB, format_size
from godwit.model.vm import Pins, Vm
from godwit.model.volume import VolumeState
from godwit.qemu.firmware import difference

# What QEMU itself needs beside the guest's memory (emulation buffers, devices, page tables).
OVERHEAD_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a VM asks of a host."""

    vm: str
    memory_bytes: int
    cpus: int
    networks: Mapping[str, int] = field(default_factory=dict)  # name -> MTU
    volumes: frozenset[str] = frozenset()
    pins: Pins | None = None
    uefi: FirmwareImage | None = None
    awake: bool = False  # its firmware's code is in its memory, and has to be the same

    @staticmethod
    def of(vm: Vm, *, awake: bool = False) -> Need:
        """The needs of a defined VM, which runs or is saved (``awake``) or is to be powered on."""
        return Need(
            vm=vm.name,
            memory_bytes=vm.memory_bytes,
            cpus=vm.cpus,
            networks={nic.network: nic.mtu for nic in vm.nics},
            volumes=vm.volumes,
            pins=vm.pins,
            uefi=None if vm.firmware is None else vm.firmware.code,
            awake=awake,
        )


@dataclass(frozen=True, kw_only=True)
class Room:
    """A host as placement sees it; ``memory_free_bytes`` None = it did not answer."""

    info: HostInfo
    state: HostState = HostState.UP
    reason: str = ""
    memory_free_bytes: int | None = None
    cpus_promised: int = 0
    vms: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)  # volume -> why it has no path of its own


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The chosen host, why, and why not the others (host -> reasons)."""

    host: str
    reason: str
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def rooms_of(snapshot: Snapshot, free: Mapping[str, int | None]) -> list[Room]:
    """Every known host as a room; ``free`` holds the free memory that the hosts answered.

    Memory already promised to VMs that start or arrive is not yet missing from what a host
    measures, so what remains unpromised is an upper bound.
    """
    rooms = []
    for info in sorted(snapshot.hosts.values(), key=lambda host: host.name):
        state, reason = host_state(
            leased=info.name in snapshot.leases, agent=info.name in snapshot.agents
        )
        here = snapshot.running_on(info.name)
        promised = (*here, *snapshot.arriving_at(info.name))
        left = info.memory_bytes - sum(vm.memory_bytes + OVERHEAD_BYTES for vm in promised)
        measured = free.get(info.name)
        rooms.append(
            Room(
                info=info,
                state=state,
                reason=reason,
                memory_free_bytes=None if measured is None else max(0, min(measured, left)),
                cpus_promised=sum(vm.cpus for vm in promised),
                vms=len(here),
                lost=_lost_paths(snapshot, info),
            )
        )
    return rooms


def _lost_paths(snapshot: Snapshot, info: HostInfo) -> dict[str, str]:
    """The volumes that a host says it has no path of its own to: state and reason."""
    seen = {volume: snapshot.seen_volume(volume, info.name) for volume in info.volumes}
    return {
        volume: f"{one.state.value} ({one.reason})"
        for volume, one in seen.items()
        if one is not None and one.state is not VolumeState.DIRECT
    }


def reasons_against(room: Room, need: Need) -> tuple[str, ...]:
    """Every reason why this host cannot take the VM; empty when it can."""
    info = room.info
    if room.state is not HostState.UP:
        return (f"{info.name} is {room.state.value}: {room.reason}",)
    found: list[str] = []
    wanted = need.memory_bytes + OVERHEAD_BYTES
    if room.memory_free_bytes is None:
        found.append(f"{info.name} did not say how much memory is free")
    elif room.memory_free_bytes < wanted:
        found.append(
            f"not enough memory: {format_size(room.memory_free_bytes)} free on {info.name}, "
            f"{format_size(wanted)} needed"
        )
    if need.cpus > info.cpus:
        found.append(f"{info.name} has {info.cpus} CPUs, {need.cpus} needed")
    for name, mtu in sorted(need.networks.items()):
        here = info.networks.get(name)
        if here is None:
            found.append(f"{info.name} has no network {name}")
        elif here != mtu:
            found.append(f"network {name} has MTU {here} on {info.name}, {mtu} needed")
    found.extend(
        f"{info.name} has no volume {volume}" for volume in sorted(need.volumes - set(info.volumes))
    )
    found.extend(
        f"{volume} is {room.lost[volume]} on {info.name}"
        for volume in sorted(need.volumes & room.lost.keys())
    )
    if need.pins is not None:
        found.extend(_against_pins(info, need.pins))
    if need.uefi is not None:
        found.extend(_against_firmware(info, need.uefi, awake=need.awake))
    return tuple(found)


def _against_firmware(info: HostInfo, wanted: FirmwareImage, *, awake: bool) -> Iterable[str]:
    if info.uefi is None:
        yield f"{info.name} has no UEFI firmware (package ovmf)"
        return
    found = info.uefi.code
    if awake and (why := difference(wanted, found)):
        yield f"{info.name} does not have the VM's UEFI firmware: {why}"
    elif found.size_bytes != wanted.size_bytes:
        size = wanted.size_bytes
        yield f"the UEFI firmware of {info.name} has {found.size_bytes} bytes, {size} are needed"


def _against_pins(info: HostInfo, pins: Pins) -> Iterable[str]:
    qemu = info.qemu
    if qemu.accelerator != pins.accelerator:
        yield f"{info.name} runs VMs with {qemu.accelerator}, this one is pinned to " + (
            pins.accelerator
        )
    if qemu.machines and pins.machine not in qemu.machines:
        yield f"QEMU on {info.name} does not know the machine {pins.machine}"
    if qemu.cpu_models and pins.cpu_model not in qemu.cpu_models:
        yield f"{info.name} cannot give the CPU model {pins.cpu_model}"


def _use_after(room: Room, need: Need) -> tuple[float, float]:
    """Shares of memory and CPUs in use once the VM is there."""
    free = room.memory_free_bytes or 0
    memory = 1 - (free - need.memory_bytes) / max(1, room.info.memory_bytes)
    return memory, (room.cpus_promised + need.cpus) / max(1, room.info.cpus)


def choose(
    rooms: Iterable[Room], need: Need, *, exclude: Mapping[str, tuple[str, ...]] | None = None
) -> Decision:
    """The best host for the VM. ``exclude`` holds more reasons against hosts.

    Refused, with all reasons in its context, when no host qualifies.
    """
    rejected: dict[str, tuple[str, ...]] = {}
    fit: list[tuple[float, float, str, Room]] = []
    for room in rooms:
        name = room.info.name
        against = reasons_against(room, need)
        against = (*(exclude or {}).get(name, ()), *against)
        if against:
            rejected[name] = against
            continue
        memory, cpus = _use_after(room, need)
        fit.append((round(max(memory, cpus), 3), round(memory + cpus, 3), name, room))
    if not fit:
        why = "; ".join(reasons[0] for reasons in rejected.values()) or "no host is known"
        raise Refused(
            f"no host can take {need.vm}: {why}",
            hint="see: godwit host list",
            rejected={name: list(reasons) for name, reasons in rejected.items()},
        )
    *_, name, room = min(fit, key=lambda entry: entry[:3])
    return Decision(host=name, reason=_why(room, len(fit), rejected), rejected=rejected)


def _why(room: Room, fit: int, rejected: Mapping[str, tuple[str, ...]]) -> str:
    info = room.info
    facts = (
        f"{format_size(room.memory_free_bytes or 0)} free and "
        f"{room.cpus_promised} of {info.cpus} CPUs promised"
    )
    if fit > 1:
        start = f"{info.name} has the most room of {fit} hosts: {facts}"
    else:
        start = f"{info.name} is the only host that can: {facts}"
    others = "; ".join(f"not {host}: {reasons[0]}" for host, reasons in sorted(rejected.items()))
    return f"{start} ({others})" if others else start


def candidates(
    rooms: Iterable[Room], need: Need, *, exclude: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[Candidate, ...]:
    """Every host with its eligibility, for a dry run."""
    found = []
    for room in rooms:
        name = room.info.name
        reasons = (*(exclude or {}).get(name, ()), *reasons_against(room, need))
        found.append(Candidate(host=name, eligible=not reasons, reasons=reasons))
    return tuple(found)
