"""Lists and single objects, read from the cache, as arrays and objects of the documented rows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel, TypeAdapter
from starlette.responses import Response

from godwit.manager import views
from godwit.manager.api.listing import After, FieldsAsked, Limit, RowsAnswer, next_page
from godwit.manager.rows import ALL, Fields, VmRows, choose_vms, encode, fields_of, page_of
from godwit.manager.work.admit import known
from godwit.manager.work.checkpoint_rules import find_checkpoint
from godwit.model.host import HostInfo, HostView
from godwit.model.migration import Migration
from godwit.model.network import NetworkView
from godwit.model.settings import ClusterSettings
from godwit.model.task import Task
from godwit.model.vm import Checkpoint, DiskView, VmState, VmView
from godwit.model.volume import VolumeView

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms

LONGEST_WAIT_S = 60.0

_MANY: dict[type[BaseModel], TypeAdapter[Any]] = {
    kind: TypeAdapter(list[kind])  # type: ignore[valid-type]
    for kind in (Checkpoint, DiskView, NetworkView, VolumeView, Migration, Task)
}
Wait = Annotated[
    float, Query(ge=0, le=3600, description="hold the answer until the task is final, in seconds")
]


def one(value: BaseModel, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An object as the answer."""
    return Response(
        value.model_dump_json(), status_code=status, headers=headers, media_type="application/json"
    )


def many(kind: type[BaseModel], values: Iterable[BaseModel]) -> Response:
    """A list as the answer."""
    return Response(_MANY[kind].dump_json(list(values)), media_type="application/json")


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """GET routes of vms, hosts, networks, volumes, migrations and tasks; health and metrics."""
    _add_vms_and_hosts(app, rooms)
    _add_settings(app, rooms)
    _add_networks_and_volumes(app, rooms)
    _add_history(app, rooms)
    _add_health(app, rooms)


_Route = TypeVar("_Route", bound=Callable[..., Awaitable[Response]])


def _get(app: FastAPI, path: str, kind: Any, summary: str) -> Callable[[_Route], _Route]:
    return app.get(path, response_model=None, responses={200: {"model": kind}}, summary=summary)


def _add_vms_and_hosts(app: FastAPI, rooms: Rooms) -> None:
    rows = VmRows()

    async def look(hosts: Collection[HostInfo], fields: Fields = ALL) -> Mapping[str, int | None]:
        """Ask hosts how much memory is free; nobody, when it is not to be shown."""
        if fields and "memory_free_bytes" not in fields:
            return {}
        return await rooms.world.free.for_list(rooms.cache.snapshot, hosts)

    @_get(app, "/v1/vms", list[VmView], "All VMs")
    async def vms(
        request: HttpRequest,
        fields: FieldsAsked = "",
        limit: Limit = None,
        after: After = "",
        host: Annotated[str | None, Query(description="only VMs that are there")] = None,
        state: Annotated[VmState | None, Query(description="only VMs in this state")] = None,
    ) -> Response:
        snapshot, chosen = rooms.cache.snapshot, fields_of(VmView, fields)
        page = page_of(choose_vms(snapshot, host=host, state=state), limit=limit, after=after)
        found = await rows.of(snapshot, page.names, chosen)
        return RowsAnswer(found, link=next_page(request, page))

    @_get(app, "/v1/vms/{name}", VmView, "One VM")
    async def vm(name: str) -> Response:
        return one(known(views.vm_of(rooms.cache.snapshot, name), "vm", name))

    @_get(app, "/v1/vms/{name}/disks", list[DiskView], "A VM's disks")
    async def disks(name: str) -> Response:
        found = known(rooms.cache.snapshot.vms.get(name), "vm", name)
        return many(DiskView, views.view_disks(found))

    @_get(app, "/v1/vms/{name}/checkpoints", list[Checkpoint], "A VM's checkpoints")
    async def checkpoints(name: str) -> Response:
        return many(Checkpoint, known(rooms.cache.snapshot.vms.get(name), "vm", name).checkpoints)

    @_get(app, "/v1/vms/{name}/checkpoints/{checkpoint}", Checkpoint, "One checkpoint")
    async def one_checkpoint(name: str, checkpoint: str) -> Response:
        vm = known(rooms.cache.snapshot.vms.get(name), "vm", name)
        return one(find_checkpoint(vm, checkpoint))

    @_get(app, "/v1/hosts", list[HostView], "All hosts")
    async def hosts(
        request: HttpRequest, fields: FieldsAsked = "", limit: Limit = None, after: After = ""
    ) -> Response:
        chosen = fields_of(HostView, fields)
        known_now = rooms.cache.snapshot.hosts
        page = page_of(sorted(known_now), limit=limit, after=after)
        free = await look([known_now[name] for name in page.names], chosen)
        snapshot = rooms.cache.snapshot
        found = (
            views.view_host(snapshot, snapshot.hosts[name], memory_free_bytes=free.get(name))
            for name in page.names
            if name in snapshot.hosts
        )
        return RowsAnswer([encode(view, chosen) for view in found], link=next_page(request, page))

    @_get(app, "/v1/hosts/{name}", HostView, "One host")
    async def host(name: str) -> Response:
        info = known(rooms.cache.snapshot.hosts.get(name), "host", name)
        free = await look([info])
        snapshot = rooms.cache.snapshot
        return one(views.view_host(snapshot, info, memory_free_bytes=free.get(name)))


def _add_settings(app: FastAPI, rooms: Rooms) -> None:
    @_get(app, "/v1/cluster/settings", ClusterSettings, "What holds for the whole cluster")
    async def settings() -> Response:
        return one(rooms.cache.snapshot.settings)


def _add_networks_and_volumes(app: FastAPI, rooms: Rooms) -> None:
    @_get(app, "/v1/networks", list[NetworkView], "All VM networks")
    async def networks() -> Response:
        snapshot = rooms.cache.snapshot
        found = (views.view_network(snapshot, n) for _, n in sorted(snapshot.networks.items()))
        return many(NetworkView, found)

    @_get(app, "/v1/networks/{name}", NetworkView, "One VM network")
    async def network(name: str) -> Response:
        snapshot = rooms.cache.snapshot
        found = known(snapshot.networks.get(name), "network", name)
        return one(views.view_network(snapshot, found))

    @_get(app, "/v1/volumes", list[VolumeView], "All volumes")
    async def volumes() -> Response:
        return many(VolumeView, views.all_volumes(rooms.cache.snapshot))

    @_get(app, "/v1/volumes/{name}", VolumeView, "One volume")
    async def volume(name: str) -> Response:
        return one(known(views.volume_of(rooms.cache.snapshot, name), "volume", name))


def _add_history(app: FastAPI, rooms: Rooms) -> None:
    @_get(app, "/v1/migrations", list[Migration], "All moves, oldest first")
    async def migrations() -> Response:
        found = rooms.cache.snapshot.migrations
        return many(Migration, (found[key] for key in sorted(found)))

    @_get(app, "/v1/migrations/{id}", Migration, "One move: progress, then report")
    async def migration(id: str) -> Response:  # noqa: A002 - the name in the path
        return one(known(rooms.cache.snapshot.migrations.get(id), "migration", id))

    @_get(app, "/v1/tasks", list[Task], "All tasks, oldest first")
    async def tasks() -> Response:
        found = rooms.cache.snapshot.tasks
        return many(Task, (found[key] for key in sorted(found)))

    @_get(app, "/v1/tasks/{id}", Task, "One task")
    async def task(id: str, wait: Wait = 0) -> Response:  # noqa: A002
        found = known(rooms.cache.snapshot.tasks.get(id), "task", id)
        if wait and not found.state.final:
            found = await rooms.tasks.ended(id, wait_s=min(wait, LONGEST_WAIT_S))
        return one(found)


def _add_health(app: FastAPI, rooms: Rooms) -> None:
    @app.get("/v1/health", summary="Does the manager serve, and does it see the store?")
    async def health() -> dict[str, Any]:
        problem = rooms.cache.problem
        if not problem and not rooms.cache.ready.is_set():
            problem = "the store has not been read yet"
        return {
            "status": "degraded" if problem else "ok",
            "problem": problem,
            "version": app.version,
            "leads": rooms.leads(),
        }

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        text = rooms.metrics.render(rooms.cache)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
