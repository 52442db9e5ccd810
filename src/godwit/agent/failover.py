"""What this host does for a VM that was lost elsewhere, and what it tells of its own QEMUs.

The manager writes the owner record first, with proof in hand, and then asks here. So a start needs
no swap of its own: it is refused unless the record gives the VM to this host at just that epoch.
A start that fails leaves the record as it is; the manager reads that nothing runs, and goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.routing import Route

from godwit.agent.routes import body_of, name_of, route
from godwit.host.process import is_alive, kill, wait_exit
from godwit.model import ownership
from godwit.model.base import Record
from godwit.model.errors import Conflict, InvalidRequest
from godwit.model.ownership import OwnerState
from godwit.model.processes import HostProcesses, ProcessState, QemuProcess
from godwit.model.vm import VmState, VmStatus
from godwit.qemu.machine import discard_traces
from godwit.qemu.runtime import Runtime, load_runtime, scan
from godwit.wire.identity import MANAGER

if TYPE_CHECKING:
    from godwit.agent.arrivals import Arrivals
    from godwit.agent.departures import Departures
    from godwit.agent.desk import Slot
    from godwit.agent.power import Power

_STATES: dict[VmState, ProcessState] = {
    VmState.PAUSED: "paused",
    VmState.FROZEN: "frozen",
    VmState.STARTING: "starting",
}


class Failover:
    """The verbs that only a manager with a proof asks for."""

    def __init__(self, power: Power, arrivals: Arrivals, departures: Departures) -> None:
        self._power = power
        self._departures = departures
        self._desk = power.desk
        self._arrivals = arrivals

    async def take_over(self, name: str, *, epoch: int) -> VmStatus:
        """Boot the VM at the epoch at which the record gives it to this host; again is harmless.

        Conflict when the record says otherwise. After any failure nothing of it runs here and the
        record is untouched; but when the store did not answer the last write, it runs, and asking
        again writes that.
        """
        desk = self._desk
        async with desk.lock(name):
            slot = desk.slots.get(name)
            spec, found = await self._power.read(name)
            owner = found.value
            given = (owner.host, owner.epoch) == (desk.host, epoch)
            if slot is not None and slot.machine.epoch == epoch and given:
                if owner.state is OwnerState.STARTING:  # the answer to our last write was lost
                    await self._power.write(name, ownership.running(owner), found.revision)
                return self._power.status(name)
            if slot is not None or not given or owner.state is not OwnerState.STARTING:
                raise Conflict(
                    f"{name} is not {desk.host}'s to start at epoch {epoch}: the record says "
                    f"{owner.state.value} on {owner.host} at epoch {owner.epoch}",
                    hint="read the record again",
                )
            await self._power.boot(spec.value, owner)
            try:
                await self._power.write(name, ownership.running(owner), found.revision)
            except Conflict:  # it was given to somebody else meanwhile
                await self._end(desk.slot(name))
                raise
            message = f"started on {desk.host} at epoch {epoch} after it was lost"
            await desk.event("vm.restarted", name, message, data={"epoch": epoch})
            return self._power.status(name)

    async def end_stray(self, name: str, *, epoch: int) -> None:
        """End a QEMU of another epoch than the record's; fine when it is gone.

        Conflict when the record names this very one.
        """
        desk = self._desk
        async with desk.lock(name):
            found = await desk.records.owner(name)
            owner = found.value if found is not None else None
            if owner is not None and (owner.host, owner.epoch) == (desk.host, epoch):
                raise Conflict(f"{name} belongs to {desk.host} at epoch {epoch}", hint="look again")
            slot = desk.slots.get(name)
            if slot is not None and slot.machine.epoch == epoch:
                await self._end(slot)
            elif (runtime := load_runtime(desk.config.paths.vm_run(name))) is not None:
                await self._end_unknown(runtime, epoch)
        message = f"a QEMU of epoch {epoch} was ended on {desk.host}: the record names another"
        await desk.event("vm.stray-ended", name, message, level="warning")

    async def end_own(self, name: str, *, revision: int) -> None:
        """End the VM that runs here by a record of just this revision, which stays as it is.

        For who takes it over from this host, which answers although its lease was lost. Conflict
        when the record has changed. When this returns no QEMU of it lives here.
        """
        desk = self._desk
        async with desk.lock(name):
            found = await desk.records.owner(name)
            if found is None or found.revision != revision:
                raise Conflict(f"the record of {name} has changed", hint="read it again")
            slot = desk.slots.get(name)
            if slot is not None:
                await self._end(slot)
            elif (runtime := load_runtime(desk.config.paths.vm_run(name))) is not None:
                await self._end_unknown(runtime, runtime.epoch)
        message = f"ended on {desk.host}, which cannot renew its lease: it is taken over"
        await desk.event("vm.given-up", name, message, level="warning")

    async def take_up_move(self, name: str, *, migration: str) -> None:
        """Go on with a move that began here and whose engine broke, as the record says.

        Before the swap it is called off, record first, and the VM runs on; after it the destination
        is waited for. Again is harmless: nothing is done while an engine works on it, or when the
        record names that move no more. Conflict when nothing here could be taken up.
        """
        desk = self._desk
        if name in desk.moving:
            return
        async with desk.lock(name):
            found = await desk.records.owner(name)
            bound = found.value.migration if found is not None else None
            if bound is None or bound.id != migration:
                return
            slot = desk.slots.get(name)
            if slot is None or bound.source != desk.host or slot.machine.exited.is_set():
                raise Conflict(f"{desk.host} has nothing of {migration} to take up", hint="look")
            await self._departures.take_up(slot, bound)
        message = f"{migration} is taken up again on {desk.host}: nobody worked on it any more"
        await desk.event("migration.taken-up", name, message, level="warning")

    async def _end(self, slot: Slot) -> None:
        slot.ending = True
        await slot.machine.kill()
        await self._desk.take(slot)

    async def _end_unknown(self, runtime: Runtime, epoch: int) -> None:
        if runtime.epoch != epoch or not runtime.pid:
            return
        kill(runtime.process)
        await wait_exit(runtime.process)
        await self._desk.brokers.end(runtime.vm)
        discard_traces(runtime)

    def processes(self) -> HostProcesses:
        """Every QEMU that lives here, also one whose monitor does not answer.

        And those that are being started, or whose end is not in the record yet: as driven.
        """
        desk = self._desk
        found, _ = scan(desk.config.paths.run / "vms")
        told = [self._told(one) for one in found if one.pid and is_alive(one.process)]
        told += [
            QemuProcess(vm=one.vm, epoch=one.epoch, state="starting", driven=True)
            for one in found
            if not one.pid and desk.lock(one.vm).locked()
        ]
        named = {one.vm for one in told}
        ending = {slot.vm.name: slot.machine.epoch for slot in desk.slots.values()} | desk.settling
        told += [
            QemuProcess(vm=name, epoch=epoch, state="paused", driven=True)
            for name, epoch in sorted(ending.items())
            if name not in named
        ]
        return HostProcesses(
            host=desk.host, boot_id=desk.equipment.info.boot_id, processes=tuple(told)
        )

    def _told(self, runtime: Runtime) -> QemuProcess:
        name = runtime.vm
        slot = self._desk.slots.get(name)
        if slot is not None and slot.machine.pid == runtime.pid:
            return QemuProcess(
                vm=name,
                epoch=slot.machine.epoch,
                state="frozen"
                if name in self._desk.guard.frozen
                else _STATES.get(slot.state, "running"),
                driven=name in self._desk.moving,
            )
        migration = runtime.migration or ""
        arrival = self._arrivals.incoming.get(migration)
        if runtime.role == "incoming" and arrival is not None:
            return QemuProcess(
                vm=name,
                epoch=runtime.epoch,
                state="running" if arrival.phase in ("starting", "running") else "incoming",
                migration=migration,
                driven=arrival.phase != "gone",
                complete=arrival.phase == "loaded" or runtime.released,
                released=runtime.released,
            )
        state: ProcessState = "incoming" if runtime.role == "incoming" else "running"
        return QemuProcess(
            vm=name, epoch=runtime.epoch, state=state, migration=migration, known=False
        )


def failover_routes(failover: Failover) -> list[Route]:
    """For the manager alone."""

    async def take_over(request: Request) -> Record:
        return await failover.take_over(name_of(request), epoch=await _epoch(request))

    async def end_stray(request: Request) -> None:
        await failover.end_stray(name_of(request), epoch=await _epoch(request))

    async def end_own(request: Request) -> None:
        revision = (await body_of(request)).get("revision")
        if not isinstance(revision, int) or revision <= 0:
            raise InvalidRequest("no revision is given", hint="send that of the owner record")
        await failover.end_own(name_of(request), revision=revision)

    async def take_up_move(request: Request) -> None:
        migration = (await body_of(request)).get("migration")
        if not isinstance(migration, str) or not migration:
            raise InvalidRequest("no move is given", hint="send the id that the record names")
        await failover.take_up_move(name_of(request), migration=migration)

    async def processes(_request: Request) -> Record:
        return failover.processes()

    return [
        route("/v1/vms/{vm}/take-over", "POST", take_over, roles=(MANAGER,)),
        route("/v1/vms/{vm}/end-stray", "POST", end_stray, roles=(MANAGER,)),
        route("/v1/vms/{vm}/end-own", "POST", end_own, roles=(MANAGER,)),
        route("/v1/vms/{vm}/take-up-move", "POST", take_up_move, roles=(MANAGER,)),
        route("/v1/processes", "GET", processes, roles=(MANAGER,)),
    ]


async def _epoch(request: Request) -> int:
    epoch = (await body_of(request)).get("epoch")
    if not isinstance(epoch, int) or epoch < 0:
        raise InvalidRequest("no epoch is given", hint="send the epoch of the record")
    return epoch
