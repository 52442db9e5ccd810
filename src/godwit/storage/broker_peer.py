"""The other end of redirected I/O: this host lends another one its path to a VM's images.

    broker on the owner --NBD, TLS--> qemu-storage-daemon here --O_DIRECT, through--> image

An export is named ``<vm>-<disk>@<epoch>`` and good for that epoch: a higher one ends it, a lower
one is refused. Every write is on the medium before it is acknowledged, because the owner's broker
sends again only what was not answered: what lay in the cache of a host that dies would be gone
without a word. The image lock is off, for the owner may hold it on the path it has lost; so the
owner's broker must have ended before this export is asked for.

It is a process of its own (a daemon has one NBD server, and the broker's is a unix socket) and of
one VM: to end it is to fence that VM alone. It opens the image at the level of its format, so a
growing qcow2 or VHD needs nothing of NBD.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Self

from godwit.model.errors import Conflict, OperationFailed, OutcomeUnknown, Refused
from godwit.qmp import MonitorError, QmpError
from godwit.storage import broker_verbs as verbs
from godwit.storage import nodes
from godwit.storage.broker_argv import Plugs, peer_argv
from godwit.storage.broker_daemon import (
    ADOPT_DEADLINE,
    KILL_TIMEOUT,
    START_DEADLINE,
    Daemon,
    DaemonPlace,
    forget_place,
    forget_recorded,
)
from godwit.storage.broker_record import PeerRecord
from godwit.storage.nodes import BrokerDisk, PeerTarget
from godwit.storage.settle import settle_disk

LABEL = "peer"
STEP_TIMEOUT = 5.0


def listen_tcp(address: str, port: int = 0) -> socket.socket:
    """A listening TCP socket on one address of this host, on a free port when ``port`` is 0."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


class PeerExport:
    """The daemon that exports one VM's disks to other hosts; make one with `start` or `adopt`."""

    def __init__(self, place: DaemonPlace, record: PeerRecord, daemon: Daemon) -> None:
        """Not for callers."""
        self.place = place
        self.record = record
        self._daemon = daemon
        self._busy = asyncio.Lock()
        daemon.on_exit = self._forget_exports

    @classmethod
    async def start(
        cls,
        place: DaemonPlace,
        vm: str,
        *,
        listener: socket.socket,
        tls_dir: str,
        lessee: str = "",
        floors: dict[str, int] | None = None,
        deadline: float = START_DEADLINE,
    ) -> Self:
        """Start the daemon behind a listening TCP socket; it exports nothing yet.

        ``tls_dir`` holds the server's certificates as QEMU names them, and whoever connects must
        show one of the same authority; empty: no TLS, for a network that is protected otherwise.
        ``lessee`` is whom it serves, ``floors`` are the epochs below which a disk is exported no
        more (see `PeerRecord`).
        """

        def options(monitor: int) -> list[str]:
            return peer_argv(Plugs(monitor=monitor, clients=listener.fileno()), tls_dir=tls_dir)

        daemon = await Daemon.start(
            place,
            name=_name(vm, place.host),
            label=LABEL,
            clients=listener.fileno(),
            options=options,
            deadline=deadline,
        )
        record = PeerRecord(
            vm=vm,
            host=place.host,
            run=place.run,
            pid=daemon.process.pid,
            start_time=daemon.process.start_time,
            boot_id=place.boot_id,
            cgroup=place.cgroup,
            argv=daemon.argv,
            port=int(listener.getsockname()[1]),
            lessee=lessee,
            floors=dict(floors or {}),
        )
        try:
            record.save()
        except BaseException:
            await daemon.kill()
            await daemon.close()
            raise
        return cls(place, record, daemon)

    @classmethod
    async def adopt(
        cls, place: DaemonPlace, record: PeerRecord, *, deadline: float = ADOPT_DEADLINE
    ) -> Self:
        """Take over after a restart of the agent. ProcessGone or MonitorError as `Daemon.adopt`."""
        daemon = await Daemon.adopt(
            record.process,
            name=_name(record.vm, record.host),
            monitor=place.run / f"{LABEL}.sock",
            cgroup=record.cgroup,
            argv=record.argv,
            deadline=deadline,
        )
        return cls(place, record, daemon)

    async def export_for_peer(self, disk: BrokerDisk, *, epoch: int, host: str) -> PeerTarget:
        """Export a disk for one epoch; where it is to be found, ``host`` being our own address.

        The asking host adds its own ``tls_dir`` to the answer.
        The owner's broker must have ended. The image is synced first: what that broker had written
        may lie in the cache of the storage. Repeating it for the same epoch changes nothing.
        Refused for a lower epoch; OperationFailed when it cannot be opened, OutcomeUnknown when
        the daemon does not answer: `kill` it then.
        """
        name = nodes.peer_export_name(self.record.vm, disk.id, epoch)
        target = PeerTarget(host=host, port=self.record.port, export=name)
        async with self._busy:
            floor = self.record.floors.get(disk.id, 0)
            if epoch < floor:
                raise Refused(
                    f"epoch {epoch} of disk {disk.id} is over: {floor} was exported here",
                    hint="read the owner record again",
                )
            if self.record.exports.get(disk.id) == epoch:
                return target
            # The floor rises before the old export goes: nobody comes back below it.
            self._note(floors={**self.record.floors, disk.id: epoch})
            try:
                await self._withdraw(disk.id)
                await settle_disk(disk, user=self.place.binary.user)
                await self._add(disk, name)
            except QmpError as error:
                raise OperationFailed(
                    f"{disk.path} cannot be exported: {error.desc}",
                    hint=f"has {self.place.host} a path to that volume?",
                ) from error
            except (MonitorError, TimeoutError) as error:
                raise OutcomeUnknown(
                    f"{_name(self.record.vm, self.place.host)} does not answer: {error}",
                    hint="kill it and await its exit",
                ) from error
            self._note(exports={**self.record.exports, disk.id: epoch})
        return target

    async def _add(self, disk: BrokerDisk, name: str) -> None:
        image = nodes.image_node(disk, aio=self.place.aio, locking=False)
        node = nodes.image_node_name(disk.id)
        export = nodes.export(disk, name=name, node=node, write_through=True)
        await self._daemon.execute("blockdev-add", image, timeout=STEP_TIMEOUT)
        try:
            sizes = await verbs.named_nodes(self._daemon, timeout=STEP_TIMEOUT)
            verbs.check_size(disk, sizes.get(node, 0))
            await self._daemon.execute("block-export-add", export, timeout=STEP_TIMEOUT)
        except (QmpError, OperationFailed):
            await verbs.delete_nodes(self._daemon, [node], timeout=STEP_TIMEOUT)
            raise

    async def withdraw(self, disk_id: str, *, epoch: int) -> None:
        """End a disk's export and close its image; no write of it lands after this returns.

        ``epoch`` becomes the lowest that may be exported again. Refused below the one exported.
        OutcomeUnknown when the daemon does not answer: `kill` it.
        """
        async with self._busy:
            if epoch < self.record.floors.get(disk_id, 0):
                raise Refused(f"epoch {epoch} of disk {disk_id} is over", hint="read the owner")
            self._note(floors={**self.record.floors, disk_id: epoch})
            try:
                await self._withdraw(disk_id)
            except (MonitorError, TimeoutError) as error:
                raise OutcomeUnknown(
                    f"the export of {disk_id} may still be there: {error}",
                    hint="kill the daemon and await its exit",
                ) from error

    async def _withdraw(self, disk_id: str) -> None:
        await verbs.delete_export(
            self._daemon, nodes.export_id(disk_id), force=True, timeout=STEP_TIMEOUT
        )
        node = nodes.image_node_name(disk_id)
        await verbs.delete_nodes(self._daemon, [node], timeout=STEP_TIMEOUT)
        left = {key: epoch for key, epoch in self.record.exports.items() if key != disk_id}
        self._note(exports=left)

    async def kill(self, *, timeout: float = KILL_TIMEOUT) -> None:
        """The fence: end the daemon and return when it is gone; OperationFailed when it stays."""
        await self._daemon.kill(timeout=timeout)
        await self._daemon.close()

    def hold_connections(self) -> None:
        """See `Daemon.hold_connections`; what they are is written down."""
        self._daemon.hold_connections()
        if self._daemon.connections != self.record.connections:
            self._note(connections=self._daemon.connections)

    async def answers(self, *, timeout: float) -> bool:
        """Whether the daemon answers its monitor within ``timeout`` seconds."""
        try:
            await self._daemon.execute("query-version", timeout=timeout)
        except MonitorError:
            return False
        return True

    async def ended(self) -> None:
        """Return when the daemon has ended."""
        await self._daemon.exited.wait()

    async def close(self) -> None:
        """Let go and leave the daemon as it is."""
        await self._daemon.close()

    def discard(self) -> None:
        """Remove what a dead daemon left, its floors too. Conflict while it lives."""
        if self.alive:
            raise Conflict(f"the export of {self.record.vm} still runs", hint="kill it first")
        forget_recorded(self.record, self.place.run / f"{LABEL}.sock")
        forget_place(self.place, LABEL)

    @property
    def alive(self) -> bool:
        """Whether its daemon runs, as far as is known here."""
        return not self._daemon.exited.is_set()

    def _note(self, **changes: object) -> None:
        self.record = self.record.but(**changes)
        self.record.save()

    def _forget_exports(self) -> None:
        self._note(exports={}, pid=0, start_time=0)


def _name(vm: str, host: str) -> str:
    return f"the peer export of {vm} on {host}"
