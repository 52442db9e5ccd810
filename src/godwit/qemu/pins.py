"""Chooses what a new VM is pinned to, so that each allowed host can run the same machine.

Pure: the same hosts, name and UUID give the same pins.  Nothing is chosen by what the creating
host happens to have; a pin holds for the VM's whole life.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final, Literal, cast

from godwit.host.facts import Usable
from godwit.model.errors import Conflict, InvalidRequest, Refused
from godwit.model.host import QemuFacts
from godwit.model.vm import Disk, Nic, Pins
from godwit.qemu.facts import machine_key
from godwit.qemu.layout import NIC_PORTS, nic_port
from godwit.qemu.quirks import SHORT_RAM

MAX_DISKS = 256

# Best first. From Nehalem up a model gives x86-64-v2, which many distributions need by now; what
# lies below it is for hosts (and emulation) that can do no better.
CPU_FAMILIES: Final[tuple[str, ...]] = (
    "GraniteRapids",
    "SapphireRapids",
    "Icelake-Server",
    "Cascadelake-Server",
    "Skylake-Server",
    "Broadwell",
    "Haswell",
    "IvyBridge",
    "SandyBridge",
    "EPYC-Turin",
    "EPYC-Genoa",
    "EPYC-Milan",
    "EPYC-Rome",
    "EPYC",
    "Opteron_G5",
    "Opteron_G4",
    "Westmere",
    "Nehalem",
    "Opteron_G3",
    "Penryn",
    "Opteron_G2",
    "Conroe",
    "Opteron_G1",
    "kvm64",
    "qemu64",
)


def choose_accelerator(wanted: str, kvm: Usable) -> tuple[Literal["kvm", "tcg"], str]:
    """The accelerator of a host and, when it is not KVM, the reason in words.

    ``wanted`` is ``auto``, ``kvm`` or ``tcg``. Refused when KVM is demanded and does not work.
    """
    if wanted == "tcg":
        return "tcg", "the configuration asks for emulation"
    if wanted not in ("auto", "kvm"):
        raise InvalidRequest(f"{wanted!r} is no accelerator", hint="use auto, kvm or tcg")
    if kvm.usable:
        return "kvm", ""
    if wanted == "kvm":
        raise Refused(f"KVM does not work here: {kvm.reason}", hint="set accelerator to auto")
    return "tcg", f"KVM does not work here ({kvm.reason}); guests are emulated, which is slow"


def choose_pins(
    hosts: Mapping[str, QemuFacts],
    *,
    uuid: str,
    cpu_model: str = "",
    quirks: Collection[str] = (),
) -> Pins:
    """The newest machine that every one of ``hosts`` has, and ``cpu_model`` or, when that is
    empty, the best CPU model that they all have.

    Refused, with the reason, when they have none in common or run guests in different ways.
    ``quirks`` are asked for by name (only ``short-ram`` exists).
    """
    if not hosts:
        raise Refused("no host is up that could run the VM", hint="look with: godwit host list")
    unknown = sorted(set(quirks) - {SHORT_RAM})
    if unknown:
        raise InvalidRequest(f"no such quirk: {', '.join(unknown)}", hint=f"known: {SHORT_RAM}")
    return Pins(
        uuid=uuid,
        machine=_common_machine(hosts),
        cpu_model=cpu_model or _common_model(hosts),
        accelerator=_common_accelerator(hosts),
        qemu_quirks=tuple(sorted(quirks)),
    )


def _common_accelerator(hosts: Mapping[str, QemuFacts]) -> Literal["kvm", "tcg"]:
    kinds = {facts.accelerator for facts in hosts.values()}
    if len(kinds) > 1:
        emulating = sorted(name for name, facts in hosts.items() if facts.accelerator != "kvm")
        raise Refused(
            f"the hosts run guests in different ways: {', '.join(emulating)} without KVM",
            hint="a guest cannot move between KVM and emulation: name hosts of one kind",
        )
    return cast("Literal['kvm', 'tcg']", kinds.pop())


def _common_machine(hosts: Mapping[str, QemuFacts]) -> str:
    common = _intersection(facts.machines for facts in hosts.values())
    known = sorted((name for name in common if machine_key(name)), key=machine_key)
    if not known:
        raise Refused(
            f"the QEMUs have no q35 machine version in common ({_versions(hosts)})",
            hint="bring the hosts' QEMUs closer together",
        )
    return known[-1]


def _common_model(hosts: Mapping[str, QemuFacts]) -> str:
    ranked = best_first(_intersection(facts.cpu_models for facts in hosts.values()))
    if not ranked:
        raise Refused(
            "the hosts have no CPU model in common that each can give in full",
            hint="compare their processors: godwit host list -o json",
        )
    return ranked[0]


def best_first(models: Iterable[str]) -> list[str]:
    """Those CPU models that a VM may be pinned to, the best first."""
    ranked = ((rank, name) for name in set(models) if (rank := _rank(name)) is not None)
    return [name for _, name in sorted(ranked)]


def _rank(model: str) -> tuple[int, int] | None:
    """Sorts models: better family first, then the newer version; None for a strange one."""
    match = re.fullmatch(r"(.+)-v(\d+)", model)
    if match is None or match[1] not in CPU_FAMILIES:
        return None
    return CPU_FAMILIES.index(match[1]), -int(match[2])


def _intersection(sets: Iterable[Collection[str]]) -> set[str]:
    first, *rest = (set(names) for names in sets)
    return first.intersection(*rest)


def _versions(hosts: Mapping[str, QemuFacts]) -> str:
    return ", ".join(
        f"{name}: {'.'.join(map(str, facts.version))}" for name, facts in sorted(hosts.items())
    )


def _digest(*words: str) -> bytes:
    return hashlib.sha256("\0".join(words).encode()).digest()


def new_mac(uuid: str, nic_id: str, *, taken: Collection[str]) -> str:
    """A locally administered address that is not ``taken``; the same question, the same answer."""
    for attempt in range(1000):
        tail = _digest("mac", uuid, nic_id, str(attempt))[:5]
        mac = "02:" + tail.hex(":")
        if mac not in taken:
            return mac
    raise Conflict(f"no free network address for {nic_id}", hint="delete unused VMs")


def new_serial(uuid: str, disk_id: str) -> str:
    """A disk's serial number: 20 characters, all that a guest can see of it."""
    return "GW" + _digest("disk", uuid, disk_id).hex()[:18].upper()


def next_nic_id(nics: Collection[Nic]) -> str:
    """The id, and with it the PCI place, of one more card; Refused when all are taken."""
    used = {nic_port(nic) for nic in nics}
    for number in range(NIC_PORTS):
        if number not in used:
            return f"net{number}"
    raise Refused(f"a VM has at most {NIC_PORTS} network cards", hint="remove one first")


def next_disk(disks: Collection[Disk]) -> tuple[str, int]:
    """Id and LUN of one more disk; Refused when all places are taken."""
    luns, ids = {disk.lun for disk in disks}, {disk.id for disk in disks}
    for lun in range(MAX_DISKS):
        if lun not in luns and f"disk{lun}" not in ids:
            return f"disk{lun}", lun
    raise Refused(f"a VM has at most {MAX_DISKS} disks", hint="remove one first")
