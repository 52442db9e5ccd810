"""What is done about hosts themselves."""

from __future__ import annotations

from godwit.manager.work.admit import check_silent
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.errors import NotFound, Refused
from godwit.model.host import ConfirmedDown, HostInfo
from godwit.model.requests import ConfirmHostDown
from godwit.store.api import absent, mod_is, put
from godwit.store.records import encode


async def confirm_down(world: World, run: TaskRun, request: ConfirmHostDown) -> Done:
    """Write down that this boot of the host is over, unless it answers at that very moment.

    What it means is for those who wait for the host's word (`godwit.agent.redirects`).
    """
    name = request.name
    check_silent(world.cache.snapshot, name)
    found = await world.records.get(keys.host_info(name), HostInfo)
    if found is None:
        raise NotFound(f"no host {name}", hint="look with: godwit host list")
    said = ConfirmedDown(boot_id=found.value.boot_id, time=world.clock.realtime(), by=run.task.by)
    answer = await world.records.store.txn(
        [
            absent(keys.host_lease(name)),
            absent(keys.host_agent(name)),
            mod_is(keys.host_info(name), found.revision),
        ],
        [put(keys.host_confirmed_down(name), encode(said))],
    )
    if not answer.succeeded:
        raise Refused(f"{name} answers again, so it is not down", hint="look: godwit host list")
    message = f"{name} is down, says {run.task.by}: nobody waits for its word any more"
    await world.records.append_event(
        "host.confirmed-down", f"host/{name}", message, at=world.clock.realtime(), level="warning"
    )
    return Done(message, {"host": name})
