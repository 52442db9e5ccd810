"""Names and PCI addresses of a VM's devices: the part of a machine that must never differ.

    pcie.0  00.0  the q35 chipset            1f.x  its LPC bridge (SATA and SMBus are off)
            01.0  scsi0      virtio-scsi; disk with lun N is scsi-id N, lun 0; CD drives are on
                             scsi-id 0 from lun 1 on
            02.0  balloon0   virtio-balloon
            03.0  rng0       virtio-rng
            04.0  ports0     virtio-serial with the port of the guest's own agent, if it has one
            10.0-10.7  port0-port7   root ports; the card whose id ends in N sits behind portN

With UEFI two flash chips below 4 GiB, parts of the board without an address: pflash0 has the host's
code (node firmware-code), pflash1 the VM's variables (node disk-vars0).

All eight root ports exist from the start, because a port cannot be added to a running VM and a
destination must have as many as the source; they cost 5 ms at start and 33 KiB of device state.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from godwit.model.errors import InvalidRequest
from godwit.model.vm import Cdrom, Disk, Nic

BUS: Final = "pcie.0"
SCSI: Final = "scsi0"
SCSI_ADDRESS: Final = "0x1"
BALLOON: Final = "balloon0"
BALLOON_ADDRESS: Final = "0x2"
RNG: Final = "rng0"
RNG_ADDRESS: Final = "0x3"
PORTS: Final = "ports0"
PORTS_ADDRESS: Final = "0x4"
GUEST_AGENT: Final = "guest-agent"
PORT_SLOT: Final = 0x10
NIC_PORTS: Final = 8
FIRMWARE: Final = "firmware-code"
SERIAL: Final = "serial0"

_TRAILING_NUMBER = re.compile(r"(\d+)$")


def nic_port(nic: Nic) -> int:
    """The root port of a card, from the number its id ends in; stable when others come and go."""
    match = _TRAILING_NUMBER.search(nic.id)
    if match is None or int(match[1]) >= NIC_PORTS:
        raise InvalidRequest(
            f"network card id {nic.id!r} names no free place in the machine",
            hint=f"ids end in a number below {NIC_PORTS}: net0, net1, ...",
        )
    return int(match[1])


def format_node(disk: Disk) -> str:
    """Block node the disk device sits on: the image's format driver."""
    return f"disk-{_short(_image(disk))}"


def file_node(disk: Disk) -> str:
    """Block node under the format driver: the file itself."""
    return f"file-{_short(_image(disk))}"


def sending_node(disk: Disk) -> str:
    """Block node of the other host's copy while a disk is sent along with its VM."""
    return f"send-{_short(_image(disk))}"


def mirror_job(disk: Disk) -> str:
    """The job that copies a disk to its next image."""
    return f"move-{disk.id}"


def broker_id(disk: Disk) -> str:
    """What the VM's storage broker calls a disk's image; ids of disks do not end like this."""
    return f"{disk.id}-g{disk.generation}" if disk.generation else disk.id


def base_node(disk: Disk) -> str:
    """Block node under a linked clone's format driver: the image it stands on."""
    return f"base-{_short(disk.id)}"


def cdrom_node(cdrom: Cdrom) -> str:
    """Block node of an ISO image."""
    return f"cdrom-{_short(cdrom.id)}"


def export_name(vm: str, disk: Disk) -> str:
    """Name under which the VM's storage broker offers a disk to the QEMU of its own host."""
    return f"{vm}-{broker_id(disk)}"


def netdev(nic: Nic) -> str:
    """Name of the host's side of a card."""
    return f"host-{nic.id}"


def tap_name(vm: str, nic_id: str) -> str:
    """Name of a card's tap on any host: at most 15 bytes, the same for the same card."""
    return "gw" + hashlib.sha256(f"{vm}/{nic_id}".encode()).hexdigest()[:12]


def _image(disk: Disk) -> str:
    """A disk's image by name: QEMU cannot rename a node, so each image brings its own."""
    return f"{disk.id}.{disk.generation}" if disk.generation else disk.id


def _short(name: str) -> str:
    # QEMU takes node names of at most 31 bytes.
    if len(name) <= 24:
        return name
    return f"{name[:11]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
