"""Volumes: define and forget them, bring images in and out.

A volume's record is only its definition: its files are neither made nor deleted with it.
"""

from __future__ import annotations

from typing import Any

from godwit.manager.snapshot import Snapshot
from godwit.manager.work.admit import check_action, host_that_is_up
from godwit.manager.work.define_acts import on_some_host
from godwit.manager.work.disk_rules import (
    changed_volume,
    check_volume_unused,
    define_volume,
    find_disk,
    import_target,
)
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.work.vms import fresh_owner
from godwit.manager.world import World
from godwit.model import keys
from godwit.model.checkpoints import check_whole
from godwit.model.disks import volume_of
from godwit.model.errors import Conflict, NotFound, OutcomeUnknown, Refused
from godwit.model.requests import (
    CreateVolume,
    DeleteVolume,
    ExportDisk,
    ImportDisk,
    RedirectVolume,
    RestoreVolume,
    SetVolume,
)
from godwit.model.volume import SERVED, Volume
from godwit.store.api import delete, delete_prefix, exists
from godwit.store.records import CasFailed

_KNOWN_S = 5.0
"""Seconds that a new volume waits for hosts to say that they know it."""
_COPY_S = 6 * 3600.0
"""Seconds for a copy of an image: a slow network and terabytes, but not for ever."""
_REDIRECT_S = 60.0


async def create_volume(world: World, run: TaskRun, request: CreateVolume) -> Done:
    """Write the definition; its hosts must see the directory already."""
    key, name = keys.volume(request.name), request.name
    volume = define_volume(world.cache.snapshot, request, now=run.task.created_at)
    try:
        await world.records.cas(key, volume, 0)
    except CasFailed:
        if not (run.adopted and world.cache.snapshot.volumes.get(name) == volume):
            raise Conflict(
                f"there is a volume {name} already", hint=f"look: godwit volume show {name}"
            ) from None
    if volume.kind in SERVED:
        await world.cache.until(lambda seen: _known_to_all(seen, name) or None, timeout=_KNOWN_S)
    await _log(world, "volume.created", f"volume/{name}", f"{name} defined by {run.task.by}")
    by = f", {volume.coordinator} coordinates it" if volume.coordinator else ""
    return Done(f"volume {name} is defined{by}", {"volume": name})


def _known_to_all(snapshot: Snapshot, volume: str) -> bool:
    """Every host that is up has heard of it, so that a VM may be made there at once."""
    return all(
        volume in info.volumes
        for info in snapshot.hosts.values()
        if info.name in snapshot.agents and info.name in snapshot.leases
    )


async def set_volume(world: World, run: TaskRun, request: SetVolume) -> Done:
    """Change the definition; nobody who uses the volume notices. Then its daemon is heard."""
    key = keys.volume(request.name)
    while True:
        found = await world.records.get(key, Volume)
        before = found.value if found else None
        changed = changed_volume(before, request)
        old = before.fence_url if before else ""
        if old not in ("", changed.fence_url) and (out := world.cutter.keeps_out(old)):
            raise Refused(
                f"the fencing daemon at {old} keeps {', '.join(out)} out, and would be forgotten",
                hint="wait until these hosts are back, or have them let in there",
            )
        try:
            await world.records.cas(key, changed, found.revision if found else 0)
            break
        except CasFailed:
            continue  # somebody else changed it at the same moment: look again
    url = changed.fence_url
    if url:
        await world.cutter.ask(url)
    said = f"{request.name} is fenced by {url}" if url else f"{request.name} has no fencing daemon"
    await _log(world, "volume.changed", f"volume/{request.name}", f"{said}, says {run.task.by}")
    why = world.cutter.problem(changed) if url else ""
    told = f"{said}, which cannot cut a host off yet: {why}" if why else said
    return Done(told, {"volume": request.name, "fence_url": url, "problem": why})


async def delete_volume(world: World, run: TaskRun, request: DeleteVolume) -> Done:
    """Forget the definition; the files stay."""
    name, key = request.name, keys.volume(request.name)
    check_volume_unused(world.cache.snapshot, name)
    # What hosts have said of it goes along: the next volume of that name may be another one.
    states = delete_prefix(keys.volume_state(name, ""))
    answer = await world.records.store.txn([exists(key)], [delete(key), states])
    if not answer.succeeded and not run.adopted:
        raise NotFound(f"no volume {name} is defined", hint="look with: godwit volume list")
    await _log(world, "volume.deleted", f"volume/{name}", f"{name} forgotten by {run.task.by}")
    return Done(f"volume {name} is forgotten; its files stay", {"volume": name})


async def redirect(world: World, run: TaskRun, request: RedirectVolume | RestoreVolume) -> Done:
    """Have the host take its VMs' I/O on the volume off its own path, or back to it."""
    name, host = request.name, request.host
    redirected = isinstance(request, RedirectVolume)
    await run.say(f"{host} {'leaves' if redirected else 'takes'} its own path to {name}")
    answer = await world.agents.call(
        host_that_is_up(world.cache.snapshot, host),
        "POST",
        f"/v1/volumes/{name}/way",
        {"redirected": redirected},
        deadline_s=_REDIRECT_S,
    )
    state, reason = str(answer.get("state")), str(answer.get("reason", ""))
    kind = "volume.redirected" if redirected else "volume.restored"
    said = f"{name} is {state} on {host}" + (f": {reason}" if reason else "")
    await _log(world, kind, f"volume/{name}", f"{said} (asked for by {run.task.by})")
    return Done(said, {"volume": name, "host": host, "state": state, "reason": reason})


async def import_disk(world: World, run: TaskRun, request: ImportDisk) -> Done:
    """Have a host that sees the volume fetch, check and convert a foreign image into it."""
    path = import_target(request)
    await run.say(f"importing {request.source} as {path}", progress={"path": path})
    source = volume_of(request.source) if request.source.startswith("/") else None
    answer = await _copy(
        world,
        run,
        path,
        f"/v1/volumes/{request.volume}/import",
        {
            "path": path,
            "source": request.source,
            "format": request.format,
            "target_format": request.target_format,
        },
        volumes={request.volume, *([source] if source else [])},
    )
    size = answer.get("size_bytes")
    message = f"{path} imported from {request.source} by {run.task.by}"
    await _log(world, "disk.imported", run.task.subject, message)
    hint = f"{request.volume} --existing {path} --format {request.target_format}"
    return Done(
        f"{path} is there; attach it: godwit vm disk add VM {hint}",
        {"path": path, "format": request.target_format, "size_bytes": size},
    )


async def export_disk(world: World, run: TaskRun, request: ExportDisk) -> Done:
    """Have a host write a copy of a stopped VM's disk; nothing is overwritten."""
    name = request.name
    check_action(await fresh_owner(world, name), request)
    spec = await world.records.vm(name)
    if spec is None:
        raise NotFound(f"no vm {name}", hint="look with: godwit vm list")
    check_whole(spec.value)
    disk = find_disk(spec.value, request.disk)
    await run.say(f"copying {disk.id} to {request.target}", progress={"path": request.target})
    target = volume_of(request.target)
    await _copy(
        world,
        run,
        request.target,
        f"/v1/vms/{name}/disks/export",
        {
            "disk": disk.model_dump(mode="json"),
            "target": request.target,
            "format": request.format,
        },
        volumes={one for one in (disk.volume, target) if one},
        prefer=(await fresh_owner(world, name)).host,
    )
    message = f"{disk.id} copied to {request.target} by {run.task.by}"
    await _log(world, "disk.exported", f"vm/{name}", message)
    return Done(
        f"{disk.id} of {name} copied to {request.target}",
        {"vm": name, "path": request.target, "format": request.format},
    )


async def _copy(
    world: World,
    run: TaskRun,
    target: str,
    path: str,
    body: dict[str, Any],
    *,
    volumes: set[str],
    prefer: str | None = None,
) -> Any:
    try:
        return await on_some_host(
            world,
            None,
            "POST",
            path,
            body,
            prefer=prefer,
            volumes=volumes,
            deadline_s=_COPY_S,
        )
    except Conflict as error:
        if not run.adopted:
            raise
        # The host may have been asked before us: what is there is whole, or still in the making.
        raise OutcomeUnknown(
            f"{target} is there already, and the manager that had it made is gone",
            hint="look at it; if it is not whole, delete it and ask again",
        ) from error


async def _log(world: World, kind: str, subject: str, message: str) -> None:
    await world.records.append_event(kind, subject, message, at=world.clock.realtime())
