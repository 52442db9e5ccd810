"""The last validation's report, read from the store: it is too large and too rare for the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.responses import Response

from godwit.manager.api.resources import one
from godwit.model import keys
from godwit.model.errors import NotFound
from godwit.model.validation import ValidationReport

if TYPE_CHECKING:
    from godwit.manager.api.app import Rooms


def add_routes(app: FastAPI, rooms: Rooms) -> None:
    """GET /v1/cluster/validation."""

    @app.get(
        "/v1/cluster/validation",
        response_model=None,
        responses={200: {"model": ValidationReport}},
        summary="The report of the last validation",
    )
    async def validation() -> Response:
        found = await rooms.world.records.get(keys.VALIDATION, ValidationReport)
        if found is None:
            raise NotFound("the cluster was never validated", hint="run: godwit cluster validate")
        return one(found.value)
