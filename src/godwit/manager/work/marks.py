"""The mark of a host: set, changed and taken away, each by one comparing transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from godwit.manager.work.tasks import TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import Conflict
from godwit.model.marks import HostMark
from godwit.store.api import absent, delete, mod_is, put
from godwit.store.records import CasFailed, encode


async def set_mark(
    world: World,
    run: TaskRun,
    host: str,
    change: Callable[[HostMark | None], HostMark],
    said: str,
    *,
    progress: dict[str, Any] | None = None,
) -> HostMark:
    """Write a mark and where the task stands in one transaction. ``change`` may refuse."""
    key = keys.host_mark(host)
    found = await world.records.get(key, HostMark)
    mark = change(found.value if found else None)
    guard = mod_is(key, found.revision) if found else absent(key)
    try:
        await run.say(said, progress=progress, compare=[guard], also=[put(key, encode(mark))])
    except CasFailed:
        raise _changed(host) from None
    await world.cache.reached(run.revision)
    return mark


async def clear_mark(
    world: World, run: TaskRun, host: str, check: Callable[[HostMark | None], HostMark], said: str
) -> HostMark:
    """Take a mark away and say so in one transaction; the mark as it was. ``check`` may refuse.

    The task's progress keeps it as ``cleared``, for whoever adopts the task.
    """
    key = keys.host_mark(host)
    found = await world.records.get(key, HostMark)
    mark = check(found.value if found else None)
    progress = {"cleared": mark.model_dump(mode="json")}
    try:
        await run.say(
            said,
            progress=progress,
            compare=[mod_is(key, found.revision if found else 0)],
            also=[delete(key)],
        )
    except CasFailed:
        raise _changed(host) from None
    await world.cache.reached(run.revision)
    return mark


def cleared(run: TaskRun) -> HostMark | None:
    """The mark that this task has taken away; None while it has not."""
    found = run.task.progress.get("cleared")
    return HostMark.model_validate(found) if found else None


def _changed(host: str) -> Conflict:
    return Conflict(
        f"somebody else marked {host} at the same moment", hint="look: godwit host list"
    )


async def tell(world: World, host: str, kind: str, message: str) -> None:
    """A line in the event log about a host."""
    await world.records.append_event(
        f"host.{kind}", f"host/{host}", message, at=world.clock.realtime()
    )
