"""Calling moves off: the source's agent decides for a move it has, the record for any other."""

from __future__ import annotations

from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.work import disk_moves
from godwit.manager.work.admit import known
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import GodwitError, NotFound, OutcomeUnknown, Refused, Unavailable
from godwit.model.marks import HostMark
from godwit.model.migration import Migration, MoveState, Outcome
from godwit.model.requests import CancelTask
from godwit.model.task import Task, TaskState
from godwit.store.records import CasFailed

_CANCEL_S = 60.0


async def close_waiting(world: World, move_id: str, outcome: Outcome, reason: str) -> bool:
    """End a move that no agent has taken up; False when one has, or it has ended already."""

    def change(move: Migration) -> Migration:
        if move.state is not MoveState.WAITING:
            raise CasFailed(move_id)
        return move.but(
            state=MoveState(outcome.value),
            outcome=outcome,
            reason=reason,
            ended_at=world.clock.realtime(),
        )

    try:
        return await world.records.update(keys.migration(move_id), Migration, change) is not None
    except CasFailed:
        return False


async def cancel(world: World, run: TaskRun, move_id: str) -> Done:
    """Call a move off: its source's agent stops it, or the record is closed if none has begun."""
    found = await world.records.migration(move_id)
    move = known(found.value if found else None, "migration", move_id)
    if move.state is MoveState.CANCELLED and run.adopted:
        return Done(f"{move_id} is cancelled", {"migration": move_id})
    if move.state.final:
        raise _ended(move)
    source = known(world.cache.snapshot.hosts.get(move.source), "host", move.source)
    await run.say(f"asking {move.source} to call {move_id} off")
    async with world.lock(move_id):
        try:
            await world.agents.call(
                source, "POST", f"/v1/migrations/{move_id}/cancel", {"by": run.task.by}
            )
        except (NotFound, Unavailable):
            # No agent drives it. That is final while it waits, since we hold its launch.
            reason = f"cancelled by {run.task.by or 'request'} before it began"
            if not await close_waiting(world, move_id, Outcome.CANCELLED, reason):
                raise await _not_driven(world, move) from None
            return Done(f"{move_id} cancelled before it began", {"migration": move_id})
    ended = await world.cache.until(partial(final_move, move_id=move_id), timeout=_CANCEL_S)
    if ended is None:
        raise OutcomeUnknown(
            f"{move_id} was told to stop and has not ended", hint="see: godwit migration list"
        )
    if ended.state is not MoveState.CANCELLED:
        raise _ended(ended)
    return Done(f"{move_id} cancelled, {move.vm} runs on {move.source}", {"migration": move_id})


def final_move(snapshot: Snapshot, *, move_id: str) -> Migration | None:
    """The move's record, once it is final."""
    found = snapshot.migrations.get(move_id)
    return found if found is not None and found.state.final else None


def _ended(move: Migration) -> Refused:
    return Refused(
        f"{move.id} has ended already: {move.state.value}"
        + (f": {move.reason}" if move.reason else ""),
        hint=f"see: godwit migration show {move.id}",
    )


async def _not_driven(world: World, move: Migration) -> GodwitError:
    """Why a move that is under way cannot be cancelled now."""
    found = await world.records.migration(move.id)
    if found is not None and found.value.state.final:
        return _ended(found.value)
    return Unavailable(
        f"the agent of {move.source} does not drive {move.id} at the moment",
        hint="try again when it is back; it decides by itself how the move ends",
    )


async def cancel_task(world: World, run: TaskRun, request: CancelTask) -> Done:
    """Stop a task that can be stopped: a move, until its owner swap; a disk's, until its switch."""
    found = await world.records.task(request.id)
    task: Task = known(found.value if found else None, "task", request.id)
    if task.state.final:
        raise Refused(
            f"task {task.id} has ended already: {task.state.value}",
            hint=f"see: godwit task show {task.id}",
        )
    move_id = task.progress.get("migration")
    if task.request.get("kind") == "vm.disk.move":
        return await disk_moves.cancel(world, run, task)
    if task.request.get("kind") in ("host.drain", "host.maintenance.enter"):
        return await _cancel_drain(world, run, task)
    if task.request.get("kind") == "cluster.update":
        return await _cancel_update(world, run, task)
    if task.request.get("kind") != "vm.migrate" or not move_id:
        raise Refused(
            f"{task.request.get('kind')} cannot be stopped half-way",
            hint=f"wait for it: godwit task wait {task.id}",
        )
    return await cancel(world, run, str(move_id))


async def _cancel_drain(world: World, run: TaskRun, task: Task) -> Done:
    """Tell a drain by its host's mark, which it watches; done when it has ended."""
    host = task.subject.partition("/")[2]

    def change(mark: HostMark) -> HostMark:
        if mark.task != task.id:
            raise Refused(
                f"task {task.id} does not empty {host} at this moment",
                hint=f"look at it: godwit task show {task.id}",
            )
        return mark.but(cancelled=run.task.by or "request")

    found = await world.records.update(keys.host_mark(host), HostMark, change)
    if found is None:
        raise Refused(
            f"task {task.id} has not begun to empty {host}, or is over",
            hint=f"look at it: godwit task show {task.id}",
        )
    await run.say(f"the drain of {host} is called off; moves end first")
    ended = await world.cache.until(partial(_final_task, task_id=task.id))
    if ended is None or ended.state is not TaskState.CANCELLED:
        raise Refused(
            f"task {task.id} has ended: {ended.reason if ended else 'its record is gone'}",
            hint=f"see: godwit task show {task.id}",
        )
    return Done(ended.reason, {"task": task.id})


async def _cancel_update(world: World, run: TaskRun, task: Task) -> Done:
    """An update stops while it empties a host; in its other steps something would be half done."""
    host, step = task.progress.get("host"), task.progress.get("step")
    found = world.cache.snapshot.tasks.get((task.progress.get("tasks") or {}).get("enter", ""))
    if step != "enter" or found is None or found.state.final:
        raise Refused(
            f"the update of {host} cannot be stopped in this step ({step})",
            hint=f"wait until it empties the next host: godwit task show {task.id}",
        )
    await _cancel_drain(world, run, found)
    ended = await world.cache.until(partial(_final_task, task_id=task.id))
    return Done(ended.reason if ended else "the update is over", {"task": task.id})


def _final_task(snapshot: Snapshot, *, task_id: str) -> Task | None:
    found = snapshot.tasks.get(task_id)
    return found if found is not None and found.state.final else None
