"""Moves: choose, check, queue, hand to the source's agent, and follow the record to its end.

The agents carry a move out by themselves; a manager that dies in the middle changes nothing, and
whoever adopts its task goes on following the same record.
"""

from __future__ import annotations

from functools import partial

from godwit.manager.rooms import rooms_of
from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import check_action, host_that_is_up, known, need_of
from godwit.manager.work.cancel import close_waiting, final_move
from godwit.manager.work.first_move import check_first_move
from godwit.manager.work.queueing import take_turn, waits_for
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.work.vms import fresh_owner, host_of
from godwit.manager.world import World, new_id
from godwit.migration.plan import check_pair
from godwit.model import keys
from godwit.model.errors import (
    Cancelled,
    ChecksFailed,
    GodwitError,
    OperationFailed,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from godwit.model.host import HostInfo
from godwit.model.migration import (
    Check,
    Forecast,
    Migration,
    MoveLimits,
    MovePlan,
    MoveState,
    Outcome,
)
from godwit.model.ownership import Owner
from godwit.model.requests import MigrateVm
from godwit.model.task import TaskState
from godwit.planner.placement import (
    Decision,
    Need,
    against_rules,
    bound_elsewhere,
    candidates,
    choose,
)
from godwit.store.api import absent, put
from godwit.store.records import encode

_PLAN_S = 20.0
_LAUNCH_S = 10.0


async def migrate(world: World, run: TaskRun, request: MigrateVm) -> Done:
    """The whole way of a move. The task ends as the record of the move does."""
    move: Migration | None = None
    if known_id := run.task.progress.get("migration"):
        found = await world.records.migration(str(known_id))
        move = found.value if found else None
    if move is None:
        move = await _open(world, run, request)
    if move.state is MoveState.WAITING:
        await _wait_in_line(world, run, move.id)
        move = await _launch(world, move.id)
        if run.task.state is TaskState.WAITING:
            await run.say(f"it is the turn of {move.id}")
    ended = await _follow(world, move)
    return conclude(ended)


async def plan(world: World, request: MigrateVm) -> MovePlan:
    """What the move would be, without doing any of it: the answer to ``--dry-run``."""
    owner = await fresh_owner(world, request.name)
    source = _source(world.cache.snapshot, owner, request)
    snapshot = world.cache.snapshot
    rooms = rooms_of(snapshot, await world.free.for_placement(snapshot))
    need = need_of(snapshot, request.name)
    out = excluded(snapshot, source, request)
    hosts = candidates(rooms, need, exclude=out)
    if request.to is not None:
        known(snapshot.hosts.get(request.to), "host", request.to)
        destination, reason = request.to, f"{request.to} was asked for"
    else:
        try:
            decision = choose(rooms, need, exclude=out)
        except Refused as error:
            check = Check(name="destination", result="fail", message=error.message, hint=error.hint)
            return MovePlan(
                vm=request.name, destination=None, checks=(check,), candidates=hosts,
                reason=error.message,
            )  # fmt: skip
        destination, reason = decision.host, decision.reason
    state_checks = _state_checks(snapshot, destination, need)
    if state_checks:
        return MovePlan(
            vm=request.name, destination=destination, checks=state_checks, candidates=hosts,
            reason=reason,
        )  # fmt: skip
    found = await ask_plan(world, source, request, destination)
    return found.but(candidates=hosts, reason=reason)


def _state_checks(snapshot: Snapshot, destination: str, need: Need) -> tuple[Check, ...]:
    try:
        _may_go(snapshot, destination, need)
    except Refused as error:
        return (Check(name="destination", result="fail", message=error.message, hint=error.hint),)
    return ()


def _may_go(snapshot: Snapshot, destination: str, need: Need) -> None:
    """A destination that was asked for takes VMs, and the VM's rules allow it; Refused else."""
    host_that_is_up(snapshot, destination)
    room = next(one for one in rooms_of(snapshot, {}) if one.info.name == destination)
    if against := against_rules(room, need):
        raise Refused(against[0], hint=f"change its rules: godwit vm set {need.vm} --help")
    if why := bound_elsewhere(need, destination):
        raise Refused(why, hint=f"stop {need.vm} and start it there")


def _source(snapshot: Snapshot, owner: Owner, request: MigrateVm) -> HostInfo:
    check_action(owner, request)
    return host_of(snapshot, owner)


def excluded(
    snapshot: Snapshot, source: HostInfo, request: MigrateVm
) -> dict[str, tuple[str, ...]]:
    """Reasons against hosts that come from the pair, not from the host alone. Pure."""
    found: dict[str, tuple[str, ...]] = {}
    for info in snapshot.hosts.values():
        if info.name == source.name:
            found[info.name] = ("the VM runs there now",)
            continue
        checks = check_pair(source, info, postcopy=request.allow_postcopy, clock_offset_s=0.0)
        reasons = [check.message for check in checks if check.result == "fail"]
        if request.method == "live" and info.qemu.live_migration_refusal:
            reasons.append(info.qemu.live_migration_refusal)
        if reasons:
            found[info.name] = tuple(reasons)
    return found


async def _open(world: World, run: TaskRun, request: MigrateVm) -> Migration:
    """Choose and check; then task and move are recorded in one transaction."""
    owner = await fresh_owner(world, request.name)
    source = _source(world.cache.snapshot, owner, request)
    destination, why = await _destination(world, source, request)
    planned = await ask_plan(world, source, request, destination)
    if planned.failed:
        first = planned.failed[0]
        more = f" (and {len(planned.failed) - 1} more)" if len(planned.failed) > 1 else ""
        raise ChecksFailed(
            f"{request.name} cannot move to {destination}: {first.message}{more}",
            hint=first.hint or "see all checks with --dry-run",
            checks=[check.model_dump(mode="json") for check in planned.checks],
        )
    await check_first_move(
        world, request, source=source.name, destination=destination, by=run.task.id
    )
    move = Migration(
        id=new_id("m", world.clock.realtime()),
        vm=request.name,
        source=source.name,
        destination=destination,
        method=request.method,
        strategy=planned.strategy,
        limits=MoveLimits(
            max_blackout_ms=request.max_blackout_ms,
            deadline_s=request.deadline_s,
            allow_postcopy=request.allow_postcopy,
            allow_throttle=request.allow_throttle,
        ),
        accepted_at=run.task.created_at,
        forecast=planned.forecast,
        checks=planned.checks,
        log=(why,),
    )
    key = keys.migration(move.id)
    await run.say(
        f"{move.id}: {move.vm} from {move.source} to {move.destination}; {why}",
        progress={"migration": move.id},
        compare=[absent(key)],
        also=[put(key, encode(move))],
    )
    return move


async def _destination(world: World, source: HostInfo, request: MigrateVm) -> tuple[str, str]:
    snapshot = world.cache.snapshot
    if request.to is not None:
        _may_go(snapshot, request.to, need_of(snapshot, request.name))
        return request.to, f"{request.to} was asked for"
    rooms = rooms_of(snapshot, await world.free.for_placement(snapshot))
    decision: Decision = choose(
        rooms, need_of(snapshot, request.name), exclude=excluded(snapshot, source, request)
    )
    return decision.host, decision.reason


async def ask_plan(
    world: World, source: HostInfo, request: MigrateVm, destination: str
) -> MovePlan:
    """The source's checks (it asks the destination) and forecast."""
    peer = known(world.cache.snapshot.hosts.get(destination), "host", destination)
    body = {
        # Only what was said: an older agent refuses a word that it does not know, whatever it says.
        **request.model_dump(mode="json", exclude_defaults=True, exclude={"kind"}),
        "to": destination,
        "peer_url": peer.agent_url,
    }
    answer = await world.agents.call(
        source, "POST", f"/v1/vms/{request.name}/plan", body, deadline_s=_PLAN_S
    )
    return MovePlan(
        vm=request.name,
        destination=destination,
        checks=tuple(Check.model_validate(check) for check in answer.get("checks", ())),
        forecast=Forecast.model_validate(answer.get("forecast") or {}),
        strategy=answer.get("strategy") or "precopy",
    )


async def _wait_in_line(world: World, run: TaskRun, move_id: str) -> None:
    """Return when the move has its turn, or has been called off; both records keep the reason."""
    await world.cache.reached(run.revision)
    while True:
        said = _in_the_way(world.cache.snapshot, move_id)
        while said:
            await _say_waiting(world, run, move_id, said)
            news = partial(_news_of_queue, move_id=move_id, said=said)
            said = await world.cache.until(news) or ""
        if await take_turn(world, move_id):
            return


def _in_the_way(snapshot: Snapshot, move_id: str) -> str:
    """What a move waits for; empty when nothing is in its way or it no longer waits."""
    move = snapshot.migrations.get(move_id)
    if move is None or move.state is not MoveState.WAITING:
        return ""
    return waits_for(snapshot, move) or ""


def _news_of_queue(snapshot: Snapshot, *, move_id: str, said: str) -> str | None:
    why = _in_the_way(snapshot, move_id)
    return None if why == said else why


async def _say_waiting(world: World, run: TaskRun, move_id: str, why: str) -> None:
    def change(move: Migration) -> Migration:
        return move.but(reason=why) if move.state is MoveState.WAITING else move

    await run.say(why, state=TaskState.WAITING)
    await world.records.update(keys.migration(move_id), Migration, change)


async def _launch(world: World, move_id: str) -> Migration:
    """Hand the move to the source's agent; a refusal closes the record."""
    # A cancel either comes before (the record is closed) or after (the agent knows the move).
    async with world.lock(move_id):
        found = await world.records.migration(move_id)
        if found is None:
            raise OperationFailed(f"the record of {move_id} is gone", hint="ask again")
        move = found.value
        if move.state is not MoveState.WAITING:
            return move
        try:
            snapshot = world.cache.snapshot
            source = known(snapshot.hosts.get(move.source), "host", move.source)
            peer = host_that_is_up(snapshot, move.destination)
            await world.agents.call(
                source,
                "POST",
                f"/v1/vms/{move.vm}/migrate",
                {"migration": move.model_dump(mode="json"), "peer_url": peer.agent_url},
                deadline_s=_LAUNCH_S,
            )
        except OutcomeUnknown:
            return move  # the record will tell
        except GodwitError as error:
            await close_waiting(world, move_id, Outcome.FAILED, error.message)
            raise
        return move


async def _follow(world: World, move: Migration) -> Migration:
    """The record once it is final. OutcomeUnknown when its source has been silent too long."""

    final = partial(final_move, move_id=move.id)
    began = seen = world.clock.monotonic()
    while True:
        ended = await world.cache.until(final, timeout=world.look_s)
        if ended is not None:
            return ended
        snapshot, now = world.cache.snapshot, world.clock.monotonic()
        current = snapshot.migrations.get(move.id, move)
        if current.state is MoveState.WAITING and now - began > world.settle_s:
            reason = f"the agent of {move.source} did not take the move up"
            if await close_waiting(world, move.id, Outcome.FAILED, reason):
                raise Unavailable(reason, hint=f"look with: godwit host show {move.source}")
        if move.source in snapshot.leases:
            seen = now
        elif now - seen > world.lost_s:
            raise OutcomeUnknown(
                f"{move.source} has been silent for {world.lost_s:g} s in the middle of "
                f"{move.id}; the record says that {snapshot.owner(move.vm).host} owns {move.vm}",
                hint=f"look at both hosts, then at: godwit migration show {move.id}",
            )


def conclude(move: Migration) -> Done:
    """A final record as the end of its task: a good one, or the error it stands for. Pure."""
    hint = f"see: godwit migration show {move.id}"
    reason = move.reason or f"{move.vm} move {move.state.value}"
    match move.state:
        case MoveState.COMPLETED:
            dark = "" if move.blackout_ms is None else f", dark for {move.blackout_ms:.0f} ms"
            return Done(f"{move.vm} runs on {move.destination}{dark}", {"migration": move.id})
        case MoveState.CANCELLED:
            raise Cancelled(reason, hint=hint, migration=move.id)
        case MoveState.FAILED:
            raise OperationFailed(reason, hint=hint, migration=move.id)
        case _:
            raise OutcomeUnknown(reason, hint=hint, migration=move.id)
