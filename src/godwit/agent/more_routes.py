"""The routes of checkpoints, of epochs seen, and of what guests learn about themselves."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from godwit.agent.checkpoints import Checkpoints
from godwit.agent.desk import Desk
from godwit.agent.files import Files
from godwit.agent.firmware import make_variables
from godwit.agent.routes import Body, Handler, body_of, disks_of, name_of, route
from godwit.agent.seeds import Seeds
from godwit.host.process import is_alive
from godwit.model.errors import OperationFailed
from godwit.model.vm import Disk
from godwit.qemu.runtime import noted_epochs, scan
from godwit.wire.identity import MANAGER


def epoch_routes(desk: Desk) -> list[Route]:
    """What this host knows of epochs by itself, without the store: for a store that is restored."""

    async def epochs(_request: Request) -> Body:
        paths = desk.config.paths
        seen = noted_epochs(paths.state / "vms")
        running: dict[str, int] = {}
        runtimes, damaged = scan(paths.run / "vms")
        if damaged:
            raise OperationFailed(damaged[0], hint="mend or remove it, then ask again")
        for one in runtimes:
            seen[one.vm] = max(seen.get(one.vm, 0), one.epoch)
            if one.pid and is_alive(one.process):
                running[one.vm] = one.epoch
        return {"host": desk.host, "seen": seen, "running": running}

    return [route("/v1/epochs", "GET", epochs, roles=(MANAGER,))]


def checkpoint_routes(checkpoints: Checkpoints) -> list[Route]:
    """Checkpoints taken, dropped and gone back to."""

    async def asked(request: Request) -> tuple[str, list[Disk], str]:
        return (
            name_of(request),
            await disks_of(request),
            str((await body_of(request)).get("tag", "")),
        )

    async def known(request: Request) -> list[str]:
        return [str(tag) for tag in (await body_of(request)).get("known", [])]

    async def take(request: Request) -> None:
        await checkpoints.take(*await asked(request), await known(request))

    async def take_still(request: Request) -> None:
        await checkpoints.take_still(*await asked(request), await known(request))

    async def drop(request: Request) -> None:
        await checkpoints.drop(*await asked(request))

    async def drop_still(request: Request) -> None:
        await checkpoints.drop_still(*await asked(request))

    async def revert(request: Request) -> dict[str, int]:
        return await checkpoints.revert(*await asked(request))

    verbs: list[tuple[str, Handler]] = [
        ("take", take),
        ("take-still", take_still),
        ("drop", drop),
        ("drop-still", drop_still),
        ("revert", revert),
    ]
    return [
        route(f"/v1/vms/{{vm}}/checkpoints/{verb}", "POST", handler, roles=(MANAGER,))
        for verb, handler in verbs
    ]


def firmware_routes(desk: Desk, files: Files) -> list[Route]:
    """UEFI variables of a new VM."""

    async def make(request: Request) -> Body:
        disk = Disk.model_validate((await body_of(request)).get("disk"))
        return await make_variables(desk, files, disk)

    return [route("/v1/vms/{vm}/make-variables", "POST", make, roles=(MANAGER,))]


def seed_routes(seeds: Seeds) -> list[Route]:
    """User data, and the CD it goes on."""

    async def user_data(request: Request) -> Any:
        return await seeds.put(request.path_params["sha256"], request.stream())

    async def make(request: Request) -> Body:
        body = await body_of(request)
        about = {word: str(body.get(word, "")) for word in ("instance_id", "hostname")}
        return await seeds.make(name_of(request), str(body.get("user_data", "")), **about)

    return [
        route("/v1/user-data/{sha256}", "PUT", user_data, roles=(MANAGER,)),
        route("/v1/vms/{vm}/make-seed", "POST", make, roles=(MANAGER,)),
    ]
