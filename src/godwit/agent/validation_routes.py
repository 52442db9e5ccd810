"""Routes of a validation: facts, measurements, marks in volumes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route

from godwit.agent.routes import Handler, body_of, route
from godwit.agent.validation import Validation
from godwit.model.base import Record
from godwit.model.errors import InvalidRequest, NotAllowed
from godwit.model.validation_facts import FilesAsk, MeasureAsk, PathsAsk
from godwit.wire.identity import HOST, MANAGER
from godwit.wire.server import peer_of


def validation_routes(validation: Validation) -> list[Route]:
    """What the manager asks of a host, and what hosts ask of each other for it."""
    marks = validation.marks

    async def facts(_request: Request) -> Record:
        return await validation.probe()

    async def paths(request: Request) -> Record:
        return await validation.paths(PathsAsk.model_validate(await body_of(request)))

    async def measure(request: Request) -> Record:
        ask, peer = MeasureAsk.model_validate(await body_of(request)), peer_of(request.scope)
        if peer is None or peer.name != ask.host:
            raise NotAllowed(f"{peer} does not speak for {ask.host}", hint="")
        return await validation.listen(ask)

    async def files(request: Request) -> FilesAsk:
        return FilesAsk.model_validate(await body_of(request))

    async def write(request: Request) -> Record:
        return await marks.write(await files(request))

    async def read(request: Request) -> Record:
        return await marks.read(await files(request))

    async def lock(request: Request) -> Record:
        return await marks.lock(await files(request))

    async def observe(request: Request) -> Record:
        ask = await files(request)
        if len(ask.hosts) != 1:
            raise InvalidRequest("hosts: name the one that holds the locks", hint="one name")
        return await marks.observe(ask)

    async def clear(request: Request) -> None:
        await marks.clear(await files(request))

    verbs: list[tuple[str, Handler]] = [
        ("paths", paths),
        ("files/write", write),
        ("files/read", read),
        ("locks/hold", lock),
        ("locks/observe", observe),
        ("files/clear", clear),
    ]
    return [
        route("/v1/validation/facts", "GET", facts, roles=(MANAGER,)),
        *(route(f"/v1/validation/{verb}", "POST", act, roles=(MANAGER,)) for verb, act in verbs),
        route("/v1/peer/measure", "POST", measure, roles=(HOST,)),
    ]
