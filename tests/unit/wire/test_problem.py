"""Errors on the wire: one shape, nothing lost, anything readable."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.testclient import TestClient

from godwit.model.errors import ALL, GodwitError, NotFound
from godwit.wire.problem import MEDIA_TYPE, Problem, problem_handler


def test_every_error_survives_the_wire() -> None:
    for kind in ALL:
        error = kind("web is gone.", hint="Look again.", vm="web")
        sent = Problem.from_error(error)
        read = Problem.from_answer(status=sent.status, content_type=MEDIA_TYPE, body=sent.to_json())
        assert read == sent
        back = read.to_error()
        assert type(back) is kind
        assert (back.message, back.hint, back.context) == (
            error.message,
            error.hint,
            {"vm": "web"},
        )


@given(
    body=st.one_of(
        st.binary(max_size=50),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: st.dictionaries(
                st.sampled_from(["code", "detail", "hint", "status", "x"]), inner
            ),
            max_leaves=5,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_answer_is_some_problem(body: bytes) -> None:
    problem = Problem.from_answer(status=502, content_type="application/json", body=body)
    assert problem.status == 502
    assert problem.code
    assert problem.detail is not None
    assert isinstance(problem.to_error(), GodwitError)


def test_an_application_answers_with_problems() -> None:
    def broken(_request: Request) -> None:
        raise NotFound("no VM named web.", hint="See vm list.")

    def describe(error: Exception) -> Problem:
        assert isinstance(error, GodwitError)
        return Problem.from_error(error)

    app = Starlette(exception_handlers={NotFound: problem_handler(describe)})
    app.add_route("/x", broken)
    with TestClient(app) as client:
        answer = client.get("/x")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.json()["hint"] == "See vm list."
