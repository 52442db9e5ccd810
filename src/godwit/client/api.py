"""The asynchronous client: one cluster, its nouns, its tasks, its events.

``sync.py`` mirrors this file; after a change here run ``scripts/client-sync``.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from godwit.client.link import Link
from godwit.client.nouns import Cluster, Hosts, Migrations, Networks, Tasks, Vms, Volumes
from godwit.client.settings import Target, resolve
from godwit.client.waiting import Listening, OnProgress

if TYPE_CHECKING:
    from godwit.client.console import Console
    from godwit.model.create import CreatePlan
    from godwit.model.drain import DrainPlan
    from godwit.model.event import Event
    from godwit.model.migration import Migration, MovePlan
    from godwit.model.network import NetworkView
    from godwit.model.requests import CreateVm, Request, SetHostPower
    from godwit.model.task import Task
    from godwit.model.vm import VmView
    from godwit.model.volume import VolumeView

NAME = "sdk/0.1"
_BOOT_FILES = ("kernel", "initrd", "cloud_init")


def _not_uploaded(request: CreateVm) -> dict[str, str | None]:
    """Nothing is uploaded for a plan: files here stand for what every host would see of them."""
    found: dict[str, str | None] = {}
    for field in _BOOT_FILES:
        path = getattr(request, field)
        if _is_here(path):
            found[field] = None if field == "cloud_init" else f"/clusterstorage/{Path(path).name}"
    return found


def _is_here(path: str | None) -> bool:
    return path is not None and Path(path).is_file()


class AsyncClient:
    """A cluster's API. Connects with the first call; close it, or use it with ``async with``.

    ``name`` says in each task through what it was asked for. Errors: InvalidRequest or NotFound
    when no cluster is chosen.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token_file: Path | str | None = None,
        ca_file: Path | str | None = None,
        context: str | None = None,
        name: str = NAME,
    ) -> None:
        self.target: Target = resolve(
            url=url,
            context=context,
            token_file=Path(token_file) if token_file else None,
            ca_file=Path(ca_file) if ca_file else None,
        )
        self._link = Link(self.target, name=name)
        self._listening: Listening | None = None
        self.vms = Vms(self)
        self.hosts = Hosts(self)
        self.networks = Networks(self)
        self.volumes = Volumes(self)
        self.migrations = Migrations(self)
        self.tasks = Tasks(self)
        self.cluster = Cluster(self)

    async def rows(
        self, noun: str, *, fields: Sequence[str] = (), **only: str | None
    ) -> list[dict[str, Any]]:
        """The JSON objects of ``vms``, ``hosts``, ... as the API gives them.

        ``fields``: not more of each of them, for nouns of which there may be thousands. ``only``
        are the filters of that list, such as ``host`` of VMs.
        """
        return await self._link.rows(
            f"/v1/{noun}", query={"fields": ",".join(fields) or None, **only}
        )

    async def row(self, noun: str, name: str) -> dict[str, Any]:
        """One JSON object as the API gives it. Errors: NotFound."""
        found: dict[str, Any] = await self._link.get(f"/v1/{noun}/{quote(name, safe='')}")
        return found

    async def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Ask what is no list and no task, once; the JSON object answered."""
        if method == "GET":
            found: dict[str, Any] = await self._link.get(f"/v1/{path}")
        else:
            found = await self._link.call(method, f"/v1/{path}", body)
        return found

    async def health(self) -> dict[str, Any]:
        """What the manager says of itself; needs no token."""
        found: dict[str, Any] = await self._link.get("/v1/health")
        return found

    async def act(self, kind: str, **fields: Any) -> Task:
        """Send the request of that kind; its task. Errors: InvalidRequest before anything is
        sent, and whatever the manager refuses with."""
        from godwit.model.requests import parse_request

        return await self.send(parse_request({"kind": kind, **fields}))

    async def plan(self, kind: str, **fields: Any) -> MovePlan:
        """What that move would do: every check, without side effects."""
        from godwit.model.migration import MovePlan
        from godwit.model.requests import parse_request

        return MovePlan.model_validate(await self._plan(parse_request({"kind": kind, **fields})))

    async def drain_plan(self, kind: str, **fields: Any) -> DrainPlan:
        """How that request would empty a host, without side effects."""
        from godwit.model.drain import DrainPlan
        from godwit.model.requests import parse_request

        return DrainPlan.model_validate(await self._plan(parse_request({"kind": kind, **fields})))

    async def send(self, request: Request) -> Task:
        """Send a typed request, once; its task. Local boot files and passwords are
        handed in first."""
        from godwit.model.requests import CreateVm, SetHostPower, http_call
        from godwit.model.task import Task

        if isinstance(request, CreateVm):
            request = await self._with_boot_files(request)
        elif isinstance(request, SetHostPower):
            request = await self._with_password(request)
        method, path, body = http_call(request)
        return Task.model_validate(await self._link.call(method, path, body))

    async def create_plan(self, kind: str, **fields: Any) -> CreatePlan:
        """What that VM would be, without making it; boot files here are not uploaded."""
        from godwit.model.create import CreatePlan
        from godwit.model.requests import parse_request

        return CreatePlan.model_validate(await self._plan(parse_request({"kind": kind, **fields})))

    async def dry_run(self, request: Request) -> MovePlan | DrainPlan | CreatePlan:
        """The plan of a typed request; moves, new VMs and what empties a host have one."""
        from godwit.model.plans import plan_of

        return plan_of(request.kind).model_validate(await self._plan(request))

    async def _plan(self, request: Request) -> Any:
        from godwit.model.errors import InvalidRequest
        from godwit.model.requests import CreateVm, http_call
        from godwit.model.words import PLANNED

        if request.kind not in PLANNED:
            raise InvalidRequest(
                f"{request.kind.replace('.', ' ')} has no plan to show",
                hint="see what would be sent with --script curl",
            )
        if isinstance(request, CreateVm):
            request = request.but(**_not_uploaded(request))
        method, path, body = http_call(request)
        return await self._link.call(method, path, body, query={"dry_run": True})

    async def listen(self, request: Request) -> Listening:
        """Hear of what a request is about from now on; for `wait`, once it has been sent."""
        from godwit.client.waiting import Listening
        from godwit.model.requests import subject_of

        self._listening = Listening(self._link, subject_of(request))
        await self._listening.connected()
        return self._listening

    async def wait(
        self,
        task: Task | str,
        *,
        on_progress: OnProgress | None = None,
        listening: Listening | None = None,
    ) -> Task:
        """The task when it has completed; what it failed with is raised, typed as it was.

        ``on_progress`` is called with each change of the task or of its move, from the first one
        on where ``listening`` began before it (`listen`). Lost connections are taken up again.
        Errors: OutcomeUnknown when the manager stays away.
        """
        from godwit.client.waiting import failure, wait

        started = await self.tasks.get(task) if isinstance(task, str) else task
        done = await wait(self._link, started, on_progress=on_progress, listening=listening)
        error = failure(done)
        if error is not None:
            raise error
        return done

    async def result(self, task: Task) -> Migration | VmView | NetworkView | VolumeView | Task:
        """What a task was about, as it is now: the move, the VM, the network, the volume, else
        the task."""
        kind = str(task.request.get("kind", ""))
        name = task.subject.partition("/")[2]
        if kind in ("vm.migrate", "migration.cancel"):
            found = await self.migration_of(task)
            if found is not None:
                return found
        elif kind.startswith("vm.") and kind != "vm.delete":
            return await self.vms.get(name)
        elif kind == "network.create":
            return await self.networks.get(name)
        elif kind == "volume.create":
            return await self.volumes.get(name)
        return await self.tasks.get(task.id)

    async def migration_of(self, task: Task) -> Migration | None:
        """The move that a task carries out (or calls off), None while it has none."""
        from godwit.client.waiting import migration_id

        move_id = migration_id(task)
        if move_id is None and task.subject.startswith("migration/"):
            move_id = task.subject.partition("/")[2]
        if move_id is not None:
            return await self.migrations.get(move_id)
        vm = task.subject.removeprefix("vm/")
        moves = [move for move in await self.migrations.list() if move.vm == vm]
        newest = max(moves, key=lambda move: move.accepted_at, default=None)
        if newest is None or newest.accepted_at < task.created_at:
            return None
        return newest

    async def events(
        self, *, since: str | None = None, subject: str | None = None, follow: bool = True
    ) -> AsyncGenerator[Event, None]:
        """Every event from now on (or after the id ``since``), across lost connections; without
        ``follow`` only those that the cluster has. ``subject`` is like ``vm/web``."""
        from godwit.model.event import Event

        query = {"subject": subject, "since": since if not follow else None}
        stream = (
            self._link.events(query=query, since=since)
            if follow
            else self._link.events_so_far(query=query, since=since)
        )
        async with contextlib.aclosing(stream):
            async for found in stream:
                with contextlib.suppress(ValueError):  # of a newer version, not for us
                    yield Event.model_validate_json(found.data)

    async def console(self, name: str) -> Console:
        """A VM's serial port, open."""
        from godwit.client.console import open_console

        return await open_console(self._link, name)

    async def upload_boot_file(self, path: Path | str) -> str:
        """Give the cluster a kernel or initrd; the path under which every host sees it."""
        return await self._upload("/v1/boot-files", path)

    async def upload_user_data(self, path: Path | str) -> str:
        """Give the cluster user data for ``vm.create``; only its hosts' root can read it."""
        return await self._upload("/v1/user-data", path)

    async def _upload(self, where: str, path: Path | str) -> str:
        import hashlib

        from godwit.model.errors import InvalidRequest

        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InvalidRequest(
                f"{path} cannot be read: {error.strerror}", hint="check the path and its rights"
            ) from None
        digest = hashlib.sha256(content).hexdigest()
        answer = await self._link.upload(where, content, headers={"x-godwit-sha256": digest})
        return str(answer["path"])

    async def _with_boot_files(self, request: Request) -> Request:
        changes = {}
        boot, data = self.upload_boot_file, self.upload_user_data
        for field, upload in zip(_BOOT_FILES, (boot, boot, data), strict=True):
            path = getattr(request, field)
            if _is_here(path):
                changes[field] = await upload(path)
        return request.but(**changes) if changes else request

    async def hand_in_secret(self, secret: str) -> str:
        """Give the cluster a secret, which it seals; what to name it by, for ten minutes."""
        return str((await self._link.upload("/v1/secrets", secret.encode(), headers={}))["path"])

    async def _with_password(self, request: SetHostPower) -> SetHostPower:
        from godwit.client.files import read_secret, read_text
        from godwit.model.host_requests import SECRET

        changes = {}
        if request.ca and "-----BEGIN" not in request.ca:
            changes["ca"] = read_text(request.ca)
        if not request.password_file.startswith(SECRET):
            secret = read_secret(request.password_file)
            changes["password_file"] = await self.hand_in_secret(secret)
        return request.but(**changes) if changes else request

    async def close(self) -> None:
        """Close the connections."""
        if self._listening is not None:
            await self._listening.close()
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
