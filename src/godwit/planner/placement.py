"""Choose a host for a VM: pure, with the reason in words and every reason against the others.

A host qualifies when it is up and carries no mark, the VM's rules allow it, nothing the VM is kept
apart from is there, it knows what the VM is pinned to, has its networks and volumes, and has the
memory and CPUs. Among those the one whose scarcer resource (memory or CPUs promised to VMs) is
least used afterwards wins; names break ties, so the same facts always give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from godwit.model.errors import Refused
from godwit.model.firmware import FirmwareImage
from godwit.model.host import HostInfo, HostState
from godwit.model.migration import Candidate
from godwit.model.units import MIB, format_size
from godwit.model.vm import Pins, Vm
from godwit.qemu.firmware import difference

# What QEMU itself needs beside the guest's memory (emulation buffers, devices, page tables).
OVERHEAD_BYTES = 64 * MIB
MARKED = (HostState.DRAINING, HostState.MAINTENANCE, HostState.QUARANTINED)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a VM asks of a host; ``hosts`` empty: it may run on any."""

    vm: str
    memory_bytes: int
    cpus: int
    networks: Mapping[str, int] = field(default_factory=dict)  # name -> MTU
    volumes: frozenset[str] = frozenset()
    pins: Pins | None = None
    uefi: FirmwareImage | None = None
    awake: bool = False  # its firmware's code is in its memory, and has to be the same
    stays_on: str | None = None  # it has this host's own CPU, and runs or is saved
    hosts: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

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
            hosts=vm.rules.hosts,
            apart=vm.rules.apart,
        )

    @property
    def whole_bytes(self) -> int:
        """The guest's memory and what its QEMU needs beside it."""
        return self.memory_bytes + OVERHEAD_BYTES


@dataclass(frozen=True, kw_only=True)
class Room:
    """A host as placement sees it; ``memory_free_bytes`` None = it did not answer.

    ``groups``: of each group that VMs are kept apart by, the VMs of it that are there or on their
    way there. ``cpus_limit``: so many CPUs may be promised to VMs; 0 is no limit.
    """

    info: HostInfo
    state: HostState = HostState.UP
    reason: str = ""
    memory_free_bytes: int | None = None
    cpus_promised: int = 0
    cpus_limit: int = 0
    vms: int = 0
    lost: Mapping[str, str] = field(default_factory=dict)  # volume -> why it has no path of its own
    groups: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def taking(self, need: Need) -> Room:
        """The same host once the VM is there as well."""
        free = self.memory_free_bytes
        groups = dict(self.groups)
        for group in need.apart:
            groups[group] = groups.get(group, frozenset()) | {need.vm}
        return replace(
            self,
            memory_free_bytes=None if free is None else max(0, free - need.whole_bytes),
            cpus_promised=self.cpus_promised + need.cpus,
            vms=self.vms + 1,
            groups=groups,
        )


class Kind(IntEnum):
    """What stands in the way, from what is changed most easily to what is hardest to change."""

    APART = 1
    RULE = 2
    CPUS = 3
    MEMORY = 4
    MARK = 5
    PATH = 6
    NETWORK = 7
    VOLUME = 8
    MACHINE = 9
    STATE = 10
    PAIR = 11


@dataclass(frozen=True)
class Obstacle:
    """One reason against a host; ``missing`` is how much of what is counted (bytes, CPUs)."""

    kind: Kind
    text: str
    missing: int = 0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The chosen host, why, and why not the others (host -> reasons)."""

    host: str
    reason: str
    rejected: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def obstacles(room: Room, need: Need) -> tuple[Obstacle, ...]:
    """Everything that keeps this host from taking the VM; empty when it can."""
    info = room.info
    if room.state is not HostState.UP:
        kind = Kind.MARK if room.state in MARKED else Kind.STATE
        return (Obstacle(kind, f"{info.name} is {room.state.value}: {room.reason}"),)
    return (
        *_against_rules(room, need),
        *_against_size(room, need),
        *_against_surroundings(room, need),
        *(Obstacle(Kind.MACHINE, text) for text in _against_machine(info, need)),
    )


def reasons_against(room: Room, need: Need) -> tuple[str, ...]:
    """Every reason why this host cannot take the VM, in words; empty when it can."""
    return tuple(obstacle.text for obstacle in obstacles(room, need))


def against_rules(room: Room, need: Need) -> tuple[str, ...]:
    """The VM's own rules against this host, which also hold for a host that is asked for."""
    return tuple(obstacle.text for obstacle in _against_rules(room, need))


def _against_rules(room: Room, need: Need) -> Iterator[Obstacle]:
    name = room.info.name
    if need.hosts and name not in need.hosts:
        allowed = ", ".join(need.hosts)
        yield Obstacle(Kind.RULE, f"the rules of {need.vm} allow only {allowed}, not {name}")
    for group in need.apart:
        others = sorted(room.groups.get(group, frozenset()) - {need.vm})
        if others:
            text = f"{others[0]} is on {name}, and {need.vm} is kept apart from it ({group})"
            yield Obstacle(Kind.APART, text, len(others))


def _against_size(room: Room, need: Need) -> Iterator[Obstacle]:
    info, free = room.info, room.memory_free_bytes
    if free is None:
        text = f"{info.name} did not say how much memory is free"
        yield Obstacle(Kind.STATE, text)
    elif free < need.whole_bytes:
        text = (
            f"not enough memory: {format_size(free)} free on {info.name}, "
            f"{format_size(need.whole_bytes)} needed"
        )
        yield Obstacle(Kind.MEMORY, text, need.whole_bytes - free)
    if need.cpus > info.cpus:
        text = f"{info.name} has {info.cpus} CPUs, {need.cpus} needed"
        yield Obstacle(Kind.CPUS, text, need.cpus - info.cpus)
    elif room.cpus_limit and room.cpus_promised + need.cpus > room.cpus_limit:
        text = (
            f"{info.name} has promised {room.cpus_promised} of at most {room.cpus_limit} CPUs "
            f"to VMs, {need.cpus} needed"
        )
        yield Obstacle(Kind.CPUS, text, room.cpus_promised + need.cpus - room.cpus_limit)


def _against_surroundings(room: Room, need: Need) -> Iterator[Obstacle]:
    info = room.info
    for name, mtu in sorted(need.networks.items()):
        here = info.networks.get(name)
        if here is None:
            yield Obstacle(Kind.NETWORK, f"{info.name} has no network {name}")
        elif here != mtu:
            text = f"network {name} has MTU {here} on {info.name}, {mtu} needed"
            yield Obstacle(Kind.NETWORK, text)
    for volume in sorted(need.volumes - set(info.volumes)):
        yield Obstacle(Kind.VOLUME, f"{info.name} has no volume {volume}")
    for volume in sorted(need.volumes & room.lost.keys()):
        yield Obstacle(Kind.PATH, f"{volume} is {room.lost[volume]} on {info.name}")


def _against_machine(info: HostInfo, need: Need) -> Iterator[str]:
    if need.pins is not None:
        yield from _against_pins(info, need.pins)
    if why := bound_elsewhere(need, info.name):
        yield why
    if need.uefi is not None:
        yield from _against_firmware(info, need.uefi, awake=need.awake)


def bound_elsewhere(need: Need, host: str) -> str:
    """Why a VM that has its host's own CPU cannot be on this one; empty when it can."""
    if need.stays_on in (None, host):
        return ""
    return f"{need.vm} has the CPU of {need.stays_on} (--cpu host): it cannot go on elsewhere"


def _against_firmware(info: HostInfo, wanted: FirmwareImage, *, awake: bool) -> Iterator[str]:
    if info.uefi is None:
        yield f"{info.name} has no UEFI firmware (package ovmf)"
        return
    found = info.uefi.code
    if awake and (why := difference(wanted, found)):
        yield f"{info.name} does not have the VM's UEFI firmware: {why}"
    elif found.size_bytes != wanted.size_bytes:
        size = wanted.size_bytes
        yield f"the UEFI firmware of {info.name} has {found.size_bytes} bytes, {size} are needed"


def _against_pins(info: HostInfo, pins: Pins) -> Iterator[str]:
    qemu = info.qemu
    if qemu.accelerator != pins.accelerator:
        yield f"{info.name} runs VMs with {qemu.accelerator}, this one is pinned to " + (
            pins.accelerator
        )
    if qemu.machines and pins.machine not in qemu.machines:
        yield f"QEMU on {info.name} does not know the machine {pins.machine}"
    if not pins.stays and qemu.cpu_models and pins.cpu_model not in qemu.cpu_models:
        yield f"{info.name} cannot give the CPU model {pins.cpu_model}"


def _use_after(room: Room, need: Need) -> tuple[float, float]:
    """Shares of memory and CPUs in use once the VM is there."""
    free = room.memory_free_bytes or 0
    memory = 1 - (free - need.memory_bytes) / max(1, room.info.memory_bytes)
    return memory, (room.cpus_promised + need.cpus) / max(1, room.info.cpus)


def rank(room: Room, need: Need) -> tuple[float, float, str]:
    """How much a host that can take the VM would be in use then; the smallest is the best."""
    memory, cpus = _use_after(room, need)
    return round(max(memory, cpus), 3), round(memory + cpus, 3), room.info.name


def choose(
    rooms: Iterable[Room], need: Need, *, exclude: Mapping[str, tuple[str, ...]] | None = None
) -> Decision:
    """The best host for the VM. ``exclude`` holds more reasons against hosts.

    Refused, with all reasons in its context and the smallest in its message, when no host
    qualifies.
    """
    rejected: dict[str, tuple[Obstacle, ...]] = {}
    fit: list[Room] = []
    for room in rooms:
        name = room.info.name
        pair = (Obstacle(Kind.PAIR, text) for text in (exclude or {}).get(name, ()))
        against = (*pair, *obstacles(room, need))
        if against:
            rejected[name] = against
        else:
            fit.append(room)
    words = {name: tuple(one.text for one in against) for name, against in rejected.items()}
    if not fit:
        raise Refused(
            f"no host can take {need.vm}: {smallest(rejected)}",
            hint="see: godwit host list",
            rejected={name: list(reasons) for name, reasons in words.items()},
        )
    best = min(fit, key=lambda room: rank(room, need))
    return Decision(host=best.info.name, reason=_why(best, len(fit), words), rejected=words)


def smallest(rejected: Mapping[str, Sequence[Obstacle]]) -> str:
    """The reason that is overcome most easily, and how many hosts are further away still. Pure.

    The nearest host is the one with the fewest kinds of obstacles, then with the easiest, then with
    the least that is missing.
    """
    if not rejected:
        return "no host is known"

    def distance(name: str) -> tuple[int, int, int, str]:
        against = rejected[name]
        worst = max(against, key=lambda one: (one.kind, one.missing))
        return len({one.kind for one in against}), worst.kind, worst.missing, name

    nearest = min(rejected, key=distance)
    said = "; ".join(one.text for one in rejected[nearest])
    others = len(rejected) - 1
    if not others:
        return said
    return f"{said} (that is the nearest of {len(rejected)} hosts)"


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
