"""Block nodes of a brokered disk, as ``blockdev-add`` takes them. Pure.

In the broker, per disk::

    export e-X --> exp-X (raw) --> img-X (vpc, vhdx, qcow2, raw) --> file-X    gate open
                        '-------> fail-X (blkdebug: EIO) --> null-X            gate closed
                        '-------> peer-X (nbd) ==TLS==> another host's export  open, redirected

The swap is a ``blockdev-reopen`` of ``exp-X``. The placeholder must *fail* I/O: a bare ``null-co``
swallows writes, and its zeroes would stay in the guest's page cache when a read met them. Only a
flush passes it: ``blockdev-reopen`` flushes what it leaves and would never open such a gate again
("Error flushing drive"). That flush says the truth, for a gate is closed in order after a flush,
and a daemon that ended otherwise is followed by a sync of the image (`godwit.storage.settle`).

Facts, seen on QEMU 10.0: node names have at most 31 bytes; ``addr.type=fd`` of an NBD server
takes a number on the command line only; one process has one NBD server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from godwit.model.base import Name, Record
from godwit.model.errors import InvalidRequest
from godwit.model.vm import Backing, DiskFormat

Aio = Literal["threads", "native"]
"""No ``io_uring``: its requests may outlive the process, and the end of the process is our fence.
The kernel waits for ``threads`` and ``native`` before a process is gone."""

Node = dict[str, Any]

RECONNECT_DELAY_S: Final = 600
OPEN_TIMEOUT_S: Final = 10
EIO: Final = 5
FAILING: Final = ("read", "write", "write-zeroes", "discard", "block-status")
PEER_TLS: Final = "peer-tls"

_DRIVERS: Final[Mapping[str, str]] = {
    "raw": "raw",
    "qcow2": "qcow2",
    "vhd-fixed": "raw",
    "vhd": "vpc",
    "vhdx": "vhdx",
}
# qcow2 keeps new cluster mappings in memory until a flush. A broker that is killed takes them
# along, and the guest, which lives on, would never learn that acknowledged writes are gone.
# vpc and vhdx write theirs with each allocation, raw has none.
_WRITE_THROUGH: Final = frozenset({"qcow2"})


class BrokerDisk(Record):
    """A disk as its broker knows it. ``size_bytes`` is what the guest sees, a multiple of 512.

    ``device``: the path is a block device and not a file. ``served``: it is neither, but what this
    unnamed node leads to over the network (`godwit.storage.places`). ``volume``: the one it lies
    in, if any.
    """

    id: Name
    path: str
    format: DiskFormat
    size_bytes: int = Field(gt=0, multiple_of=512)
    device: bool = False
    served: dict[str, Any] | None = None
    backing: Backing | None = None
    volume: str = ""


class PeerTarget(Record):
    """Another host's export of a disk; see `godwit.storage.broker_peer`.

    ``tls_dir`` holds the client's certificates as QEMU names them, ``tls_hostname`` is the name in
    the peer's certificate when it is not ``host``. Without ``tls_dir`` nothing is encrypted.
    """

    host: str
    port: int = Field(gt=0, lt=65536)
    export: str
    tls_dir: str = ""
    tls_hostname: str = ""


def _short(disk_id: str) -> str:
    # 31 bytes less the longest prefix; a digest keeps long names apart.
    if len(disk_id) <= 24:
        return disk_id
    return f"{disk_id[:11]}-{hashlib.sha256(disk_id.encode()).hexdigest()[:12]}"


def export_node_name(disk_id: str) -> str:
    """The node the export stands on; only its child changes."""
    return f"exp-{_short(disk_id)}"


def image_node_name(disk_id: str) -> str:
    """The image's format node."""
    return f"img-{_short(disk_id)}"


def file_node_name(disk_id: str) -> str:
    """The file or device under it."""
    return f"file-{_short(disk_id)}"


def peer_node_name(disk_id: str) -> str:
    """The connection to another host's export."""
    return f"peer-{_short(disk_id)}"


def failing_node_name(disk_id: str) -> str:
    """The placeholder of a closed gate."""
    return f"fail-{_short(disk_id)}"


def null_node_name(disk_id: str) -> str:
    """What gives the placeholder its size."""
    return f"null-{_short(disk_id)}"


def export_id(disk_id: str) -> str:
    """The id of a disk's export in its daemon."""
    return f"e-{disk_id}"


def export_name(vm: str, disk_id: str) -> str:
    """What QEMU asks its own broker for.

    No epoch in it: a move, and the gift back of one, raise the epoch under a QEMU that is
    connected and cannot ask for another name. The gate holds the epoch.
    """
    return f"{vm}-{disk_id}"


def peer_export_name(vm: str, disk_id: str, epoch: int) -> str:
    """What another host's broker asks for: good for one epoch."""
    return f"{vm}-{disk_id}@{epoch}"


def placeholder_nodes(disk: BrokerDisk) -> tuple[Node, Node]:
    """The two nodes of a closed gate, lower one first."""
    null: Node = {
        "driver": "null-co",
        "node-name": null_node_name(disk.id),
        "size": disk.size_bytes,
        "read-zeroes": True,
    }
    failing: Node = {
        "driver": "blkdebug",
        "node-name": failing_node_name(disk.id),
        "image": null_node_name(disk.id),
        "inject-error": [{"event": "none", "iotype": kind, "errno": EIO} for kind in FAILING],
    }
    return null, failing


def image_node(disk: BrokerDisk, *, aio: Aio = "threads", locking: bool = True) -> Node:
    """The image with its file, one node tree that one ``blockdev-del`` closes.

    The format is always named and a backing file inside the image never followed. A fixed VHD is
    its bytes without the footer. ``locking`` False is for a redirecting peer, for the host that
    lost its path may hold QEMU's lock still, and for hosts whose storage is no place for locks.
    """
    if disk.format not in _DRIVERS:
        raise InvalidRequest(
            f"disk {disk.id}: format {disk.format!r} cannot be brokered",
            hint=f"known are: {', '.join(sorted(_DRIVERS))}",
        )
    cache = {"direct": True, "no-flush": False}
    file: Node = {
        "driver": "host_device" if disk.device else "file",
        "node-name": file_node_name(disk.id),
        "filename": disk.path,
        "aio": aio,
        "discard": "unmap",
        "cache": cache,
    }
    if disk.served is not None:
        name = file_node_name(disk.id)
        file = {**disk.served, "node-name": name, "discard": "unmap", "cache": cache}
    if not locking and disk.served is None:  # no served one knows locks
        file["locking"] = "off"
    image: Node = {
        "driver": _DRIVERS[disk.format],
        "node-name": image_node_name(disk.id),
        "discard": "unmap",
        "cache": cache,
        "file": file,
    }
    if disk.format == "qcow2":
        image["backing"] = _base_node(disk.backing, aio=aio, locking=locking)
    if disk.format == "vhd-fixed":
        image |= {"offset": 0, "size": disk.size_bytes}
    return image


def _base_node(backing: Backing | None, *, aio: Aio, locking: bool) -> Node | None:
    """What a linked clone stands on; nobody writes it."""
    if backing is None:
        return None
    shared: Node = {"read-only": True, "cache": {"direct": True, "no-flush": False}}
    file: Node = {"driver": "file", "filename": backing.path, "aio": aio, **shared}
    if not locking:
        file["locking"] = "off"
    base: Node = {"driver": _DRIVERS[backing.format], "file": file, **shared}
    return base | ({"backing": None} if backing.format == "qcow2" else {})


def peer_node(disk: BrokerDisk, peer: PeerTarget) -> Node:
    """The connection to another host's export, which holds requests while that is away."""
    node: Node = {
        "driver": "nbd",
        "node-name": peer_node_name(disk.id),
        "server": {
            "type": "inet",
            "host": peer.host,
            "port": str(peer.port),
            "keep-alive": True,
        },
        "export": peer.export,
        "reconnect-delay": RECONNECT_DELAY_S,
        "open-timeout": OPEN_TIMEOUT_S,
        "discard": "unmap",
    }
    if peer.tls_dir:
        node["tls-creds"] = PEER_TLS
        node["tls-hostname"] = peer.tls_hostname or peer.host
    return node


def tls_object(role: Literal["client", "server"], directory: str) -> Node:
    """Credentials for or from a peer, as ``object-add`` takes them: both sides show theirs."""
    return {
        "qom-type": "tls-creds-x509",
        "id": PEER_TLS,
        "dir": directory,
        "endpoint": role,
        "verify-peer": True,
    }


def export_node(disk: BrokerDisk, *, over: str) -> Node:
    """The node the export stands on, over the node of this name."""
    return {
        "driver": "raw",
        "node-name": export_node_name(disk.id),
        "discard": "unmap",
        "file": over,
    }


def export(disk: BrokerDisk, *, name: str, node: str, write_through: bool | None = None) -> Node:
    """The NBD export, as ``block-export-add`` takes it.

    ``write_through`` None: as the format needs. Written through, a write is acknowledged once it
    and its metadata would survive the end of the daemon and of the host.
    """
    through = disk.format in _WRITE_THROUGH if write_through is None else write_through
    return {
        "type": "nbd",
        "id": export_id(disk.id),
        "node-name": node,
        "name": name,
        "writable": True,
        "writethrough": through,
    }


def client_node(
    node_name: str,
    *,
    socket: Path,
    export: str,
    reconnect_delay_s: int = RECONNECT_DELAY_S,
    open_timeout_s: int = OPEN_TIMEOUT_S,
) -> Node:
    """QEMU's side of a brokered disk: holds requests for so many seconds while no broker answers.

    ``open_timeout_s`` is for the first connection. After ``reconnect_delay_s`` seconds requests
    fail, and the device's ``werror=stop`` pauses the VM.
    """
    return {
        "driver": "nbd",
        "node-name": node_name,
        "server": {"type": "unix", "path": str(socket)},
        "export": export,
        "reconnect-delay": reconnect_delay_s,
        "open-timeout": open_timeout_s,
        "read-only": False,
        "discard": "unmap",
        "cache": {"direct": True, "no-flush": False},
    }
