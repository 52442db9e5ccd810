"""Routes of paths to volumes: lent to other hosts, and left or taken again by request."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route

from godwit.agent.desk import Desk
from godwit.agent.routes import Body, Handler, body_of, route
from godwit.model.base import Record, check_name
from godwit.model.errors import InvalidRequest, NotAllowed
from godwit.storage.lending import ExportAsk, ExportedAsk, WithdrawAsk
from godwit.wire.identity import HOST, MANAGER
from godwit.wire.server import peer_of


def volume_routes(desk: Desk) -> list[Route]:
    """Paths lent to other hosts, and volumes redirected by request."""

    def heard(request: Request, host: str) -> None:
        peer = peer_of(request.scope)
        if peer is None or peer.name != host:
            raise NotAllowed(f"{peer} does not speak for {host}", hint="")

    async def export(request: Request) -> Record:
        ask = ExportAsk.model_validate(await body_of(request))
        heard(request, ask.host)
        return await desk.exports.export(ask)

    async def withdraw(request: Request) -> Record:
        ask = WithdrawAsk.model_validate(await body_of(request))
        heard(request, ask.host)
        return await desk.exports.withdraw(ask)

    async def exported(request: Request) -> Record:
        ask = ExportedAsk.model_validate(await body_of(request))
        heard(request, ask.host)
        return await desk.exports.exported(ask)

    async def way(request: Request) -> Body:
        redirected = (await body_of(request)).get("redirected")
        if not isinstance(redirected, bool):
            raise InvalidRequest("redirected: true or false is expected", hint="say which")
        name = check_name(request.path_params["volume"])
        return await desk.redirects.plan(name, redirected=redirected)

    verbs: list[tuple[str, Handler]] = [
        ("export", export),
        ("withdraw", withdraw),
        ("exported", exported),
    ]
    return [
        *(route(f"/v1/peer/{verb}", "POST", handler, roles=(HOST,)) for verb, handler in verbs),
        route("/v1/volumes/{volume}/way", "POST", way, roles=(MANAGER,)),
    ]
