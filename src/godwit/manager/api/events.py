"""``GET /v1/events``: the event stream; see ``godwit.manager.feed`` for what an id means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Header, Query
from starlette.responses import StreamingResponse

from godwit.model.errors import InvalidRequest
from godwit.wire.sse import MEDIA_TYPE

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """The one stream."""

    @app.get(
        "/v1/events",
        response_class=StreamingResponse,
        responses={200: {"content": {MEDIA_TYPE: {}}}},
        summary="What happens, as server-sent events; resume with Last-Event-ID",
    )
    async def events(
        since: Annotated[
            str | None, Query(description="an event id; 0 = all that is still known")
        ] = None,
        subject: Annotated[
            list[str] | None, Query(description="kind/name, for example vm/web; repeatable")
        ] = None,
        kind: Annotated[list[str] | None, Query(description="only these kinds")] = None,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        # The header is what a reader sends that comes back, so it goes before the query.
        start = _revision(last_event_id or since)
        stream = rooms.feed.stream(since=start, subjects=subject or (), kinds=kind or ())
        return StreamingResponse(
            stream, media_type=MEDIA_TYPE, headers={"cache-control": "no-store"}
        )


def _revision(text: str | None) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(
            f"{text!r} is not an event id", hint="send the id of an event, or 0 for all"
        )
    return int(text)
