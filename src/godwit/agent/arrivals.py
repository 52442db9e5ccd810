"""VMs on their way in: the engine's destination side, and the world it runs in."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from functools import partial
from pathlib import Path

from godwit.agent.broker_disks import VmDisks
from godwit.agent.desk import Desk
from godwit.agent.facts import memory_free, usable_by
from godwit.agent.files import images
from godwit.agent.guest_agents import set_clock_soon
from godwit.agent.local_disks import local_disks, make_room, settle_soon
from godwit.agent.volumes import volumes_of
from godwit.host.strain import Strain
from godwit.migration import plan
from godwit.migration.destination import Incoming
from godwit.migration.gift import give_back
from godwit.migration.peer import (
    CheckAnswer,
    CheckAsk,
    PeerState,
    PrepareAsk,
    Prepared,
    Recovered,
    TakenOver,
)
from godwit.migration.stream import TLS_OBJECT
from godwit.migration.world import DestinationWorld
from godwit.model.disks import volume_of
from godwit.model.errors import ChecksFailed, Conflict, GodwitError, NotAllowed, NotFound
from godwit.model.vm import Vm
from godwit.qemu.carry import offer, withdraw
from godwit.qemu.machine import Machine
from godwit.qemu.runtime import (
    Runtime,
    forget_started,
    load_runtime,
    note_started,
    read_started,
)
from godwit.qemu.start import spawn
from godwit.qmp import MonitorError
from godwit.wire.identity import migration_dns

_log = logging.getLogger("agent")


class Arrivals:
    """The moves that this host receives."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.incoming: dict[str, Incoming] = {}

    async def check(self, ask: CheckAsk) -> CheckAnswer:
        """What only this host can tell about taking the VM in."""
        desk = self.desk
        files = {disk.path: True for disk in images(list(ask.vm.written)) if not disk.local}
        files |= {disk.backing.path: False for disk in ask.vm.disks if disk.backing is not None}
        files |= {cdrom.path: False for cdrom in ask.vm.cdroms}
        files |= {path: False for path in (ask.vm.boot.kernel, ask.vm.boot.initrd) if path}
        # Nobody touches what lies behind a lost path: it may hang.
        lost = {name: why for name in volumes_of(ask.vm) if (why := desk.volumes.why(name))}
        files = {path: write for path, write in files.items() if volume_of(path) not in lost}
        free = memory_free(promised_bytes=desk.promised_bytes())
        facts = plan.DestinationFacts(
            info=await desk.host_info(),
            memory_free_bytes=free,
            volumes={
                disk.volume: _is_there(desk.config.paths.volumes / disk.volume)
                for disk in local_disks(ask.vm)
            }
            | lost,
            files={path: await self._why_not(path, write) for path, write in files.items()}
            | _missing_devices(ask.vm),
            macs_in_use=tuple(
                nic.mac
                for slot in desk.slots.values()
                if slot.vm.name != ask.vm.name
                for nic in slot.vm.nics
            ),
            holds_vm=ask.vm.name in desk.slots,
            tls_ready=not desk.config.migration.tls or desk.config.tls.migration_dir.is_dir(),
        )
        checks = plan.check_destination(ask.vm, facts, method=ask.method)
        link = desk.equipment.info.migration_rate_bits / 8
        return CheckAnswer(checks=tuple(checks), link_bytes_per_s=link or None)

    async def _why_not(self, path: str, write: bool) -> str:
        """Why QEMU could not use a file of a volume here; empty when it can."""
        uid, gid = self.desk.equipment.binary.user or (0, 0)
        try:
            facts = await self.desk.catalog.files_at(path).look(Path(path))
        except (OSError, GodwitError) as error:
            return str(getattr(error, "strerror", None) or error)
        if facts is None:
            return "No such file or directory"
        return usable_by(facts, uid, gid, write=write)

    async def prepare(self, ask: PrepareAsk) -> Prepared:
        """Get ready to receive; ChecksFailed lists what is in the way."""
        name = ask.vm.name
        if name in self.desk.slots or any(
            other.ask.vm.name == name and other.phase not in ("gone", "running")
            for other in self.incoming.values()
        ):
            raise Conflict(f"{self.desk.host} has a QEMU of {name} already", hint="look there")
        answer = await self.check(
            CheckAsk(vm=ask.vm, source=ask.source, method=ask.method, postcopy=ask.postcopy)
        )
        if failed := [check for check in answer.checks if check.result == "fail"]:
            raise ChecksFailed(
                failed[0].message,
                hint=failed[0].hint,
                checks=[check.model_dump(mode="json") for check in failed],
            )
        self.desk.promised[name] = ask.vm.memory_bytes
        incoming = Incoming(ask, self._destination_world(ask))
        self.incoming[ask.migration] = incoming
        return await incoming.prepare()

    def adopt(self, ask: PrepareAsk, machine: Machine) -> None:
        """After a restart: a copy that was on its way in; the record decides."""
        incoming = Incoming(ask, self._destination_world(ask))
        self.incoming[ask.migration] = incoming
        self.desk.promised[ask.vm.name] = ask.vm.memory_bytes
        incoming.adopt(machine)

    async def ping(self, migration: str, *, oob: bool = False) -> PeerState:
        incoming = self.incoming.get(migration)
        if incoming is None:
            for slot in self.desk.slots.values():
                if slot.machine.runtime.migration == migration:
                    status = (await slot.machine.status()).status
                    return PeerState(phase="running", qemu_status=status, started=True)
            return PeerState(phase="gone", reason=f"{self.desk.host} knows nothing of {migration}")
        return await incoming.ping(oob=oob)

    async def released(self, migration: str, *, by: str) -> None:
        """Take the source's word that it has let go; nobody else's counts."""
        incoming = self._incoming(migration)
        if incoming.ask.source != by:
            raise NotAllowed(f"{by} does not speak for {incoming.ask.source}", hint="")
        await incoming.release()

    async def take_over(self, migration: str, vm: str) -> TakenOver:
        if migration not in self.incoming:
            if (epoch := self._taken_before(migration, vm)) is not None:
                now = self.desk.clock.realtime()
                return TakenOver(epoch=epoch, resumed_at=None, started_at=now)
            await self._never_started(migration, vm)
        return await self._incoming(migration).take_over()

    def _taken_before(self, migration: str, vm: str) -> int | None:
        """The epoch of a VM that an earlier life of this agent took over in this very move."""
        slot = self.desk.slots.get(vm)
        if slot is None or slot.machine.runtime.migration != migration:
            return None
        return slot.machine.epoch

    async def _never_started(self, migration: str, vm: str) -> None:
        """Asked to take over what this agent knows nothing of: it died before the swap.

        No QEMU of it here and no durable note of the epoch prove that it never ran here, so it
        is given back to the source, which still holds it whole.
        """
        desk = self.desk
        found, spec = await desk.records.owner(vm), await desk.records.vm(vm)
        if found is None or spec is None or vm in desk.slots:
            return
        if load_runtime(desk.config.paths.vm_run(vm)) is not None:
            return
        note = read_started(desk.config.paths.vm_state(vm), uuid=spec.value.pins.uuid)
        if note is None or note.epoch < found.value.epoch:
            await give_back(desk.records, desk.clock, vm=vm, migration=migration, host=desk.host)

    async def abort(self, migration: str, reason: str) -> None:
        incoming = self.incoming.get(migration)
        if incoming is not None:
            await incoming.abort(reason)

    async def recover(self, migration: str) -> Recovered:
        with socket.socket() as probe:  # QEMU must be told a port: its main loop may stand still
            probe.bind((self.desk.config.migration.address, 0))
            port = int(probe.getsockname()[1])
        return await self._incoming(migration).recover(port)

    def _incoming(self, migration: str) -> Incoming:
        found = self.incoming.get(migration)
        if found is None:
            raise NotFound(f"{self.desk.host} knows nothing of {migration}", hint="it was ended")
        return found

    def _destination_world(self, ask: PrepareAsk) -> DestinationWorld:
        desk, name = self.desk, ask.vm.name
        state = desk.config.paths.vm_state(name)

        async def start(_postcopy: bool) -> Machine:
            await desk.catalog.fetch_boot(ask.vm)
            await make_room(desk, ask.vm, ask.migration, ask.source)
            await desk.brokers.start(ask.vm)
            machine = await spawn(
                ask.vm,
                desk.place(ask.vm),
                epoch=ask.epoch + 1,
                incoming=True,
                migration=ask.migration,
            )
            _save_ask(machine.runtime, ask)
            await desk.guard.register(machine.runtime, ha=ask.vm.ha)
            return machine

        async def note(epoch: int, migration: str) -> None:
            note_started(state, uuid=ask.vm.pins.uuid, epoch=epoch, migration_id=migration)

        async def unnote() -> None:
            forget_started(state)

        def noted() -> int:
            found = read_started(state, uuid=ask.vm.pins.uuid)
            return found.epoch if found else 0

        async def announced(machine: Machine) -> None:
            machine.amend(role="started", released=False)
            _ask_path(machine.runtime).unlink(missing_ok=True)
            await desk.guard.disarm(name)
            paused = False
            with contextlib.suppress(MonitorError):  # one that died since has an end to be noted
                paused = not (await machine.status()).running
            gate = desk.gate(ask.vm, machine)
            slot = await desk.put(ask.vm, machine, gate, paused=paused)
            if ask.method == "quick":
                set_clock_soon(desk, slot)
            settle_soon(desk, name)
            self._spawn_forget(ask.migration)

        async def gone(reason: str) -> None:
            desk.promised.pop(name, None)
            await desk.brokers.end(name)
            settle_soon(desk, name)
            incoming = self.incoming.get(ask.migration)
            if incoming is not None and incoming.machine is not None:
                await desk.guard.forget(name)
                if incoming.machine.exited.is_set():
                    _ask_path(incoming.machine.runtime).unlink(missing_ok=True)
                    await incoming.machine.discard()
            _log.info("%s: incoming copy ended: %s", name, reason)
            self._spawn_forget(ask.migration)

        tls = desk.config.tls.migration_dir if desk.config.migration.tls else None
        strain = Strain()
        return DestinationWorld(
            host=desk.host,
            info=desk.equipment.info,
            clock=desk.clock,
            records=desk.records,
            spawn=start,
            gate=lambda machine: desk.gate(ask.vm, machine),
            guard=desk.guard,
            note_started=note,
            forget_note=unnote,
            noted_epoch=noted,
            announced=announced,
            gone=gone,
            disks=VmDisks(desk.brokers, name),
            take_in=partial(_take_in, desk, ask),
            taken_in=partial(_taken_in, ask),
            holds=desk.holds,
            migration_address=desk.config.migration.address,
            migration_tls_dir=tls,
            tls_hostname=migration_dns(desk.host),
            files=desk.catalog.files_at(ask.image),
            strain=lambda machine: strain.read((os.getpid(), machine.pid)),
        )

    def _spawn_forget(self, migration: str) -> None:
        self.desk.background(self._forget(migration), f"incoming {migration}: forget")

    async def _forget(self, migration: str) -> None:
        """Keep the answer for a source that asks again, then forget it."""
        await self.desk.clock.sleep(60.0)
        self.incoming.pop(migration, None)

    def close(self) -> None:
        """The agent ends; what is on its way in is left to the next one."""
        for incoming in self.incoming.values():
            incoming.close()


def _is_there(volume: Path) -> str:
    return "" if volume.is_dir() else "there is no such directory"


async def _take_in(desk: Desk, ask: PrepareAsk, machine: Machine) -> int:
    """Let the disks that come along arrive; the port, 0 when none do."""
    disks = local_disks(ask.vm)
    if not disks:
        return 0
    address = desk.config.migration.address
    return await offer(machine, disks, address=address, tls=TLS_OBJECT if ask.tls else "")


async def _taken_in(ask: PrepareAsk, machine: Machine) -> None:
    if local_disks(ask.vm):
        await withdraw(machine)


def _ask_path(runtime: Runtime) -> Path:
    return runtime.run / "incoming.json"


def _save_ask(runtime: Runtime, ask: PrepareAsk) -> None:
    _ask_path(runtime).write_text(ask.model_dump_json())


def load_ask(runtime: Runtime) -> PrepareAsk | None:
    """What an incoming copy was prepared for; None when nothing readable says so."""
    try:
        return PrepareAsk.model_validate_json(_ask_path(runtime).read_text())
    except (OSError, ValueError):
        return None


def _missing_devices(vm: Vm) -> dict[str, str]:
    """What is amiss with the VM's own devices; they become the QEMU user's only at its start."""
    paths = [disk.path for disk in vm.disks if disk.source == "device"]
    return {path: "" if Path(path).is_block_device() else "no such block device" for path in paths}
