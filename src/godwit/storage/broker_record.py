"""``broker.json`` and ``peer.json``: how an agent finds its storage daemons after its own restart.

Written as a whole but not forced to the disk, like QEMU's ``runtime.json``: it has to survive the
death of the agent, not that of the machine (``boot_id`` tells). ``pid`` 0: no daemon, but the
gates' epochs still hold.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Self

from pydantic import Field, ValidationError

from godwit.host.files import load_json
from godwit.host.process import Process
from godwit.model.base import Name, Record
from godwit.model.errors import OperationFailed
from godwit.storage.gate import Gate, Via
from godwit.storage.nodes import BrokerDisk, PeerTarget, image_node_name, peer_node_name

BROKER: Final = "broker.json"
PEER: Final = "peer.json"


class Served(Record):
    """A disk in a broker: its gate, and the peer that an open gate leads to, if any.

    ``grows_to``: its image may hold so many bytes by now, and is measured before it is opened.
    """

    disk: BrokerDisk
    gate: Gate = Field(default_factory=Gate)
    peer: PeerTarget | None = None
    grows_to: int = 0


class DaemonRecord(Record):
    """A storage daemon of one VM on this host.

    ``run`` is the VM's run directory, ``start_time`` (clock ticks since boot) makes the pid
    unmistakable. ``connections`` are those it had when it was last looked at: should it and the
    agent die together, the kernel may still deliver what lies in them (`godwit.host.tcpcut`).
    """

    vm: Name
    host: str
    run: Path
    pid: int = 0
    start_time: int = 0
    boot_id: str = ""
    cgroup: str = ""
    argv: tuple[str, ...] = ()
    connections: tuple[str, ...] = ()

    @property
    def process(self) -> Process:
        """The identity of the daemon's process."""
        return Process(self.pid, self.start_time)

    def remove(self) -> None:
        """Forget the daemon; fine when it is forgotten already."""
        raise NotImplementedError

    def _save(self, name: str) -> None:
        path = self.run / name
        fresh = path.with_name(f".{name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(self.model_dump_json().encode())
        fresh.replace(path)

    @classmethod
    def _load(cls, path: Path) -> Self | None:
        try:
            content = load_json(path)
            return None if content is None else cls.model_validate(content)
        except (ValueError, ValidationError) as error:
            raise OperationFailed(
                f"{path} cannot be read: {error}",
                hint="end the storage daemon of that VM by hand and remove the file",
            ) from None


class BrokerRecord(DaemonRecord):
    """The broker of a VM: where QEMU reaches it, its disks and their gates.

    ``lenders`` maps each host that was asked to export the disks, and has not yet said that this
    is over, to the boot it was asked in: until then nobody else may open them. ``turn`` counts
    what those hosts were told (see `godwit.storage.lending`).
    """

    socket: Path
    disks: dict[str, Served] = Field(default_factory=dict)
    lenders: dict[str, str] = Field(default_factory=dict)
    turn: int = 0

    def save(self) -> None:
        """Replace the file; a reader sees the old one or the new one."""
        self._save(BROKER)

    def remove(self) -> None:
        """Forget the broker; fine when it is forgotten already."""
        (self.run / BROKER).unlink(missing_ok=True)


def load_broker(run: Path) -> BrokerRecord | None:
    """The record in a VM's run directory, None when there is none; OperationFailed if damaged."""
    return BrokerRecord._load(run / BROKER)


class PeerRecord(DaemonRecord):
    """The daemon that exports a VM's disks to other hosts.

    ``exports`` maps a disk to the epoch it is exported for; ``floors`` to the highest epoch ever
    seen, below which it is exported no more. ``lessee`` is the host that asked.
    """

    port: int
    lessee: str = ""
    exports: dict[str, int] = Field(default_factory=dict)
    floors: dict[str, int] = Field(default_factory=dict)

    def save(self) -> None:
        """Replace the file; a reader sees the old one or the new one."""
        self._save(PEER)

    def remove(self) -> None:
        """Forget the daemon; fine when it is forgotten already."""
        (self.run / PEER).unlink(missing_ok=True)


def load_peer(run: Path) -> PeerRecord | None:
    """The record in a VM's run directory, None when there is none; OperationFailed if damaged."""
    return PeerRecord._load(run / PEER)


def daemon_name(record: BrokerRecord) -> str:
    """What people read."""
    return f"the broker of {record.vm} on {record.host}"


def via(peer: PeerTarget | None) -> Via:
    """Where a gate leads."""
    return "image" if peer is None else "peer"


def target_name(served: Served) -> str:
    """The node that an open gate leads to."""
    if served.peer is not None:
        return peer_node_name(served.disk.id)
    return image_node_name(served.disk.id)
