"""The life of a broker: started, ended for certain, and started again behind the same socket.

What it does while it lives is in `godwit.storage.broker`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from godwit.host.sockets import bind_unix
from godwit.model.errors import Conflict, NotFound, OperationFailed
from godwit.qmp import MonitorError
from godwit.storage import broker_verbs as verbs
from godwit.storage import gate as gates
from godwit.storage.broker_argv import Plugs, broker_argv
from godwit.storage.broker_daemon import (
    KILL_TIMEOUT,
    START_DEADLINE,
    Daemon,
    DaemonPlace,
    check_delivered,
    end_recorded,
    forget_recorded,
)
from godwit.storage.broker_record import BrokerRecord, Served, daemon_name, target_name, via
from godwit.storage.broker_standby import Standby
from godwit.storage.gate import Gate, GateState
from godwit.storage.latch import Latch
from godwit.storage.nodes import BrokerDisk, Node, PeerTarget
from godwit.storage.settle import settle_disk

LABEL = "broker"


@dataclass(frozen=True, slots=True)
class Opening:
    """A gate that is to be open: for this epoch, to the image or to a peer.

    ``after_crash``: whoever had the image open before did not close it, so it is synced first.
    """

    epoch: int
    peer: PeerTarget | None = None
    after_crash: bool = False


def listen(path: Path, *, user: tuple[int, int] | None = None) -> socket.socket:
    """The socket on which a VM's broker is reached, for ``user`` (QEMU's) alone.

    Every directory above must let that user pass. Keep it open as long as the VM lives.
    """
    listener = bind_unix(path)
    if user is not None:
        os.chown(path, *user)
    return listener


@dataclass(frozen=True, slots=True)
class _Ready:
    """The next daemon, and what it was made for: nothing else may be asked of it."""

    standby: Standby
    opening: dict[str, Opening]
    disks: tuple[BrokerDisk, ...]


class BrokerLife:
    """The broker of one VM as a process with a record; `godwit.storage.broker.Broker` is whole."""

    def __init__(
        self,
        place: DaemonPlace,
        record: BrokerRecord,
        *,
        daemon: Daemon | None,
        listener: socket.socket | None,
    ) -> None:
        """Not for callers."""
        self.place = place
        self.record = record
        self._daemon = daemon
        self._listener = listener
        self._ready: _Ready | None = None
        self._left: tuple[str, ...] = ()  # connections of a daemon that ended unseen
        if daemon is not None:
            daemon.on_exit = self._fence

    @classmethod
    async def start(
        cls,
        place: DaemonPlace,
        vm: str,
        *,
        socket: Path,
        listener: socket.socket,
        disks: Sequence[BrokerDisk] = (),
        opening: Mapping[str, Opening] | None = None,
        deadline: float = START_DEADLINE,
    ) -> Self:
        """Start the VM's broker behind ``listener`` (bound to ``socket``, kept by the caller).

        Gates are closed but for those in ``opening`` (by disk id). OperationFailed, with the
        daemon's words, when it does not come up; nothing is left then.
        """
        record = BrokerRecord(
            vm=vm,
            host=place.host,
            run=place.run,
            boot_id=place.boot_id,
            cgroup=place.cgroup,
            socket=socket,
            disks={disk.id: Served(disk=disk) for disk in disks},
        )
        broker = cls(place, record, daemon=None, listener=listener)
        try:
            await broker.restart(opening, deadline=deadline)
        except BaseException:
            if not broker.alive:
                broker.record.remove()
            raise
        return broker

    @classmethod
    async def revive(
        cls,
        place: DaemonPlace,
        record: BrokerRecord,
        *,
        listener: socket.socket,
        opening: Mapping[str, Opening] | None = None,
    ) -> Self:
        """Start another daemon for a record; see `restart`.

        What the old one left is ended first, also one whose start a dying agent had not yet
        written down.
        """
        broker = await cls.recall(place, record, listener=listener)
        await broker.restart(opening)
        return broker

    @classmethod
    async def recall(
        cls, place: DaemonPlace, record: BrokerRecord, *, listener: socket.socket
    ) -> Self:
        """End what is left of a record's daemon and start none yet: all gates are closed."""
        await end_recorded(record, place.run / f"{LABEL}.sock", name=daemon_name(record))
        broker = cls(place, record, daemon=None, listener=listener)
        broker._left = record.connections
        broker._fence()
        return broker

    def check_left(self) -> None:
        """OperationFailed while a daemon that ended unseen may still have writes under way.

        Until then nobody else opens the images, here or elsewhere.
        """
        if self._left:
            check_delivered(self._left, daemon_name(self.record))
            self._left = ()

    async def prepare(
        self, opening: Mapping[str, Opening], *, listener: socket.socket | None = None
    ) -> None:
        """Have the next daemon ready, for a `restart` with this very ``opening``.

        The one that serves goes on. OperationFailed when it does not get ready: then `restart`
        starts one as ever. `dismiss` when it is not wanted after all.
        """
        await self.dismiss()
        self._listener = listener or self._listener
        if self._listener is None:
            raise Conflict(f"nobody listens for the clients of {self.record.vm}", hint="bind again")
        served = []
        for one in self.record.disks.values():
            wish, gate = opening.get(one.disk.id), gates.fenced(one.gate)
            if wish is not None:
                gate = gates.acquire(gate, epoch=wish.epoch, via=via(wish.peer))
            served.append(one.but(gate=gate, peer=wish.peer if wish is not None else None))
        clients = self._listener.fileno()

        def options(monitor: int, latch: Latch) -> list[str]:
            plugs = Plugs(monitor=monitor, clients=clients)
            return self._argv(served, plugs, latch=latch.node())

        standby = await Standby.start(
            self.place,
            name=daemon_name(self.record),
            label=LABEL,
            clients=clients,
            options=options,
        )
        disks = tuple(one.disk for one in served)
        self._ready = _Ready(standby, dict(opening), disks)

    async def dismiss(self) -> None:
        """Send the next daemon away, if there is one."""
        ready, self._ready = self._ready, None
        if ready is not None:
            await ready.standby.end()

    async def restart(
        self,
        opening: Mapping[str, Opening] | None = None,
        *,
        listener: socket.socket | None = None,
        deadline: float = START_DEADLINE,
    ) -> None:
        """End the daemon if it lives and start another one behind the same socket.

        All gates are closed but for those in ``opening``. What the old daemon left open is synced
        first, unless it is to be reached through a peer (who does it). Refused for a lower epoch,
        OperationFailed when the old one does not die, an image cannot be synced, or the new one
        does not come up: then no daemon runs, and QEMU's requests wait.
        """
        self._listener = listener or self._listener
        if self._listener is None:
            raise Conflict(f"nobody listens for the clients of {self.record.vm}", hint="bind again")
        wanted = dict(opening or {})
        if wanted:
            self.check_left()
        self.place.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Judged before anything is ended: a refusal leaves the old daemon at work.
        for disk_id, wish in wanted.items():
            gates.acquire(gates.fenced(self._served(disk_id).gate), epoch=wish.epoch)
        if self._daemon is not None:
            await self.kill()
        await self._settle_all(wanted)
        for disk_id, wish in wanted.items():
            served = self._served(disk_id)
            gate = gates.acquire(served.gate, epoch=wish.epoch, via=via(wish.peer))
            self._put(served.but(gate=gate, peer=wish.peer))
        self.record.save()
        try:
            await self._launch(wanted, self._listener.fileno(), deadline)
        except BaseException:
            await self.kill()
            self._fence()
            raise

    async def _launch(self, wanted: dict[str, Opening], clients: int, deadline: float) -> None:
        served = tuple(self.record.disks.values())
        daemon = await self._next(wanted, deadline) or await self._start(clients, deadline)
        daemon.on_exit = self._fence
        self._daemon = daemon
        process = daemon.process
        self.record = self.record.but(
            pid=process.pid, start_time=process.start_time, argv=daemon.argv
        )
        self.record.save()
        try:
            sizes = await verbs.named_nodes(daemon, timeout=deadline)
        except MonitorError as error:
            raise OperationFailed(
                f"{daemon.name} came up and went: {error}", hint=f"see its log on {self.place.host}"
            ) from error
        self._hold_connections()
        for one in served:
            if one.gate.state is GateState.OPENING:
                verbs.check_size(one.disk, sizes.get(target_name(one), 0))
                self._put(one.but(gate=gates.done(one.gate)))

    async def _next(self, wanted: dict[str, Opening], deadline: float) -> Daemon | None:
        """The daemon that stands ready for just this, let go; None when there is none."""
        ready, disks = self._ready, tuple(one.disk for one in self.record.disks.values())
        fits = ready is not None and (ready.opening, ready.disks) == (wanted, disks)
        if ready is None or not fits or not ready.standby.alive:
            await self.dismiss()
            return None
        self._ready, process = None, ready.standby.process
        # Written down before it opens anything: whoever comes after us has to end it.
        self.record = self.record.but(
            pid=process.pid, start_time=process.start_time, argv=ready.standby.argv
        )
        self.record.save()
        return await ready.standby.go(label=LABEL, deadline=deadline)

    def _argv(self, served: Sequence[Served], plugs: Plugs, latch: Node | None = None) -> list[str]:
        place = self.place
        return broker_argv(
            self.record.vm, served, plugs, aio=place.aio, latch=latch, locking=place.locking
        )

    async def _start(self, clients: int, deadline: float) -> Daemon:
        served = tuple(self.record.disks.values())

        def options(monitor: int) -> list[str]:
            plugs = Plugs(monitor=monitor, clients=clients)
            return self._argv(served, plugs)

        return await Daemon.start(
            self.place,
            name=daemon_name(self.record),
            label=LABEL,
            clients=clients,
            options=options,
            deadline=deadline,
        )

    async def _settle_all(self, wanted: Mapping[str, Opening]) -> None:
        for disk_id, served in self.record.disks.items():
            wish = wanted.get(disk_id)
            to_peer = wish is not None and wish.peer is not None
            crashed = served.gate.unsettled or (wish is not None and wish.after_crash)
            if crashed and not to_peer:
                await settle_disk(served.disk, user=self.place.binary.user)
                self._put(served.but(gate=gates.settled(served.gate)))

    async def kill(self, *, timeout: float = KILL_TIMEOUT) -> None:
        """The fence: end the daemon and return when it is gone, all gates closed.

        QEMU's requests wait from here on. OperationFailed when it does not die: its gates are
        ``unknown`` and no other host may open the images.
        """
        if self._daemon is None:
            return
        # What still goes to a peer is fenced by the peer, which says that its export is over.
        still = any(one.gate.may_be_open and one.peer is None for one in self.record.disks.values())
        with contextlib.suppress(OSError):  # the fence waits for no full disk
            for served in self.record.disks.values():
                self._put(served.but(gate=gates.lost(served.gate, "the broker is being killed")))
        daemon = self._daemon
        await daemon.kill(timeout=timeout, still=still)
        await daemon.close()
        self._daemon = None

    async def close(self) -> None:
        """Let go of the broker and leave it as it is: its clients notice nothing."""
        await self.dismiss()
        if self._daemon is not None:
            await self._daemon.close()

    def discard(self) -> None:
        """Remove what a dead broker left; the socket is the caller's. Conflict while it lives."""
        if self.alive:
            raise Conflict(f"the broker of {self.record.vm} still runs", hint="kill it first")
        forget_recorded(self.record, self.place.run / f"{LABEL}.sock")

    @property
    def alive(self) -> bool:
        """Whether its daemon runs, as far as is known here."""
        return self._daemon is not None and not self._daemon.exited.is_set()

    async def answers(self, *, timeout: float) -> bool:
        """Whether the daemon answers its monitor within ``timeout`` seconds."""
        if self._daemon is None:
            return False
        self._hold_connections()
        try:
            await self._daemon.execute("query-version", timeout=timeout)
        except MonitorError:
            return False
        return True

    def _hold_connections(self) -> None:
        if self._daemon is not None:
            self._daemon.hold_connections()
            names = self._daemon.connections
            if names != self.record.connections:
                self.record = self.record.but(connections=names)
                self.record.save()

    def note_lender(self, host: str, boot_id: str) -> int:
        """Write down that a host is about to be asked to export the disks; the turn to say it."""
        return self._turn(lenders={**self.record.lenders, host: boot_id})

    def next_turn(self) -> int:
        """The turn for another word to a lender."""
        return self._turn()

    def forget_lender(self, host: str, *, killed: bool) -> None:
        """A host exports nothing of the VM any more; ``killed``: not closed in order.

        What it wrote is synced then before the image is opened here.
        """
        if killed:
            for served in tuple(self.record.disks.values()):
                if not served.gate.may_be_open:
                    self._put(served.but(gate=served.gate.but(unsettled=True)))
        left = {one: boot for one, boot in self.record.lenders.items() if one != host}
        self.record = self.record.but(lenders=left)
        self.record.save()

    def note_growth(self, disk_id: str, size_bytes: int) -> None:
        """Write down that the disk's image is about to get this size."""
        self._put(self._served(disk_id).but(grows_to=size_bytes))

    def settle_growth(self, disk_id: str, size_bytes: int) -> None:
        """The disk's image holds so many bytes now. Conflict while a gate may be open."""
        served = self._served(disk_id)
        if self.alive or served.gate.may_be_open:
            raise Conflict(f"the broker of {self.record.vm} has its images open", hint="end it")
        disk = served.disk.but(size_bytes=size_bytes)
        self._put(served.but(disk=disk, grows_to=0))

    def _turn(self, **changes: object) -> int:
        self.record = self.record.but(turn=self.record.turn + 1, **changes)
        self.record.save()
        return self.record.turn

    async def ended(self) -> None:
        """Return when the daemon has ended, by itself or by force."""
        if self._daemon is not None:
            await self._daemon.exited.wait()

    # The record

    def _served(self, disk_id: str) -> Served:
        try:
            return self.record.disks[disk_id]
        except KeyError:
            raise NotFound(f"the broker of {self.record.vm} has no disk {disk_id}") from None

    def _put(self, served: Served) -> None:
        if self.record.disks.get(served.disk.id) == served:
            return
        self.record = self.record.but(disks={**self.record.disks, served.disk.id: served})
        self.record.save()

    def _set_gate(self, disk_id: str, gate: Gate) -> None:
        peer = self._served(disk_id).peer if gate.may_be_open else None
        self._put(self._served(disk_id).but(gate=gate, peer=peer))

    def _fence(self) -> None:
        """The daemon has ended: every gate is closed."""
        disks = {
            key: one.but(gate=gates.fenced(one.gate), peer=None)
            for key, one in self.record.disks.items()
        }
        self.record = self.record.but(disks=disks, pid=0, start_time=0)
        self.record.save()

    def _live(self) -> Daemon:
        if self._daemon is None or self._daemon.exited.is_set():
            raise Conflict(
                f"the broker of {self.record.vm} does not run", hint="restart it behind its socket"
            )
        return self._daemon
