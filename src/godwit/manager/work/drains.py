"""Emptying a host: a plan first, then one task for each VM, until none runs there any more.

    plan     -> refused before anything moves, when something cannot leave and was not allowed to
    mark     -> draining: no new VM goes there; the mark names the VMs and the task
    moves    -> a few asked for ahead, each waits for its turn in the queue of all moves
    look     -> what arrived or started meanwhile leaves as well; a move that failed is planned anew
    end      -> empty: the mark stays (draining, or maintenance)
    cancel   -> moves that can be called off are, VMs that were shut down start again, the mark
                goes: every VM runs somewhere, the host takes VMs again

Where it stands is in the records: the mark, the moves, the VMs' owners. A manager that adopts the
task reads them and goes on; nothing has to be undone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.batch import Batch
from godwit.manager.work.drain_plan import plan_drain, vms_on
from godwit.manager.work.mark_rules import EmptyHost
from godwit.manager.work.marks import clear_mark, cleared, set_mark, tell
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.drain import DrainPlan, PlannedVm
from godwit.model.errors import Cancelled, ChecksFailed, Conflict, OperationFailed
from godwit.model.marks import HostMark
from godwit.model.ownership import OwnerState
from godwit.model.requests import DrainHost, MigrateVm, Request, StartVm, StopVm
from godwit.model.task import Task, TaskState
from godwit.planner.drain import bound, time_left

ATTEMPTS = 2
"""How often a VM is tried before it is left where it is."""
_SHUTDOWN_S = 300.0


async def empty(world: World, run: TaskRun, request: EmptyHost) -> Done:
    """Empty a host, whichever word was used; the task ends when it is empty."""
    if (gone := cleared(run)) is not None:
        await _Drain(world, run, request, None).called_off(gone)
    if ended := run.task.progress.get("ended"):
        return await _Drain(world, run, request, None).conclude(str(ended))
    mark = world.cache.snapshot.marks.get(request.name)
    plan = None
    if mark is None or mark.task != run.task.id:
        plan = await plan_drain(world, request)
        if plan.refused:
            raise _refusal(plan)
        await _mark(world, run, request, plan)
    drain = _Drain(world, run, request, plan)
    return await drain.run()


def _refusal(plan: DrainPlan) -> ChecksFailed:
    more = f" (and {len(plan.refused) - 1} more)" if len(plan.refused) > 1 else ""
    return ChecksFailed(
        f"{plan.host} cannot be emptied: {plan.refused[0]}{more}",
        hint=f"{plan.hint}; nothing has moved",
        plan=plan.model_dump(mode="json"),
    )


async def _mark(world: World, run: TaskRun, request: EmptyHost, plan: DrainPlan) -> None:
    name, by = request.name, run.task.by

    def change(before: HostMark | None) -> HostMark:
        if before is not None and before.state == "maintenance":
            raise Conflict(f"{name} is in maintenance", hint="look: godwit host list")
        left = {*(before.left if before else ()), *(one.vm for one in plan.vms)}
        return HostMark(
            state="draining",
            since=world.clock.realtime(),
            reason=request.reason or f"asked for by {by}",
            by=by,
            left=tuple(sorted(left)),
            stopped=before.stopped if before else (),
            task=run.task.id,
        )

    said = f"{plan.reason}; at least {plan.bound_s:g} s" if plan.bound_s else plan.reason
    await set_mark(world, run, name, change, said)
    await tell(world, name, "draining", f"{name} is emptied: {said}")


@dataclass
class _Tally:
    """What is known of the VMs beside the records."""

    planned: dict[str, PlannedVm] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)  # parts whose end has been dealt with
    busy: dict[str, str] = field(default_factory=dict)


class _Drain:
    """One host that is being emptied."""

    def __init__(
        self, world: World, run: TaskRun, request: EmptyHost, plan: DrainPlan | None
    ) -> None:
        self._world = world
        self._run = run
        self._request = request
        self._host = request.name
        self._batch = Batch(world, run)
        self._tally = _Tally()
        if plan is not None:
            self._tally.planned = {one.vm: one for one in plan.vms}
        progress = run.task.progress
        self._bound_s: float | None = plan.bound_s if plan else progress.get("bound_s")
        self._began: float = progress.get("began_at") or world.clock.realtime()
        self._total: int = progress.get("total") or len(self._tally.planned)

    async def run(self) -> Done:
        """Until the host is empty, or what is left there cannot leave, or it is called off."""
        while True:
            snapshot = self._world.cache.snapshot
            mark = self._own_mark(snapshot)
            if mark.cancelled:
                return await self._call_off(mark.cancelled)
            self._take_ends(snapshot)
            here = vms_on(snapshot, self._host)
            if not self._batch.active(snapshot) and all(vm in self._tally.given_up for vm in here):
                return await self._finish(here)
            await self._send(snapshot, here)
            await self._report(here)
            news = partial(self._news, seen=self._look(self._world.cache.snapshot))
            await self._world.cache.until(news, timeout=self._world.look_s)

    def _news(self, snapshot: Snapshot, *, seen: object) -> bool | None:
        return True if self._look(snapshot) != seen else None

    def _own_mark(self, snapshot: Snapshot) -> HostMark:
        mark = snapshot.marks.get(self._host)
        if mark is None or mark.task != self._run.task.id:
            raise Conflict(
                f"the mark of {self._host} was taken away or changed",
                hint="look: godwit host list; moves under way go on",
            )
        return mark

    def _look(self, snapshot: Snapshot) -> object:
        """Everything whose change is news here."""
        here = vms_on(snapshot, self._host)
        mark = snapshot.marks.get(self._host)
        return (
            here,
            mark,
            tuple((task.id, _planned(task)) for task in self._batch.active(snapshot)),
            tuple(snapshot.owner(vm).state for vm in here),
            tuple(task.id for vm in here for task in snapshot.active_tasks(f"vm/{vm}")),
        )

    # What has ended

    def _take_ends(self, snapshot: Snapshot) -> None:
        for vm in self._batch.tasks:
            task = self._batch.task(snapshot, vm)
            if task is None or not task.state.final or task.id in self._tally.counted:
                continue
            self._tally.counted.add(task.id)
            if task.state is TaskState.COMPLETED:
                continue
            tally = self._tally
            tally.attempts[vm] = tally.attempts.get(vm, 0) + 1
            tally.planned.pop(vm, None)
            if task.state is TaskState.CANCELLED:
                tally.given_up[vm] = f"its move was called off: {task.reason}"
            elif tally.attempts[vm] >= ATTEMPTS:
                tally.given_up[vm] = task.reason

    # What begins

    async def _send(self, snapshot: Snapshot, here: tuple[str, ...]) -> None:
        ready = [vm for vm in here if self._may_leave(snapshot, vm)]
        await self._plan_anew([vm for vm in ready if vm not in self._tally.planned])
        moving = False
        for one in self._in_order(ready):
            if one.way == "stay":
                self._tally.given_up[one.vm] = one.reason
                continue
            active = self._batch.active(self._world.cache.snapshot)
            if self._batch.room(self._world.cache.snapshot) <= 0:
                return
            if len(active) == 1 and not _planned(active[0]):
                return  # the first move begins sooner when the others are not planned beside it
            if one.way == "shutdown" and (moving or self._batch.active(snapshot)):
                return  # last of all: whoever cancels before has nothing to start again
            moving = True
            self._tally.busy.pop(one.vm, None)
            if one.way == "shutdown":
                await self._note_stopped(one.vm)
            if why := await self._batch.begin(one.vm, self._part(one)):
                self._tally.busy[one.vm] = why

    def _may_leave(self, snapshot: Snapshot, vm: str) -> bool:
        if vm in self._tally.given_up:
            return False
        starting = snapshot.owner(vm).state is OwnerState.STARTING
        return not starting and not snapshot.active_tasks(f"vm/{vm}")

    def _in_order(self, ready: list[str]) -> list[PlannedVm]:
        places = {vm: number for number, vm in enumerate(self._tally.planned)}
        found = (self._tally.planned[vm] for vm in ready if vm in self._tally.planned)
        return sorted(found, key=lambda one: places[one.vm])

    async def _plan_anew(self, names: list[str]) -> None:
        """For VMs that came later, whose move failed, or that a manager before us had planned."""
        if not names:
            return
        plan = await plan_drain(self._world, self._request, only=names)
        self._tally.planned |= {one.vm: one for one in plan.vms}

    def _part(self, one: PlannedVm) -> Request:
        if one.way == "shutdown":
            return StopVm(name=one.vm, timeout_s=_SHUTDOWN_S)
        return MigrateVm(
            name=one.vm,
            to=one.destination,
            method="quick" if one.way == "quick" else "live",
            max_blackout_ms=self._request.max_blackout_ms,
            deadline_s=self._request.deadline_s,
        )

    async def _note_stopped(self, vm: str) -> None:
        def change(mark: HostMark | None) -> HostMark:
            if mark is None:
                raise Conflict(f"the mark of {self._host} is gone", hint="look: godwit host list")
            return mark.but(stopped=tuple(sorted({*mark.stopped, vm})))

        await set_mark(self._world, self._run, self._host, change, f"{vm} is shut down")

    # What is told

    async def _report(self, here: tuple[str, ...]) -> None:
        leaving = [vm for vm in here if vm not in self._tally.given_up]
        self._total = max(self._total, len(here), len(self._tally.planned))
        moved = max(0, self._total - len(here))
        left = [self._tally.planned[vm] for vm in leaving if vm in self._tally.planned]
        snapshot = self._world.cache.snapshot
        left_s, _ = bound(self._host, left, limits=snapshot.settings)
        now = self._world.clock.realtime()
        eta_s = time_left(elapsed_s=now - self._began, bound_s=self._bound_s, left_s=left_s)
        about = "" if eta_s is None else f", about {eta_s:.0f} s left"
        said = f"{moved} of {self._total} VMs have left {self._host}{about}"
        if self._tally.given_up:
            said += f"; staying: {', '.join(sorted(self._tally.given_up))}"
        if self._tally.busy:
            vm, why = min(self._tally.busy.items())
            said += f"; {vm} waits: {why}"
        progress = {
            "host": self._host,
            "total": self._total,
            "moved": moved,
            "left": leaving,
            "staying": dict(sorted(self._tally.given_up.items())),
            "bound_s": self._bound_s,
            "eta_s": eta_s,
            "began_at": self._began,
            "tasks": dict(self._batch.tasks),
        }
        known = self._run.task.progress
        same = all(known.get(key) == value for key, value in progress.items() if key != "eta_s")
        if not same or said.partition(",")[0] != self._run.task.reason.partition(",")[0]:
            await self._run.say(said, progress=progress)

    # How it ends

    async def _finish(self, here: tuple[str, ...]) -> Done:
        """The mark says how it ended, and the task with it: adopted, it only concludes."""
        took = self._world.clock.realtime() - self._began
        left = ", ".join(f"{vm} ({why})" for vm, why in sorted(self._tally.given_up.items()))
        whole = not here or self._request.force
        drains = isinstance(self._request, DrainHost) or not whole
        if not here:
            said = f"{self._host} is empty after {took:.1f} s"
        else:
            said = f"{self._host} keeps {left}" if whole else f"{self._host} is not empty: {left}"

        def change(mark: HostMark | None) -> HostMark:
            if mark is None or mark.task != self._run.task.id:
                raise Conflict(f"the mark of {self._host} is gone", hint="look: godwit host list")
            state = "draining" if drains else "maintenance"
            return HostMark.model_validate(
                {**dict(mark), "state": state, "task": "", "cancelled": ""}
            )

        ended = {"ended": said, "whole": whole, "took_s": round(took, 3), "staying": list(here)}
        mark = await set_mark(self._world, self._run, self._host, change, said, progress=ended)
        if whole:
            told = f"{said}; {mark.state}: {mark.reason}"
            await tell(self._world, self._host, mark.state, told)
        return await self.conclude(said)

    async def conclude(self, said: str) -> Done:
        """The end of a drain whose mark has been written already. Raises when VMs were left."""
        host, progress = self._host, self._run.task.progress
        if not progress.get("whole"):
            raise OperationFailed(
                said,
                hint=f"it takes no VMs; ask again, or: godwit host return {host}",
                left=progress.get("staying"),
            )
        found = await self._world.records.get(keys.host_mark(host), HostMark)
        mark = found.value if found else None
        return Done(
            said,
            {
                "host": host,
                "took_s": progress.get("took_s"),
                "bound_s": self._bound_s,
                "left": list(mark.left) if mark else [],
                "staying": progress.get("staying"),
                "stopped": list(mark.stopped) if mark else [],
            },
        )

    async def _call_off(self, by: str) -> Done:
        host, world, run = self._host, self._world, self._run
        await run.say(f"called off by {by}: moves under way are stopped where they can be")
        await self._batch.call_off()

        def check(mark: HostMark | None) -> HostMark:
            if mark is None:
                raise Conflict(f"the mark of {host} is gone already", hint="look: godwit host list")
            return mark

        mark = await clear_mark(world, run, host, check, f"{host} takes VMs again")
        return await self.called_off(mark)

    async def called_off(self, mark: HostMark) -> NoReturn:
        """The end of a drain whose mark is gone: what was shut down starts, then Cancelled."""
        host, world = self._host, self._world
        failed = await start_again(world, self._batch, mark.stopped, host)
        here = vms_on(world.cache.snapshot, host)
        moved = sorted(set(mark.left) - set(here) - set(failed))
        by = mark.cancelled
        said = f"called off by {by}: {len(here)} VMs run on {host}, which takes VMs again"
        if moved:
            said += f"; these have moved and stay where they are: {', '.join(moved)}"
        if failed:
            said += "; not started again: " + "; ".join(failed.values())
        await tell(world, host, "returned", f"{host}: {said}")
        raise Cancelled(said, hint="move back what you want back: godwit vm migrate", moved=moved)


def _planned(task: Task) -> bool:
    """Whether a part has been planned: it has its move's record, or is no move."""
    return "migration" in task.progress or task.request.get("kind") != "vm.migrate"


async def start_again(
    world: World, batch: Batch, names: tuple[str, ...], host: str
) -> dict[str, str]:
    """Start VMs that were shut down for a drain; those that do not start, with the reason."""
    failed: dict[str, str] = {}
    begun = []
    for vm in names:
        if world.cache.snapshot.owner(vm).state is not OwnerState.STOPPED:
            continue
        if why := await batch.begin(vm, StartVm(name=vm, host=host)):
            failed[vm] = f"{vm}: {why}"
        else:
            begun.append(vm)
    for vm, task in (await batch.ended(begun)).items():
        if task.state is not TaskState.COMPLETED:
            failed[vm] = f"{vm}: {task.reason}"
    return failed
