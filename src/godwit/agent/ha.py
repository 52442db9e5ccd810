"""Rules of a VM that its own host has to know while it runs: whether it is highly available.

A VM that others may start elsewhere has to be stopped here in time. So the guard is told before the
record says it, and the record is the manager's to write only after that.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route

from godwit.agent.desk import Desk
from godwit.agent.routes import body_of, name_of, route
from godwit.model.errors import Conflict, Unavailable
from godwit.wire.identity import MANAGER


async def set_ha(desk: Desk, name: str, *, ha: bool) -> None:
    """The VM's guard stops it at the deadline from now on, or no more; done twice it is the same.

    Conflict while it moves or ends: its other host would not know. Unavailable without a guard.
    """
    async with desk.lock(name):
        slot = desk.slot(name)
        if name in desk.moving or slot.ending:
            raise Conflict(f"{name} is being moved or ended", hint="ask again when that is over")
        slot.vm = slot.vm.but(ha=ha)
        await desk.guard.change(name, ha=ha)
        if ha and not desk.guard.connected:
            raise Unavailable(
                f"the guard of {desk.host} is away, so nobody would stop {name} in time",
                hint="it is started again by itself; ask again",
            )


def ha_routes(desk: Desk) -> list[Route]:
    """What the manager tells of a running VM's rules."""

    async def ha(request: Request) -> None:
        wanted = (await body_of(request)).get("ha") is True
        await set_ha(desk, name_of(request), ha=wanted)

    return [route("/v1/vms/{vm}/set-ha", "POST", ha, roles=(MANAGER,))]
