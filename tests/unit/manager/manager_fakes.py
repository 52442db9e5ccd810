"""An agent as the manager sees one: real HTTP with certificates, records in the store, no QEMU."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from starlette.responses import Response

from godwit.model import keys, ownership
from godwit.model.errors import GodwitError, NotFound, Refused
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.migration import (
    Forecast,
    Migration,
    MoveState,
    Outcome,
    Progress,
    Stage,
)
from godwit.model.ownership import MoveIntent, Owner, SavedState
from godwit.model.vm import VmState, VmStatus
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
        self.disks: set[str] = set()
        self.moves: set[asyncio.Task[None]] = set()
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

        @app.post("/v1/images/{image}/publish")
        async def publish(image: str) -> dict[str, Any]:
            self.calls.append(("publish", {"image": image}))
            root = "/clusterstorage/shared/.godwit/boot"
            return {"kernel": f"{root}/aa", "initrd": f"{root}/bb", "append": "console=ttyS0"}

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
            body = await request.json()
            self.calls.append((verb, body))
            self.news.set()
            if verb in self.refuse:
                raise self.refuse[verb]
            if verb in self.drop_before:
                await asyncio.Event().wait()
            answer = await getattr(self, "do_" + verb.replace("-", "_"))(vm, body)
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
        self.disks |= {disk["path"] for disk in body["disks"]}
        return Response(b"{}", media_type="application/json")

    async def do_delete_disks(self, _vm: str, body: Any) -> Response:
        self.disks -= {disk["path"] for disk in body["disks"]}
        return Response(b"{}", media_type="application/json")

    async def do_plan(self, _vm: str, _body: Any) -> Response:
        forecast = Forecast(converges=True, total_ms=900.0, blackout_ms=60.0)
        checks = self.checks or [{"name": "all", "result": "pass", "message": "fine"}]
        import json

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

    async def join(self, url: str) -> None:
        """Publish the host as an agent and a guard do."""
        store = self.records.store
        await store.put(keys.host_info(self.name), encode(host_info(self.name, url)))
        await store.put(keys.host_lease(self.name), b"{}")
        await store.put(keys.host_agent(self.name), b"{}")


def refused(text: str) -> Refused:
    return Refused(text, hint="do something else")


def store_file(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path
