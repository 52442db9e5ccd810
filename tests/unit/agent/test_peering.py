"""What another agent's answers mean to the engine of a move."""

from __future__ import annotations

from typing import Any

import pytest

from godwit.agent.peering import HttpPeer
from godwit.model.errors import NotFound, TooOld
from godwit.wire.errors import PeerRefused
from godwit.wire.problem import Problem


class Answers:
    """A client whose server always refuses in this way."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    async def post(self, _path: str, _body: Any, *, deadline_s: float) -> Any:
        raise PeerRefused(self.problem)


def peer(status: int, code: str) -> HttpPeer:
    return HttpPeer(Answers(Problem(status=status, code=code, detail="no")))  # type: ignore[arg-type]


async def test_a_path_that_the_other_agent_lacks_is_a_matter_of_versions() -> None:
    with pytest.raises(TooOld, match=r"does not know what it is asked for \(ping\)") as caught:
        await peer(404, "http-404").ping("m-1", timeout=1.0)
    assert "older of the two hosts" in caught.value.hint


async def test_its_own_refusal_is_passed_on() -> None:
    with pytest.raises(NotFound, match="no"):
        await peer(404, "not-found").ping("m-1", timeout=1.0)
