"""Filling a host again: its mark goes, and the VMs that were there come back if asked.

The mark goes first, in the transaction in which the task notes who was there; whoever adopts the
task goes on from that note. A VM that does not come back stays where it is, and is named.
"""

from __future__ import annotations

from functools import partial

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.batch import Batch
from godwit.manager.work.drains import start_again
from godwit.manager.work.mark_rules import FillHost, check_return
from godwit.manager.work.marks import clear_mark, cleared, tell
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model.errors import OperationFailed
from godwit.model.marks import HostMark
from godwit.model.ownership import OwnerState
from godwit.model.requests import MigrateVm
from godwit.model.task import TaskState


async def fill(world: World, run: TaskRun, request: FillHost) -> Done:
    """Take the mark away; bring the VMs back that were there."""
    name = request.name
    mark = cleared(run)
    if mark is None:

        def check(found: HostMark | None) -> HostMark:
            return check_return(found, request)

        mark = await clear_mark(world, run, name, check, f"{name} takes VMs again")
        await tell(world, name, "returned", f"{name} takes VMs again, says {run.task.by}")
    left, stopped = mark.left, mark.stopped
    if not request.bring_back:
        return Done(f"{name} takes VMs again", {"host": name, "left": list(left)})
    batch = Batch(world, run)
    failed = await start_again(world, batch, stopped, name)
    failed |= await _come_back(world, run, batch, name, left)
    here = [vm for vm in left if world.cache.snapshot.owner(vm).host == name]
    if failed:
        raise OperationFailed(
            f"{name} takes VMs again, but not all came back: {'; '.join(failed.values())}",
            hint=f"move them when it can be: godwit vm migrate VM --to {name}",
            failed=sorted(failed),
        )
    return Done(
        f"{name} takes VMs again, {len(here)} of the {len(left)} that were there run there",
        {"host": name, "back": here, "left": list(left)},
    )


async def _come_back(
    world: World, run: TaskRun, batch: Batch, host: str, left: tuple[str, ...]
) -> dict[str, str]:
    """Move those that run elsewhere; the ones that did not come, with the reason."""
    failed: dict[str, str] = {}
    todo = [vm for vm in left if _elsewhere(world.cache.snapshot, vm, host)]
    asked: list[str] = []
    for vm in todo:
        await world.cache.until(partial(_room, batch=batch))
        task = batch.task(world.cache.snapshot, vm)
        if task is None or task.state.final:  # an adopted one is under way already
            if why := await batch.begin(vm, MigrateVm(name=vm, to=host)):
                failed[vm] = f"{vm}: {why}"
                continue
            back = len(left) - len(todo) + len(asked)
            said = f"{back} of {len(left)} VMs are back or on their way to {host}"
            await run.say(said, progress={"tasks": dict(batch.tasks)})
        asked.append(vm)
    for vm, task in (await batch.ended(asked)).items():
        if task.state is not TaskState.COMPLETED:
            failed[vm] = f"{vm}: {task.reason}"
    return failed


def _room(snapshot: Snapshot, *, batch: Batch) -> bool | None:
    return True if batch.room(snapshot) > 0 else None


def _elsewhere(snapshot: Snapshot, vm: str, host: str) -> bool:
    owner = snapshot.owner(vm)
    return vm in snapshot.vms and owner.state is OwnerState.RUNNING and owner.host != host
