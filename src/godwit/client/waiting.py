"""Wait for a task to its end, showing how far it is, across lost connections.

The end comes from a held request (``GET /v1/tasks/ID?wait=``), asked again until the task is
final; progress comes from the event stream. A connection that breaks while waiting loses
nothing: the task lives in the cluster, and both are taken up again until ``give_up_s`` passed
without any answer; then the outcome is unknown to us, and the error says how to look.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from godwit.model.errors import (
    Cancelled,
    GodwitError,
    OperationFailed,
    OutcomeUnknown,
    Unavailable,
    from_problem,
)

if TYPE_CHECKING:
    from godwit.client.link import Link
    from godwit.model.migration import Migration
    from godwit.model.task import Task
    from godwit.wire.sse import SseEvent

OnProgress = Callable[["Task | Migration"], None]

HELD_S = 20.0  # how long one request may be held
GIVE_UP_S = 60.0
CONNECT_S = 0.5  # how long a request waits for the news to be heard first
_BY_STATE: dict[str, type[GodwitError]] = {
    "failed": OperationFailed,
    "cancelled": Cancelled,
    "unknown": OutcomeUnknown,
}


class Listening:
    """The news of a subject from now on; begun before a request, so that none of its is missed.

    It costs connections, which are made while nothing is under way yet. Belongs to one event loop.
    """

    def __init__(self, link: Link, subject: str) -> None:
        self.subject = subject
        self._news: asyncio.Queue[SseEvent | None] = asyncio.Queue()
        self._connected = asyncio.Event()
        self._fresh = True  # nothing was asked for yet, so there is no state to be read
        self._task = asyncio.create_task(self._listen(link), name=f"news of {subject}")

    async def _listen(self, link: Link) -> None:
        with contextlib.suppress(GodwitError):
            async with contextlib.aclosing(link.news(query={"subject": self.subject})) as stream:
                async for event in stream:
                    if event is None and self._fresh:
                        self._connected.set()
                    else:
                        self._news.put_nowait(event)
                    self._fresh = False

    async def connected(self, timeout: float = CONNECT_S) -> None:
        """Return when it hears, or after ``timeout`` seconds: it will read the state then."""
        try:
            async with asyncio.timeout(timeout):
                await self._connected.wait()
        except TimeoutError:
            self.late()

    def late(self) -> None:
        """What it is about is under way already: its state is read with the first connection."""
        self._fresh = False

    async def next(self) -> SseEvent | None:
        """The next event; None when the present state has to be read."""
        return await self._news.get()

    async def close(self) -> None:
        """Listen no more."""
        self._task.cancel()
        await asyncio.wait({self._task})


async def wait(
    link: Link,
    task: Task,
    *,
    on_progress: OnProgress | None,
    listening: Listening | None = None,
    give_up_s: float = GIVE_UP_S,
) -> Task:
    """The task when it is final, completed or not. Errors: OutcomeUnknown, NotFound.

    ``listening`` to the task's subject began before the task and ends with it.
    """
    try:
        return await _wait(link, task, on_progress, listening, give_up_s)
    finally:
        if listening is not None:
            await listening.close()


async def _wait(
    link: Link,
    task: Task,
    on_progress: OnProgress | None,
    listening: Listening | None,
    give_up_s: float,
) -> Task:
    if task.state.final:
        return task
    if on_progress is None:
        return await _until_final(link, task.id, give_up_s)
    telling = _tell(link, task, on_progress, listening)
    teller = asyncio.create_task(telling, name=f"tell {task.id}")
    try:
        return await _until_final(link, task.id, give_up_s)
    finally:
        teller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await teller


async def _until_final(link: Link, task_id: str, give_up_s: float) -> Task:
    from godwit.model.task import Task

    loop = asyncio.get_running_loop()
    answered_at, pause_s = loop.time(), 0.05
    while True:
        asked_at = loop.time()
        try:
            found = Task.model_validate(
                await link.get(
                    f"/v1/tasks/{task_id}", query={"wait": HELD_S}, deadline_s=HELD_S + 10
                )
            )
        except (Unavailable, OutcomeUnknown) as error:
            if loop.time() - answered_at > give_up_s:
                raise _lost(task_id, give_up_s) from error
            pause_s = min(pause_s * 2, 1.0)
        else:
            if found.state.final:
                return found
            answered_at, pause_s = loop.time(), 0.05
            if answered_at - asked_at > 1.0:
                continue  # it was held, as asked
        # Nothing tells us when a manager is back (or one that does not hold has news): ask again.
        await asyncio.sleep(pause_s)


def _lost(task_id: str, give_up_s: float) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the manager has not answered for {give_up_s:g} s; task {task_id} may go on without us",
        hint=f"when it is back, run: godwit task wait {task_id}",
        task=task_id,
    )


async def _tell(
    link: Link, task: Task, on_progress: OnProgress, listening: Listening | None
) -> None:
    """Hand every news of the task and its move to ``on_progress`` until cancelled."""
    # Only for the eye: whatever breaks here must not end the wait.
    told, begun = Told(), listening
    if listening is None or listening.subject != task.subject:
        begun = Listening(link, task.subject)
        begun.late()
    assert begun is not None  # noqa: S101 - narrows for the type checker
    try:
        while True:
            event = await begun.next()
            with contextlib.suppress(GodwitError):
                seen = await _present(link, task.id) if event is None else _news(event.data)
                if seen is not None and told.is_news(seen):
                    on_progress(seen)
    finally:
        if begun is not listening:
            await begun.close()


class Told:
    """How far people know that each move is, so that it never runs backwards for them.

    What stands after a connection is read beside the stream, and may be newer than what the stream
    still brings.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, tuple[bool, int, float]] = {}

    def is_news(self, seen: Task | Migration) -> bool:
        """Whether it is no older than what was told of that move; a task always is."""
        from godwit.model.migration import STAGES, Migration

        if not isinstance(seen, Migration):
            return True
        now = seen.progress
        rank = (seen.state.final, STAGES.index(now.stage), now.percent)
        if rank < self._ranks.get(seen.id, rank):
            return False
        self._ranks[seen.id] = rank
        return True


async def _present(link: Link, task_id: str) -> Task | Migration:
    from godwit.model.migration import Migration
    from godwit.model.task import Task

    task = Task.model_validate(await link.get(f"/v1/tasks/{task_id}"))
    move_id = migration_id(task)
    if move_id is None:
        return task
    return Migration.model_validate(await link.get(f"/v1/migrations/{move_id}"))


def _news(data: str) -> Task | Migration | None:
    from godwit.model.migration import Migration
    from godwit.model.task import Task

    with contextlib.suppress(ValueError, AttributeError):
        carried: dict[str, Any] = json.loads(data).get("data") or {}
        if "migration" in carried:
            return Migration.model_validate(carried["migration"])
        if "task" in carried:
            return Task.model_validate(carried["task"])
    return None


def failure(task: Task) -> GodwitError | None:
    """The error a final task ended in, typed as it was raised; None when it completed."""
    kind = _BY_STATE.get(task.state.value)
    if kind is None:
        return None
    error: GodwitError = kind(task.reason or f"task {task.id} {task.state.value}")
    if task.error:
        error = from_problem(task.error)
        if kind is not OperationFailed and not isinstance(error, kind):
            error = kind(error.message, hint=error.hint, **error.context)
    if not error.hint:
        error.hint = f"see what happened: godwit task show {task.id}"
    error.context.setdefault("task", task.id)
    return error


def migration_id(task: Task) -> str | None:
    """The id of the move that a task carries out, None when it says none."""
    for place in (task.progress, task.result or {}):
        for key in ("migration", "migration_id"):
            if isinstance(place.get(key), str):
                return str(place[key])
    result = task.result or {}
    if "blackout_ms" in result or "stages" in result:  # the result is the move itself
        return str(result["id"])
    return None
