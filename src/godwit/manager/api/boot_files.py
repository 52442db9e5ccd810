"""``POST /v1/boot-files`` and ``/v1/user-data``: files kept by content hash where hosts see them.

A kernel or initrd is there for everybody, user data (it has passwords and keys) for root alone.

The manager has no access to the volumes: it takes the body in, checks it, and passes it on to an
agent. Sending the same file again changes nothing.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request

from godwit.manager.work.define_acts import helpers
from godwit.model.errors import GodwitError, InvalidRequest, OutcomeUnknown, TooOld, Unavailable

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms

LIMIT_BYTES = 512 << 20
USER_DATA_BYTES = 1 << 20


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """The two routes."""

    @app.post(
        "/v1/boot-files",
        status_code=201,
        summary="Store a kernel or initrd; answers the path to name in vm.create",
        openapi_extra={
            "requestBody": {
                "content": {
                    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
                }
            }
        },
    )
    async def boot_file(request: Request) -> dict[str, str]:
        return await _take_in(rooms, request, "boot-files", LIMIT_BYTES)

    @app.post(
        "/v1/user-data",
        status_code=201,
        summary="Store user data for cloud-init; answers the path to name in vm.create",
        openapi_extra={
            "requestBody": {"content": {"text/cloud-config": {"schema": {"type": "string"}}}}
        },
    )
    async def user_data(request: Request) -> dict[str, str]:
        return await _take_in(rooms, request, "user-data", USER_DATA_BYTES)


async def _take_in(rooms: Rooms, request: Request, kind: str, limit: int) -> dict[str, str]:
    headers = request.headers
    wanted = headers.get("x-content-sha256") or headers.get("x-godwit-sha256") or ""
    if int(headers.get("content-length") or 0) > limit:
        raise _too_large(limit)
    rooms.uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=rooms.uploads, prefix="boot-") as stream:
        digest = await _receive(request, stream, limit)
        if wanted and wanted.lower() != digest:
            raise InvalidRequest(
                "what arrived is not what the checksum says", hint="send the file again"
            )
        stream.flush()
        return await _pass_on(rooms, kind, digest, Path(stream.name))


async def _receive(request: Request, stream: Any, limit: int) -> str:
    digest, size = hashlib.sha256(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        digest.update(chunk)
        stream.write(chunk)
    if not size:
        raise InvalidRequest("the file is empty", hint="send the file's bytes as the body")
    return digest.hexdigest()


async def _pass_on(rooms: Rooms, kind: str, digest: str, path: Path) -> dict[str, str]:
    last: GodwitError | None = None
    for info in helpers(rooms.cache.snapshot, None):
        try:
            answer = await rooms.world.agents.put_file(info, f"/v1/{kind}/{digest}", path)
        except (TooOld, Unavailable, OutcomeUnknown) as error:
            last = error  # storing by hash may be done twice, so the next host may be asked
            continue
        return {"sha256": digest, "path": str(answer["path"])}
    raise last or Unavailable("no host is up to keep the file", hint="see: godwit host list")


def _too_large(limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"the file is larger than {limit >> 20} MiB", hint="put it on a disk instead"
    )
