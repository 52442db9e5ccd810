"""``POST /v1/secrets`` and ``GET /v1/hosts/{name}/power``.

A secret is handed in as the body of a request of its own, sealed at once and kept for minutes. The
request that needs it names it. So no secret is in a request, which tasks keep and people print.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import Response

from godwit.manager.api.resources import one
from godwit.manager.work.admit import known
from godwit.manager.work.power_rules import check_keys, device_of
from godwit.model import keys
from godwit.model.errors import InvalidRequest
from godwit.model.host_requests import SECRET
from godwit.model.power import PowerView, SealedSecret
from godwit.power.vault import about_secret
from godwit.store.records import encode

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms

LIMIT_BYTES = 1024
KEPT_S = 600
_TEXT = {"text/plain": {"schema": {"type": "string", "format": "password"}}}


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """The two routes."""

    @app.post(
        "/v1/secrets",
        status_code=201,
        summary="Hand in a secret; answers what to name in host.power.set within ten minutes",
        openapi_extra={"requestBody": {"content": _TEXT}},
    )
    async def secret(request: Request) -> dict[str, str]:
        text = await _receive(request)
        vault, snapshot = rooms.world.vault, rooms.cache.snapshot
        if not snapshot.powers:
            vault.create()
        check_keys(snapshot, vault.key_id)
        secret_id = secrets.token_hex(16)
        sealed = SealedSecret(sealed=vault.seal(text, about=about_secret(secret_id)))
        store = rooms.world.records.store
        lease = await store.lease_grant(KEPT_S)
        await store.put(keys.secret(secret_id), encode(sealed), lease=lease.id)
        return {"path": f"{SECRET}{secret_id}"}

    @app.get(
        "/v1/hosts/{name}/power",
        response_model=None,
        responses={200: {"model": PowerView}},
        summary="How a host's power is switched; never the password",
    )
    async def power(name: str) -> Response:
        snapshot = rooms.cache.snapshot
        if name not in snapshot.powers:
            known(snapshot.hosts.get(name), "host", name)
        return one(PowerView.of(name, device_of(snapshot, name)))


async def _receive(request: Request) -> str:
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > LIMIT_BYTES:
            raise InvalidRequest("a secret has at most 1024 bytes", hint="send the secret alone")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise InvalidRequest(
            "a secret is one line of text", hint="send its bytes as the body, without a line end"
        )
    return text
