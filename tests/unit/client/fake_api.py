"""A small cluster's API on a real TLS socket in a thread: it speaks as the manager does.

It keeps what it was asked, validates requests with the real model, and plays moves as a script of
stages, so that clients can be watched from outside.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from godwit.model.errors import GodwitError, NotFound, Unauthenticated
from godwit.model.migration import STAGES, Migration, MovePlan
from godwit.model.requests import ROUTES, parse_request
from godwit.model.task import Task
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import Identity
from godwit.wire.problem import Problem
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.sse import EventHub

TOKEN = "secret-token"
NOW = 1_700_000_000.0

REPORT: dict[str, Any] = {
    "id": "m-1",
    "vm": "web",
    "source": "host1",
    "destination": "host2",
    "state": "completed",
    "outcome": "completed",
    "accepted_at": NOW,
    "ended_at": NOW + 0.87,
    "stages": [
        {"name": "setup", "start_s": 0.0, "duration_ms": 120.0},
        {"name": "precopy", "start_s": 0.12, "duration_ms": 640.0},
        {"name": "switchover", "start_s": 0.76, "duration_ms": 38.0},
        {"name": "handover", "start_s": 0.798, "duration_ms": 4.0},
        {"name": "resume", "start_s": 0.802, "duration_ms": 5.0},
        {"name": "announce", "start_s": 0.807, "duration_ms": 63.0},
    ],
    "passes": [
        {"number": 1, "bytes": 38_000_000, "duration_ms": 600.0, "dirty_bytes_per_s": 1_200_000.0},
        {"number": 2, "bytes": 700_000, "duration_ms": 40.0, "dirty_bytes_per_s": 900_000.0},
    ],
    "bytes_transferred": 38_900_000,
    "total_ms": 870.0,
    "blackout_ms": 47.0,
    "forecast": {"converges": True, "total_ms": 900.0, "blackout_ms": 45.0},
}
VM: dict[str, Any] = {
    "name": "web",
    "state": "running",
    "host": "host1",
    "epoch": 3,
    "cpus": 2,
    "memory_bytes": 512 << 20,
    "ha": False,
}
DISK: dict[str, Any] = {
    "id": "disk0",
    "volume": "shared",
    "path": "/clusterstorage/shared/web/disk0.vhdx",
    "size_bytes": 2 << 30,
    "format": "vhdx",
    "serial": "GW0",
    "lun": 0,
    "effective_tier": "brokered",
}
VOLUME: dict[str, Any] = {
    "name": "shared",
    "kind": "dir",
    "path": "/clusterstorage/shared",
    "capacity_bytes": 100 << 30,
    "used_bytes": 30 << 30,
    "health": "degraded",
    "hosts": {
        "host1": {"state": "direct", "reason": ""},
        "host2": {"state": "redirected", "reason": "lost path to LUN 3"},
    },
}
HOST: dict[str, Any] = {
    "name": "host1",
    "state": "up",
    "vms": 1,
    "cpus": 4,
    "memory_bytes": 8 << 30,
    "memory_free_bytes": 6 << 30,
}


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


@dataclass
class FakeApi:
    """The cluster: change its fields from a test, read ``asked`` afterwards."""

    directory: Path
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    refusal: GodwitError | None = None  # answers every action
    fate: str = "completed"  # how tasks end
    error: GodwitError | None = None  # ... and in what
    hold_at: str = ""  # the stage at which a move stays until `let_go`
    holds_requests: bool = True  # False: answers ?wait= at once
    port: int = 0

    def __post_init__(self) -> None:
        self.rows = {
            "vms": {"web": dict(VM)},
            "hosts": {"host1": dict(HOST), "host2": {**HOST, "name": "host2", "vms": 0}},
            "networks": {
                "lan": {"name": "lan", "bridge": "br-lan", "mtu": 1500, "subnet": "10.91.0.0/22"}
            },
            "volumes": {"shared": dict(VOLUME)},
            "migrations": {},
            "tasks": {},
        }
        self.let_go = threading.Event()
        self.stage_reached = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._plays: set[asyncio.Task[None]] = set()
        self._final: dict[str, asyncio.Event] = {}
        self._server: WireServer | None = None
        ca = ClusterCa.create(cluster="test")
        issued = issue(ca, role="manager", name="m1", dns=["localhost"], ips=["127.0.0.1"])
        write_identity(self.directory, issued)
        self.identity = Identity.load(self.directory)
        self.ca_file = self.directory / "ca.pem"
        self.token_file = self.directory / "token"
        self.token_file.write_text(TOKEN + "\n")
        self.hub = EventHub()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "GODWIT_URL": self.url,
            "GODWIT_TOKEN_FILE": str(self.token_file),
            "GODWIT_CA_FILE": str(self.ca_file),
        }

    def actions(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method in ("POST", "DELETE")]

    # Running

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def start(self) -> None:
        async def starting() -> None:
            tls = ServerTls(self.identity, roles=None)
            server = WireServer(self._serve, [Listener.tcp("127.0.0.1", self.port, tls=tls)])
            await server.start()
            self._server, self.port = server, server.ports[0]

        self.run(starting())

    def stop(self) -> None:
        """Stop answering; what it knows stays."""

        async def stopping() -> None:
            if self._server is not None:
                await self._server.stop(grace_s=0.0)

        self.run(stopping())

    def close(self) -> None:
        async def closing() -> None:
            self.hub.close()
            for play in self._plays:
                play.cancel()
            await asyncio.gather(*self._plays, return_exceptions=True)

        self.let_go.set()
        self.run(closing())
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    # Serving

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await self._console(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = Asked(
            method=scope["method"],
            path=scope["path"],
            query=dict(parse_qsl(scope["query_string"].decode())),
            headers={key.decode(): value.decode() for key, value in scope["headers"]},
            body=body,
        )
        self.asked.append(asked)
        try:
            if asked.headers.get("authorization") != f"Bearer {TOKEN}":
                raise Unauthenticated("no valid token", hint="give one")
            if asked.path == "/v1/events":
                await self._events(asked, send)
                return
            status, value = await self._answer(asked)
        except GodwitError as error:
            problem = Problem.from_error(error)
            await _respond(send, problem.status, problem.to_dict(), b"application/problem+json")
            return
        await _respond(send, status, value, b"application/json")

    async def _answer(self, asked: Asked) -> tuple[int, Any]:
        if asked.path == "/v1/boot-files":
            digest = asked.headers["x-godwit-sha256"]
            return 200, {"sha256": digest, "path": f"/clusterstorage/shared/.godwit/boot/{digest}"}
        if asked.method == "GET":
            return 200, await self._read(asked)
        for kind, (method, template) in ROUTES.items():
            match = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", template), asked.path)
            if match and method == asked.method:
                return self._act(kind, {**(asked.json or {}), **match.groupdict()}, asked)
        raise NotFound(f"nothing at {asked.path}", hint="look in the documentation")

    async def _read(self, asked: Asked) -> Any:
        _, _, noun, *rest = asked.path.split("/")
        rows = self.rows.get(noun)
        if rows is None or (rest and rest[0] not in rows):
            raise NotFound(f"no {noun.removesuffix('s')} {rest[0]}", hint="look at the list")
        if not rest:
            return list(rows.values())
        if rest[1:] == ["checkpoints"]:
            return []
        if rest[1:] == ["disks"]:
            return [DISK]
        if noun == "tasks" and "wait" in asked.query and self.holds_requests:
            ended = self._final.setdefault(rest[0], asyncio.Event())
            try:
                async with asyncio.timeout(float(asked.query["wait"])):
                    await ended.wait()
            except TimeoutError:
                pass
        return rows[rest[0]]

    def _act(self, kind: str, fields: dict[str, Any], asked: Asked) -> tuple[int, Any]:
        request = parse_request({"kind": kind, **fields})
        if self.refusal is not None:
            raise self.refusal
        if asked.query.get("dry_run") == "true":
            plan = MovePlan.model_validate(
                {
                    "vm": "web",
                    "destination": "host2",
                    "checks": [{"name": "memory", "result": "pass", "message": "enough"}],
                    "forecast": {"total_ms": 900.0, "blackout_ms": 45.0},
                }
            )
            return 200, plan.model_dump(mode="json")
        number = len(self.rows["tasks"]) + 1
        name = fields.get("volume" if kind == "volume.disk.import" else "name") or fields.get("id")
        noun = kind.partition(".")[0]
        task = Task(
            id=f"t-{number}",
            request=request.model_dump(mode="json"),
            subject=f"{noun}/{name}",
            by=asked.headers.get("x-godwit-client", ""),
            created_at=NOW,
        )
        self.rows["tasks"][task.id] = task.model_dump(mode="json")
        play = self._move(task) if kind == "vm.migrate" else self._quick(task)
        running = self._loop.create_task(play)
        self._plays.add(running)
        running.add_done_callback(self._plays.discard)
        return 202, task.model_dump(mode="json")

    async def _quick(self, task: Task) -> None:
        kind = task.request["kind"]
        if kind == "vm.create":
            self.rows["vms"][task.request["name"]] = {
                **VM,
                "name": task.request["name"],
                "state": "stopped",
                "host": None,
            }
        elif kind == "volume.create":
            name = task.request["name"]
            self.rows["volumes"][name] = {**VOLUME, "name": name}
        elif kind == "network.create":
            self.rows["networks"][task.request["name"]] = {
                "name": task.request["name"],
                "bridge": "br-x",
                "mtu": 1500,
            }
        self._end(task, reason="")

    async def _move(self, task: Task) -> None:
        move = Migration(id="m-1", vm="web", source="host1", destination="host2", accepted_at=NOW)
        task = task.but(progress={"migration": "m-1"})
        self._put_task(task)
        for index, stage in enumerate(STAGES):
            progress = {"stage": stage, "percent": 18.0 * index, "bytes_transferred": index << 20}
            move = move.but(state="running", progress=progress)
            self._put_move(move, "migration.stage")
            if stage.value == self.hold_at:
                self.stage_reached.set()
                await asyncio.to_thread(self.let_go.wait, 20)
            await asyncio.sleep(0.02)
        report = {**REPORT, "state": self.fate, "outcome": self.fate}
        if self.fate != "completed":
            report |= {"reason": f"it was {self.fate}", "blackout_ms": None, "total_ms": None}
        self._put_move(Migration.model_validate(report), "migration.stage")
        self._end(task, reason="moved")

    def _put_move(self, move: Migration, kind: str) -> None:
        self.rows["migrations"][move.id] = move.model_dump(mode="json")
        self._publish(kind, f"migration/{move.id}", {"migration": move.model_dump(mode="json")})

    def _put_task(self, task: Task) -> None:
        self.rows["tasks"][task.id] = task.model_dump(mode="json")
        self._publish("task.updated", f"task/{task.id}", {"task": task.model_dump(mode="json")})

    def _end(self, task: Task, *, reason: str) -> None:
        error = self.error.to_problem() if self.error else None
        self._put_task(task.but(state=self.fate, reason=reason, error=error, ended_at=NOW + 1))
        self._final.setdefault(task.id, asyncio.Event()).set()

    def _publish(self, kind: str, subject: str, data: dict[str, Any]) -> None:
        event = {
            "id": f"{kind}-{time.monotonic_ns()}",
            "time": NOW,
            "kind": kind,
            "subject": subject,
            "message": f"{subject} {kind}",
            "data": data,
        }
        self.hub.publish(json.dumps(event), event=kind)

    def publish(self, message: str) -> None:
        """Put a line into the event log, from any thread."""
        event = {
            "id": message,
            "time": NOW,
            "kind": "note",
            "subject": "vm/web",
            "message": message,
        }

        async def publishing() -> None:
            self.hub.publish(json.dumps(event))

        self.run(publishing())

    async def _events(self, asked: Asked, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last = asked.headers.get("last-event-id")
        async for chunk in self.hub.stream(last_event_id=last, keepalive_s=0.5):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _console(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = dict(scope["headers"])
        if headers.get(b"authorization") != f"Bearer {TOKEN}".encode():
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "bytes": b"login: "})
        while (message := await receive())["type"] == "websocket.receive":
            data = message.get("bytes") or (message.get("text") or "").encode()
            if data == b"poweroff\n":
                await send({"type": "websocket.close", "code": 1000})
                return
            await send({"type": "websocket.send", "bytes": data.upper()})


async def _respond(send: Any, status: int, value: Any, kind: bytes) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
