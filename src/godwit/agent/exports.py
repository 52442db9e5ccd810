"""This host lends its path: exports of VMs' disks to hosts that have lost theirs.

An export serves one owner at one epoch. It ends when that owner says so, when the owner record says
anything else (looked at on every change and every few seconds), and for certain: its daemon is
ended and its exit awaited. The record is read linearizably before an export is made and once more
after, so that one which was asked for by an owner of yesterday is not there when the asking ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from godwit.host.errors import ProcessGone
from godwit.model import keys
from godwit.model.errors import GodwitError, OperationFailed, Refused
from godwit.model.host import ConfirmedDown
from godwit.model.ownership import Owner, OwnerState
from godwit.qemu.launch import Binary
from godwit.qmp import MonitorError
from godwit.storage.broker_daemon import (
    DaemonPlace,
    check_delivered,
    end_recorded,
    forget_place,
    forget_recorded,
)
from godwit.storage.broker_peer import LABEL, PeerExport, listen_tcp
from godwit.storage.broker_record import load_peer
from godwit.storage.lending import (
    ExportAnswer,
    ExportAsk,
    Exported,
    ExportedAsk,
    WithdrawAsk,
    Withdrawn,
)
from godwit.storage.nodes import BrokerDisk
from godwit.storage.places import served_node
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed
from godwit.wire.identity import migration_dns

if TYPE_CHECKING:
    from godwit.agent.desk import Desk

PROGRAM = "qemu-storage-daemon"
LENT = "lent"
HEARTBEAT_S, SILENT_S = 1.0, 3.0
LOOK_S = 5.0
_ALIVE = (OwnerState.RUNNING, OwnerState.STARTING)
_log = logging.getLogger("agent")


class Exports:
    """All exports of this host. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._exports: dict[str, PeerExport] = {}
        self._said: dict[str, tuple[int, int]] = {}  # (epoch, turn) of the last word on a VM
        self._locks: dict[str, asyncio.Lock] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}  # nothing of these can land any more
        self._cut_off: set[str] = set()  # ended here by force while its owner believed us down
        self._left: dict[str, tuple[str, ...]] = {}  # connections of those that ended unseen

    def __len__(self) -> int:
        return len(self._exports)

    # What owners ask for.

    async def export(self, ask: ExportAsk) -> ExportAnswer:
        """Export a VM's disks to its owner; asked again for the same, the same answer.

        Refused when the record does not name that owner and epoch, when a later word was heard,
        or when this host's own path is not good. After an error nothing is exported.
        """
        await self._heed_word()
        async with self._lock(ask.vm):
            self._heed(ask.vm, ask.epoch, ask.turn)
            for volume in {disk.volume for disk in ask.disks}:
                await self._desk.volumes.look(volume)
            self._check(ask)
            self._check_left(ask.vm)
            await self._check_owner(ask)
            try:
                answer = await self._export(ask)
                await self._check_owner(ask)
            except BaseException:
                await asyncio.shield(self._end(ask.vm))
                raise
            named = f"{ask.vm}: its disks are exported to {ask.host} at epoch {ask.epoch}"
            _log.info("%s", named)
            return answer

    async def _export(self, ask: ExportAsk) -> ExportAnswer:
        desk = self._desk
        if ending := self._ending.pop(ask.vm, None):
            await asyncio.wait({ending})
        here = self._exports.get(ask.vm)
        if here is not None and (not here.alive or here.record.lessee != ask.host):
            await self._end(ask.vm)
            here = None
        address = desk.config.migration.address or desk.config.agent.address
        if here is None:
            here = await self._start(ask, address)
        wanted = {disk.id for disk in ask.disks}
        for left in here.record.exports.keys() - wanted:
            await here.withdraw(left, epoch=ask.epoch)
        names = {}
        for asked in ask.disks:
            disk = self._as_seen_here(asked)
            target = await here.export_for_peer(disk, epoch=ask.epoch, host=address)
            names[disk.id] = target.export
        here.hold_connections()
        return ExportAnswer(
            address=address,
            port=here.record.port,
            tls_hostname=migration_dns(desk.host),
            boot_id=desk.equipment.info.boot_id,
            exports=names,
        )

    def _as_seen_here(self, disk: BrokerDisk) -> BrokerDisk:
        """A served disk is reached as this host, whose name towards the server is its own."""
        catalog = self._desk.catalog
        node = served_node(catalog.get(disk.volume), disk.path, catalog.access)
        return disk.but(served=node)

    async def _start(self, ask: ExportAsk, address: str) -> PeerExport:
        config = self._desk.config
        with listen_tcp(address) as listener:  # the daemon has it then, and with it it goes
            peer = await PeerExport.start(
                self._place(ask.vm),
                ask.vm,
                listener=listener,
                tls_dir=str(config.tls.migration_dir) if config.migration.tls else "",
                lessee=ask.host,
            )
        self._keep(ask.vm, peer)
        return peer

    async def withdraw(self, ask: WithdrawAsk) -> Withdrawn:
        """End what is exported of a VM; when this returns no write of it can land any more."""
        async with self._lock(ask.vm):
            self._heed(ask.vm, ask.epoch, ask.turn)
            here = self._exports.get(ask.vm)
            if here is not None and here.record.lessee != ask.host:
                raise Refused(
                    f"{ask.vm} is exported to {here.record.lessee}, not {ask.host}",
                    hint="read the owner record again",
                )
            self._check_left(ask.vm)
            cut_off = ask.vm in self._cut_off
            killed = await self._end(ask.vm, quick=True)
            self._cut_off.discard(ask.vm)
            return Withdrawn(killed=killed or cut_off)

    async def exported(self, ask: ExportedAsk) -> Exported:
        """Whether the export serves, and whether this host's own path is good."""
        here = self._exports.get(ask.vm)
        alive = (
            here is not None
            and here.alive
            and here.record.lessee == ask.host
            and set(here.record.exports.values()) == {ask.epoch}
        )
        bad = [one for one in ask.volumes if not self._desk.volumes.usable(one)]
        reason = f"{self._desk.host} has lost its own path to {bad[0]}" if bad else ""
        if not alive:
            reason = f"{self._desk.host} exports nothing of {ask.vm} any more"
        return Exported(alive=alive, direct=not bad, reason=reason)

    def _heed(self, vm: str, epoch: int, turn: int) -> None:
        """Refuse a word that was overtaken by a later one."""
        last = self._said.get(vm, (0, 0))
        if (epoch, turn) < last:
            raise Refused(
                f"epoch {epoch}, turn {turn} of {vm} is over: {last} was heard here",
                hint="read the owner record again",
            )
        self._said[vm] = (epoch, turn)

    def _check_left(self, vm: str) -> None:
        """OperationFailed while the kernel may deliver writes of an export that ended unseen."""
        if left := self._left.get(vm):
            check_delivered(left, f"the export of {vm} on {self._desk.host}")
            del self._left[vm]

    def _check(self, ask: ExportAsk) -> None:
        desk = self._desk
        if ask.vm in desk.slots:
            raise Refused(f"{ask.vm} runs here, on {desk.host}", hint="read the owner record again")
        for disk in ask.disks:
            if why := desk.volumes.lends(disk.volume):
                raise Refused(why, hint="ask another host")
            # No word from elsewhere leads out of the volume.
            desk.catalog.check_inside(Path(disk.path), disk.volume)

    async def _check_owner(self, ask: ExportAsk) -> None:
        found = await self._desk.records.owner(ask.vm, timeout=2.0)
        if found is None or not _serves(found.value, ask.host, ask.epoch):
            raise Refused(
                f"{ask.host} does not own {ask.vm} at epoch {ask.epoch}",
                hint="read the owner record again",
            )

    # Their lives.

    async def serve(self) -> None:
        """End what the records no longer stand behind, for ever: a look every few seconds.

        Beside it every export has a watch of its own; where nothing is lent, nothing is watched.
        """
        while True:
            await self._desk.clock.sleep(LOOK_S)
            with contextlib.suppress(StoreError):
                await self._heed_word()
            for vm in tuple(self._exports):
                await self._look(vm)

    async def _follow(self, vm: str, peer: PeerExport) -> None:
        """Look at an export whenever its owner record changes; the watch is only a hint."""
        store = self._desk.records.store
        while self._exports.get(vm) is peer:
            try:
                looked = False
                async with store.watch(keys.vm_owner(vm)) as watch:
                    async for batch in watch:
                        # The first one says that the watch stands: before it things may be missed.
                        if batch.events or not looked:
                            # Beside this: an export that ends ends its watch, and us with it.
                            self._desk.background(self._look(vm), f"export of {vm}: look")
                            looked = True
            except StoreError as error:
                _log.warning("the export of %s: %s", vm, error)
                await self._desk.clock.sleep(1.0)

    async def _heed_word(self) -> None:
        """Somebody has said that this very boot is over: then nothing of it may be lent.

        What was lent before is ended by force, and only then the word is taken back.
        """
        desk = self._desk
        key = keys.host_confirmed_down(desk.host)
        found = await desk.records.get(key, ConfirmedDown, timeout=2.0)
        if found is None:
            return
        if found.value.boot_id == desk.equipment.info.boot_id:
            for vm in tuple(self._exports):
                async with self._lock(vm):
                    try:
                        await self._cut(vm)
                    except GodwitError as error:  # it may still write: the word stays
                        await desk.event("vm.export", vm, error.message, level="error")
                        return
        with contextlib.suppress(CasFailed):
            await desk.records.forget(key, found.revision)

    async def _cut(self, vm: str) -> None:
        here = self._exports.get(vm)
        if here is None:
            return
        self._cut_off.add(vm)
        await here.kill()
        self._exports.pop(vm, None)
        here.discard()
        said = f"{self._desk.host} was said to be down and is not: its export ends"
        await self._desk.event("vm.export", vm, said, level="warning")

    async def _look(self, vm: str) -> None:
        async with self._lock(vm):
            here = self._exports.get(vm)
            if here is None:
                return
            try:
                found = await self._desk.records.owner(vm)
            except StoreError:
                return  # the next look may know more
            epochs = set(here.record.exports.values()) or {0}
            if found is not None and _serves(found.value, here.record.lessee, max(epochs)):
                return
            _log.info("%s: its owner is another now, its export ends", vm)
            await self._end(vm)

    async def adopt(self) -> None:
        """After a restart of the agent: take the exports over; what is dead is cleared away."""
        for path in sorted((self._desk.config.paths.run / LENT).glob("*/peer.json")):
            vm = path.parent.name
            try:
                record = load_peer(path.parent)
                if record is None:
                    continue
                place = self._place(vm)
                try:
                    self._keep(vm, await PeerExport.adopt(place, record))
                except (ProcessGone, MonitorError):
                    monitor = path.parent / f"{LABEL}.sock"
                    await end_recorded(record, monitor, name=f"the export of {vm}")
                    self._left[vm] = record.connections
                    self._cut_off.add(vm)
                    self._check_left(vm)
                    forget_recorded(record, monitor)
                    forget_place(place, LABEL)
            except GodwitError as error:
                await self._desk.event("vm.export", vm, error.message, level="error")

    async def _end(self, vm: str, *, quick: bool = False) -> bool:
        """End a VM's export, in order if it can be; whether it had to be killed before.

        ``quick``: once nothing of it can land, its process may end a little later.
        """
        here = self._exports.pop(vm, None)
        if here is None:
            return False
        epoch = max(here.record.floors.values(), default=0)
        killed = not here.alive
        try:
            for disk in tuple(here.record.exports):
                await here.withdraw(disk, epoch=epoch)
        except (GodwitError, MonitorError) as error:
            killed = True
            _log.warning("the export of %s does not end in order: %s", vm, error)
        if quick and not killed:
            work = self._clear(vm, here)
            self._ending[vm] = self._desk.background(work, f"export of {vm}: end")
        else:
            await self._clear(vm, here)
        return killed

    async def _clear(self, vm: str, here: PeerExport) -> None:
        try:
            await here.kill()
        except GodwitError:
            self._exports.setdefault(vm, here)  # it may still write: it is not over
            raise
        if vm not in self._exports:
            here.discard()

    def _keep(self, vm: str, peer: PeerExport) -> None:
        self._exports[vm] = peer
        self._desk.volumes.wake()
        tending = self._desk.background(self._tend(vm, peer), f"export of {vm}")
        following = self._desk.background(self._follow(vm, peer), f"export of {vm}: owner")
        tending.add_done_callback(lambda _: following.cancel())

    async def _tend(self, vm: str, peer: PeerExport) -> None:
        """Notice its end, and end one that is silent; its owner asks and hears of it."""
        while self._exports.get(vm) is peer:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await peer.ended()
                    break
            peer.hold_connections()
            if not await peer.answers(timeout=SILENT_S) and peer.alive:
                _log.warning("the export of %s is silent for %g s: ending it", vm, SILENT_S)
                with contextlib.suppress(OperationFailed):
                    await peer.kill()
        if self._exports.get(vm) is peer:
            await self._desk.event("vm.export", vm, "its export ended by itself", level="warning")

    async def shut(self) -> None:
        """The agent ends; the exports do not."""
        for peer in self._exports.values():
            await peer.close()

    def _lock(self, vm: str) -> asyncio.Lock:
        return self._locks.setdefault(vm, asyncio.Lock())

    def _place(self, vm: str) -> DaemonPlace:
        desk = self._desk
        paths = desk.config.paths
        return DaemonPlace(
            host=desk.host,
            run=paths.run / LENT / vm,
            state=paths.state / LENT / vm,
            binary=Binary.named(PROGRAM, user=desk.config.qemu.user),
            cgroup=f"{desk.config.cgroup.root}/{vm}-lent",
            boot_id=desk.equipment.info.boot_id,
        )


def _serves(owner: Owner, host: str, epoch: int) -> bool:
    """Whether the record still stands behind an export to that host at that epoch."""
    return owner.host == host and owner.epoch == epoch and owner.state in _ALIVE
