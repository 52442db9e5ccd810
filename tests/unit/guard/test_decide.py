"""What the guard does about a move without an agent: the whole table."""

from __future__ import annotations

import pytest

from godwit.guard.decide import DARK_LIMIT_S, DEVICE_PATIENCE_S, Act, Watch, decide

STATUSES = (
    "", "none", "setup", "active", "pre-switchover", "device", "completed", "failed",
    "cancelling", "cancelled", "postcopy-active", "postcopy-paused", "postcopy-recover", "acted",
)  # fmt: skip


def act(role: str, status: str, *, gone: float, since: float = 0.0) -> Act:
    watch = Watch(role=role, status=status, status_since=100.0 - since)
    return decide(watch, agent_gone_for=gone, now=100.0).act


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("role", ["source", "destination"])
def test_while_the_agent_lives_nothing_is_done(role: str, status: str) -> None:
    assert act(role, status, gone=0.0, since=1000) is Act.NOTHING


@pytest.mark.parametrize("status", STATUSES)
def test_a_destination_is_never_touched(status: str) -> None:
    assert act("destination", status, gone=60.0, since=60.0) is Act.NOTHING


@pytest.mark.parametrize("status", STATUSES)
def test_a_source_is_touched_only_while_it_is_dark_and_undecided(status: str) -> None:
    wanted = {"pre-switchover": Act.CANCEL, "device": Act.YANK}.get(status, Act.NOTHING)
    assert act("source", status, gone=0.1, since=60.0) is wanted


def test_the_last_pages_get_a_moment_before_their_stream_is_cut() -> None:
    assert act("source", "device", gone=0.1, since=DEVICE_PATIENCE_S - 0.1) is Act.WAIT
    assert act("source", "device", gone=0.1, since=DEVICE_PATIENCE_S) is Act.YANK


def test_a_hung_agent_keeps_a_vm_dark_no_longer_than_promised() -> None:
    from godwit.guard.decide import AGENT_SILENCE_S
    from godwit.guard.socket import LOOK_S

    assert AGENT_SILENCE_S + LOOK_S <= DARK_LIMIT_S
    assert max(AGENT_SILENCE_S, DEVICE_PATIENCE_S) + LOOK_S <= DARK_LIMIT_S


def test_every_act_explains_itself() -> None:
    for status in ("pre-switchover", "device"):
        watch = Watch(role="source", status=status, status_since=0.0)
        sentence = decide(watch, agent_gone_for=2.5, now=9.0).sentence
        assert "the agent is gone" in sentence
