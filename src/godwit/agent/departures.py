"""VMs on their way out: plans, the engine's source side, and the world it runs in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from godwit.agent.broker_disks import VmDisks
from godwit.agent.desk import Desk, Slot
from godwit.agent.local_disks import local_disks, note_source, settle_soon
from godwit.agent.volumes import volumes_of
from godwit.host.cgroup import open_cgroup
from godwit.host.errors import CgroupError
from godwit.host.strain import Strain
from godwit.migration import plan
from godwit.migration.forecast import Load, predict, rest_ms
from godwit.migration.peer import CheckAnswer, CheckAsk, Peer, PeerSilent
from godwit.migration.quick import memory_volume
from godwit.migration.source import SourceMove
from godwit.migration.stream import TLS_OBJECT, open_stream
from godwit.migration.world import CarriedDisks, NothingCarried, SourceWorld
from godwit.model import keys
from godwit.model.errors import ChecksFailed, Conflict, NotFound, OperationFailed, Unavailable
from godwit.model.migration import (
    Check,
    Forecast,
    Migration,
    MoveLimits,
    MovePlan,
    MoveState,
    Outcome,
)
from godwit.model.ownership import MoveIntent
from godwit.model.requests import MigrateVm
from godwit.model.vm import VmState
from godwit.qemu.carry import Sender
from godwit.qemu.machine import Machine, MemoryInfo
from godwit.qmp import MonitorError
from godwit.store.errors import StoreError
from godwit.store.records import encode
from godwit.wire.clock import measure_offset

_log = logging.getLogger("agent")
PAST_MOVES = 16


class Departures:
    """The moves that this host drives."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.peers = desk.peers
        self.outgoing: dict[str, SourceMove] = {}
        self.ended: Callable[[Slot], Coroutine[Any, Any, None]] | None = None
        self._overheads: deque[float] = deque(maxlen=PAST_MOVES)

    async def plan(self, request: MigrateVm, peer_url: str) -> MovePlan:
        """Every check this host and the destination can make, and the forecast; no side effects."""
        slot = self.desk.slot(request.name)
        destination = request.to or ""
        limits = _limits(request)
        found, here = await asyncio.gather(
            self.desk.records.owner(request.name), self._check_here(slot, request.method)
        )
        if found is None:
            raise NotFound(f"there is no VM {request.name}", hint="look: godwit vm list")
        checks = plan.check_request(found.value, source=self.desk.host, destination=destination)
        checks += here
        forecast = Forecast(basis="the destination was not asked")
        if destination != self.desk.host:
            (answer, offset), hosts, past, now = await asyncio.gather(
                self._ask_peer(slot, request, peer_url),
                self.desk.records.hosts(),
                self._past_moves(request.name),
                self._load(slot.machine),
            )
            checks += list(answer.checks)
            if destination in hosts:
                checks += plan.check_pair(
                    self.desk.equipment.info,
                    hosts[destination],
                    postcopy=request.allow_postcopy,
                    clock_offset_s=offset,
                )
            forecast = self._forecast(limits, answer, past, now)
        return MovePlan(
            vm=request.name,
            destination=destination,
            checks=tuple(checks),
            forecast=forecast,
            strategy="save-restore" if request.method == "quick" else "precopy",
        )

    async def begin(self, order: Migration, peer_url: str) -> None:
        """Accept a move and run it in the background; its record tells the rest."""
        slot = self.desk.slot(order.vm)
        if order.vm in self.desk.moving:
            raise Conflict(f"{order.vm} is being moved already", hint="wait for that move")
        request = MigrateVm(name=order.vm, to=order.destination, method=order.method)
        checks = await self._check_here(slot, request.method)
        if failed := [check for check in checks if check.result == "fail"]:
            raise ChecksFailed(
                failed[0].message,
                hint=failed[0].hint,
                checks=[check.model_dump(mode="json") for check in failed],
            )
        if order.method == "live":
            await note_source(self.desk, slot.vm, order.id)
        if order.vm in self.desk.changing:
            settle_soon(self.desk, order.vm)
            raise Conflict(f"the disks of {order.vm} are being changed", hint="ask again soon")
        self.desk.moving.add(order.vm)
        peer = self.peers.to(order.destination, peer_url)
        move = SourceMove(order, slot.vm, self._source_world(slot, peer))
        self.outgoing[order.id] = move
        self.desk.background(self._run(slot, move, adopted=False), f"move {order.id}")

    async def take_up(self, slot: Slot, bound: MoveIntent) -> None:
        """Go on by the record with a move of ours whose driver died; nothing while one works.

        OperationFailed when its destination is no host any more.
        """
        name, records = slot.vm.name, self.desk.records
        found, hosts = await asyncio.gather(records.migration(bound.id), records.hosts())
        peer = hosts.get(bound.destination)
        if peer is None:
            why = f"{bound.destination}, where {bound.id} leads, is no host any more"
            raise OperationFailed(why, hint="")
        order = found.value if found is not None else _order(name, bound)
        if name in self.desk.moving:
            return
        self.desk.moving.add(name)
        slot.state = VmState.PAUSED if slot.paused else VmState.RUNNING
        there = self.peers.to(order.destination, peer.agent_url)
        move = SourceMove(order, slot.vm, self._source_world(slot, there))
        self.outgoing[order.id] = move
        self.desk.background(self._run(slot, move, adopted=True), f"move {order.id}")

    def cancel(self, migration: str, by: str) -> None:
        """Call a move off; Refused after the swap."""
        move = self.outgoing.get(migration)
        if move is None:
            raise NotFound(f"no move {migration} runs here", hint="look: godwit migration list")
        move.cancel(by)

    async def _run(self, slot: Slot, move: SourceMove, *, adopted: bool) -> None:
        order = move.move.order
        try:
            async with self.desk.lock(order.vm):
                report = await (move.adopt() if adopted else move.run())
                await self._after(slot, report)
        except Exception as error:
            _log.exception("move %s", order.id)
            await self._publish(
                move.move.report(Outcome.UNKNOWN, f"internal fault of the agent: {error!r}")
            )
            await self._see(slot)
            raise
        finally:
            self.desk.moving.discard(order.vm)
            self.outgoing.pop(order.id, None)
            settle_soon(self.desk, order.vm)
        if slot.machine.exited.is_set() and order.vm in self.desk.slots and self.ended:
            await self.ended(slot)

    async def _see(self, slot: Slot) -> None:
        """A move ended without its end: what its QEMU does now is all that is known."""
        with contextlib.suppress(MonitorError):
            if not (await slot.machine.status()).running:
                slot.state = VmState.PAUSED
        await self.desk.publish(slot)

    async def _after(self, slot: Slot, report: Migration) -> None:
        self.desk.moving.discard(report.vm)
        if report.outcome is Outcome.COMPLETED:
            slot.ending = True
            await self.desk.take(slot)
            if report.blackout_ms is not None and report.method == "live":
                self._overheads.append(report.blackout_ms)
        elif not slot.machine.exited.is_set():
            with contextlib.suppress(MonitorError):
                now = await slot.machine.status()
                if now.running:
                    await self.desk.publish(slot)
                elif await self.desk.stalls.look(slot):
                    pass  # nobody but the move listened when its storage stopped it
                elif now.status == "shutdown" and self.ended is not None:
                    # The guest shut itself down while nobody but the move listened.
                    self.desk.background(self.ended(slot), f"vm {report.vm}: shut down")
                else:  # it may have met a gate that was closed at first
                    await self.desk.redirects.go_on(report.vm)
        elif report.outcome is Outcome.UNKNOWN:
            slot.ending = True
            await self.desk.take(slot)
        kind = f"migration.{report.outcome.value if report.outcome else 'unknown'}"
        level = "info" if report.outcome in (Outcome.COMPLETED, Outcome.CANCELLED) else "warning"
        await self.desk.event(kind, report.vm, f"{report.id}: {report.reason}", level=level)

    def _source_world(self, slot: Slot, peer: Peer) -> SourceWorld:
        desk = self.desk
        tls = desk.config.tls.migration_dir if desk.config.migration.tls else None
        return SourceWorld(
            host=desk.host,
            info=desk.equipment.info,
            clock=desk.clock,
            records=desk.records,
            machine=slot.machine,
            gate=slot.gate,
            guard=desk.guard,
            peer=peer,
            publish=self._publish,
            dial=lambda host, port: open_stream(
                host,
                port,
                from_address=desk.config.migration.address,
                rate_bits=desk.equipment.info.migration_rate_bits,
            ),
            throttle=lambda quota: self._throttle(slot, quota),
            disks=VmDisks(desk.brokers, slot.vm.name),
            carried=_carried(slot, tls=tls is not None),
            holds=desk.holds,
            migration_tls_dir=tls,
            volumes=desk.config.paths.volumes,
            files=desk.catalog.files(memory_volume(slot.vm)),
            past_overhead_ms=tuple(self._overheads),
            strain=partial(Strain().read, (os.getpid(), slot.machine.pid)),
        )

    async def _publish(self, record: Migration) -> None:
        """The record others see; while the store is away the next one carries it."""
        with contextlib.suppress(StoreError):
            await self.desk.records.store.put(
                keys.migration(record.id), encode(record), timeout=2.0
            )

    def _throttle(self, slot: Slot, quota: float) -> None:
        """Hold the vCPUs to a share of a core each; the migration thread stays free."""
        group = open_cgroup(slot.machine.runtime.cgroup)
        try:
            if quota >= 1.0:
                group.clear_quota()
            else:
                group.set_quota(quota * slot.vm.cpus)
        except (CgroupError, OSError) as error:
            _log.warning("%s: no throttle: %s", slot.vm.name, error)

    async def _check_here(self, slot: Slot, method: str) -> list[Check]:
        machine = slot.machine
        try:
            status, answer, jobs = await asyncio.gather(
                machine.status(),
                machine.query_migrate(),
                machine.monitor.execute("query-block-jobs"),
            )
        except MonitorError as error:
            return [
                plan.failed("guest", f"its QEMU does not answer: {error}", "see: godwit vm show")
            ]
        facts = plan.SourceFacts(
            info=self.desk.equipment.info,
            qemu_status=status.status,
            blocked_reasons=tuple(answer.get("blocked-reasons", ())),
            block_jobs=tuple(job["device"] for job in jobs),
            guard_ready=self.desk.guard.connected,
        )
        checks = plan.check_source(slot.vm, facts, method=method)
        checks += plan.check_along(slot.vm, method=method)
        if method == "quick":
            checks += [
                plan.failed("storage", f"{self.desk.host}: {why}", "its memory is saved there")
                for name in volumes_of(slot.vm)
                if (why := self.desk.volumes.lost(name))
            ]
        return checks

    async def _ask_peer(
        self, slot: Slot, request: MigrateVm, peer_url: str
    ) -> tuple[CheckAnswer, float | None]:
        peer = self.peers.to(request.to or "", peer_url)
        info = self.desk.equipment.info
        ask = CheckAsk(
            vm=slot.vm,
            source=self.desk.host,
            method=request.method,
            postcopy=request.allow_postcopy,
            source_qemu=info.qemu.version,
            migration_subnet=info.migration_subnet,
        )
        try:
            return await asyncio.gather(peer.check(ask, timeout=5.0), _offset_s(peer))
        except PeerSilent as error:
            raise Unavailable(f"{request.to} does not answer: {error}", hint="try later") from error

    async def _load(self, machine: Machine) -> tuple[MemoryInfo, float | None] | None:
        """The VM's memory and its dirty rate in bytes/s; None when its QEMU does not answer."""
        try:
            return await asyncio.gather(machine.memory_info(), self._dirty_rate(machine))
        except MonitorError:
            return None

    def _forecast(
        self,
        limits: MoveLimits,
        answer: CheckAnswer,
        past: list[Migration],
        now: tuple[MemoryInfo, float | None] | None,
    ) -> Forecast:
        if now is None:
            return Forecast(basis="its QEMU does not answer")
        memory, dirty = now
        link = self.desk.equipment.info.migration_rate_bits / 8 or answer.link_bytes_per_s
        resident = min(memory.resident_bytes, memory.total_bytes)
        rest = [rest_ms(move, link) for move in past] if link else []
        return predict(
            Load(
                used_bytes=past[-1].bytes_transferred if past else resident,
                dirty_bytes_per_s=dirty,
                link_bytes_per_s=link,
                overhead_ms=[move.blackout_ms for move in past if move.blackout_ms is not None],
                rest_ms=[ms for ms in rest if ms is not None],
            ),
            limits,
        )

    async def _past_moves(self, vm: str) -> list[Migration]:
        """The last completed live moves of this VM, oldest first, wherever they began."""
        found = await self.desk.records.list(keys.MIGRATIONS, Migration)
        moves = [record.value for record in found.values()]
        done = [
            move
            for move in moves
            if move.vm == vm
            and move.method == "live"
            and move.strategy == "precopy"
            and move.outcome is Outcome.COMPLETED
        ]
        return sorted(done, key=lambda move: move.accepted_at)[-PAST_MOVES:]

    async def _dirty_rate(self, machine: Machine) -> float | None:
        """The last page-sampled dirty rate, bytes/s; starts the next sample, never waits for it."""
        with contextlib.suppress(MonitorError):
            last = await machine.monitor.execute("query-dirty-rate")
            if last.get("status") != "measuring":
                await machine.monitor.execute(
                    "calc-dirty-rate", {"calc-time": 1, "mode": "page-sampling"}
                )
            if last.get("status") == "measured":
                return float(last["dirty-rate"]) * (1 << 20)
        return None


def _order(vm: str, bound: MoveIntent) -> Migration:
    """A move whose own record is gone, as far as the owner record knows it."""
    return Migration(
        id=bound.id,
        vm=vm,
        source=bound.source,
        destination=bound.destination,
        method=bound.method,
        state=MoveState.RUNNING,
    )


def _carried(slot: Slot, *, tls: bool) -> CarriedDisks:
    """What sends the disks that only this host has."""
    disks = local_disks(slot.vm)
    if not disks:
        return NothingCarried()
    return Sender(slot.machine, disks, tls=TLS_OBJECT if tls else "")


async def _offset_s(peer: Peer) -> float | None:
    """The peer's clock against ours; None when its answers make no sense."""
    try:
        offset = await measure_offset(lambda: peer.clock(timeout=1.0), exchanges=3)
    except ValueError:
        return None
    return offset.offset_s


def _limits(request: MigrateVm) -> MoveLimits:
    return MoveLimits(
        max_blackout_ms=request.max_blackout_ms,
        deadline_s=request.deadline_s,
        allow_postcopy=request.allow_postcopy,
        allow_throttle=request.allow_throttle,
    )
