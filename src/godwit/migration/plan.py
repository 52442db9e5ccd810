"""May this VM move there? Pure: facts in, every failed check out, all at once.

The same checks serve ``--dry-run``, the real move and the choice of a destination. A check that
cannot be decided because its fact is missing warns; it never passes silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from godwit.model.checkpoints import check_movable
from godwit.model.disks import tier_of
from godwit.model.errors import Refused
from godwit.model.host import HostInfo
from godwit.model.migration import Check
from godwit.model.ownership import Owner, OwnerState
from godwit.model.units import format_size
from godwit.model.vm import Vm
from godwit.qemu.firmware import PACKAGE_HINT, SAME_HINT, difference

CLOCK_LIMIT_S = 1.0
"""A larger clock offset between hosts makes guests jump and reports lie."""


def passed(name: str, message: str) -> Check:
    """A check that found nothing wrong."""
    return Check(name=name, result="pass", message=message)


def warned(name: str, message: str, hint: str = "") -> Check:
    """A check that lets the move go on but wants to be read."""
    return Check(name=name, result="warn", message=message, hint=hint)


def failed(name: str, message: str, hint: str) -> Check:
    """A check that forbids the move."""
    return Check(name=name, result="fail", message=message, hint=hint)


@dataclass(frozen=True)
class SourceFacts:
    """What the source's agent knows about its running VM."""

    info: HostInfo
    qemu_status: str  # query-status
    blocked_reasons: tuple[str, ...] = ()  # query-migrate
    block_jobs: tuple[str, ...] = ()
    devices_leaving: tuple[str, ...] = ()  # device_del asked for, not done
    guard_ready: bool = True


@dataclass(frozen=True)
class DestinationFacts:
    """What the destination's agent found out by itself."""

    info: HostInfo
    memory_free_bytes: int
    volumes: dict[str, str]  # volume -> "" or why the QEMU user cannot use it
    files: dict[str, str]  # boot file or disk path -> "" or why it cannot be opened
    macs_in_use: tuple[str, ...] = ()
    holds_vm: bool = False  # a QEMU of this name is there already
    tls_ready: bool = True


def check_request(owner: Owner, *, source: str, destination: str) -> list[Check]:
    """Is it ours to move, does it run, is it free?"""
    checks = []
    if owner.host != source:
        checks.append(failed("owner", f"the VM is on {owner.host}, not {source}", "ask again"))
    if source == destination:
        checks.append(
            failed("destination", f"the VM already runs on {source}", "name another host")
        )
    if owner.state is not OwnerState.RUNNING:
        checks.append(failed("state", f"the VM is {owner.state.value}", "start it first"))
    if owner.migration is not None:
        checks.append(
            failed(
                "exclusive",
                f"the VM is being moved by {owner.migration.id}",
                f"wait, or: godwit migration cancel {owner.migration.id}",
            )
        )
    return checks or [passed("owner", f"{source} owns the VM at epoch {owner.epoch}")]


def check_source(vm: Vm, facts: SourceFacts, *, method: str) -> list[Check]:
    """What only the source can see: the running QEMU and what blocks it."""
    checks = []
    if facts.qemu_status not in ("running", "paused"):
        checks.append(
            failed(
                "guest",
                f"QEMU says {facts.qemu_status or 'nothing'}",
                "a VM moves while it runs or is paused; look at: godwit vm show " + vm.name,
            )
        )
    for reason in facts.blocked_reasons:
        checks.append(failed("blocked", f"QEMU refuses: {reason}", "remove that device first"))
    for job in facts.block_jobs:
        checks.append(failed("block-jobs", f"block job {job} runs", "wait until it is done"))
    for device in facts.devices_leaving:
        checks.append(failed("devices", f"{device} is being removed", "wait until it is gone"))
    refusal = facts.info.qemu.live_migration_refusal
    if method == "live" and refusal:
        checks.append(failed("qemu", refusal, "use --method quick, or install a newer QEMU"))
    if not facts.guard_ready:
        checks.append(
            warned("guard", "the guard does not answer here", "a hung agent would not be noticed")
        )
    return checks or [passed("guest", "nothing in the running VM is in the way")]


def check_along(vm: Vm, *, method: str) -> list[Check]:
    """The disks that only the source has, and that have to come along."""
    along = [disk for disk in vm.disks if disk.local]
    if not along:
        return []
    names = ", ".join(disk.id for disk in along)
    if method != "live":
        hint = "move it live, or its disks to a shared volume first"
        return [failed("local-disks", f"{names} lies on this host's own storage", hint)]
    if brokered := [disk for disk in along if tier_of(disk) == "brokered"]:
        text = f"{brokered[0].id} is {brokered[0].format} on local storage, which does not go along"
        hint = f"first: godwit vm disk move {vm.name} {brokered[0].id} --format qcow2"
        return [failed("local-disks", text, hint)]
    for disk in along:
        try:
            check_movable(vm, disk)
        except Refused as refusal:
            return [failed("local-disks", refusal.message, refusal.hint)]
    size = format_size(sum(disk.size_bytes for disk in along))
    return [passed("local-disks", f"{names} ({size}) goes along, copied while the VM runs")]


def check_destination(vm: Vm, facts: DestinationFacts, *, method: str) -> list[Check]:
    """What only the destination can see."""
    info = facts.info
    checks: list[Check] = []
    if facts.holds_vm:
        checks.append(
            failed("clean", f"{info.name} already has a QEMU of this VM", "see: godwit host show")
        )
    checks += _memory(vm, facts)
    checks += _processor(vm, info)
    checks += _firmware(vm, info)
    checks += [
        failed("storage", f"{info.name} cannot use {what}: {why}", "check the volume there")
        for what, why in {**facts.volumes, **facts.files}.items()
        if why
    ]
    checks += _networks(vm, facts)
    if not facts.tls_ready:
        checks.append(
            failed(
                "tls",
                f"{info.name} has no migration certificate",
                "put its certificates into tls.migration_dir",
            )
        )
    if method == "live" and info.qemu.live_migration_refusal:
        checks.append(
            failed("qemu", info.qemu.live_migration_refusal, "use --method quick or update QEMU")
        )
    return checks or [passed("destination", f"{info.name} can take the VM")]


def _memory(vm: Vm, facts: DestinationFacts) -> list[Check]:
    if vm.memory_bytes <= facts.memory_free_bytes:
        return []
    have, need = format_size(facts.memory_free_bytes), format_size(vm.memory_bytes)
    return [failed("memory", f"{facts.info.name} has {have} free, {need} needed", "free some")]


def _processor(vm: Vm, info: HostInfo) -> list[Check]:
    checks = []
    if vm.pins.machine not in info.qemu.machines:
        version = ".".join(map(str, info.qemu.version))
        checks.append(
            failed(
                "machine",
                f"QEMU {version} on {info.name} does not know {vm.pins.machine}",
                "update QEMU there",
            )
        )
    if vm.pins.stays:
        checks.append(
            failed(
                "cpu",
                f"{vm.name} has its host's own CPU ({vm.pins.cpu_model}) and cannot leave it",
                "stop it and start it there; a VM made without --cpu host moves",
            )
        )
    elif vm.pins.cpu_model not in info.qemu.cpu_models:
        checks.append(
            failed(
                "cpu",
                f"{info.name} cannot provide the CPU model {vm.pins.cpu_model}",
                "choose a host with such a CPU, or a VM with an older CPU model",
            )
        )
    if vm.pins.accelerator != info.qemu.accelerator:
        checks.append(
            failed(
                "accelerator",
                f"the VM runs on {vm.pins.accelerator}, {info.name} has {info.qemu.accelerator}",
                "a running VM cannot change between emulation and KVM",
            )
        )
    return checks


def _firmware(vm: Vm, info: HostInfo) -> list[Check]:
    """A running VM has its firmware's code in memory: both hosts need the same."""
    if vm.firmware is None:
        return []
    found = None if info.uefi is None else info.uefi.code
    why = difference(vm.firmware.code, found)
    if not why:
        return []
    text = f"{info.name} does not have the VM's UEFI firmware: {why}"
    return [failed("firmware", text, PACKAGE_HINT if found is None else SAME_HINT)]


def _networks(vm: Vm, facts: DestinationFacts) -> list[Check]:
    checks = []
    for nic in vm.nics:
        mtu = facts.info.networks.get(nic.network)
        if mtu is None:
            text = f"{facts.info.name} has no network {nic.network}"
            checks.append(failed("network", text, "create it there"))
        elif mtu != nic.mtu:
            text = f"network {nic.network}: MTU {mtu} on {facts.info.name}, the VM has {nic.mtu}"
            checks.append(failed("mtu", text, "make the MTUs equal"))
        if nic.mac in facts.macs_in_use:
            text = f"{nic.mac} is in use on {facts.info.name}"
            checks.append(failed("mac", text, "find the other owner of this address"))
    return checks


def check_pair(
    source: HostInfo, destination: HostInfo, *, postcopy: bool, clock_offset_s: float | None
) -> list[Check]:
    """What two hosts must have in common."""
    checks = []
    if source.migration_subnet != destination.migration_subnet:
        checks.append(
            failed(
                "subnet",
                f"migration networks differ: {source.migration_subnet or 'none'} and "
                f"{destination.migration_subnet or 'none'}",
                "put both hosts on one migration network",
            )
        )
    if source.cpu_vendor != destination.cpu_vendor:
        text = f"CPU makers differ: {source.cpu_vendor} and {destination.cpu_vendor}"
        checks.append(failed("vendor", text, "live migration needs one manufacturer"))
    if destination.qemu.version < source.qemu.version:
        checks.append(
            failed(
                "qemu-version",
                "from newer to older QEMU ("
                + " to ".join(".".join(map(str, i.qemu.version)) for i in (source, destination))
                + ") is not tested",
                "update the destination first",
            )
        )
    if clock_offset_s is None:
        checks.append(warned("clock", "the clock offset could not be measured"))
    elif abs(clock_offset_s) > CLOCK_LIMIT_S:
        text = f"clocks differ by {clock_offset_s:.3f} s"
        checks.append(failed("clock", text, "let both hosts follow one time source"))
    if postcopy and not destination.userfaultfd:
        checks.append(
            failed("postcopy", f"{destination.name} has no /dev/userfaultfd", "do without")
        )
    return checks or [passed("pair", "the two hosts fit together")]


def eligible(
    vm: Vm, hosts: Sequence[tuple[HostInfo, int, bool]], *, source: HostInfo
) -> dict[str, tuple[str, ...]]:
    """Why each host (facts, free bytes, up?) could not take the VM; no reasons = it can."""
    reasons: dict[str, tuple[str, ...]] = {}
    for info, free, up in hosts:
        facts = DestinationFacts(info=info, memory_free_bytes=free, volumes={}, files={})
        checks = check_destination(vm, facts, method="quick")
        checks += check_pair(source, info, postcopy=False, clock_offset_s=0.0)
        found = [check.message for check in checks if check.result == "fail"]
        if info.name == source.name:
            found = ["the VM is there now"]
        if not up:
            found.insert(0, f"{info.name} is not up")
        missing = vm.volumes - set(info.volumes)
        found += [f"{info.name} does not see volume {volume}" for volume in sorted(missing)]
        reasons[info.name] = tuple(found)
    return reasons
