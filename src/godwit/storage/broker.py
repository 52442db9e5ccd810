"""The storage broker of one VM: the process through which its brokered disks reach their images.

    QEMU --NBD--> unix socket (the agent keeps it listening) --> qemu-storage-daemon --> image
                                                                                    '--> a peer

The daemon may die, be killed and be replaced behind the same socket: QEMU reconnects and sends
again what was not answered, and the guest sees no error. One process serves one VM, so its end
fences that VM alone. Gates (`godwit.storage.gate`) say who may write; each step of a gate is in
``broker.json`` before the command it stands for.

Planned change of a path on a running VM: `kill`, let the peer export (or take its export away),
`restart` with the new path: the guest waits and sees nothing. `attach_peer` on a gate that was
released is for a VM that stands still, because in between its I/O fails.

Cancelling `acquire`, `release` or `attach_peer` leaves the gate ``unknown``: kill the broker then.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from godwit.model.errors import Conflict, OperationFailed, OutcomeUnknown
from godwit.qemu.snapshots import TIMEOUT as SNAPSHOT_TIMEOUT
from godwit.qemu.snapshots import Held
from godwit.qmp import MonitorError, QmpError
from godwit.storage import broker_verbs as verbs
from godwit.storage import gate as gates
from godwit.storage import nodes
from godwit.storage.broker_argv import disk_export, target_node
from godwit.storage.broker_daemon import ADOPT_DEADLINE, Daemon, DaemonPlace
from godwit.storage.broker_life import LABEL, BrokerLife, Opening, listen
from godwit.storage.broker_record import BrokerRecord, Served, daemon_name, target_name, via
from godwit.storage.gate import Gate, GateState
from godwit.storage.nodes import BrokerDisk, PeerTarget
from godwit.storage.settle import settle_disk

__all__ = ["Broker", "Opening", "Released", "listen"]

SWAP_TIMEOUT = 5.0
"""Seconds a step of a gate may take; the swap itself takes milliseconds."""
AT_ONCE = 3
"""Steps of gates under way in one daemon: enough that it never waits for us."""
PROMPT_TIMEOUT = 0.5
"""Seconds within which a daemon answers a question that costs it nothing."""
PEER_TIMEOUT = nodes.OPEN_TIMEOUT_S + SWAP_TIMEOUT


@dataclass(frozen=True, slots=True)
class Released:
    """How all gates came to be closed. After ``killed`` the next host acquires ``after_crash``."""

    how: Literal["closed", "killed"]
    reason: str = ""


class Broker(BrokerLife):
    """The broker of one VM on this host; make one with `start`, `adopt` or `revive`."""

    @classmethod
    async def adopt(
        cls,
        place: DaemonPlace,
        record: BrokerRecord,
        *,
        listener: socket.socket | None = None,
        deadline: float = ADOPT_DEADLINE,
    ) -> Self:
        """Take over a broker after a restart of the agent; the guest notices nothing.

        Open gates stay open; one that was on its way is closed. ProcessGone when the daemon has
        ended (see `revive`), MonitorError or OutcomeUnknown when it does not answer: kill it.
        """
        daemon = await Daemon.adopt(
            record.process,
            name=daemon_name(record),
            monitor=place.run / f"{LABEL}.sock",
            cgroup=record.cgroup,
            argv=record.argv,
            deadline=deadline,
        )
        broker = cls(place, record, daemon=daemon, listener=listener)
        try:
            await broker._find_gates()
        except BaseException:
            await broker.close()
            raise
        return broker

    # Disks

    def gate(self, disk_id: str) -> Gate:
        """The gate of a disk; NotFound when the broker has no such disk."""
        return self._served(disk_id).gate

    async def add_disk(self, disk: BrokerDisk, opening: Opening | None = None) -> None:
        """Serve one more disk, its gate closed unless ``opening`` says otherwise.

        Its export is ``nodes.export_name(vm, disk.id)``. After a failure `remove_disk` clears up.
        """
        if disk.id in self.record.disks:
            raise Conflict(f"the broker of {self.record.vm} has a disk {disk.id} already")
        daemon = self._live()
        self._put(Served(disk=disk))
        with self._answers(f"adding disk {disk.id}"):
            export = disk_export(self.record.vm, disk)
            await verbs.add_closed(daemon, disk, export, timeout=SWAP_TIMEOUT)
        if opening is not None:
            await self._open(disk.id, opening)

    async def remove_disk(self, disk_id: str, *, force: bool = False) -> None:
        """Serve the disk no more: its export goes, its gate closes.

        Conflict while QEMU is connected, unless ``force``. Can be repeated after a failure.
        """
        served = self._served(disk_id)
        daemon = self._live()
        with self._answers(f"taking away disk {disk_id}"):
            export = nodes.export_id(disk_id)
            await verbs.delete_export(daemon, export, force=force, timeout=SWAP_TIMEOUT)
        await self.release(disk_id)
        names = (
            nodes.export_node_name(disk_id),
            nodes.failing_node_name(disk_id),
            nodes.null_node_name(disk_id),
        )
        with self._answers(f"taking away disk {disk_id}"):
            await verbs.delete_nodes(daemon, names, timeout=SWAP_TIMEOUT)
        left = {key: one for key, one in self.record.disks.items() if key != served.disk.id}
        self.record = self.record.but(disks=left)
        self.record.save()

    # Snapshots, inside images whose gates are open to them
    #
    # They are asked of the node of the export, which hands them on to the image: the image itself
    # is no root node here, as QEMU wants one to be.

    async def held(self, disk_ids: Sequence[str]) -> dict[str, Held]:
        """What these disks' images hold."""
        with self._answers("looking at snapshots"):
            found = await verbs.held_images(self._live(), timeout=SWAP_TIMEOUT)
        return {one: found[nodes.image_node_name(one)] for one in disk_ids}

    async def take_snapshots(self, disk_ids: Sequence[str], tag: str) -> None:
        """Take one of all these disks at one instant, or of none."""
        names = [nodes.export_node_name(one) for one in disk_ids]
        with self._answers(f"holding {', '.join(disk_ids)}"):
            await verbs.take_snapshots(self._live(), names, tag, timeout=SNAPSHOT_TIMEOUT)

    async def drop_snapshot(self, disk_id: str, tag: str) -> None:
        """Drop one of one disk."""
        name = nodes.export_node_name(disk_id)
        with self._answers(f"dropping {tag} from {disk_id}"):
            await verbs.drop_snapshot(self._live(), name, tag, timeout=SNAPSHOT_TIMEOUT)

    # Gates

    async def acquire(self, disk_id: str, *, epoch: int, after_crash: bool = False) -> None:
        """Open the image and let I/O through; when this returns the guest may write.

        ``after_crash``: whoever had it open before did not close it, so it is synced first.
        Refused for a lower epoch; Conflict when another process has the image; OperationFailed
        when it cannot be opened, the gate is closed then; OutcomeUnknown: kill the broker.
        """
        await self._open(disk_id, Opening(epoch, after_crash=after_crash))

    async def attach_peer(self, disk_id: str, *, epoch: int, peer: PeerTarget) -> None:
        """Open a closed gate to another host's export of the disk. Errors as with `acquire`."""
        await self._open(disk_id, Opening(epoch, peer))

    async def _open(self, disk_id: str, wish: Opening) -> None:
        before = self._served(disk_id)
        gate = gates.acquire(before.gate, epoch=wish.epoch, via=via(wish.peer))
        opening = before.but(gate=gate, peer=wish.peer)
        if gate.state is GateState.OPEN:
            if before.peer != wish.peer:
                raise Conflict(f"disk {disk_id} is open to another peer", hint="release it first")
            self._put(opening)
            return
        daemon = self._live()
        timeout = SWAP_TIMEOUT if wish.peer is None else PEER_TIMEOUT
        async with self._stepping(opening):
            if wish.peer is None and (gate.unsettled or wish.after_crash):
                await settle_disk(opening.disk, user=self.place.binary.user)
            if wish.peer is not None and wish.peer.tls_dir:
                await self._renew_tls(daemon, wish.peer.tls_dir)
            target = target_node(opening, aio=self.place.aio, locking=self.place.locking)
            await verbs.open_target(daemon, opening.disk, target, timeout=timeout)
            self._hold_connections()

    async def release(self, disk_id: str, *, timeout: float = SWAP_TIMEOUT) -> None:
        """Let no I/O through any more and close the image; it is closed when this returns.

        Writes fail with EIO from here. OperationFailed when the last flush fails: the gate is
        open still. OutcomeUnknown when there is no answer within ``timeout`` seconds a command.
        """
        before = self._served(disk_id)
        gate = gates.release(before.gate)
        if gate.state is GateState.CLOSED:
            return
        daemon = self._live()
        async with self._stepping(before.but(gate=gate)):
            name = target_name(before)
            await verbs.close_target(daemon, before.disk, name, timeout=timeout)

    async def release_all(self, *, timeout: float = SWAP_TIMEOUT) -> Released:
        """Close every gate, by force if need be; all are closed when this returns.

        A daemon that refuses or does not answer is killed and its exit awaited. OperationFailed
        when it does not even die.
        """
        releases = [self.release(disk_id, timeout=timeout) for disk_id in self.record.disks]
        answers, results = await self.while_it_answers(*releases)
        if not answers:
            return Released("killed", reason=f"it did not answer within {PROMPT_TIMEOUT:g} s")
        failures = [result for result in results if result is not None]
        if not failures:
            return Released("closed")
        await self.kill()
        return Released("killed", reason=str(failures[0]))

    async def while_it_answers(
        self, *steps: Coroutine[Any, Any, None]
    ) -> tuple[bool, list[BaseException | None]]:
        """Take these steps while a VM stands still; whether the daemon answers, what came of them.

        It is asked right before them, and its answer is not waited for first. One that does not
        answer within ``PROMPT_TIMEOUT`` is killed: no flush is waited for that nobody will do, and
        the steps fail. OperationFailed when it does not even die.
        """
        # A few at a time: each has its own time-out, and the daemon takes one after the other.
        turns = asyncio.Semaphore(AT_ONCE)

        async def in_turn(step: Coroutine[Any, Any, None]) -> None:
            async with turns:
                await step

        asking = asyncio.ensure_future(self._still_answers())
        taking = asyncio.gather(*map(in_turn, steps), return_exceptions=True)
        try:
            answers = await asking
            if not answers:
                await self.kill()
            return answers, await taking
        finally:
            asking.cancel()
            taking.cancel()
            for step in steps:
                if inspect.getcoroutinestate(step) == inspect.CORO_CREATED:
                    step.close()  # it never had its turn

    async def _still_answers(self) -> bool:
        """Whether nothing is to be feared of the daemon: it answers, or there was none."""
        return not self.alive or await self.answers(timeout=PROMPT_TIMEOUT)

    @contextlib.contextmanager
    def _answers(self, doing: str) -> Iterator[None]:
        try:
            yield
        except QmpError as error:
            in_use = "in use" in error.desc
            raise (Conflict if in_use else OperationFailed)(
                f"{doing}: the broker of {self.record.vm} refuses: {error.desc}",
                hint="take the disk out of the VM first" if in_use else "see the broker's log",
            ) from error
        except (MonitorError, TimeoutError) as error:
            raise OutcomeUnknown(
                f"{doing}: the broker of {self.record.vm} does not answer: {error}",
                hint="kill it and restart it behind its socket",
            ) from error

    @contextlib.asynccontextmanager
    async def _stepping(self, served: Served) -> AsyncIterator[None]:
        """Write a gate's step down, carry it out, and write down what came of it."""
        disk_id, verb = served.disk.id, served.gate.state.value
        self._put(served)
        try:
            yield
        except (QmpError, OperationFailed) as error:
            if self.gate(disk_id).state is served.gate.state:
                self._set_gate(disk_id, gates.refused(self.gate(disk_id), str(error)))
            raise _refusal(served, error) from error
        except BaseException as error:
            self._set_gate(disk_id, gates.lost(self.gate(disk_id), str(error) or "cancelled"))
            if isinstance(error, MonitorError | TimeoutError):
                raise OutcomeUnknown(
                    f"disk {disk_id} of {self.record.vm} was {verb} when its broker went silent: "
                    f"{error}",
                    hint="kill the broker and await its exit: that closes every gate",
                ) from error
            raise
        if self.gate(disk_id).state is not served.gate.state:
            raise OutcomeUnknown(
                f"the broker of {self.record.vm} ended while disk {disk_id} was {verb}",
                hint="restart it",
            )
        self._set_gate(disk_id, gates.done(self.gate(disk_id)))

    async def _find_gates(self) -> None:
        daemon = self._live()
        there = await verbs.named_nodes(daemon, timeout=ADOPT_DEADLINE)
        for served in tuple(self.record.disks.values()):
            disk_id = served.disk.id
            names = {nodes.image_node_name(disk_id), nodes.peer_node_name(disk_id)} & there.keys()
            gate = gates.found(served.gate, open_now=bool(names))
            if gate.state is GateState.CLOSING:
                async with self._stepping(served.but(gate=gate)):
                    for name in names:
                        await verbs.close_target(daemon, served.disk, name, timeout=SWAP_TIMEOUT)
            elif gate != served.gate:
                self._put(served.but(gate=gate))

    async def _renew_tls(self, daemon: Daemon, directory: str) -> None:
        # Refused while another disk's peer connection uses it: then it is there, and good.
        with contextlib.suppress(QmpError):
            await daemon.execute("object-del", {"id": nodes.PEER_TLS}, timeout=SWAP_TIMEOUT)
        try:
            credentials = nodes.tls_object("client", directory)
            await daemon.execute("object-add", credentials, timeout=SWAP_TIMEOUT)
        except QmpError as error:
            if "duplicate" not in error.desc:
                raise


def _refusal(served: Served, error: QmpError | OperationFailed) -> OperationFailed | Conflict:
    if isinstance(error, OperationFailed):
        return error
    where = served.peer.export if served.peer is not None else served.disk.path
    if "lock" in error.desc and "Failed to get" in error.desc:
        return Conflict(f"{where} is in use by another process", hint="who has it must release it")
    if served.gate.state is GateState.CLOSING:
        return OperationFailed(
            f"{where} cannot be closed in order: {error.desc}",
            hint="its last flush failed: redirect it, or kill the broker",
        )
    return OperationFailed(f"{where} cannot be opened: {error.desc}", hint="see the broker's log")
