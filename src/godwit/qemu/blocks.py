"""A disk as QEMU takes it: its block nodes and its SCSI device, the same cold and hot.

    direct    scsi-hd -- disk-<id>: qcow2 | raw | raw with a size -- file-<id>: file | host_device
                                                                            | nfs | iscsi
                                 '-- base-<id> (a linked clone's; read only, part of disk-<id>)
    brokered  scsi-hd -- disk-<id>: nbd ~~ unix socket ~~ the VM's storage broker on this host

Pure: what differs from host to host (the way of asynchronous I/O, the broker's socket) comes in.
A fixed VHD is its payload, opened as ``raw`` up to the virtual size: its own driver cannot be
migrated, and so the footer stays out of the guest's reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from godwit.model.disks import tier_of
from godwit.model.errors import InvalidRequest
from godwit.model.vm import Cdrom, Disk
from godwit.qemu import layout

SECTOR: Final = 512

BROKER_RECONNECT_S: Final = 600
"""Seconds a request waits for a broker that has gone before the guest's write fails, which pauses
the VM. The guest itself begins to abort requests after 30 s; a paused one does not."""

BROKER_OPEN_S: Final = 10
"""Seconds the first connection to the broker may take."""

EMULATED: Final = "scsi-hd"
PASSED_THROUGH: Final = "scsi-block"
DISK_DRIVERS: Final = frozenset({EMULATED, PASSED_THROUGH})
"""QEMU's drivers of what a record calls a disk."""

Node = dict[str, object]

_FORMAT_DRIVERS: Final = {"raw": "raw", "qcow2": "qcow2", "vhd-fixed": "raw"}


def stored_size(size_bytes: int) -> int:
    """Bytes a disk of this size really has: whole sectors."""
    return -(-size_bytes // SECTOR) * SECTOR


def node_names(disk: Disk) -> tuple[str, ...]:
    """Names of the disk's block nodes, in the order in which they are made."""
    if tier_of(disk) == "brokered":
        return (layout.format_node(disk),)
    return layout.file_node(disk), layout.format_node(disk)


def disk_nodes(
    disk: Disk,
    *,
    vm: str,
    aio: str = "threads",
    broker: str = "",
    served: Mapping[str, object] | None = None,
    locking: bool = True,
) -> tuple[Node, ...]:
    """The block nodes of a disk, lowest first, as ``blockdev-add`` takes them.

    ``served`` is the node, without a name, of a disk that no host has a file or a device of
    (`godwit.storage.places`).

    The format is always named and a backing file inside the image is never followed: a linked
    clone's record names the image under it, which goes with the node above it.  The image lock
    is the last net under two QEMUs on one image; ``locking`` False is for storage on which it
    does harm, and then gates and ownership stand alone, as on what is served.  ``broker`` is the
    socket of the VM's storage broker; InvalidRequest when a brokered disk is given none.
    """
    if tier_of(disk) == "brokered":
        return (_broker_node(disk, vm, broker),)
    return _storage_node(disk, aio, served, locking), _format_node(disk, aio, locking)


def _common() -> Node:
    cache = {"direct": True, "no-flush": False}
    return {"read-only": False, "discard": "unmap", "cache": cache}


def _lock(locking: bool) -> Node:
    """What a node of a file or device says of QEMU's lock; its own default says nothing."""
    return {} if locking else {"locking": "off"}


def _storage_node(disk: Disk, aio: str, served: Mapping[str, object] | None, locking: bool) -> Node:
    if served is not None:
        return {**served, "node-name": layout.file_node(disk), **_common()}
    if disk.source == "lun":
        raise InvalidRequest(
            f"disk {disk.id} is a LUN of {disk.volume}, which this host does not know",
            hint=f"look: godwit volume show {disk.volume}",
        )
    return {
        "driver": "host_device" if disk.source == "device" else "file",
        "node-name": layout.file_node(disk),
        "filename": disk.path,
        "aio": aio,
        **_lock(locking),
        **_common(),
    }


def _base_node(disk: Disk, aio: str, locking: bool) -> Node | None:
    if disk.backing is None:
        return None
    shared: Node = {"read-only": True, "auto-read-only": False}
    shared |= {"cache": {"direct": True, "no-flush": False}}
    file: Node = {"driver": "file", "filename": disk.backing.path, "aio": aio, **_lock(locking)}
    file |= shared
    base: Node = {"driver": disk.backing.format, "node-name": layout.base_node(disk), "file": file}
    if disk.backing.format == "qcow2":
        base["backing"] = None
    return base | shared


def _format_node(disk: Disk, aio: str, locking: bool) -> Node:
    driver = _FORMAT_DRIVERS.get(disk.format)
    if driver is None:
        raise InvalidRequest(
            f"disk {disk.id}: QEMU does not migrate {disk.format} by itself",
            hint="leave its tier to auto: it then goes through the storage broker",
        )
    node: Node = {
        "driver": driver,
        "node-name": layout.format_node(disk),
        "file": layout.file_node(disk),
        **_common(),
    }
    if disk.format == "qcow2":
        node["backing"] = _base_node(disk, aio, locking)
    if disk.format == "vhd-fixed":
        node |= {"offset": 0, "size": stored_size(disk.size_bytes)}
    return node


def _broker_node(disk: Disk, vm: str, broker: str) -> Node:
    if not broker:
        raise InvalidRequest(
            f"disk {disk.id} of {vm} needs a storage broker and this host gave none",
            hint="use a format that QEMU opens itself: raw, qcow2, vhd-fixed",
        )
    return {
        "driver": "nbd",
        "node-name": layout.format_node(disk),
        "server": {"type": "unix", "path": broker},
        "export": layout.export_name(vm, disk),
        "reconnect-delay": BROKER_RECONNECT_S,
        "open-timeout": BROKER_OPEN_S,
        **_common(),
    }


def cdrom_node(cdrom: Cdrom, *, aio: str = "threads", locking: bool = True) -> Node:
    """The block node of an ISO image, which is only read."""
    shared: Node = {"read-only": True, "cache": {"direct": True, "no-flush": False}}
    file: Node = {"driver": "file", "filename": cdrom.path, "aio": aio, **_lock(locking), **shared}
    return {"driver": "raw", "node-name": layout.cdrom_node(cdrom), "file": file, **shared}


def firmware_node(number: int) -> Node:
    """The block node of UEFI code, in the descriptor set of that number; only read.

    Nobody writes it, so no lock is taken: it would be held beside those of other VMs.
    """
    shared: Node = {"read-only": True, "auto-read-only": False}
    file: Node = {"driver": "file", "filename": f"/dev/fdset/{number}", "locking": "off", **shared}
    return {"driver": "raw", "node-name": layout.FIRMWARE, "file": file, **shared}


def cdrom_device(cdrom: Cdrom, place: int, *, boot: bool = False) -> Node:
    """Its drive, the ``place``-th; disks are started from before it."""
    device: Node = {
        "driver": "scsi-cd",
        "id": cdrom.id,
        "bus": f"{layout.SCSI}.0",
        "channel": 0,
        "scsi-id": 0,
        "lun": 1 + place,
        "drive": layout.cdrom_node(cdrom),
        "rerror": "stop",
    }
    return device | ({"bootindex": 2 + place} if boot else {})


def disk_device(disk: Disk, *, boot: bool = False) -> Node:
    """The disk itself, as ``device_add`` takes it.

    A LUN that is passed through answers the guest itself, so it has its own serial number and
    block sizes; only reads and writes are still QEMU's.
    """
    device: Node = {
        "driver": PASSED_THROUGH if disk.passthrough else EMULATED,
        "id": disk.id,
        "bus": f"{layout.SCSI}.0",
        "channel": 0,
        "scsi-id": disk.lun,
        "lun": 0,
        "drive": layout.format_node(disk),
    }
    if not disk.passthrough:
        device |= {
            "serial": disk.serial,
            "device_id": disk.serial,
            "logical_block_size": 512,
            "physical_block_size": 512,
            "write-cache": "on",
        }
    device |= {"werror": "stop", "rerror": "stop"}
    if boot:
        device["bootindex"] = 1
    return device
