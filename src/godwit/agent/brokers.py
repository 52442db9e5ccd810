"""The storage brokers of this host's VMs: up before QEMU, gated by ownership, gone after it.

    power-on   started with open gates at the owner's epoch, then QEMU
    arrival    started with closed gates; opened after the durable note, before ``cont``
    departure  closed after the proof point, before the swap; opened again on the way back
    death      another daemon behind the same socket, its gates as before: the guest only waits
    path lost  the same, its gates open to a peer (`godwit.agent.redirects` decides the way)

A VM without brokered disks has no broker, and every step here does nothing for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from godwit.agent.broker_disks import (
    broker_disk,
    broker_place,
    brokered,
    delivered,
    end_left_over,
    first_opening,
    settle_growth,
)
from godwit.agent.broker_sockets import BrokerSockets
from godwit.agent.laps import Laps
from godwit.host.errors import ProcessGone
from godwit.model.disks import tier_of
from godwit.model.errors import GodwitError, Refused
from godwit.model.vm import Disk, Vm
from godwit.qemu.layout import broker_id
from godwit.qmp import MonitorError
from godwit.storage.broker import PROMPT_TIMEOUT, Broker, Opening
from godwit.storage.broker_record import load_broker
from godwit.storage.gate import GateState
from godwit.storage.nodes import BrokerDisk
from godwit.storage.settle import settle_disk
from godwit.store.errors import StoreError

if TYPE_CHECKING:
    from godwit.agent.desk import Desk  # it owns these brokers

HEARTBEAT_S, SILENT_S = 1.0, 3.0
"""Seconds between questions to a daemon, and after which one that is silent counts as frozen."""
RETRY_S = 2.0
"""Seconds until another daemon is tried where one does not start."""
_log = logging.getLogger("agent")

Grow = Callable[[Disk, int], Awaitable[None]]
"""Makes a disk's image so many bytes large."""


class Brokers:
    """All brokers of this host. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._brokers: dict[str, Broker] = {}
        self._sockets = BrokerSockets(desk.config.paths.run, desk.equipment.binary.user)
        self._locks: dict[str, asyncio.Lock] = {}
        self._shut: set[str] = set()  # another host may write: only `open` opens anything again

    async def start(self, vm: Vm, *, epoch: int | None = None) -> None:
        """Start the VM's broker if it needs one; its gates are open when ``epoch`` is given."""
        disks = [self._disk(disk) for disk in brokered(vm)]
        if not disks or vm.name in self._brokers:
            return
        place = broker_place(self._desk, vm.name)
        place.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        opening = {one.id: first_opening(one, epoch) for one in disks} if epoch is not None else {}
        listener = self._sockets.listen(vm.name)
        try:
            broker = await Broker.start(
                place,
                vm.name,
                socket=self._sockets.path(vm.name),
                listener=listener,
                disks=disks,
                opening=opening,
            )
        except BaseException:
            self._sockets.hang_up(vm.name)
            raise
        if epoch is None:
            self._shut.add(vm.name)
        self._keep(vm.name, broker)

    async def add(self, vm: Vm, disk: Disk, *, epoch: int) -> None:
        """Serve one more disk of a VM that runs here, its gate open; nothing for a direct one.

        After a failure the broker serves what it did before.
        """
        if tier_of(disk) != "brokered":
            return
        if self.of(vm.name) is None:
            await self.start(vm.but(disks=(disk,)), epoch=epoch)
            return
        async with self._lock(vm.name):
            broker = self._brokers[vm.name]
            if broker_id(disk) in broker.record.disks:  # left by an addition cut short
                await broker.acquire(broker_id(disk), epoch=epoch)
                return
            try:
                served = self._disk(disk)
                await broker.add_disk(served, first_opening(served, epoch))
            except BaseException:
                await asyncio.shield(broker.remove_disk(broker_id(disk), force=True))
                raise

    async def remove(self, vm: str, disk: Disk) -> None:
        """Serve a disk no more, its image closed; the last one takes the broker along."""
        broker = self.of(vm)
        if broker is None or broker_id(disk) not in broker.record.disks:
            return
        if len(broker.record.disks) == 1:
            await self.end(vm)
            return
        async with self._lock(vm):
            # Its QEMU has no node on it any more; a connection left over would be a strange one.
            through_peer = broker.record.disks[broker_id(disk)].peer is not None
            await broker.remove_disk(broker_id(disk), force=True)
        if through_peer:
            await self.reroute(vm)  # what is exported is asked for anew, without it

    async def open(self, vm: str, epoch: int, *, unsynced: bool = False) -> None:
        """Let the VM's QEMU write, for this epoch; what is open already stays open.

        ``unsynced``: another host's broker may have ended without a sync of what it wrote.
        """
        async with self._lock(vm):
            broker = self._brokers.get(vm)
            if broker is None:
                return
            self._shut.discard(vm)
            if broker.alive and await self._open_all(vm, broker, epoch, unsynced=unsynced):
                # Told afterwards: the VM may stand still until this returns.
                told = self._desk.redirects.goes(vm)
                self._desk.background(told, f"vm {vm}: way of its I/O told")
                return
            try:
                await self._restart(vm, broker, epoch, unsynced=unsynced)
            finally:  # where it does not work, it is tried again by itself
                self._watch(vm, broker)

    async def _open_all(self, vm: str, broker: Broker, epoch: int, *, unsynced: bool) -> bool:
        """Open every gate of a living broker; False when it did not answer and was ended."""
        open_now = {
            one.disk.id: Opening(epoch, one.peer)
            for one in broker.record.disks.values()
            if one.gate.state is GateState.OPEN
        }
        wanted = {}
        if len(open_now) < len(broker.record.disks):
            wanted = await self._desk.redirects.route(vm, broker, epoch=epoch)
        steps = [
            broker.acquire(disk, epoch=epoch, after_crash=unsynced)
            if opening.peer is None
            else broker.attach_peer(disk, epoch=epoch, peer=opening.peer)
            for disk, opening in {**wanted, **open_now}.items()
        ]
        answers, results = await broker.while_it_answers(*steps)
        if not answers:
            _log.warning("%s: its broker is silent: another one opens its disks", vm)
            return False
        for problem in results:
            if problem is not None:
                raise problem
        return True

    async def reroute(self, vm: str) -> Laps | None:
        """Put the disks of a VM that runs here on the way that they belong on now.

        What each step took; None when they are not on it, which is tried again by itself. The
        VM's requests wait meanwhile.
        """
        async with self._lock(vm):
            broker, slot = self._brokers.get(vm), self._desk.slots.get(vm)
            if broker is None or slot is None or slot.ending or vm in self._shut:
                return None
            epoch, laps = slot.machine.epoch, Laps(self._desk.clock)
            disks = [one.disk for one in broker.record.disks.values()]
            try:
                back = not self._desk.redirects.lost(disks)
                if back:
                    with laps.lap("prepared"):
                        await self._prepare(vm, broker, epoch)
                with laps.lap("dark"):
                    await self._free(vm, broker, laps, back=back)
                    await self._restart(vm, broker, epoch, laps)
            except GodwitError as error:
                message = f"its storage broker does not start, the VM waits: {error.message}"
                await self._desk.event("vm.broker", vm, message, level="error")
                await self._desk.redirects.waits(vm, error.message)
                return None
            finally:
                await broker.dismiss()
            self._watch(vm, broker)
            _log.info("%s: on another way: %s", vm, laps)
            return laps

    async def _prepare(self, vm: str, broker: Broker, epoch: int) -> None:
        """On the way back nothing but the images is left to be opened while the guest waits."""
        opening = {disk: Opening(epoch) for disk in broker.record.disks}
        try:
            await broker.prepare(opening, listener=self._sockets.known(vm))
        except GodwitError as error:  # then one is started as ever, and the guest waits longer
            _log.warning("%s: %s", vm, error)

    async def _free(self, vm: str, broker: Broker, laps: Laps, *, back: bool) -> None:
        """End the daemon; on the way back the peer's export ends beside it: both must be over."""

        async def end() -> None:
            with laps.lap("daemon ended"):
                await broker.kill()

        async def withdraw() -> None:
            with laps.lap("peer withdrew"):
                await self._desk.redirects.end_loans(vm, broker)

        if not back:
            await end()
            return
        # A peer that does not say so is asked again, and then waited for, by the next step.
        killed, _ = await asyncio.gather(end(), withdraw(), return_exceptions=True)
        if killed is not None:
            raise killed

    def wake(self, vm: str) -> None:
        """The VM runs here from now on: a broker that was found dead starts again."""
        broker = self._brokers.get(vm)
        if broker is not None and not broker.alive:
            self._watch(vm, broker)

    def is_shut(self, vm: str) -> bool:
        """Whether another host may write the VM's disks, so that nothing is opened here."""
        return vm in self._shut

    def lenders(self, vm: str) -> list[str]:
        """The hosts through which a VM's disks go."""
        broker = self._brokers.get(vm)
        return sorted(broker.record.lenders) if broker is not None else []

    @contextlib.asynccontextmanager
    async def at_home(self, vm: str, what: str) -> AsyncIterator[Broker]:
        """The broker of a VM that runs here, alive and on this host's own paths, for one alone.

        Refused with ``what`` and the reason when it is not so.
        """
        async with self._lock(vm):
            broker = self._brokers.get(vm)
            if broker is None or not broker.alive or vm in self._shut or broker.record.lenders:
                reason = self._desk.redirects.reason(vm) or "its storage broker is just starting"
                raise Refused(f"{what}: {reason}", hint="ask again when it is back")
            yield broker

    async def grow(self, vm: str, disk: Disk, size_bytes: int, work: Grow) -> int:
        """Have ``work`` make the image of a disk larger while no daemon has it open; its bytes now.

        For a VM that stands still: its gates close in order. Refused while the disk goes through
        a peer. An error of ``work`` is raised when its image is served again, as it is then.
        """
        async with self.at_home(vm, f"{disk.id} of {vm} cannot grow now") as broker:
            name, epoch = broker_id(disk), self._desk.slot(vm).machine.epoch
            broker.note_growth(name, size_bytes)
            try:
                await broker.release_all()
                await broker.kill()
                await work(disk, size_bytes)
            finally:
                await asyncio.shield(self._serve_again(vm, broker, epoch))
            return broker.record.disks[name].disk.size_bytes

    async def _serve_again(self, vm: str, broker: Broker, epoch: int) -> None:
        await broker.kill()  # cut short, it may run still
        await self._restart(vm, broker, epoch)
        self._watch(vm, broker)

    async def _restart(
        self,
        vm: str,
        broker: Broker,
        epoch: int,
        laps: Laps | None = None,
        *,
        unsynced: bool = False,
    ) -> None:
        """Another daemon, its gates open the way they belong now. The lock is held."""
        broker.check_left()  # before a peer is asked as well
        laps = laps or Laps(self._desk.clock)
        await settle_growth(broker, self._desk.catalog)
        with laps.lap("way found"):
            wanted = await self._desk.redirects.route(vm, broker, epoch=epoch)
        if unsynced:
            wanted = {disk: replace(one, after_crash=True) for disk, one in wanted.items()}
        with laps.lap("opened"):
            await broker.restart(wanted, listener=self._sockets.known(vm))
        await self._desk.redirects.goes(vm)

    async def close(self, vm: str, *, sync: bool = True) -> None:
        """Nothing of this host writes the VM's brokered disks from here on, whatever it takes.

        ``sync`` False: what a broker that was killed had written is synced by who opens them next.
        """
        async with self._lock(vm):
            broker = self._brokers.get(vm)
            if broker is None:
                return
            self._shut.add(vm)
            broker.check_left()
            own = [one.disk for one in broker.record.disks.values() if one.peer is None]
            released = await broker.release_all()
            if released.how == "killed":
                _log.warning("%s: its broker was killed: %s", vm, released.reason)
                # What it wrote must be on the disk before another host's daemon serves it. What
                # went through a peer is: that writes through.
                user = self._desk.equipment.binary.user
                for disk in own if sync else []:
                    await settle_disk(disk, user=user)
            await self._desk.redirects.end_loans(vm, broker)

    async def end(self, vm: str) -> None:
        """The VM's QEMU is gone: end its broker and remove what it left."""
        async with self._lock(vm):
            broker = self._brokers.get(vm)
            if broker is not None:
                self._shut.add(vm)
                # In order first: what the daemon holds in memory reaches the image.
                await broker.release_all()
                await broker.kill()
                await delivered(self._desk, broker)
                try:
                    await self._desk.redirects.end_loans(vm, broker)
                except (GodwitError, StoreError) as error:  # it ends by itself with the record
                    await self._desk.event("vm.export", vm, str(error), level="warning")
                broker.discard()
                del self._brokers[vm]
            self._shut.discard(vm)
            self._sockets.hang_up(vm)

    async def adopt(self, vm: Vm, *, epoch: int, owned: bool) -> None:
        """After a restart of the agent: take the VM's broker over, or start another one."""
        place, record = (
            broker_place(self._desk, vm.name),
            load_broker(broker_place(self._desk, vm.name).run),
        )
        if record is None:
            return
        try:
            broker = await Broker.adopt(place, record)
        except (ProcessGone, MonitorError, GodwitError) as error:
            _log.warning("%s: its broker is not there any more: %s", vm.name, error)
            broker = await Broker.recall(place, record, listener=self._sockets.known(vm.name))
        if not owned:
            self._shut.add(vm.name)
            if not broker.alive:
                await broker.restart(listener=self._sockets.known(vm.name))
        self._keep(vm.name, broker)

    async def sweep(self, keep: set[str]) -> None:
        """After a restart of the agent: end brokers whose VM is not here, and forget dead ones."""
        for vm in await end_left_over(self._desk, keep | set(self._brokers)):
            self._sockets.hang_up(vm)

    def address(self, vm: Vm) -> str:
        """Where the VM's QEMU reaches its broker; empty when it has none."""
        return str(self._sockets.path(vm.name)) if brokered(vm) else ""

    def of(self, vm: str) -> Broker | None:
        """The broker of a VM, if it has one here."""
        return self._brokers.get(vm)

    async def shut(self) -> None:
        """The agent ends; the brokers do not."""
        for broker in self._brokers.values():
            await broker.close()
        self._sockets.close()

    # Steps.

    def _disk(self, disk: Disk) -> BrokerDisk:
        return broker_disk(disk, self._desk.catalog.served([disk]).get(disk.id))

    def _lock(self, vm: str) -> asyncio.Lock:
        return self._locks.setdefault(vm, asyncio.Lock())

    def _keep(self, vm: str, broker: Broker) -> None:
        self._brokers[vm] = broker
        self._watch(vm, broker)

    def _watch(self, vm: str, broker: Broker, *, told: str = "") -> None:
        self._desk.background(self._revive(vm, broker, told), f"vm {vm}: broker")

    async def _revive(self, vm: str, broker: Broker, told: str) -> None:
        """A daemon that dies or freezes under a running VM is replaced; its requests wait.

        ``told`` is what was said last of one that does not start: each thing is said once.
        """
        await self._until_lost(vm, broker)
        async with self._lock(vm):
            slot = self._desk.slots.get(vm)
            if self._brokers.get(vm) is not broker or broker.alive:
                return
            if slot is None or slot.ending or vm in self._shut:
                return  # whoever opens it again starts another one
            if not told:
                ended = "its storage broker ended; another one starts"
                await self._desk.event("vm.broker", vm, ended, level="warning")
            try:
                await self._restart(vm, broker, slot.machine.epoch)
            except GodwitError as error:
                message = f"its storage broker does not start, the VM waits: {error.message}"
                if message != told:
                    await self._desk.event("vm.broker", vm, message, level="error")
                await self._desk.redirects.waits(vm, error.message)
                told = message
            else:
                told = ""
        if told:
            await self._desk.clock.sleep(RETRY_S)  # nothing announces that a path is back
        self._watch(vm, broker, told=told)

    async def _until_lost(self, vm: str, broker: Broker) -> None:
        """Return when the daemon has ended; one that is silent for ``SILENT_S`` is ended."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await broker.ended()
                    return
            if vm in self._shut or self._brokers.get(vm) is not broker:
                continue  # the hand-over has deadlines of its own
            asked = broker.record.process
            if await broker.answers(timeout=SILENT_S) or not broker.alive:
                continue
            if vm in self._desk.guard.frozen:
                continue  # with its VM, and it goes on with it
            async with self._lock(vm):
                # Somebody has replaced it meanwhile, or had it at work until now.
                if broker.record.process != asked or await broker.answers(timeout=PROMPT_TIMEOUT):
                    continue
                _log.warning("%s: its broker is silent for %g s: ending it", vm, SILENT_S)
                try:
                    await broker.kill()
                except GodwitError as error:
                    await self._desk.event("vm.broker", vm, str(error), level="error")
