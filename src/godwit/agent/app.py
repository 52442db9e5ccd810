"""Who may ask this agent what: the routes, for the manager, for peers, for the lab.

A certificate of role ``manager`` may use everything but ``/v1/peer``; one of role ``host`` may
use ``/v1/peer`` and the clock. All answers are JSON, all errors problem+json.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from godwit.agent.arrivals import Arrivals
from godwit.agent.checkpoints import Checkpoints
from godwit.agent.console import bridge
from godwit.agent.departures import Departures
from godwit.agent.desk import Desk
from godwit.agent.disk_moves import DiskMoves
from godwit.agent.disks import Disks
from godwit.agent.facts import load, memory_free
from godwit.agent.failover import Failover, failover_routes
from godwit.agent.files import Files
from godwit.agent.ha import ha_routes
from godwit.agent.images import Images
from godwit.agent.more_routes import (
    checkpoint_routes,
    epoch_routes,
    firmware_routes,
    seed_routes,
)
from godwit.agent.power import Power
from godwit.agent.routes import Body, Handler
from godwit.agent.routes import body_of as _body
from godwit.agent.routes import disks_of as _disks
from godwit.agent.routes import name_of as _name
from godwit.agent.routes import route as _route
from godwit.agent.seeds import Seeds
from godwit.agent.upkeep import Upkeep, upkeep_routes
from godwit.agent.validation import Validation
from godwit.agent.validation_routes import validation_routes
from godwit.agent.volume_routes import volume_routes
from godwit.migration.peer import CheckAsk, PrepareAsk
from godwit.model.base import Record, check_name
from godwit.model.diskmove import DiskMoveAsk
from godwit.model.errors import (
    GodwitError,
    InvalidRequest,
    NotAllowed,
    OperationFailed,
)
from godwit.model.migration import Migration
from godwit.model.requests import MigrateVm
from godwit.model.vm import Disk
from godwit.wire.identity import HOST, MANAGER
from godwit.wire.server import peer_of


@dataclass(frozen=True)
class Rooms:
    """What the routes reach."""

    desk: Desk
    power: Power
    departures: Departures
    arrivals: Arrivals
    files: Files
    disks: Disks
    disk_moves: DiskMoves
    images: Images
    checkpoints: Checkpoints
    seeds: Seeds
    upkeep: Upkeep
    failover: Failover


def build(rooms: Rooms) -> Starlette:
    """The agent's application."""
    routes = [
        *_host_routes(rooms),
        *_vm_routes(rooms),
        *epoch_routes(rooms.desk),
        *failover_routes(rooms.failover),
        *_disk_routes(rooms.disks),
        *_disk_move_routes(rooms.disk_moves),
        *_image_routes(rooms.images),
        *checkpoint_routes(rooms.checkpoints),
        *seed_routes(rooms.seeds),
        *firmware_routes(rooms.desk, rooms.files),
        *_peer_routes(rooms),
        *volume_routes(rooms.desk),
        *upkeep_routes(rooms.upkeep),
        *validation_routes(Validation(rooms.desk)),
        *ha_routes(rooms.desk),
        *_lab_routes(rooms),
        WebSocketRoute("/v1/vms/{vm}/console", _console(rooms)),
    ]
    return Starlette(routes=routes)


def _host_routes(rooms: Rooms) -> list[Route]:
    desk = rooms.desk

    async def facts(_request: Request) -> Record:
        return await desk.host_info()

    async def clock(_request: Request) -> Body:
        return {"realtime": desk.clock.realtime(), "monotonic": desk.clock.monotonic()}

    async def capacity(_request: Request) -> Body:
        return {
            "memory_free_bytes": memory_free(promised_bytes=desk.promised_bytes()),
            "cpus": desk.equipment.info.cpus,
            "load": load(),
            "vms": sorted(desk.slots),
            "guard": desk.guard.connected,
            "lease_left_s": round(desk.guard.lease_left(), 3),
        }

    async def vms(_request: Request) -> list[Body]:
        return [
            {
                "vm": name,
                "state": slot.state.value,
                "epoch": slot.machine.epoch,
                "pid": slot.machine.pid,
                "moving": name in desk.moving,
            }
            for name, slot in sorted(desk.slots.items())
        ]

    async def boot_file(request: Request) -> Any:
        return await rooms.files.put_boot_file(request.path_params["sha256"], request.stream())

    async def publish_image(request: Request) -> Any:
        return await rooms.files.publish_image(request.path_params["image"])

    both, manager = (MANAGER, HOST), (MANAGER,)
    return [
        _route("/v1/facts", "GET", facts, roles=manager),
        _route("/v1/clock", "GET", clock, roles=both),
        _route("/v1/capacity", "GET", capacity, roles=manager),
        _route("/v1/vms", "GET", vms, roles=manager),
        _route("/v1/boot-files/{sha256}", "PUT", boot_file, roles=manager),
        _route("/v1/images/{image}/publish", "POST", publish_image, roles=manager),
    ]


async def _no_clones_at(request: Request) -> int:
    """What a manager says that it has seen; nothing when it does not say it."""
    said = (await _body(request)).get("no_clones_at", 0)
    return said if isinstance(said, int) else 0


def _vm_routes(rooms: Rooms) -> list[Route]:
    power, moves, files = rooms.power, rooms.departures, rooms.files

    async def start(request: Request) -> Record:
        return await power.start(_name(request), no_clones_at=await _no_clones_at(request))

    async def restore(request: Request) -> Record:
        seen = await _no_clones_at(request)
        return await power.start(_name(request), restore=True, no_clones_at=seen)

    async def stop(request: Request) -> Record:
        body = await _body(request)
        return await power.stop(
            _name(request),
            force=bool(body.get("force", False)),
            timeout_s=float(body.get("timeout_s", 60.0)),
        )

    async def pause(request: Request) -> Record:
        return await power.pause(_name(request))

    async def resume(request: Request) -> Record:
        return await power.resume(_name(request))

    async def save(request: Request) -> Record:
        return await power.save(_name(request))

    async def create_disks(request: Request) -> None:
        await files.create_disks(await _disks(request))

    async def delete_disks(request: Request) -> None:
        whole = (await _body(request)).get("whole") is True
        await files.delete_disks(_name(request), await _disks(request), whole=whole)

    async def plan(request: Request) -> Record:
        body = await _body(request)
        url = str(body.pop("peer_url", ""))
        return await moves.plan(MigrateVm.model_validate({**body, "name": _name(request)}), url)

    async def migrate(request: Request) -> None:
        body = await _body(request)
        order = Migration.model_validate(body.get("migration"))
        await moves.begin(order, str(body.get("peer_url", "")))

    async def cancel(request: Request) -> None:
        by = str((await _body(request)).get("by", "request"))
        moves.cancel(request.path_params["id"], by)

    verbs: list[tuple[str, Handler]] = [
        ("start", start),
        ("restore", restore),
        ("stop", stop),
        ("pause", pause),
        ("resume", resume),
        ("save", save),
        ("create-disks", create_disks),
        ("delete-disks", delete_disks),
        ("plan", plan),
        ("migrate", migrate),
    ]
    routes = [
        _route(f"/v1/vms/{{vm}}/{verb}", "POST", handler, roles=(MANAGER,))
        for verb, handler in verbs
    ]
    return [*routes, _route("/v1/migrations/{id}/cancel", "POST", cancel, roles=(MANAGER,))]


def _image_routes(images: Images) -> list[Route]:
    async def inspect(request: Request) -> Body:
        return await images.inspect(await _disk(request))

    async def grow(request: Request) -> Body:
        return await images.grow(await _disk(request), _size(await _body(request)))

    async def export(request: Request) -> Body:
        body = await _body(request)
        target, kind = str(body.get("target", "")), str(body.get("format", ""))
        return await images.export(await _disk(request), target, kind)

    async def clone(request: Request) -> Body:
        target = Disk.model_validate((await _body(request)).get("target"))
        return await images.clone(await _disk(request), target)

    async def discard(request: Request) -> None:
        await images.discard(await _disk(request))

    async def bring_in(request: Request) -> Body:
        body = await _body(request)
        words = ("path", "source", "format", "target_format")
        return await images.bring_in(*(str(body.get(word, "")) for word in words))

    verbs: list[tuple[str, Handler]] = [
        ("inspect", inspect),
        ("grow", grow),
        ("export", export),
        ("clone", clone),
        ("discard", discard),
    ]
    return [
        *(
            _route(f"/v1/vms/{{vm}}/disks/{verb}", "POST", handler, roles=(MANAGER,))
            for verb, handler in verbs
        ),
        _route("/v1/volumes/{volume}/import", "POST", bring_in, roles=(MANAGER,)),
    ]


def _disk_routes(disks: Disks) -> list[Route]:
    async def show(request: Request) -> Body:
        return await disks.show(_name(request))

    async def add(request: Request) -> Record:
        return await disks.add(_name(request), await _disk(request))

    async def remove(request: Request) -> Record:
        body = await _body(request)
        force = body.get("force") is True
        return await disks.remove(_name(request), str(body.get("disk", "")), force=force)

    async def resize(request: Request) -> Record:
        body = await _body(request)
        return await disks.resize(_name(request), str(body.get("disk", "")), _size(body))

    verbs: list[tuple[str, Handler]] = [("add", add), ("remove", remove), ("resize", resize)]
    return [
        _route("/v1/vms/{vm}/disks", "GET", show, roles=(MANAGER,)),
        *(
            _route(f"/v1/vms/{{vm}}/disks/{verb}", "POST", handler, roles=(MANAGER,))
            for verb, handler in verbs
        ),
    ]


def _disk_move_routes(moves: DiskMoves) -> list[Route]:
    async def begin(request: Request) -> Record:
        return await moves.begin(_name(request), DiskMoveAsk.model_validate(await _body(request)))

    async def wait(request: Request) -> Record:
        seconds = float((await _body(request)).get("wait_s", 0.0))
        return await moves.view(request.path_params["id"], wait_s=min(seconds, 30.0))

    async def cancel(request: Request) -> Record:
        by = str((await _body(request)).get("by", "request"))
        return moves.cancel(request.path_params["id"], by)

    return [
        _route("/v1/vms/{vm}/disks/move", "POST", begin, roles=(MANAGER,)),
        _route("/v1/disk-moves/{id}/wait", "POST", wait, roles=(MANAGER,)),
        _route("/v1/disk-moves/{id}/cancel", "POST", cancel, roles=(MANAGER,)),
    ]


async def _disk(request: Request) -> Disk:
    return Disk.model_validate((await _body(request)).get("disk"))


def _size(body: dict[str, Any]) -> int:
    size = body.get("size_bytes")
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise InvalidRequest(f"{size!r} is not a size", hint="a positive number of bytes")
    return size


def _peer_routes(rooms: Rooms) -> list[Route]:
    moves = rooms.arrivals

    async def check(request: Request) -> Record:
        return await moves.check(CheckAsk.model_validate(await _body(request)))

    async def prepare(request: Request) -> Record:
        ask = PrepareAsk.model_validate(await _body(request))
        peer = peer_of(request.scope)
        if peer is None or peer.name != ask.source:
            raise NotAllowed(f"{peer} does not speak for {ask.source}", hint="")
        return await moves.prepare(ask)

    async def ping(request: Request) -> Record:
        body = await _body(request)
        return await moves.ping(str(body.get("migration", "")), oob=body.get("oob") is True)

    async def released(request: Request) -> None:
        peer = peer_of(request.scope)
        await moves.released(await _id(request), by=peer.name if peer is not None else "")

    async def take_over(request: Request) -> Record:
        body = await _body(request)
        return await moves.take_over(str(body.get("migration", "")), str(body.get("vm", "")))

    async def abort(request: Request) -> None:
        body = await _body(request)
        await moves.abort(str(body.get("migration", "")), str(body.get("reason", "")))

    async def recover(request: Request) -> Record:
        return await moves.recover(await _id(request))

    verbs: list[tuple[str, Handler]] = [
        ("check", check),
        ("prepare", prepare),
        ("ping", ping),
        ("released", released),
        ("take-over", take_over),
        ("abort", abort),
        ("recover", recover),
    ]
    return [_route(f"/v1/peer/{verb}", "POST", handler, roles=(HOST,)) for verb, handler in verbs]


async def _id(request: Request) -> str:
    return str((await _body(request)).get("migration", ""))


def _lab_routes(rooms: Rooms) -> list[Route]:
    holds = rooms.desk.holds

    async def hold(request: Request) -> Body:
        body = await _body(request)
        holds.arm(str(body.get("stage", "")), str(body.get("role", "source")))
        return holds.view()

    async def release(request: Request) -> Body:
        stage = (await _body(request)).get("stage")
        await holds.release(str(stage) if stage else None)
        return holds.view()

    async def view(request: Request) -> Body:
        point = request.query_params.get("wait")
        if point:
            role = request.query_params.get("role", "source")
            timeout = float(request.query_params.get("timeout", "30"))
            try:
                await holds.wait_reached(point, role, timeout=timeout)
            except TimeoutError:
                raise OperationFailed(f"nothing came to {point} in {timeout:g} s") from None
        return holds.view()

    manager = (MANAGER,)
    return [
        _route("/v1/lab/hold", "POST", hold, roles=manager),
        _route("/v1/lab/release", "POST", release, roles=manager),
        _route("/v1/lab/holds", "GET", view, roles=manager),
    ]


def _console(rooms: Rooms) -> Callable[[WebSocket], Awaitable[None]]:
    async def serve(websocket: WebSocket) -> None:
        peer = peer_of(websocket.scope)
        if peer is None or peer.role != MANAGER:
            await websocket.close(code=4403, reason="not allowed")
            return
        try:
            slot = rooms.desk.slot(check_name(websocket.path_params["vm"]))
        except GodwitError as error:
            await websocket.close(code=4404, reason=error.message[:120])
            return
        await websocket.accept()
        try:
            await bridge(websocket, slot.machine.serial_path)
        except OSError as error:
            await websocket.close(code=4409, reason=f"the serial port: {error.strerror}"[:120])

    return serve
