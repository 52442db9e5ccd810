"""Receiving a VM: a copy that waits, and starts only when the owner record says so.

    preparing -> ready -> (loaded) -> starting -> running
         '---------'---------'----------'--> gone

What wakes it is the owner record, watched from the start; the source's ``take_over`` message only
makes it look again. It looks linearizably and then

- the record names this host for this move: durable note "starting epoch N+1", gate open, ``cont``;
- the record still names the source for this move: wait;
- anything else: the copy is killed. So a dead source leaves nothing behind here.

A copy that cannot start is *given back*: QEMU killed, then one transaction (S, epoch + 1). That
is allowed only while this live agent knows that the vCPUs never ran.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from godwit.migration import release
from godwit.migration.gift import close_disks, give_back
from godwit.migration.listen import listen
from godwit.migration.peer import (
    PeerPhase,
    PeerState,
    PrepareAsk,
    Prepared,
    Recovered,
    TakenOver,
)
from godwit.migration.quick import describe, load_memory
from godwit.migration.stream import ENDED, Stream, announce_self, wait_status
from godwit.migration.world import LEASE_MARGIN_S, DestinationWorld, Gate, settle
from godwit.model import keys, ownership
from godwit.model.errors import GodwitError, OperationFailed, Refused
from godwit.model.ownership import Owner
from godwit.qemu.machine import Machine
from godwit.qmp import MonitorError, MonitorLost, MonitorTimeout, QmpError
from godwit.store.api import WatchBatch, WatchKind
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed, Versioned, decode

_RETRY_S = 0.1
LEASE_PATIENCE_S = 5.0
CONT_S = 5.0


class Incoming:
    """One VM on its way to this host. Belongs to the agent's event loop."""

    def __init__(self, ask: PrepareAsk, world: DestinationWorld) -> None:
        self.ask = ask
        self.world = world
        self.phase: PeerPhase = "preparing"
        self.reason = ""
        self.machine: Machine | None = None
        self._gate: Gate | None = None
        self._look = asyncio.Event()
        self._done: asyncio.Future[TakenOver] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(_seen)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ran = False  # its vCPUs ran, or may have: then it is never given back
        self._returning = False  # on its way back to the source: nothing is opened here any more
        self._watching: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Lock()
        self._ends = asyncio.Lock()
        self._cleaned = False

    # What the source asks for.

    async def prepare(self) -> Prepared:
        """Start the copy; on failure nothing is left of it."""
        try:
            return await self._prepare()
        except (MonitorError, OSError, TimeoutError) as error:
            await self.abort(f"could not prepare: {error}")
            raise OperationFailed(
                f"{self.world.host} could not prepare {self.ask.vm.name}: {error}",
                hint="see the agent's log there",
            ) from error
        except BaseException:
            await self.abort("could not prepare")
            raise

    async def _prepare(self) -> Prepared:
        ask, world = self.ask, self.world
        self._watching.add(self._spawn(self._follow_record(), "record"))  # while QEMU comes up
        machine = await world.spawn(ask.postcopy)
        if self.phase == "gone":  # called off while QEMU was starting
            await machine.kill()
            raise Refused(f"{ask.migration} was called off", hint="ask again")
        self._use(machine)
        armed = world.guard.arm(ask.vm.name, ask.migration, "destination")
        if ask.method == "quick":
            _, devices = await asyncio.gather(armed, machine.device_tree())
            prepared = Prepared(devices=devices)
        else:
            _, port, devices = await asyncio.gather(
                armed, listen(machine, ask, world), machine.device_tree()
            )
            disk_port = await world.take_in(machine)
            prepared = Prepared(
                disk_port=disk_port,
                uri_host=world.migration_address,
                uri_port=port,
                tls_hostname=world.tls_hostname if ask.tls else "",
                devices=devices,
            )
        if self.phase != "preparing":
            raise Refused(f"{ask.migration} was called off: {self.reason}", hint="ask again")
        self.phase = "ready"
        self._look.set()
        await machine.joined()
        await world.holds.reach("prepared", vm=ask.vm.name, role="destination")
        return prepared

    async def ping(self, *, oob: bool = False) -> PeerState:
        """Where the copy stands; an empty ``qemu_status`` means its QEMU does not answer.

        ``oob`` asks out-of-band: the main loop may be busy with the last pages.
        """
        machine, qemu, stream = self.machine, "", ""
        if machine is not None and self.phase != "gone" and oob and machine.monitor.oob:
            with contextlib.suppress(MonitorError):
                await machine.alive(timeout=1.0)
                qemu = "alive"
        elif machine is not None and self.phase != "gone":
            with contextlib.suppress(MonitorError):
                now, read = await asyncio.gather(
                    machine.status(timeout=1.0), Stream(machine.monitor).read(timeout=1.0)
                )
                qemu, stream = now.status, read.status
        return PeerState(
            phase=self.phase,
            qemu_status=qemu,
            stream_status=stream,
            started=self.world.noted_epoch() > self.ask.epoch,
            reason=self.reason,
            strain=1.0 if oob or machine is None else self.world.strain(machine),
        )

    async def release(self) -> None:
        """The source has let go of the VM: keep that beside the copy. Again is harmless."""
        if self.phase == "gone":
            raise Refused(f"the copy of {self.ask.vm.name} was ended: {self.reason}", hint="")
        if self.phase not in ("starting", "running"):
            await release.keep(self._machine(), where=self.world.host)

    async def take_over(self) -> TakenOver:
        """Look at the record now, and answer once the VM runs here (or why it never will)."""
        self._look.set()
        if self.phase == "gone" and not self._ran:
            # The copy died before the swap, so the record names a host with nothing to start.
            await give_back(
                self.world.records,
                self.world.clock,
                vm=self.ask.vm.name,
                migration=self.ask.migration,
                host=self.world.host,
            )
        return await asyncio.shield(self._done)

    async def abort(self, reason: str) -> None:
        """Kill the copy, unless the record says that it is the VM. Idempotent."""
        if self.phase in ("gone", "running", "starting"):
            return
        found = await self._read()
        if found is not None and self._mine(found.value):
            self._look.set()
            return
        await self._end(reason)

    async def recover(self, port: int) -> Recovered:
        """Post-copy: let go of the broken stream and listen anew on ``port``."""
        machine = self._machine()
        stream = Stream(machine.monitor)
        with machine.monitor.events("MIGRATION") as events, contextlib.suppress(MonitorError):
            await machine.monitor.execute_oob("migrate-pause", timeout=1.0)
            await wait_status(events, {"postcopy-paused"} | ENDED, timeout=2.0)
        address = self.world.migration_address
        await stream.monitor.execute_oob(
            "migrate-recover", {"uri": f"tcp:{address}:{port}"}, timeout=3.0
        )
        return Recovered(
            uri_host=address,
            uri_port=port,
            tls_hostname=self.world.tls_hostname if self.ask.tls else "",
        )

    # Life.

    def adopt(self, machine: Machine) -> None:
        """After an agent's restart: take the waiting copy that was found; the record decides."""
        self.phase = "loaded"
        self._ran = self.world.noted_epoch() > self.ask.epoch  # another life may have let it run
        self._watching.add(self._spawn(self._follow_record(), "record"))
        self._use(machine)
        self._look.set()

    def close(self) -> None:
        """The agent ends: forget everything, touch nothing."""
        for task in self._tasks:
            task.cancel()

    def _use(self, machine: Machine) -> None:
        self.machine = machine
        self._gate = self.world.gate(machine)
        self._gate.close()
        self._watching.add(self._spawn(self._watch_exit(machine), "exit"))
        self._spawn(self._obey_record(), "look")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"incoming {self.ask.vm.name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.reason = f"internal fault in {task.get_name()}: {error!r}"

    async def _follow_record(self) -> None:
        """Every change of the owner record is a reason to look; so is the passing of time."""
        key = keys.vm_owner(self.ask.vm.name)
        while True:
            try:
                async with self.world.records.store.watch(key) as watch:
                    async for batch in watch:  # the first one says that the watch stands
                        if not self._still_waiting(batch):
                            self._look.set()
            except StoreError:
                await self.world.clock.sleep(_RETRY_S)

    def _still_waiting(self, batch: WatchBatch) -> bool:
        """Whether a change leaves the VM with its source, on its way here: no reason to look.

        The source writes such a one while the VM is dark; reading it again would cost it time.
        """
        if not batch.events or batch.events[-1].kind is not WatchKind.PUT:
            return False
        found = decode(batch.events[-1].kv, Owner)
        return self._waiting(found) and not self._mine(found.value)

    async def _obey_record(self) -> None:
        while self.phase != "gone" and not self._done.done():
            await self._look.wait()
            self._look.clear()
            found = await self._read()
            if found is not None and self._mine(found.value):
                await self._start(found)
            elif self.phase != "preparing" and not self._waiting(found):
                await self._end("the owner record no longer names this move")

    async def _watch_exit(self, machine: Machine) -> None:
        await machine.exited.wait()
        if self.phase in ("running", "gone"):
            return
        self.reason = f"QEMU on {self.world.host} died"
        found = await self._read()
        if found is not None and self._mine(found.value):
            await self._give_back(found, self.reason)
        await self._end(self.reason)

    # Reading the record.

    async def _read(self) -> Versioned[Owner] | None:
        """The record, linearizably; waits for the store as long as it takes."""
        while True:
            try:
                return await self.world.records.owner(self.ask.vm.name)
            except StoreError:
                # The store's clients reconnect by themselves; nothing announces it.
                await self.world.clock.sleep(_RETRY_S)

    def _mine(self, owner: Owner) -> bool:
        move = owner.migration
        return (
            owner.host == self.world.host
            and move is not None
            and move.id == self.ask.migration
            and owner.epoch == self.ask.epoch + 1
        )

    def _waiting(self, found: Versioned[Owner] | None) -> bool:
        move = found.value.migration if found else None
        return move is not None and move.id == self.ask.migration

    # Starting.

    async def _start(self, found: Versioned[Owner]) -> None:
        """The record names us: note, open, run; or give the VM back."""
        async with self._starting:
            if self._done.done():
                return
            world, started_at = self.world, self.world.clock.realtime()
            await world.holds.reach("take-over", vm=self.ask.vm.name, role="destination")
            try:
                if await self._runs_already():
                    resumed_at = None
                else:
                    await self._lease_holds()
                    resumed_at = await self._run(found.value)
            except (MonitorError, OSError, ValueError, TimeoutError, GodwitError) as error:
                await self._give_back(found, f"it could not start on {world.host}: {error}")
                await self._end(str(error))
                return
            self.phase = "running"
            for task in self._watching:
                task.cancel()
            self._done.set_result(
                TakenOver(epoch=found.value.epoch, resumed_at=resumed_at, started_at=started_at)
            )
            await settle(self.ask.vm, world.clock)
            await world.announced(self._machine())

    async def _runs_already(self) -> bool:
        """Another life of this agent let it run and died before it could say so."""
        if not self._ran or not (await self._machine().status()).running:
            return False
        with contextlib.suppress(OSError):
            self._open_gate()
        return True

    async def _run(self, owner: Owner) -> float | None:
        world, machine = self.world, self._machine()
        if self.ask.method == "quick":
            label = describe(self.ask.vm, epoch=self.ask.epoch)
            if (await machine.status()).status == "inmigrate":
                await load_memory(machine, Path(self.ask.image), label=label, files=world.files)
        self._check_kept()
        self.phase = "starting"
        await world.note_started(owner.epoch, self.ask.migration)
        await world.holds.reach("started", vm=self.ask.vm.name, role="destination")
        self._check_kept()
        await world.taken_in(machine)
        await world.disks.open(owner.epoch)
        gate = self._open_gate()
        if owner.paused:
            return None
        gate.announce()
        resumed_at = await self._cont(machine)
        self._spawn(self._announce(machine), "announce")
        return resumed_at

    def _check_kept(self) -> None:
        """OperationFailed when `_watch_exit` has seen the copy dead: the source may have it."""
        if self._returning:
            raise OperationFailed(self.reason, hint="the source goes on")

    async def _cont(self, machine: Machine) -> float:
        """Let the vCPUs run. Only a refusal, or a ``cont`` never sent, proves that they did not."""
        before, self._ran = self._ran, True
        try:
            return await machine.cont(timeout=CONT_S)
        except (QmpError, Refused):
            self._ran = before
            raise
        except (MonitorTimeout, MonitorLost) as error:
            if error.command == "query-status":  # asked before
                self._ran = before
            raise

    async def _announce(self, machine: Machine) -> None:
        with contextlib.suppress(MonitorError):
            await announce_self(machine.monitor)

    def _open_gate(self) -> Gate:
        if self._gate is None:
            raise OperationFailed("no gate", hint="this is a fault of the agent")
        self._gate.open()
        return self._gate

    async def _lease_holds(self) -> None:
        clock = self.world.clock
        until = clock.monotonic() + LEASE_PATIENCE_S
        while self.world.guard.lease_left() < LEASE_MARGIN_S:
            if clock.monotonic() > until:
                raise OperationFailed(f"{self.world.host}'s own lease does not hold", hint="")
            await clock.sleep(_RETRY_S)

    async def _give_back(self, found: Versioned[Owner], reason: str) -> None:
        """Return the VM to its source; only this live agent may say that it never ran here.

        A copy that may have run has written to its disks and makes the source's memory void:
        it is ended and recorded as stopped here, at the epoch it had.
        """
        # First of all, and before any wait: a start may be under way beside this.
        self._returning = True
        machine = self._machine()
        await machine.kill()
        # Or the source would open what is still open here.
        await close_disks(self.world.disks, self.world.clock, ran=self._ran)
        if not self._ran:
            await self.world.forget_note()
        self.reason = reason
        current: Versioned[Owner] | None = found
        while current is not None and self._mine(current.value):
            owner, key = current.value, keys.vm_owner(self.ask.vm.name)
            after = (
                ownership.stopped(owner)
                if self._ran
                else ownership.gift_back(owner, self.ask.migration)
            )
            try:
                await self.world.records.cas(key, after, current.revision)
                break
            except (CasFailed, StoreError):
                current = await self._read()

    async def _end(self, reason: str) -> None:
        self.phase = "gone"
        self.reason = reason
        if not self._done.done():
            self._done.set_exception(
                OperationFailed(f"{self.world.host} ended its copy: {reason}", hint="")
            )
        # Two may come here at once (a start that failed, and who saw QEMU die): the second one
        # finds nothing left to do, and must not cut the first one short.
        async with self._ends:
            if not self._cleaned:
                await self._clean_up(reason)
                self._cleaned = True
        current = asyncio.current_task()
        for task in self._tasks - ({current} if current else set()):
            task.cancel()

    async def _clean_up(self, reason: str) -> None:
        if self.machine is not None:
            await self.machine.kill()
        with contextlib.suppress(OSError, GodwitError):
            await self.world.guard.disarm(self.ask.vm.name)
        await self.world.gone(reason)

    def _machine(self) -> Machine:
        if self.machine is None:
            raise OperationFailed("no copy of the VM here", hint="ask again")
        return self.machine


def _seen(future: asyncio.Future[TakenOver]) -> None:
    # Nobody may be waiting for it; the reason is in the state and in the record.
    if not future.cancelled():
        future.exception()
