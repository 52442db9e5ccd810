"""An agent as the manager sees one: real HTTP with certificates, records in the store, no QEMU."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from starlette.responses import Response

from godwit.model import keys, ownership
from godwit.model.diskmove import DiskMove, DiskMoveAsk
from godwit.model.disks import USER_DATA
from godwit.model.errors import Cancelled, Conflict, GodwitError, NotFound, Refused
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.membership import Renewal
from godwit.model.migration import (
    Forecast,
    Migration,
    MoveState,
    Outcome,
    Progress,
    Stage,
)
from godwit.model.ownership import MoveIntent, Owner, SavedState
from godwit.model.skew import our_own
from godwit.model.vm import Disk, Vm, VmState, VmStatus
from godwit.store.records import Records, encode
from godwit.wire.problem import Problem, problem_response

GIB = 1 << 30


def host_info(name: str, url: str = "https://127.0.0.1:1", **changes: Any) -> HostInfo:
    fields: dict[str, Any] = {
        "name": name,
        "agent_url": url,
        "cpus": 4,
        "cpu_vendor": "GenuineIntel",
        "memory_bytes": 8 * GIB,
        "qemu": QemuFacts(
            version=(10, 0, 2),
            accelerator="tcg",
            machines=("pc-q35-9.2", "pc-q35-10.0"),
            cpu_models=("Nehalem-v1", "qemu64-v1"),
        ),
        "migration_address": "10.93.0.11",
        "migration_subnet": "10.93.0.0/24",
        "networks": {"lan": 1500},
        "volumes": ("shared",),
        **dict(our_own()),
    }
    return HostInfo(**{**fields, **changes})


class FakeAgent:
    """One host. ``calls`` is what it was asked; the knobs make it misbehave."""

    def __init__(self, name: str, records: Records) -> None:
        self.name = name
        self.records = records
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.news = asyncio.Event()
        self.free = 6 * GIB
        self.refuse: dict[str, GodwitError] = {}  # verb -> what it answers
        self.drop_after: set[str] = set()  # verbs that are done, but whose answer never comes
        self.drop_before: set[str] = set()  # verbs that are not done and not answered either
        self.checks: list[dict[str, str]] = []
        self.hold = asyncio.Event()  # moves stand in precopy until this is set
        self.hold.set()
        self.slow_start = asyncio.Event()  # accepted, but the record does not say so yet
        self.slow_start.set()
        self.cancelled: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.disks: set[str] = set()  # images on the volumes
        self.plugged: dict[str, set[str]] = {}  # VM -> disks added to its machine
        self.device_bytes = 5 * GIB
        self.disk_moves: dict[str, DiskMove] = {}
        self.disk_asks: dict[str, DiskMoveAsk] = {}
        self.clones_left = 1 << 30  # how many images may be cloned before there is no room
        self.on_clone: Any = None
        self.tags: dict[str, list[str]] = {}  # image -> the snapshots in it
        self.moves: set[asyncio.Task[None]] = set()
        self.said_ha: list[tuple[str, bool, bool]] = []  # VM, what was said, what the record said
        self.commands: list[list[str]] = []  # what its configuration lets it run
        self.upkeep: dict[str, Any] = {"state": "done", "exit": 0, "output": ""}
        self.on_upkeep: Any = None
        self.app = self._make()

    async def was_asked(self, verb: str) -> None:
        """Return once the manager has asked for ``verb``."""
        async with asyncio.timeout(5):
            while not self.asked(verb):
                self.news.clear()
                await self.news.wait()

    def asked(self, verb: str) -> list[dict[str, Any]]:
        return [body for name, body in self.calls if name == verb]

    def _make(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        self._add_host_routes(app)
        self._add_vm_routes(app)
        return app

    def _add_host_routes(self, app: FastAPI) -> None:

        @app.exception_handler(GodwitError)
        async def problem(_request: Request, error: GodwitError) -> Response:
            return problem_response(Problem.from_error(error))

        @app.get("/v1/capacity")
        async def capacity() -> dict[str, Any]:
            return {"memory_free_bytes": self.free, "cpus": 4, "load": 0.1, "vms": []}

        @app.get("/v1/upkeep")
        async def allowed() -> dict[str, Any]:
            return {"commands": self.commands}

        @app.post("/v1/upkeep/{id}")
        async def upkeep(id: str, request: Request) -> dict[str, Any]:  # noqa: A002
            self.calls.append(("upkeep", {"id": id, **await request.json()}))
            if self.on_upkeep is not None:
                await self.on_upkeep()
            return self.upkeep

        @app.post("/v1/images/{image}/publish")
        async def publish(image: str) -> dict[str, Any]:
            self.calls.append(("publish", {"image": image}))
            if "publish" in self.refuse:
                raise self.refuse["publish"]
            root = "/clusterstorage/shared/.godwit/boot"
            return {"kernel": f"{root}/aa", "initrd": f"{root}/bb", "append": "console=ttyS0"}

        @app.put("/v1/user-data/{digest}")
        async def user_data(digest: str, request: Request) -> dict[str, str]:
            self.files[digest] = await request.body()
            return {"sha256": digest, "path": USER_DATA + digest}

        @app.put("/v1/boot-files/{digest}")
        async def boot_file(digest: str, request: Request) -> dict[str, str]:
            data = await request.body()
            assert hashlib.sha256(data).hexdigest() == digest
            self.files[digest] = data
            return {"sha256": digest, "path": f"/clusterstorage/shared/.godwit/boot/{digest}"}

        @app.post("/v1/migrations/{id}/cancel")
        async def cancel(id: str) -> dict[str, Any]:  # noqa: A002
            if id not in {task.get_name() for task in self.moves}:
                raise NotFound(f"no move {id} runs here", hint="look: godwit migration list")
            self.cancelled.add(id)
            self.slow_start.set()
            self.hold.set()
            return {}

    def _add_vm_routes(self, app: FastAPI) -> None:
        @app.websocket("/v1/vms/{vm}/console")
        async def console(socket: WebSocket, vm: str) -> None:
            await socket.accept()
            await socket.send_bytes(f"{vm} on {self.name}: ".encode())
            while (data := await socket.receive())["type"] == "websocket.receive":
                if data["bytes"] == b"q":
                    await socket.close()
                    return
                await socket.send_bytes(data["bytes"].upper())

        @app.post("/v1/vms/{vm}/{verb}", status_code=200)
        async def verb(vm: str, verb: str, request: Request) -> Response:
            return await self._do(vm, verb, await request.json())

        @app.post("/v1/vms/{vm}/disks/{verb}", status_code=200)
        async def disk_verb(vm: str, verb: str, request: Request) -> Response:
            return await self._do(vm, f"disks/{verb}", await request.json())

        @app.post("/v1/disk-moves/{id}/{verb}", status_code=200)
        async def disk_move(id: str, verb: str, request: Request) -> Response:  # noqa: A002
            return await self._do(id, f"disk-move/{verb}", await request.json())

        @app.post("/v1/vms/{vm}/checkpoints/{verb}", status_code=200)
        async def checkpoint_verb(vm: str, verb: str, request: Request) -> Response:
            return await self._do(vm, f"checkpoints/{verb}", await request.json())

        @app.post("/v1/volumes/{volume}/import", status_code=200)
        async def import_image(volume: str, request: Request) -> Response:
            return await self._do(volume, "import", await request.json())

    async def _do(self, name: str, verb: str, body: dict[str, Any]) -> Response:
        self.calls.append((verb, body))
        self.news.set()
        if verb in self.refuse:
            raise self.refuse[verb]
        if verb in self.drop_before:
            await asyncio.Event().wait()
        method = "do_" + verb.replace("-", "_").replace("/", "_")
        answer: Response = await getattr(self, method)(name, body)
        if verb in self.drop_after:
            await asyncio.Event().wait()
        return answer

    async def _owner(self, vm: str, change: Any) -> Owner:
        found = await self.records.update(keys.vm_owner(vm), Owner, change)
        assert found is not None
        return found.value

    async def do_start(self, vm: str, _body: Any) -> Response:
        owner = await self._owner(vm, lambda o: ownership.power_on(o, host=self.name))
        owner = await self._owner(vm, ownership.running)
        status = VmStatus(state=VmState.RUNNING, host=self.name, epoch=owner.epoch)
        await self.records.write_status(vm, status)
        return Response(status.model_dump_json(), media_type="application/json")

    do_restore = do_start

    async def do_make_variables(self, _vm: str, body: Any) -> Response:
        self.disks.add(body["disk"]["path"])
        return Response("{}", media_type="application/json")

    async def do_set_ha(self, vm: str, body: Any) -> Response:
        spec = await self.records.vm(vm)
        assert spec is not None
        self.said_ha.append((vm, body["ha"], spec.value.ha))
        return Response(b"{}", media_type="application/json")

    async def do_stop(self, vm: str, _body: Any) -> Response:
        owner = await self._owner(vm, ownership.stopped)
        status = VmStatus(state=VmState.STOPPED, host=self.name, epoch=owner.epoch)
        return Response(status.model_dump_json(), media_type="application/json")

    async def do_save(self, vm: str, _body: Any) -> Response:
        image = SavedState(path=f"/clusterstorage/shared/{vm}.mem", epoch=1, disk_ids=())
        await self._owner(vm, lambda o: ownership.saved(o, image))
        return Response(b"{}", media_type="application/json")

    async def do_pause(self, vm: str, _body: Any) -> Response:
        await self._owner(vm, lambda o: ownership.running(o, paused=True))
        return Response(b"{}", media_type="application/json")

    async def do_resume(self, vm: str, _body: Any) -> Response:
        await self._owner(vm, ownership.running)
        return Response(b"{}", media_type="application/json")

    async def do_create_disks(self, _vm: str, body: Any) -> Response:
        wanted = {disk["path"] for disk in body["disks"]}
        if wanted & self.disks:
            raise Conflict(f"{wanted & self.disks} exists already", hint="choose another name")
        self.disks |= wanted
        return Response(b"{}", media_type="application/json")

    async def do_disks_add(self, vm: str, body: Any) -> Response:
        disk = Disk.model_validate(body["disk"])
        if disk.source == "device":
            disk = disk.but(size_bytes=self.device_bytes)
        else:
            assert disk.path in self.disks
        # An agent never sees a disk that the record does not have.
        spec = await self.records.vm(vm)
        assert spec is not None
        assert disk.id in {one.id for one in spec.value.disks}
        self.plugged.setdefault(vm, set()).add(disk.id)
        return Response(disk.model_dump_json(), media_type="application/json")

    async def do_disks_remove(self, vm: str, body: Any) -> Response:
        if body["disk"] not in self.plugged.get(vm, set()):
            raise NotFound(f"{vm} has no disk {body['disk']}", hint="look")
        self.plugged[vm].discard(body["disk"])
        return Response(b"{}", media_type="application/json")

    async def do_disks_resize(self, _vm: str, body: Any) -> Response:
        return _json({"id": body["disk"], "size_bytes": -(-body["size_bytes"] // 512) * 512})

    async def do_disks_grow(self, _vm: str, body: Any) -> Response:
        return _json({"size_bytes": -(-body["size_bytes"] // 512) * 512})

    async def do_disks_inspect(self, _vm: str, body: Any) -> Response:
        if body["disk"]["path"] not in self.disks and body["disk"]["source"] == "image":
            raise NotFound(f"there is no {body['disk']['path']}", hint="look at the volume")
        return _json({"size_bytes": self.device_bytes})

    async def do_make_seed(self, _vm: str, _body: Any) -> Response:
        return _json({})

    async def do_disks_clone(self, _vm: str, body: Any) -> Response:
        source, target = (Disk.model_validate(body[word]) for word in ("disk", "target"))
        assert source.path in self.disks
        self.clones_left -= 1
        if self.clones_left < 0:
            raise Refused("no room", hint="make some")
        if target.path in self.disks:
            raise Conflict(f"{target.path} exists already", hint="choose another name")
        self.disks.add(target.path)
        if self.on_clone is not None:
            await self.on_clone()
        return _json({"size_bytes": source.size_bytes})

    async def do_disks_discard(self, _vm: str, body: Any) -> Response:
        self.disks.discard(body["disk"]["path"])
        return _json({})

    async def do_checkpoints_take(self, _vm: str, body: Any) -> Response:
        for disk in body["disks"]:
            tags = self.tags.setdefault(disk["path"], [])
            tags[:] = [tag for tag in tags if tag in body["known"]]
            tags.append(body["tag"])
        return _json({})

    do_checkpoints_take_still = do_checkpoints_take

    async def do_checkpoints_drop(self, _vm: str, body: Any) -> Response:
        for disk in body["disks"]:
            tags = self.tags.get(disk["path"], [])
            tags[:] = [tag for tag in tags if tag != body["tag"]]
        return _json({})

    do_checkpoints_drop_still = do_checkpoints_drop

    async def do_checkpoints_revert(self, vm: str, body: Any) -> Response:
        spec = await self.records.vm(vm)
        assert spec is not None
        assert spec.value.reverting, "the record says so before an image is touched"
        assert all(body["tag"] in self.tags[disk["path"]] for disk in body["disks"])
        return _json({disk["id"]: self.device_bytes for disk in body["disks"]})

    async def do_disks_export(self, _vm: str, body: Any) -> Response:
        if body["target"] in self.disks:
            raise Conflict(f"{body['target']} exists already", hint="choose another name")
        self.disks.add(body["target"])
        return _json({"size_bytes": body["disk"]["size_bytes"]})

    async def do_disks_move(self, vm: str, body: Any) -> Response:
        """Copied at once; of a VM that runs the record is this host's to write."""
        known = self.disk_moves.get(body["id"])
        if known is None:
            wanted = DiskMoveAsk.model_validate(body)
            assert wanted.disk.path in self.disks
            self.disks.add(wanted.target.path)
            known = DiskMove(id=wanted.id, vm=vm, stage=Stage.PRECOPY, total_bytes=GIB)
            self.disk_moves[wanted.id] = known
            self.disk_asks[wanted.id] = wanted
        return Response(known.model_dump_json(), media_type="application/json")

    async def do_disk_move_wait(self, id: str, _body: Any) -> Response:  # noqa: A002
        if id not in self.disk_moves:
            raise NotFound(f"{self.name} knows no move {id}", hint="look")
        now = self.disk_moves[id]
        if not now.state.final and not self.hold.is_set():
            now = now.but(copied_bytes=now.copied_bytes + 1)
        elif not now.state.final:
            now = await self._moved(self.disk_asks[id], now)
        self.disk_moves[id] = now
        return Response(now.model_dump_json(), media_type="application/json")

    async def _moved(self, wanted: DiskMoveAsk, now: DiskMove) -> DiskMove:
        owner = await self.records.owner(now.vm)
        if owner is None or owner.value.state is not ownership.OwnerState.RUNNING:
            return now.but(state="completed", copied_bytes=GIB)

        def change(vm: Vm) -> Vm:
            return vm.but(disks=tuple(wanted.target if d == wanted.disk else d for d in vm.disks))

        await self.records.update(keys.vm_spec(now.vm), Vm, change)
        if not wanted.keep:
            self.disks.discard(wanted.disk.path)
        return now.but(state="completed", copied_bytes=GIB, switched=True, stood_ms=12.5)

    async def do_disk_move_cancel(self, id: str, body: Any) -> Response:  # noqa: A002
        error = Cancelled(f"called off by {body['by']}")
        self.disks.discard(self.disk_asks[id].target.path)
        now = self.disk_moves[id].but(state="cancelled", error=error.to_problem())
        self.disk_moves[id] = now
        return Response(now.model_dump_json(), media_type="application/json")

    async def do_import(self, _volume: str, body: Any) -> Response:
        if body["path"] in self.disks:
            raise Conflict(f"{body['path']} exists already", hint="choose another name")
        self.disks.add(body["path"])
        return _json({"size_bytes": GIB})

    async def do_delete_disks(self, _vm: str, body: Any) -> Response:
        self.disks -= {disk["path"] for disk in body["disks"]}
        return Response(b"{}", media_type="application/json")

    async def do_plan(self, _vm: str, _body: Any) -> Response:
        forecast = Forecast(converges=True, total_ms=900.0, blackout_ms=60.0)
        checks = self.checks or [{"name": "all", "result": "pass", "message": "fine"}]
        body = {"checks": checks, "forecast": forecast.model_dump()}
        return Response(json.dumps(body), media_type="application/json")

    async def do_migrate(self, vm: str, body: Any) -> Response:
        move = Migration.model_validate(body["migration"])
        assert body["peer_url"].startswith("https://")
        task = asyncio.create_task(self._move(vm, move), name=move.id)
        self.moves.add(task)
        task.add_done_callback(self.moves.discard)
        return Response(b"{}", status_code=202, media_type="application/json")

    async def _move(self, vm: str, move: Migration) -> None:
        intent = MoveIntent(
            id=move.id, method="live", source=self.name, destination=move.destination
        )
        await self._owner(vm, lambda o: ownership.begin_move(o, intent))
        key = keys.migration(move.id)

        await self.slow_start.wait()

        async def write(**changes: Any) -> None:
            await self.records.update(key, Migration, lambda now: now.but(**changes))

        await write(state=MoveState.RUNNING, progress=Progress(stage=Stage.PRECOPY, percent=40))
        await self.hold.wait()
        if move.id in self.cancelled:
            await self._owner(vm, lambda o: ownership.rolled_back(o, move.id))
            await write(state=MoveState.CANCELLED, outcome=Outcome.CANCELLED, reason="called off")
            return
        await self._owner(vm, lambda o: ownership.swap(o, move.id))
        await self._owner(vm, lambda o: ownership.finished(o, move.id))
        await write(
            state=MoveState.COMPLETED,
            outcome=Outcome.COMPLETED,
            progress=Progress(stage=Stage.ANNOUNCE, percent=100),
            total_ms=900.0,
            blackout_ms=42.0,
            bytes_transferred=1000,
        )
        # The destination's agent tells it, a little after the move has ended.
        found = await self.records.owner(vm)
        assert found is not None
        here = VmStatus(state=VmState.RUNNING, host=move.destination, epoch=found.value.epoch)
        await self.records.write_status(vm, here)

    async def join(self, url: str) -> None:
        """Publish the host as an agent and a guard do."""
        store = self.records.store
        info = host_info(self.name, url)
        await store.put(keys.host_info(self.name), encode(info))
        await store.put(keys.host_lease(self.name), b"{}")
        renewal = Renewal(boot_id=info.boot_id, number=1, guard="armed", watchdog=True)
        await store.put(keys.host_renewal(self.name), encode(renewal))
        await store.put(keys.host_agent(self.name), b"{}")


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def refused(text: str) -> Refused:
    return Refused(text, hint="do something else")


def store_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path
