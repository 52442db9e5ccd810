"""VMs whose host has lost a path: their brokers go on through another host, and come back.

    path lost      daemon ended -> a peer exports at this epoch -> daemon anew, to the peer
    path back      daemon ended -> the peer withdraws -> daemon anew, to the image
    no peer        no daemon; QEMU's requests wait, the volume is ``paused``, tried again

The way of each disk is decided whenever a daemon is (re)started or a gate opened (`route`), and
looked at every second (`serve`). What was asked of a peer is in ``broker.json`` before it is asked,
and stays there until that peer has said that it is over, or has booted anew, or an administrator
has said that this boot of it is over (``godwit host confirm-down``): in between nobody else opens
the images. So a peer that falls silent for good keeps its VMs waiting: an old write that it still
holds must not land after a newer one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from godwit.migration.peer import PeerSilent
from godwit.model import keys
from godwit.model.disks import tier_of
from godwit.model.errors import GodwitError, OperationFailed, Unavailable
from godwit.model.host import ConfirmedDown, HostInfo
from godwit.model.ownership import Owner
from godwit.model.volume import VolumeOnHost, VolumeState
from godwit.qmp import MonitorError
from godwit.storage.broker import Broker, Opening
from godwit.storage.lending import (
    Candidate,
    ExportAnswer,
    ExportAsk,
    ExportedAsk,
    WithdrawAsk,
    rank,
)
from godwit.storage.nodes import BrokerDisk, PeerTarget
from godwit.storage.path_state import VmWay
from godwit.store.errors import StoreError

if TYPE_CHECKING:
    from godwit.agent.desk import Desk, Slot

LOOK_S = 1.0
EXPORT_S, WITHDRAW_S, ASK_S = 8.0, 6.0, 1.0
SILENT_S = 3.0
PLAN_S = 30.0
ATTEMPTS = 3
AFTER_FAILURE_S = 10.0
_log = logging.getLogger("agent")


class Redirects:
    """The ways of this host's brokered disks. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._waits: dict[str, str] = {}  # VM -> why its I/O does not go on
        self._silent: dict[str, float] = {}  # VM -> since when its peer's agent is silent
        self._failed: dict[str, float] = {}  # host -> when it failed to lend its path
        self._looking: set[str] = set()
        self._peers: dict[str, HostInfo] = {}  # those that lately answered: a way back is quick

    # What others ask.

    def uses(self, volume: str) -> bool:
        """Whether a VM here has a disk, or its UEFI variables, on the volume."""
        return any(d.volume == volume for s in self._desk.slots.values() for d in s.vm.written)

    def fixed(self, volume: str) -> list[str]:
        """VMs here with a disk, or UEFI variables, on the volume that QEMU itself has open."""
        found = {
            slot.vm.name
            for slot in self._desk.slots.values()
            for disk in slot.vm.written
            if disk.volume == volume and tier_of(disk) == "direct"
        }
        return sorted(found)

    def ways(self, volume: str) -> list[VmWay]:
        """How each VM here does its I/O on the volume."""
        found = [self._way(slot, volume) for _, slot in sorted(self._desk.slots.items())]
        return [way for way in found if way is not None]

    def _way(self, slot: Slot, volume: str) -> VmWay | None:
        vm = slot.vm
        disks = [disk for disk in vm.disks if disk.volume == volume]
        if not disks:
            return None
        fixed = next((disk for disk in disks if tier_of(disk) == "direct"), None)
        if fixed is not None and self._desk.volumes.lost(volume):
            why = (
                f"QEMU itself has {fixed.id} open; once the path is back it goes on, or start "
                "it on another host"
            )
            return VmWay(vm.name, "waiting", reason=why)
        broker = self._desk.brokers.of(vm.name)
        if broker is None:
            return VmWay(vm.name, "direct")
        if why := self._waits.get(vm.name, ""):
            return VmWay(vm.name, "waiting", reason=why)
        served = [one for one in broker.record.disks.values() if one.disk.volume == volume]
        if any(one.peer is not None for one in served):
            return VmWay(vm.name, "redirected", through=", ".join(broker.record.lenders))
        return VmWay(vm.name, "direct")

    async def plan(self, volume: str, *, redirected: bool) -> dict[str, str]:
        """Take this host's I/O off its own path to a volume, or back; what holds then.

        Refused or Unavailable when it cannot be redirected; after OperationFailed it is as before.
        """
        desk = self._desk
        if redirected:
            await self._peers_for({volume})
        desk.volumes.plan(volume, redirected=redirected)
        wanted = {VolumeState.REDIRECTED} if redirected else {VolumeState.DIRECT}
        until = desk.clock.monotonic() + PLAN_S
        while desk.clock.monotonic() < until:
            state, reason = desk.volumes.state(volume)
            waits = any(one.way != "redirected" for one in self.ways(volume)) and redirected
            if (state in wanted and not waits) or (not redirected and desk.volumes.lost(volume)):
                return {"state": state.value, "reason": reason}
            await desk.clock.sleep(0.05)  # many things may bring it about
        if redirected:
            desk.volumes.plan(volume, redirected=False)
        raise OperationFailed(
            f"{volume} on {desk.host} is {state.value} after {PLAN_S:g} s: {reason}",
            hint="it is as it was before" if redirected else "look: godwit volume show " + volume,
        )

    def lost(self, disks: Sequence[BrokerDisk]) -> set[str]:
        """The disks whose I/O does not belong on this host's own path."""
        return {d.id for d in disks if d.volume and not self._desk.volumes.usable(d.volume)}

    # Ways.

    async def route(self, vm: str, broker: Broker, *, epoch: int) -> dict[str, Opening]:
        """How to open the VM's disks now: to the image, or to a peer that has just exported it.

        Only while no daemon here has them open. Unavailable or OperationFailed: nobody can open
        them at present.
        """
        try:
            found = await self._route(vm, broker, epoch=epoch)
        except StoreError as error:
            problem = Unavailable(
                f"the store says nothing: {error.message}", hint="it is asked again"
            )
            await self.waits(vm, problem.message)
            raise problem from error
        except GodwitError as error:
            await self.waits(vm, error.message)
            raise
        self._silent.pop(vm, None)
        return found

    async def _route(self, vm: str, broker: Broker, *, epoch: int) -> dict[str, Opening]:
        disks = [served.disk for served in broker.record.disks.values()]
        lost = self.lost(disks)
        if not lost:
            await self.end_loans(vm, broker)
            return {disk.id: Opening(epoch) for disk in disks}
        borrowed = [disk for disk in disks if disk.id in lost]
        hosts, order = await self._peers_for({disk.volume for disk in borrowed})
        problem = ""
        for host in order[:ATTEMPTS]:
            await self.end_loans(vm, broker, but=host)
            try:
                answer = await self._borrow(vm, broker, borrowed, hosts[host], epoch=epoch)
            except (GodwitError, PeerSilent) as error:
                self._failed[host] = self._desk.clock.monotonic()
                problem = f"{host} does not lend its path: {error}"
                _log.warning("%s: %s", vm, problem)
                continue
            return {
                disk.id: Opening(epoch, self._target(answer, disk.id) if disk.id in lost else None)
                for disk in disks
            }
        raise OperationFailed(problem, hint="it is tried again by itself")

    async def _peers_for(self, volumes: set[str]) -> tuple[dict[str, HostInfo], list[str]]:
        """The hosts there are, and those that can lend their path to all of these volumes."""
        records, here = self._desk.records, self._desk.host
        hosts, states, owners, living = await asyncio.gather(
            records.hosts(),
            records.list(keys.VOLUME_STATES, VolumeOnHost),
            records.list(keys.VMS, Owner, suffix="/owner"),
            records.store.range(keys.HOSTS),
        )
        alive = {kv.key.removeprefix(keys.HOSTS) for kv in living.kvs}
        seen: dict[str, dict[str, VolumeOnHost]] = {}
        for key, found in states.items():
            volume, _, host = key.removeprefix(keys.VOLUME_STATES).partition("/")
            seen.setdefault(host, {})[volume] = found.value
        candidates = [
            Candidate(
                host=name,
                up={f"{name}/lease", f"{name}/agent"} <= alive,
                volumes=seen.get(name, {}),
                load=sum(one.value.host == name for one in owners.values()),
            )
            for name in hosts
        ]
        now = self._desk.clock.monotonic()
        failed = {host for host, at in self._failed.items() if now - at < AFTER_FAILURE_S}
        needed = {volume: self._desk.volumes.identity(volume) for volume in volumes}
        order, why = rank(candidates, needed, here=here, not_these=failed)
        if not order:
            raise Unavailable(
                f"no other host can lend its path to {', '.join(sorted(volumes))}: {why}",
                hint="it is tried again by itself; bring a path back",
            )
        return hosts, order

    async def _borrow(
        self, vm: str, broker: Broker, disks: list[BrokerDisk], peer: HostInfo, *, epoch: int
    ) -> ExportAnswer:
        turn = broker.note_lender(peer.name, peer.boot_id)
        ask = ExportAsk(vm=vm, host=self._desk.host, epoch=epoch, turn=turn, disks=tuple(disks))
        to = self._desk.peers.to(peer.name, peer.agent_url)
        return await to.export(ask, timeout=EXPORT_S)

    def _target(self, answer: ExportAnswer, disk: str) -> PeerTarget:
        config = self._desk.config
        return PeerTarget(
            host=answer.address,
            port=answer.port,
            export=answer.exports[disk],
            tls_dir=str(config.tls.migration_dir) if config.migration.tls else "",
            tls_hostname=answer.tls_hostname,
        )

    async def end_loans(self, vm: str, broker: Broker, *, but: str = "") -> None:
        """Have every peer (``but`` one) end its export of the VM; they have when this returns.

        Only while no daemon here uses them. Unavailable when one does not say so.
        """
        lenders = {host: boot for host, boot in broker.record.lenders.items() if host != but}
        if not lenders:
            return
        for host, boot_id in lenders.items():
            info = self._peers.get(host) or (await self._desk.records.hosts()).get(host)
            if info is None:
                raise self._not_over(vm, host, "it is no host any more")
            epoch = max(one.gate.epoch for one in broker.record.disks.values())
            ask = WithdrawAsk(vm=vm, host=self._desk.host, epoch=epoch, turn=broker.next_turn())
            # Asked of the store only with a reason: on the way back a guest waits for this.
            down = vm in self._silent and await self._confirmed_down(host, boot_id)
            try:
                to = self._desk.peers.to(host, info.agent_url)
                killed = (await to.withdraw(ask, timeout=ASK_S if down else WITHDRAW_S)).killed
            except PeerSilent as error:
                self._peers = await self._desk.records.hosts()
                again = host not in self._peers or self._peers[host].boot_id != boot_id
                if not (again or down or await self._confirmed_down(host, boot_id)):
                    raise self._not_over(vm, host, str(error)) from error
                killed = True  # what exported it is gone with its boot
            broker.forget_lender(host, killed=killed)

    async def _is_over(self, host: str, broker: Broker) -> bool:
        with contextlib.suppress(StoreError):
            return await self._confirmed_down(host, broker.record.lenders.get(host, ""))
        return False

    async def _confirmed_down(self, host: str, boot_id: str) -> bool:
        """Whether a person has said that just this boot of the host is over."""
        found = await self._desk.records.get(keys.host_confirmed_down(host), ConfirmedDown)
        return found is not None and bool(boot_id) and found.value.boot_id == boot_id

    def _not_over(self, vm: str, host: str, why: str) -> Unavailable:
        return Unavailable(
            f"{host} was exporting the disks of {vm} and does not say that it is over: {why}",
            hint=f"bring {host} back, or switch it off and run: godwit host confirm-down {host} "
            "(until then an old write of it could land after a newer one)",
        )

    async def waits(self, vm: str, reason: str) -> None:
        """A VM's I/O does not go on: say why, where people look."""
        if self._waits.get(vm) != reason:
            self._waits[vm] = reason
            await self._told(vm, f"its I/O waits: {reason}")

    async def goes(self, vm: str) -> None:
        """A VM's I/O goes on: say through whom; a guest that stopped at an error goes on too."""
        self._waits.pop(vm, None)
        await self._told(vm, self.reason(vm))
        await self.go_on(vm)

    def reason(self, vm: str) -> str:
        """What a person should know of the way of a VM's I/O; empty when it is its own."""
        if why := self._waits.get(vm, ""):
            return f"its I/O waits: {why}"
        broker = self._desk.brokers.of(vm)
        through = ", ".join(broker.record.lenders) if broker is not None else ""
        return f"its I/O goes through {through}" if through else ""

    async def _told(self, vm: str, reason: str) -> None:
        slot = self._desk.slots.get(vm)
        if slot is not None and slot.reason != reason and not self._desk.stalls.full(vm):
            slot.reason = reason
            if vm not in self._desk.moving:
                await self._desk.publish(slot)
        await self._desk.volumes.ways_changed()

    async def go_on(self, vm: str) -> None:
        """QEMU stops a VM at an I/O error of its disk, and asks the disk again when told to go."""
        slot = self._desk.slots.get(vm)
        if (
            slot is None
            or vm in self._waits
            or slot.paused
            or vm in self._desk.moving
            or self._desk.stalls.full(vm)
        ):
            return
        with contextlib.suppress(MonitorError):
            if (await slot.machine.status()).status == "io-error":
                await slot.machine.cont()

    # Looking.

    async def serve(self) -> None:
        """Keep every VM's I/O on the right way, for ever."""
        desk = self._desk
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await desk.volumes.changed.wait()
            desk.volumes.changed.clear()
            for vm in tuple(desk.slots):
                if vm not in self._looking:
                    self._looking.add(vm)
                    desk.background(self._look(vm), f"vm {vm}: way of its I/O")

    async def _look(self, vm: str) -> None:
        try:
            broker = self._desk.brokers.of(vm)
            if broker is None:
                await self._look_direct(vm)
                return
            if not broker.alive or self._desk.brokers.is_shut(vm):
                return  # whoever starts it or opens it again asks for the way
            disks = [served.disk for served in broker.record.disks.values()]
            lost = self.lost(disks)
            there = {one.disk.id for one in broker.record.disks.values() if one.peer is not None}
            volumes = tuple(sorted({disk.volume for disk in disks if disk.id in there}))
            if lost > there or (vm in self._waits and not there):  # nobody has them open
                await self._turn(vm, lost)
            elif there:
                well = await self._ask_lenders(vm, broker, volumes)
                if well and lost != there and vm not in self._desk.moving:
                    await self._turn(vm, lost)
        finally:
            self._looking.discard(vm)

    async def _turn(self, vm: str, lost: set[str]) -> None:
        desk = self._desk
        broker = desk.brokers.of(vm)
        laps = await desk.brokers.reroute(vm) if broker is not None else None
        if broker is None or laps is None:
            return
        said = f"its I/O goes on {desk.host}'s own path again"
        if lost:
            volumes = {broker.record.disks[one].disk.volume for one in lost}
            why = "; ".join(desk.volumes.why(one) for one in sorted(volumes))
            said = f"its I/O goes through {', '.join(desk.brokers.lenders(vm))}: {why}"
        steps = {"steps_ms": laps.spent_ms}
        await desk.event("vm.redirected" if lost else "vm.direct", vm, said, data=steps)

    async def _ask_lenders(self, vm: str, broker: Broker, volumes: tuple[str, ...]) -> bool:
        """Whether the peers answer that all is well; one that says otherwise is left."""
        desk = self._desk
        epoch = max(one.gate.epoch for one in broker.record.disks.values())
        ask = ExportedAsk(vm=vm, host=desk.host, epoch=epoch, volumes=volumes)
        for host in tuple(broker.record.lenders):
            try:
                self._peers = await desk.records.hosts()
                info = self._peers[host]
                answer = await desk.peers.to(host, info.agent_url).exported(ask, timeout=ASK_S)
            except (PeerSilent, StoreError, KeyError, GodwitError) as error:
                if isinstance(error, PeerSilent) and await self._is_over(host, broker):
                    await desk.brokers.reroute(vm)
                    return False
                now = desk.clock.monotonic()
                if now - self._silent.setdefault(vm, now) > SILENT_S:
                    # Its daemon may well go on serving: nothing is to be touched.
                    await self.waits(vm, f"{host}, through which it goes, is silent: {error}")
                return False
            self._silent.pop(vm, None)
            if answer.alive and answer.direct:
                continue
            if not answer.direct:
                self._failed[host] = desk.clock.monotonic()
            _log.warning("%s: %s", vm, answer.reason)
            await desk.brokers.reroute(vm)
            return False
        if vm in self._waits:
            await self.goes(vm)
        return True

    async def _look_direct(self, vm: str) -> None:
        """A VM whose QEMU opens its disks itself: it can only be told of, and let go on."""
        slot = self._desk.slots.get(vm)
        if slot is None:
            return
        bad = sorted({d.volume for d in slot.vm.disks if self._desk.volumes.lost(d.volume)})
        reason = f"its I/O waits: {self._desk.volumes.why(bad[0])}" if bad else ""
        if slot.reason == reason:
            return
        await self._told(vm, reason)
        if not bad:
            await self.go_on(vm)
