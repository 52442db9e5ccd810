"""A disk on its way to another image or volume: its host copies, this follows and records.

    runs     the host that runs the VM copies, writes the record and deletes the old image
    stopped  a host that sees both volumes copies; then the record, then the old image goes

The new image's name is chosen and stored with the task before anybody is asked, so that a manager
that takes the task over asks for the same one; the host carries one order out once.
"""

from __future__ import annotations

import contextlib
from typing import Any

from godwit.manager.work.admit import known
from godwit.manager.work.define_acts import helpers
from godwit.manager.work.disk_rules import find_disk, moved_disk, with_disk
from godwit.manager.work.disks import Work, delete_image
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model.diskmove import DiskMove, DiskMoveAsk
from godwit.model.errors import (
    Conflict,
    GodwitError,
    NotFound,
    OperationFailed,
    OutcomeUnknown,
    Refused,
    Unavailable,
    from_problem,
)
from godwit.model.host import HostInfo
from godwit.model.migration import MoveState
from godwit.model.requests import MoveDisk
from godwit.model.task import Task
from godwit.model.units import format_size
from godwit.model.vm import Disk

LOOK_S = 1.0
"""Seconds a host waits for the end before it tells how far it is."""
AWAY_S = 60.0
"""Seconds that a host may be away which copies; its VM and the copy may go on meanwhile."""
_CANCEL_S = 60.0


async def move(world: World, run: TaskRun, request: MoveDisk) -> Done:
    """Move one disk to its end. A failure or a cancel leaves it where it was."""
    work = await Work.of(world, run, request)
    noted = run.task.progress
    if "disk" in noted:
        old, new = Disk.model_validate(noted["old"]), Disk.model_validate(noted["disk"])
    else:
        old, new = await _plan(work, request)
    if find_disk(work.vm, old.id).path != new.path:
        if work.runs:
            await _carry_out(work, work.host(), _ask(run, request, old, new))
        else:
            await _carry_out_stopped(work, _ask(run, request, old, new))
    elif not (work.runs or request.keep):
        await _delete_old(work, old)
    said = f"{old.id} of {request.name} moved to {new.path}"
    await world.records.append_event(
        "vm.disk-moved",
        f"vm/{request.name}",
        f"{said} ({new.format}) by {run.task.by}",
        at=world.clock.realtime(),
    )
    result = {"vm": request.name, "disk": new.id, "path": new.path}
    stood = run.task.progress.get("stood_ms")
    if stood is not None:
        result["stood_ms"] = stood
        said += f"; the VM stood still for {stood:.0f} ms"
    return Done(said, result)


def _ask(run: TaskRun, request: MoveDisk, old: Disk, new: Disk) -> DiskMoveAsk:
    rate = request.max_bytes_per_s or 0
    return DiskMoveAsk(
        id=run.task.id, disk=old, target=new, keep=request.keep, max_bytes_per_s=rate
    )


async def _plan(work: Work, request: MoveDisk) -> tuple[Disk, Disk]:
    old = find_disk(work.vm, request.disk)
    new = moved_disk(work.vm, request, mark=work.run.task.id[-6:], local=work.local_volumes)
    host = work.host() if work.runs else _helper(work, old, new)
    missing = sorted({old.volume, new.volume} - set(host.volumes))
    if missing:
        raise Refused(
            f"{host.name} does not see the volume {missing[0]}",
            hint="look which hosts do: godwit volume list",
        )
    await work.run.say(
        f"{host.name} copies {old.id} of {work.vm.name} to {new.path}",
        progress={
            "old": old.model_dump(mode="json"),
            "disk": new.model_dump(mode="json"),
            "host": host.name,
            "copied_bytes": 0,
            "total_bytes": old.size_bytes,
        },
    )
    return old, new


def _helper(work: Work, old: Disk, new: Disk) -> HostInfo:
    found = helpers(
        work.world.cache.snapshot, None, prefer=work.owner.host, volumes={old.volume, new.volume}
    )
    if not found:
        raise Unavailable(
            f"no host that is up sees both {old.volume} and {new.volume}",
            hint="see: godwit volume list",
        )
    return found[0]


async def _carry_out(work: Work, host: HostInfo, ask: DiskMoveAsk) -> None:
    """Have the host do it and follow it to its end; raises what it ended with."""
    with contextlib.suppress(OutcomeUnknown):  # whether it was heard is found out by looking
        await work.world.agents.call(
            host, "POST", f"/v1/vms/{work.vm.name}/disks/move", ask.model_dump(mode="json")
        )
    end = await _follow(work, host, ask)
    if end is None:
        await _forgotten(work, host, ask.disk, ask.target)
    elif end.state is not MoveState.COMPLETED:
        raise _ended(end)
    else:
        await work.run.say(
            end.reason, progress={"stood_ms": end.stood_ms, "copied_bytes": end.total_bytes}
        )


async def _follow(work: Work, host: HostInfo, ask: DiskMoveAsk) -> DiskMove | None:
    """The move once it has ended, its progress told meanwhile; None when the host forgot it."""
    clock = work.world.clock
    seen, last, told = clock.monotonic(), None, ""
    while True:
        try:
            answer = await work.world.agents.call(
                host,
                "POST",
                f"/v1/disk-moves/{ask.id}/wait",
                {"wait_s": LOOK_S},
                deadline_s=LOOK_S + 10.0,
            )
        except NotFound:
            return None
        except (Unavailable, OutcomeUnknown) as error:
            if clock.monotonic() - seen > AWAY_S:
                raise OutcomeUnknown(
                    f"{host.name} copies {ask.disk.id} and does not answer: {error.message}",
                    hint="look when it is back: godwit vm disk list",
                ) from error
            await clock.sleep(LOOK_S)
            continue
        seen, now = clock.monotonic(), DiskMove.model_validate(answer)
        if now.state.final:
            return now
        if now != last:
            last, told = now, _sentence(ask, now)
            await work.run.say(
                told,
                progress={
                    "stage": now.stage.value,
                    "copied_bytes": now.copied_bytes,
                    "total_bytes": now.total_bytes,
                },
            )


def _sentence(ask: DiskMoveAsk, now: DiskMove) -> str:
    done, of = format_size(now.copied_bytes), format_size(now.total_bytes)
    return f"{ask.disk.id} to {ask.target.path}: {now.stage.value}, {done} of {of}"


def _ended(end: DiskMove) -> GodwitError:
    if end.error is not None:
        return from_problem(end.error)
    return OperationFailed(end.reason or "the copy failed", hint="see the host's log")


async def _forgotten(work: Work, host: HostInfo, old: Disk, new: Disk) -> None:
    """The host's agent was restarted: it has ended what it found, and the record says how."""
    if not work.runs:
        raise OperationFailed(
            f"the agent of {host.name} was restarted while it copied {old.id}",
            hint="nothing has changed; ask again",
        )
    now = await work.world.records.vm(work.vm.name)
    if now is None or find_disk(now.value, old.id).path != new.path:
        raise OperationFailed(
            f"the agent of {host.name} was restarted while it copied {old.id}",
            hint="the disk has its old image; ask again",
        )


async def _carry_out_stopped(work: Work, ask: DiskMoveAsk) -> None:
    old, new = ask.disk, ask.target
    name = work.run.task.progress["host"]
    host = known(work.world.cache.snapshot.hosts.get(name), "host", name)
    await _carry_out(work, host, ask)
    try:
        await work.write(with_disk(work.vm, new), f"{old.id} is {new.path} in the record")
    except Conflict:
        with contextlib.suppress(GodwitError):
            await delete_image(work, new)
        raise
    if not ask.keep:
        await _delete_old(work, old)


async def _delete_old(work: Work, old: Disk) -> None:
    try:
        await delete_image(work, old)
    except OutcomeUnknown:
        raise
    except GodwitError as error:
        raise OperationFailed(
            f"{old.id} has its new image, but {old.path} could not be deleted: {error.message}",
            hint="delete the file when its volume can be reached",
        ) from error


async def cancel(world: World, run: TaskRun, task: Task) -> Done:
    """Have the host call the copy off; Refused once the disk has its new image."""
    name = str(task.progress.get("host", ""))
    host = world.cache.snapshot.hosts.get(name)
    if host is None:
        raise Conflict(f"task {task.id} is only just beginning", hint="ask again")
    await run.say(f"asking {name} to call {task.id} off")
    path = f"/v1/disk-moves/{task.id}/cancel"
    await world.agents.call(host, "POST", path, {"by": run.task.by})

    def final(snapshot: Any) -> Task | None:
        found: Task | None = snapshot.tasks.get(task.id)
        return found if found is not None and found.state.final else None

    ended = await world.cache.until(final, timeout=_CANCEL_S)
    if ended is None:
        raise OutcomeUnknown(
            f"{task.id} was told to stop and has not ended", hint=f"godwit task show {task.id}"
        )
    if ended.state.value != "cancelled":
        raise Refused(
            f"task {task.id} has ended already: {ended.reason}",
            hint=f"see: godwit task show {task.id}",
        )
    return Done(f"{task.id} cancelled: {ended.reason}", {"task": task.id})
