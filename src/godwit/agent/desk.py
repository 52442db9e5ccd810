"""The VMs of this host: what runs, what is on its way in or out, and what others are told of it.

A ``Slot`` is a VM that this host owns and runs. The desk keeps one lock per VM, so that a start, a
stop and a move of the same VM never interleave here; between hosts the owner record does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from godwit.agent.brokers import Brokers
from godwit.agent.catalog import Catalog
from godwit.agent.exports import Exports
from godwit.agent.facts import Equipment
from godwit.agent.gate import TapGate
from godwit.agent.guardlink import GuardLink
from godwit.agent.holds import LabHolds
from godwit.agent.peering import Peers
from godwit.agent.redirects import Redirects
from godwit.agent.stalls import Stalls
from godwit.agent.volumes import Volumes
from godwit.host.announce import Announcer
from godwit.host.cgroup import open_cgroup
from godwit.host.config import AgentConfig
from godwit.host.errors import CgroupError
from godwit.host.ifctl import LinkControl
from godwit.model import keys
from godwit.model.errors import NotFound
from godwit.model.host import HostInfo
from godwit.model.vm import Vm, VmState, VmStatus
from godwit.model.world import Clock
from godwit.qemu.firmware import FirmwareShelf
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place
from godwit.qmp import MonitorError, MonitorLost
from godwit.store.errors import StoreError
from godwit.store.records import Records, encode

_log = logging.getLogger("agent")


@dataclass
class Slot:
    """A VM that runs here, with its way to the network."""

    vm: Vm
    machine: Machine
    gate: TapGate
    ending: bool = False  # somebody here is ending it on purpose
    paused: bool = False
    state: VmState = VmState.RUNNING
    reason: str = ""  # what a person should know of it now
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Desk:
    """Everything the rooms of the agent share. Belongs to one event loop."""

    def __init__(
        self,
        config: AgentConfig,
        equipment: Equipment,
        *,
        records: Records,
        clock: Clock,
        guard: GuardLink,
        holds: LabHolds,
        peers: Peers,
    ) -> None:
        self.config = config
        self.equipment = equipment
        self.records = records
        self.clock = clock
        self.guard = guard
        self.holds = holds
        self.peers = peers
        self.links = LinkControl()
        self.announcer = Announcer()
        self.catalog = Catalog(self)
        self.brokers = Brokers(self)
        self.stalls = Stalls(self)
        self.volumes = Volumes(self)
        self.redirects = Redirects(self)
        self.exports = Exports(self)
        self.firmware = FirmwareShelf()
        self.networks = dict(config.networks)
        self.slots: dict[str, Slot] = {}
        self.promised: dict[str, int] = {}  # memory of VMs on their way in, bytes
        self.moving: set[str] = set()
        self.changing: set[str] = set()  # their disks come, go or grow: no move may begin
        self.copying: set[str] = set()  # one of their disks is on its way to another image
        self.unlocked: set[str] = set()  # taken over from a host whose locks may still be there
        self.settling: dict[str, int] = {}  # ended, at this epoch, and the record does not say so
        self.along = asyncio.Lock()  # images of disks that come along are made, or deleted
        self.standing: set[str] = set()  # held for a moment by us, not by anybody's wish
        self.on_exit: Callable[[Slot], Coroutine[Any, Any, None]] | None = None
        self._locks: dict[str, asyncio.Lock] = {}
        self._telling = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def host(self) -> str:
        """This host's name."""
        return self.config.host

    def lock(self, vm: str) -> asyncio.Lock:
        """Held by whoever changes what runs of this VM here."""
        return self._locks.setdefault(vm, asyncio.Lock())

    def slot(self, vm: str) -> Slot:
        """The VM that runs here, or NotFound."""
        found = self.slots.get(vm)
        if found is None:
            raise NotFound(f"{vm} does not run on {self.host}", hint=f"look: godwit vm show {vm}")
        return found

    def locks(self, vm: str) -> bool:
        """Whether the VM's images are locked here while they are open."""
        return self.config.qemu.image_locks and vm not in self.unlocked

    def place(self, vm: Vm) -> Place:
        """Where on this host a VM's QEMU lives."""
        paths = self.config.paths
        return Place(
            host=self.host,
            run=paths.vm_run(vm.name),
            state=paths.vm_state(vm.name),
            binary=self.equipment.binary,
            features=self.equipment.qemu.features,
            cgroup=f"{self.config.cgroup.root}/{vm.name}",
            boot_id=self.equipment.info.boot_id,
            locking=self.locks(vm.name),
            broker=self.brokers.address(vm),
            served=self.catalog.served(vm.written),
            boot=self.catalog.boot(vm),
        )

    def gate(self, vm: Vm, machine: Machine) -> TapGate:
        """The VM's taps and their bridges here."""
        return TapGate(vm, machine.runtime, self.networks, self.links, self.announcer)

    async def host_info(self) -> HostInfo:
        """What this host publishes about itself, with what it has now."""
        volumes = await self.catalog.names()
        networks = {name: port.mtu for name, port in self.networks.items()}
        uefi = self.firmware.uefi()
        return self.equipment.info.but(networks=networks, volumes=volumes, uefi=uefi)

    async def publish_host(self) -> None:
        """Tell the store of this host as it is now; one at a time, so that the last word is new."""
        async with self._telling:
            info = encode(await self.host_info())
            await self.records.store.put(keys.host_info(self.host), info)

    def promised_bytes(self) -> int:
        """Memory that VMs here, and those on their way in, may take."""
        running = sum(slot.vm.memory_bytes for slot in self.slots.values())
        return running + sum(self.promised.values())

    def background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A named task whose failure is logged and ends nothing else."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("%s: %r", task.get_name(), error, exc_info=error)

    async def put(self, vm: Vm, machine: Machine, gate: TapGate, *, paused: bool = False) -> Slot:
        """A VM runs here from now on: watch it, tell guard and store."""
        slot = Slot(vm=vm, machine=machine, gate=gate, paused=paused)
        slot.state = VmState.PAUSED if paused else VmState.RUNNING
        self.slots[vm.name] = slot
        self.promised.pop(vm.name, None)
        for work, name in ((self._follow(slot), "events"), (self._await_exit(slot), "exit")):
            task = self.background(work, f"vm {vm.name}: {name}")
            slot.tasks.add(task)
        await self.guard.register(machine.runtime, ha=vm.ha)
        await self._group_vcpus(machine)
        self.brokers.wake(vm.name)
        self.volumes.suspect(vm)  # from here on it is looked at often
        await self.publish(slot)
        # Its storage may have stopped it before anybody here listened.
        self.background(self._look(slot), f"vm {vm.name}: first look")
        return slot

    async def _look(self, slot: Slot) -> None:
        await self.stalls.look(slot)

    async def _group_vcpus(self, machine: Machine) -> None:
        """Give the vCPU threads their own control group, so that a throttle hits only them."""
        try:
            open_cgroup(machine.runtime.cgroup).add_vcpu_threads(await machine.vcpu_threads())
        except (CgroupError, OSError, MonitorError) as error:
            _log.warning("%s: vCPUs cannot be throttled: %s", machine.vm, error)

    async def take(self, slot: Slot) -> None:
        """The VM runs here no more and its QEMU is dead: forget it and what it left."""
        self.slots.pop(slot.vm.name, None)
        self.unlocked.discard(slot.vm.name)
        self.stalls.forget(slot.vm.name)
        current = asyncio.current_task()
        for task in slot.tasks - ({current} if current is not None else set()):
            task.cancel()
        await self.guard.forget(slot.vm.name)
        if slot.machine.exited.is_set():
            await self.brokers.end(slot.vm.name)
            await slot.machine.discard()

    async def publish(self, slot: Slot) -> None:
        """Tell the store what is seen of a VM; a store that is away is told later by others."""
        status = VmStatus(
            state=slot.state,
            host=self.host,
            epoch=slot.machine.epoch,
            reason=slot.reason,
            since=self.clock.realtime(),
        )
        await self.publish_status(slot.vm.name, status)

    async def publish_status(self, vm: str, status: VmStatus) -> None:
        """Like ``publish``, for a VM that is not (or no more) here."""
        with contextlib.suppress(StoreError):
            await self.records.write_status(vm, status)

    async def event(
        self,
        kind: str,
        vm: str,
        message: str,
        *,
        level: Any = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        """A line in the event log, if the store can be reached."""
        _log.log(logging.WARNING if level != "info" else logging.INFO, "%s: %s", vm, message)
        with contextlib.suppress(StoreError):
            await self.records.append_event(
                kind, f"vm/{vm}", message, at=self.clock.realtime(), level=level, data=data
            )

    async def _follow(self, slot: Slot) -> None:
        """Keep the published state true, and end the QEMU of a guest that shut itself down."""
        names = ("STOP", "RESUME", "SHUTDOWN")
        with slot.machine.monitor.events(*names) as events, contextlib.suppress(MonitorLost):
            async for event in events:
                if slot.vm.name in self.moving or slot.vm.name in self.standing:
                    continue
                if event.name == "SHUTDOWN":
                    if not slot.ending and self.on_exit is not None:
                        self.background(self.on_exit(slot), f"vm {slot.vm.name}: shut down")
                elif event.name == "RESUME":
                    slot.state = VmState.RUNNING
                    await self.stalls.over(slot)
                    slot.reason = self.redirects.reason(slot.vm.name)
                    await self.publish(slot)
                elif await self.stalls.look(slot):
                    self.volumes.suspect(slot.vm)
                else:
                    slot.state = VmState.PAUSED
                    await self.publish(slot)

    async def _await_exit(self, slot: Slot) -> None:
        await slot.machine.exited.wait()
        if not slot.ending and self.on_exit is not None:
            self.background(self.on_exit(slot), f"vm {slot.vm.name}: exited")

    async def close(self) -> None:
        """The agent ends; the VMs do not."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self.slots.values():
            await slot.machine.close()
        await self.brokers.shut()
        self.catalog.close()
        await self.exports.shut()
        await self.peers.close()
        self.links.close()
        self.announcer.close()
