"""Update hosts one after the other: empty, run a command, see it healthy, bring its VMs back.

    check    every host is up, carries no mark and allows the command; nothing has begun
    enter    its maintenance, as a task of its own: plan, moves, progress, cancel
    run      the command, once; its end is noted on the host
    healthy  lease and agent are back; after a restart of the kernel, if the command is to cause one
    exit     the mark goes, its VMs come back; then the next host

It stops at the first step that fails, with the host as it is then: in maintenance, so that nothing
starts on what is half updated. What has been done stays done. Each step is noted before it begins,
so that a manager which adopts the task goes on with it: the parts are tasks and go on by
themselves, and the command has an id under which its host does not run it twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from godwit.manager.snapshot import Snapshot
from godwit.manager.views import host_state
from godwit.manager.work.batch import Batch
from godwit.manager.work.lookup import known
from godwit.manager.work.mark_rules import host_that_answers
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model.errors import (
    Cancelled,
    GodwitError,
    OperationFailed,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from godwit.model.host import HostInfo, HostState
from godwit.model.requests import EnterMaintenance, ExitMaintenance, Request, UpdateCluster
from godwit.model.task import Task, TaskState

_GRACE_S = 30.0
_STEPS = ("enter", "run", "healthy", "exit")


async def update(world: World, run: TaskRun, request: UpdateCluster) -> Done:
    """All hosts, one by one; the error says at which one it stopped and what was done."""
    if "hosts" not in run.task.progress:
        hosts = sorted(set(request.hosts) or world.cache.snapshot.hosts)
        await _check(world, request, hosts)
        await run.say(
            f"the command is allowed on {', '.join(hosts)}", progress={"hosts": hosts, "done": []}
        )
    hosts = list(run.task.progress["hosts"])
    for host in hosts:
        if host in run.task.progress["done"]:
            continue
        try:
            await _Host(world, run, request, host).update()
        except GodwitError as error:
            raise _stopped(error, run, host) from error
        done = [*run.task.progress["done"], host]
        await run.say(f"{host} is updated", progress={"done": done, "step": "", "tasks": {}})
    return Done(f"updated: {', '.join(hosts)}", {"hosts": hosts})


def _stopped(error: GodwitError, run: TaskRun, host: str) -> GodwitError:
    done = ", ".join(run.task.progress["done"]) or "none"
    kind: type[GodwitError] = OperationFailed
    if isinstance(error, Cancelled | OutcomeUnknown):
        kind = type(error)
    return kind(
        f"the update stopped at {host}: {error.message} (updated before: {done})",
        hint=f"look at {host}; then: godwit host maintenance exit {host} --bring-back, "
        "and update the others with --host",
        host=host,
        done=run.task.progress["done"],
    )


async def _check(world: World, request: UpdateCluster, hosts: list[str]) -> None:
    """Everything that would stop it later and can be known now."""
    snapshot = world.cache.snapshot
    if len(snapshot.hosts) < 2:
        raise Refused("there is no other host for the VMs", hint="look: godwit host list")
    for name in hosts:
        info = host_that_answers(snapshot, name)
        if (mark := snapshot.marks.get(name)) is not None:
            raise Refused(f"{name} is {mark.state}", hint=f"first: godwit host return {name}")
        answer = await world.agents.call(info, "GET", "/v1/upkeep")
        allowed = answer.get("commands", ()) if isinstance(answer, dict) else ()
        if list(request.argv) not in [list(one) for one in allowed]:
            raise Refused(
                f"{name} does not allow this command",
                hint=f"its administrator writes it into the configuration of {name}: "
                f"[maintenance] commands = [{request.command!r}]",
            )


class _Host:
    """One host on its way through the steps."""

    def __init__(self, world: World, run: TaskRun, request: UpdateCluster, host: str) -> None:
        self._world = world
        self._run = run
        self._request = request
        self._host = host
        self._batch = Batch(world, run)

    async def update(self) -> None:
        """The steps that are left, each noted before it begins."""
        progress = self._run.task.progress
        begun = progress.get("step") or _STEPS[0] if progress.get("host") == self._host else ""
        first = _STEPS.index(begun) if begun else 0
        steps = {
            "enter": self._enter,
            "run": self._command,
            "healthy": self._healthy,
            "exit": self._exit,
        }
        for step in _STEPS[first:]:
            if step != begun:
                about = {"host": self._host, "step": step, **self._facts(step)}
                await self._run.say(f"{self._host}: {step}", progress=about)
            await steps[step]()

    def _facts(self, step: str) -> dict[str, Any]:
        if step != "run":
            return {}
        return {"boot_id": self._info().boot_id}  # of the kernel that the command finds

    def _info(self) -> HostInfo:
        return known(self._world.cache.snapshot.hosts.get(self._host), "host", self._host)

    async def _enter(self) -> None:
        await self._part(
            "enter",
            EnterMaintenance(
                name=self._host,
                reason=f"update ({self._run.task.id})",
                allow_quick=self._request.allow_quick,
                allow_shutdown=self._request.allow_shutdown,
            ),
        )

    async def _command(self) -> None:
        """Run it; where the answer is lost, ask again for how it ended once the host is back."""
        try:
            answer = await self._ask()
        except (Unavailable, OutcomeUnknown):
            if not self._request.reboots:
                await self._healthy()
                answer = await self._ask()
            else:
                return  # that is what a restart looks like from here
        if answer.get("state") == "interrupted":
            if self._request.reboots:
                return
            raise OutcomeUnknown(
                f"the agent of {self._host} did not see the command to its end",
                hint="look on the host how far it came",
            )
        if answer.get("exit") != 0:
            lines = str(answer.get("output", "")).strip().splitlines()
            said = f": {lines[-1]}" if lines else ""
            raise OperationFailed(
                f"the command ended with {answer.get('exit')}{said}",
                hint="look on the host",
                output=lines[-20:],
            )

    async def _ask(self) -> dict[str, Any]:
        body = {"argv": list(self._request.argv), "timeout_s": self._request.timeout_s}
        answer = await self._world.agents.call(
            self._info(),
            "POST",
            f"/v1/upkeep/{self._run.task.id}",
            body,
            deadline_s=self._request.timeout_s + _GRACE_S,
        )
        found: dict[str, Any] = answer if isinstance(answer, dict) else {}
        return found

    async def _healthy(self) -> None:
        """Wait until its lease and its agent are there, after a restart if there is to be one."""
        before = str(self._run.task.progress.get("boot_id", ""))
        well = partial(self._is_well, before=before if self._request.reboots else None)
        if not await self._world.cache.until(well, timeout=self._request.healthy_s):
            snapshot = self._world.cache.snapshot
            state, reason = _membership(snapshot, self._host)
            same = self._info().boot_id == before
            why = "it did not restart" if state is HostState.UP and same else reason
            raise OperationFailed(
                f"{self._host} is not healthy after {self._request.healthy_s:g} s: {why}",
                hint="look: godwit host list",
            )

    def _is_well(self, snapshot: Snapshot, *, before: str | None) -> bool | None:
        info = snapshot.hosts.get(self._host)
        up = _membership(snapshot, self._host)[0] is HostState.UP
        if info is None or not up or (before is not None and info.boot_id == before):
            return None
        return True

    async def _exit(self) -> None:
        await self._part("exit", ExitMaintenance(name=self._host, bring_back=True))

    async def _part(self, name: str, request: Request) -> None:
        """A step that is a task of its own; an adopted one is followed to its end."""
        snapshot = self._world.cache.snapshot
        task = self._batch.task(snapshot, name) or self._begun(snapshot, request)
        if task is not None:
            self._batch.tasks[name] = task.id
        else:
            if why := await self._batch.begin(name, request):
                raise Refused(why, hint="look: godwit task list")
            await self._run.say(
                f"{self._host}: {name}, task {self._batch.tasks[name]}",
                progress={"tasks": dict(self._batch.tasks)},
            )
        ended = (await self._batch.ended([name]))[name]
        if ended.state is TaskState.CANCELLED:
            raise Cancelled(ended.reason, hint=f"see: godwit task show {ended.id}")
        if ended.state is not TaskState.COMPLETED:
            raise OperationFailed(ended.reason, hint=f"see: godwit task show {ended.id}")

    def _begun(self, snapshot: Snapshot, request: Request) -> Task | None:
        """The part as a manager before us had begun it, and died before it could note that."""
        asked = request.model_dump(mode="json")
        mine = f"({self._run.task.request.get('kind')} {self._run.task.id})"
        found = (t for t in snapshot.tasks.values() if t.request == asked and mine in t.by)
        return max(found, key=lambda task: task.id, default=None)


def _membership(snapshot: Snapshot, name: str) -> tuple[HostState, str]:
    return host_state(leased=name in snapshot.leases, agent=name in snapshot.agents)
