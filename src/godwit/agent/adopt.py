"""After a restart: find this host's QEMUs and do with each what the record says.

Reads every ``runtime.json``, the owner record (linearizably) and the process itself, asks
``migration.recover`` and acts. The guest of an adopted VM notices nothing. A QEMU whose monitor
does not answer is left alone while its owner is this host: it is frozen, not ours to judge here.
"""

from __future__ import annotations

import contextlib
import logging

from godwit.agent import growth
from godwit.agent.arrivals import Arrivals, load_ask
from godwit.agent.departures import Departures
from godwit.agent.desk import Desk
from godwit.agent.disk_settle import settle_others, settle_running
from godwit.agent.local_disks import settle_all
from godwit.host.errors import ProcessGone
from godwit.host.process import is_alive, kill, wait_exit
from godwit.migration import recover
from godwit.migration.gift import give_back
from godwit.migration.recover import Action, Found
from godwit.model import keys, ownership
from godwit.model.errors import GodwitError, OperationFailed
from godwit.model.migration import Migration, MoveState, Outcome
from godwit.model.ownership import MovePhase, Owner
from godwit.model.vm import Vm, VmState, VmStatus
from godwit.qemu.machine import Machine, discard_traces
from godwit.qemu.runtime import Runtime, load_runtime, read_started, scan
from godwit.qemu.start import end_unfinished
from godwit.qmp import MonitorError
from godwit.store.api import delete
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed

THAW_S = 15.0
_log = logging.getLogger("agent")


async def adopt_all(desk: Desk, departures: Departures, arrivals: Arrivals) -> None:
    """Every QEMU of this host, one after the other; a failure with one leaves the others."""
    found, damaged = scan(desk.config.paths.run / "vms")
    for sentence in damaged:
        await desk.event("host.damaged", desk.host, sentence, level="error")
    for runtime in found:
        try:
            await _one(desk, departures, arrivals, runtime)
        except (GodwitError, MonitorError, OSError, StoreError) as error:
            await desk.event("vm.unadopted", runtime.vm, f"not adopted: {error}", level="error")
    here = set(desk.slots) | {incoming.ask.vm.name for incoming in arrivals.incoming.values()}
    await desk.brokers.sweep(here)
    await _stale_records(desk, noted={runtime.vm for runtime in found})
    await settle_others(desk)
    await growth.settle_others(desk)
    settle_all(desk)


async def _one(desk: Desk, departures: Departures, arrivals: Arrivals, runtime: Runtime) -> None:
    if not runtime.pid:
        await end_unfinished(runtime)
        return
    if runtime.unlocked:
        desk.unlocked.add(runtime.vm)
    owner = await _owner(desk, runtime.vm)
    # One that the guard froze answers nobody; it goes on, or dies, soon after the store is back.
    await desk.guard.until_it_moves(runtime.vm, timeout=THAW_S)
    try:
        machine = await Machine.adopt(runtime)
    except ProcessGone:
        discard_traces(runtime)
        return
    except MonitorError as error:
        await _silent(desk, runtime, owner, str(error))
        return
    status, stream = await machine.status(), await machine.query_migrate()
    what = Found(
        role=runtime.role,
        epoch=runtime.epoch,
        migration=runtime.migration or "",
        qemu_status=status.status,
        stream_status=str(stream.get("status", "none")),
    )
    verdict = recover.judge(owner, what, host=desk.host)
    await desk.event("vm.found", runtime.vm, f"{verdict.action.value}: {verdict.sentence}")
    if verdict.action is Action.GO_ON_AS_DESTINATION:
        await _go_on_receiving(desk, arrivals, machine)
    else:
        await _act(desk, departures, machine, owner, verdict.action)


async def _go_on_receiving(desk: Desk, arrivals: Arrivals, machine: Machine) -> None:
    ask = load_ask(machine.runtime)
    if ask is None:
        raise OperationFailed("what this copy was prepared for cannot be read", hint="")
    await desk.brokers.adopt(ask.vm, epoch=ask.epoch + 1, owned=False)
    await desk.guard.register(machine.runtime, ha=ask.vm.ha)
    arrivals.adopt(ask, machine)


async def _act(
    desk: Desk, departures: Departures, machine: Machine, owner: Owner | None, action: Action
) -> None:
    vm = await desk.records.vm(machine.vm)
    if action is Action.END or vm is None or owner is None:
        await machine.kill()
        if vm is not None:
            await desk.brokers.adopt(vm.value, epoch=machine.epoch, owned=False)
            await desk.brokers.end(machine.vm)
        await machine.discard()
        return
    if action is Action.ADOPT and machine.epoch != owner.epoch:
        machine.amend(epoch=owner.epoch)  # a gift came back, with a new epoch, while we were away
    await desk.brokers.adopt(vm.value, epoch=owner.epoch, owned=action is Action.ADOPT)
    spec = vm.value
    if action is Action.ADOPT:
        spec = await settle_running(desk, spec, machine)
    gate = desk.gate(spec, machine)
    slot = await desk.put(spec, machine, gate, paused=owner.paused)
    if action is Action.ADOPT:
        gate.open()
        status = await machine.status()
        if status.status in ("paused", "postmigrate") and not owner.paused:
            # Taken by its owner, noted, but the agent died before (or right after) ``cont``.
            with contextlib.suppress(GodwitError):  # told; nothing gets through a closed gate
                await desk.brokers.open(machine.vm, owner.epoch)
            gate.announce()
            await machine.cont()
            slot.state = VmState.RUNNING
            await desk.publish(slot)
        await growth.settle_running(desk, slot)
        return
    if owner.migration is None:
        raise OperationFailed(f"no move of {machine.vm} is in the record", hint="")
    await departures.take_up(slot, owner.migration)


async def _silent(desk: Desk, runtime: Runtime, owner: Owner | None, why: str) -> None:
    """A QEMU that does not answer: ours is reported as frozen, any other is ended."""
    mine = owner is not None and owner.host == desk.host and owner.epoch == runtime.epoch
    if mine:
        await desk.publish_status(
            runtime.vm,
            VmStatus(
                state=VmState.FROZEN,
                host=desk.host,
                epoch=runtime.epoch,
                reason=why,
                since=desk.clock.realtime(),
            ),
        )
        raise OperationFailed(f"its QEMU does not answer: {why}", hint="")
    if is_alive(runtime.process):
        kill(runtime.process)
        await wait_exit(runtime.process)
    discard_traces(runtime)


async def _owner(desk: Desk, vm: str) -> Owner | None:
    """The record, linearizably, waiting for the store: nothing is decided without it."""
    while True:
        try:
            found = await desk.records.owner(vm)
        except StoreError:
            await desk.clock.sleep(0.2)
            continue
        return found.value if found else None


async def _stale_records(desk: Desk, *, noted: set[str]) -> None:
    """VMs that the record puts here although no process is left: they are not running.

    Those of which nothing is ``noted`` in /run ran before this host booted: what becomes of them,
    after a loss of power perhaps of all hosts, is the cluster's to decide.
    """
    owners = await desk.records.list(keys.VMS, Owner, suffix="/owner")
    for key, found in owners.items():
        name = key.removeprefix(keys.VMS).removesuffix("/owner")
        owner = found.value
        running = owner.state in (ownership.OwnerState.RUNNING, ownership.OwnerState.STARTING)
        if owner.host != desk.host and await _source_is_gone(desk, name, owner):
            await _finish(desk, name, owner, found.revision)
        if owner.host != desk.host or not running or name in desk.slots:
            continue
        if (desk.config.paths.vm_run(name) / "runtime.json").exists():
            continue
        spec = await desk.records.vm(name)
        if owner.migration is not None and spec and _never_started(desk, spec.value, owner):
            await give_back(
                desk.records, desk.clock, vm=name, migration=owner.migration.id, host=desk.host
            )
            continue
        reason = "its QEMU was gone when the agent came back"
        move = owner.migration
        undecided = name not in noted or (spec is not None and spec.value.ha)
        if (undecided and move is None) or (move is not None and move.source == desk.host):
            # Of a move that had let go of it here, the destination may hold the whole VM.
            # Whoever leads the cluster reads that nothing of it runs, and goes on from there.
            await _tell_failed(desk, name, owner, f"{reason}; the cluster settles what follows")
            continue
        reservation = []
        if owner.migration is not None:
            reservation = [delete(keys.host_reservation(owner.migration.destination, name))]
        try:
            await desk.records.cas(key, ownership.stopped(owner), found.revision, also=reservation)
        except CasFailed:
            continue
        await _tell_failed(desk, name, owner, reason)
        if owner.migration is not None:
            await _close_move(desk, owner.migration.id, reason)


async def _tell_failed(desk: Desk, name: str, owner: Owner, reason: str) -> None:
    status = VmStatus(state=VmState.FAILED, host=desk.host, epoch=owner.epoch, reason=reason)
    await desk.publish_status(name, status)
    await desk.event("vm.failed", name, reason, level="error")


async def _source_is_gone(desk: Desk, vm: str, owner: Owner) -> bool:
    """A move of ours that was swapped, and whose QEMU here died with its agent."""
    move = owner.migration
    return (
        move is not None
        and move.source == desk.host
        and move.destination == owner.host
        and vm not in desk.slots
        and load_runtime(desk.config.paths.vm_run(vm)) is None
    )


async def _finish(desk: Desk, vm: str, owner: Owner, revision: int) -> None:
    """Nothing is left here of a VM that was handed over: free its record."""
    if owner.migration is None:
        return
    move = owner.migration
    try:
        await desk.records.cas(keys.vm_owner(vm), ownership.finished(owner, move.id), revision)
    except CasFailed:
        return
    reason = f"{vm} was handed to {owner.host}; the source's QEMU and agent died meanwhile"

    def change(record: Migration) -> Migration:
        if record.state.final:
            return record
        outcome = Outcome.UNKNOWN if move.phase is MovePhase.PAGE_SOURCE else Outcome.COMPLETED
        return record.but(state=MoveState(outcome.value), outcome=outcome, reason=reason)

    await desk.records.update(keys.migration(move.id), Migration, change)


def _never_started(desk: Desk, vm: Vm, owner: Owner) -> bool:
    """The swap named this host, whose copy had died: the source still holds the VM whole."""
    if owner.migration is None or owner.migration.destination != desk.host:
        return False
    note = read_started(desk.config.paths.vm_state(vm.name), uuid=vm.pins.uuid)
    return note is None or note.epoch < owner.epoch


async def _close_move(desk: Desk, migration: str, reason: str) -> None:
    def change(move: Migration) -> Migration:
        if move.state.final:
            return move
        return move.but(state=MoveState.FAILED, outcome="failed", reason=reason)

    await desk.records.update(keys.migration(migration), Migration, change)
