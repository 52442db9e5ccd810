"""What a new VM or network is, exactly: pure, with everything pinned that must never change."""

from __future__ import annotations

import hashlib

from godwit.manager.snapshot import Snapshot
from godwit.model.disks import (
    DEFAULT_FORMAT,
    SEED,
    VARIABLES,
    image_path,
    iso_path,
    seed_path,
)
from godwit.model.errors import Refused
from godwit.model.firmware import UefiFacts
from godwit.model.network import Network
from godwit.model.requests import CreateNetwork, CreateVm
from godwit.model.vm import Boot, Cdrom, Disk, Firmware, Nic, Pins, Vm
from godwit.qemu.pins import new_mac, new_serial, next_disk, next_nic_id

_LONGEST_BRIDGE = 15  # the kernel's limit for interface names


def define_vm(snapshot: Snapshot, request: CreateVm, *, pins: Pins, boot: Boot, now: float) -> Vm:
    """The definition that ``request`` stands for. Refused when it has too many cards or disks."""
    return Vm(
        name=request.name,
        cpus=request.cpus,
        memory_bytes=request.memory_bytes,
        boot=boot,
        firmware=_firmware(snapshot, request, pins.uuid),
        disks=_disks(request, pins.uuid, snapshot.local_volumes),
        cdroms=_cdroms(request),
        nics=_nics(snapshot, request, pins.uuid),
        ha=request.ha,
        rules=request.rules,
        guest_agent=request.guest_agent,
        pins=pins,
        created_at=now,
    )


def _firmware(snapshot: Snapshot, request: CreateVm, uuid: str) -> Firmware | None:
    if request.firmware != "uefi":
        return None
    here, volume = uefi_of(snapshot, request.host), variables_volume(snapshot, request)
    variables = Disk(
        id=VARIABLES,
        volume=volume,
        path=image_path(volume, request.name, VARIABLES, DEFAULT_FORMAT),
        size_bytes=here.template.size_bytes,
        format=DEFAULT_FORMAT,
        serial=new_serial(uuid, VARIABLES),
        lun=0,
    )
    return Firmware(code=here.code, variables=variables)


def uefi_of(snapshot: Snapshot, host: str | None) -> UefiFacts:
    """The UEFI firmware of that host, or of any; Refused where there is none."""
    infos = [info for name, info in sorted(snapshot.hosts.items()) if host in (None, name)]
    found = next((info.uefi for info in infos if info.uefi is not None), None)
    if found is None:
        raise Refused(f"{host or 'no host'} has {'no ' if host else ''}UEFI firmware", hint=HINT)
    return found


HINT = "install the package ovmf on the hosts: scripts/setup does it"


def variables_volume(snapshot: Snapshot, request: CreateVm) -> str:
    """Where UEFI variables go: beside the first disk that all hosts see, else to ``shared``."""
    shared = (one.volume for one in request.disks if one.volume not in snapshot.local_volumes)
    return next(shared, "shared")


def _cdroms(request: CreateVm) -> tuple[Cdrom, ...]:
    found = []
    if request.iso is not None:
        volume, path = iso_path(request.iso)
        found.append(Cdrom(id="cd0", volume=volume, path=path))
    if request.cloud_init is not None:
        found.append(Cdrom(id=SEED, volume="shared", path=seed_path(request.name)))
    return tuple(found)


def _nics(snapshot: Snapshot, request: CreateVm, uuid: str) -> tuple[Nic, ...]:
    taken = {nic.mac for vm in snapshot.vms.values() for nic in vm.nics}
    nics: list[Nic] = []
    for network in request.networks:
        nic_id = next_nic_id(nics)
        mac = new_mac(uuid, nic_id, taken=taken)
        taken.add(mac)
        nics.append(Nic(id=nic_id, network=network, mac=mac, mtu=snapshot.networks[network].mtu))
    return tuple(nics)


def _disks(request: CreateVm, uuid: str, local: frozenset[str]) -> tuple[Disk, ...]:
    disks: list[Disk] = []
    for wanted in request.disks:
        disk_id, lun = next_disk(disks)
        disks.append(
            Disk(
                id=disk_id,
                volume=wanted.volume,
                path=image_path(wanted.volume, request.name, disk_id, wanted.format),
                size_bytes=wanted.size_bytes,
                format=wanted.format,
                serial=new_serial(uuid, disk_id),
                lun=lun,
                local=wanted.volume in local,
            )
        )
    return tuple(disks)


def bridge_name(network: str) -> str:
    """``br-NAME``; a name too long for the kernel is cut and made unique by a checksum."""
    plain = f"br-{network}"
    if len(plain) <= _LONGEST_BRIDGE:
        return plain
    return f"br-{network[:7].rstrip('-')}-{hashlib.sha256(network.encode()).hexdigest()[:4]}"


def define_network(request: CreateNetwork) -> Network:
    """The network that ``request`` stands for."""
    return Network(
        name=request.name,
        bridge=bridge_name(request.name),
        mtu=request.mtu,
        subnet=request.subnet,
        uplink=request.uplink,
    )
