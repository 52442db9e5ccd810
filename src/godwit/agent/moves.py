"""Moves of this host's VMs: the worlds the engine runs in, and who is on the way in or out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from godwit.agent.desk import Desk, Slot
from godwit.agent.facts import memory_free, usable_by
from godwit.agent.peering import Peers
from godwit.host.cgroup import open_cgroup
from godwit.host.errors import CgroupError
from godwit.migration import plan
from godwit.migration.destination import Incoming
from godwit.migration.forecast import Load, predict
from godwit.migration.peer import (
    CheckAnswer,
    CheckAsk,
    PeerSilent,
    PeerState,
    PrepareAsk,
    Prepared,
    Recovered,
    TakenOver,
)
from godwit.migration.source import SourceMove
from godwit.migration.world import DestinationWorld, SourceWorld
from godwit.model import keys
from godwit.model.errors import ChecksFailed, Conflict, NotFound, Unavailable
from godwit.model.migration import (
    Check,
    Forecast,
    Migration,
    MoveLimits,
    MovePlan,
    Outcome,
)
from godwit.model.requests import MigrateVm
from godwit.qemu.machine import Machine
from godwit.qemu.runtime import Runtime, forget_started, note_started, read_started
from godwit.qemu.start import spawn
from godwit.qmp import MonitorError
from godwit.store.errors import StoreError
from godwit.store.records import encode
from godwit.wire.clock import measure_offset
from godwit.wire.identity import migration_dns

_log = logging.getLogger("agent")
PAST_MOVES = 16


class Moves:
    """All moves that this host takes part in."""

    def __init__(self, desk: Desk, peers: Peers) -> None:
        self.desk = desk
        self.peers = peers
        self.outgoing: dict[str, SourceMove] = {}
        self.incoming: dict[str, Incoming] = {}
        self.ended: Callable[[Slot], Awaitable[None]] | None = None
        self._overheads: deque[float] = deque(maxlen=PAST_MOVES)

    # Source.

    async def plan(self, request: MigrateVm, peer_url: str) -> MovePlan:
        """Every check this host and the destination can make, and the forecast; no side effects."""
        slot = self.desk.slot(request.name)
        destination = request.to or ""
        found = await self.desk.records.owner(request.name)
        if found is None:
            raise NotFound(f"there is no VM {request.name}", hint="look: godwit vm list")
        checks = plan.check_request(found.value, source=self.desk.host, destination=destination)
        checks += await self._check_here(slot, request.method)
        limits = _limits(request)
        forecast = Forecast(basis="the destination was not asked")
        if destination != self.desk.host:
            answer, offset = await self._ask_peer(slot, request, peer_url)
            checks += list(answer.checks)
            hosts = await self.desk.records.hosts()
            if destination in hosts:
                checks += plan.check_pair(
                    self.desk.equipment.info,
                    hosts[destination],
                    postcopy=request.allow_postcopy,
                    clock_offset_s=offset,
                )
            forecast = await self._forecast(slot, limits, answer)
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
        self.desk.moving.add(order.vm)
        peer = self.peers.to(order.destination, peer_url)
        move = SourceMove(order, slot.vm, self._source_world(slot, peer))
        self.outgoing[order.id] = move
        self.desk.background(self._run(slot, move, adopted=False), f"move {order.id}")

    async def resume(self, slot: Slot, order: Migration, peer_url: str) -> None:
        """After a restart: a move of ours whose driver died."""
        self.desk.moving.add(order.vm)
        peer = self.peers.to(order.destination, peer_url)
        move = SourceMove(order, slot.vm, self._source_world(slot, peer))
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
            raise
        finally:
            self.desk.moving.discard(order.vm)
            self.outgoing.pop(order.id, None)
        if slot.machine.exited.is_set() and order.vm in self.desk.slots and self.ended:
            await self.ended(slot)

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
        elif report.outcome is Outcome.UNKNOWN:
            slot.ending = True
            await self.desk.take(slot)
        kind = f"migration.{report.outcome.value if report.outcome else 'unknown'}"
        level = "info" if report.outcome in (Outcome.COMPLETED, Outcome.CANCELLED) else "warning"
        await self.desk.event(kind, report.vm, f"{report.id}: {report.reason}", level=level)

    def _source_world(self, slot: Slot, peer: object) -> SourceWorld:
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
            peer=peer,  # type: ignore[arg-type]
            publish=self._publish,
            throttle=lambda quota: self._throttle(slot, quota),
            holds=desk.holds,
            migration_tls_dir=tls,
            volumes=desk.config.paths.volumes,
            past_overhead_ms=tuple(self._overheads),
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
        return plan.check_source(slot.vm, facts, method=method)

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
            answer = await peer.check(ask, timeout=5.0)
            offset = await measure_offset(lambda: peer.clock(timeout=1.0), exchanges=4)
        except PeerSilent as error:
            raise Unavailable(f"{request.to} does not answer: {error}", hint="try later") from error
        except ValueError:
            return answer, None
        return answer, offset.offset_s

    async def _forecast(self, slot: Slot, limits: MoveLimits, answer: CheckAnswer) -> Forecast:
        try:
            memory = await slot.machine.memory_info()
        except MonitorError:
            return Forecast(basis="its QEMU does not answer")
        dirty = await self._dirty_rate(slot.machine)
        link = self.desk.equipment.info.migration_rate_bits / 8 or answer.link_bytes_per_s
        return predict(
            Load(
                used_bytes=min(memory.resident_bytes, memory.total_bytes),
                dirty_bytes_per_s=dirty,
                link_bytes_per_s=link,
                overhead_ms=tuple(self._overheads),
            ),
            limits,
        )

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

    # Destination.

    async def check(self, ask: CheckAsk) -> CheckAnswer:
        """What only this host can tell about taking the VM in."""
        desk = self.desk
        files = {disk.path: True for disk in ask.vm.disks}
        files |= {path: False for path in (ask.vm.boot.kernel, ask.vm.boot.initrd) if path}
        uid, gid = desk.equipment.binary.user or (0, 0)
        free = memory_free(promised_bytes=desk.promised_bytes())
        facts = plan.DestinationFacts(
            info=desk.equipment.info.but(networks=_mtus(desk)),
            memory_free_bytes=free,
            volumes={},
            files={
                path: usable_by(Path(path), uid, gid, write=write) for path, write in files.items()
            },
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

    async def prepare(self, ask: PrepareAsk) -> Prepared:
        """Get ready to receive; ChecksFailed lists what is in the way."""
        name = ask.vm.name
        if name in self.desk.slots or any(
            other.ask.vm.name == name and other.phase != "gone" for other in self.incoming.values()
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

    def adopt_incoming(self, ask: PrepareAsk, machine: Machine) -> None:
        """After a restart: a copy that was on its way in; the record decides."""
        incoming = Incoming(ask, self._destination_world(ask))
        self.incoming[ask.migration] = incoming
        self.desk.promised[ask.vm.name] = ask.vm.memory_bytes
        incoming.adopt(machine)

    async def ping(self, migration: str) -> PeerState:
        incoming = self.incoming.get(migration)
        if incoming is None:
            return PeerState(phase="gone", reason=f"{self.desk.host} knows nothing of {migration}")
        return await incoming.ping()

    async def take_over(self, migration: str) -> TakenOver:
        return await self._incoming(migration).take_over()

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
            machine = await spawn(
                ask.vm,
                desk.place(name),
                epoch=ask.epoch + 1,
                incoming=True,
                migration=ask.migration,
            )
            _save_ask(machine.runtime, ask)
            await desk.guard.register(machine.runtime)
            return machine

        async def note(epoch: int, migration: str) -> None:
            note_started(state, epoch=epoch, migration_id=migration)

        async def unnote() -> None:
            forget_started(state)

        def noted() -> int:
            found = read_started(state)
            return found.epoch if found else 0

        async def announced(machine: Machine) -> None:
            machine.amend(role="started")
            _ask_path(machine.runtime).unlink(missing_ok=True)
            await desk.guard.disarm(name)
            status = await machine.status()
            gate = desk.gate(ask.vm, machine)
            await desk.put(ask.vm, machine, gate, paused=not status.running)
            self._spawn_forget(ask.migration)

        async def gone(reason: str) -> None:
            desk.promised.pop(name, None)
            incoming = self.incoming.get(ask.migration)
            if incoming is not None and incoming.machine is not None:
                await desk.guard.forget(name)
                if incoming.machine.exited.is_set():
                    _ask_path(incoming.machine.runtime).unlink(missing_ok=True)
                    await incoming.machine.discard()
            _log.info("%s: incoming copy ended: %s", name, reason)
            self._spawn_forget(ask.migration)

        tls = desk.config.tls.migration_dir if desk.config.migration.tls else None
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
            holds=desk.holds,
            migration_address=desk.config.migration.address,
            migration_tls_dir=tls,
            tls_hostname=migration_dns(desk.host),
        )

    def _spawn_forget(self, migration: str) -> None:
        self.desk.background(self._forget(migration), f"incoming {migration}: forget")

    async def _forget(self, migration: str) -> None:
        """Keep the answer for a source that asks again, then forget it."""
        await self.desk.clock.sleep(60.0)
        self.incoming.pop(migration, None)

    async def close(self) -> None:
        """The agent ends; moves are left to the next one."""
        for incoming in self.incoming.values():
            incoming.close()
        await self.peers.close()


def _limits(request: MigrateVm) -> MoveLimits:
    return MoveLimits(
        max_blackout_ms=request.max_blackout_ms,
        deadline_s=request.deadline_s,
        allow_postcopy=request.allow_postcopy,
        allow_throttle=request.allow_throttle,
    )


def _mtus(desk: Desk) -> dict[str, int]:
    return {name: port.mtu for name, port in desk.networks.items()}


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
