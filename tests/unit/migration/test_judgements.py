"""Whose is it, and what to do with what was found: the two pure tables, row by row."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from godwit.migration import recover
from godwit.migration.handover import Verdict
from godwit.migration.handover import judge as whose
from godwit.migration.recover import Action, Found
from godwit.model import ownership
from godwit.model.ownership import MoveIntent, Owner, OwnerState

INTENT = MoveIntent(id="m-1", method="live", source="h1", destination="h2")
FREE = Owner(host="h1", epoch=3, state=OwnerState.RUNNING)
BOUND = ownership.begin_move(FREE, INTENT)
COMMITTING = ownership.committing(BOUND, "m-1")
SWAPPED = ownership.swap(COMMITTING, "m-1")
PAGED = ownership.swap(COMMITTING, "m-1", postcopy=True)
DONE = ownership.finished(SWAPPED, "m-1")
GIVEN = ownership.gift_back(SWAPPED, "m-1")
ENDED = ownership.stopped(SWAPPED)


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (BOUND, Verdict.SOURCE),
        (COMMITTING, Verdict.SOURCE),
        (FREE, Verdict.SOURCE),  # rolled back already
        (SWAPPED, Verdict.DESTINATION),
        (PAGED, Verdict.DESTINATION),
        (DONE, Verdict.DESTINATION),
        (ENDED, Verdict.DESTINATION),
        (GIVEN, Verdict.SOURCE),
        (None, Verdict.NEITHER),
        (ownership.begin_move(GIVEN, INTENT.but(id="m-2")), Verdict.NEITHER),
        (
            ownership.begin_move(DONE, MoveIntent(id="m-9", method="live", source="h2",
                                                  destination="h3")),
            Verdict.NEITHER,
        ),
        (FREE.but(host="h3"), Verdict.NEITHER),
        (FREE.but(epoch=4), Verdict.NEITHER),
        (FREE.but(epoch=2), Verdict.NEITHER),
        (SWAPPED.but(epoch=5), Verdict.NEITHER),
        (SWAPPED.but(epoch=3), Verdict.NEITHER),
        (Owner(), Verdict.NEITHER),
    ],
)  # fmt: skip
def test_whose_the_vm_is(record: Owner | None, verdict: Verdict) -> None:
    assert whose(record, INTENT, epoch=3) is verdict


def found(role: Literal["started", "incoming"], epoch: int, **more: Any) -> Found:
    fields: dict[str, Any] = {
        "migration": "m-1" if role == "incoming" else "",
        "qemu_status": "running" if role == "started" else "inmigrate",
        "stream_status": "none",
    }
    return Found(role=role, epoch=epoch, **{**fields, **more})


OLD = found("started", 3)
COPY = found("incoming", 4)
LOADED = found("incoming", 4, qemu_status="paused", stream_status="completed")
RAN = found("incoming", 4, qemu_status="running", stream_status="completed")
LET_GO = found("started", 3, qemu_status="postmigrate", stream_status="completed")

ROWS: list[tuple[str, str, Owner | None, Found, Action]] = [
    # On the source.
    ("nothing moves", "h1", FREE, OLD, Action.ADOPT),
    ("a paused vm", "h1", FREE, found("started", 3, qemu_status="paused"), Action.ADOPT),
    ("rolled back, cont not sent", "h1", FREE, LET_GO, Action.ADOPT),
    ("in pre-copy", "h1", BOUND, found("started", 3, stream_status="active"), Action.BACK_OUT),
    ("dark", "h1", COMMITTING, found("started", 3, qemu_status="finish-migrate",
                                     stream_status="pre-switchover"), Action.BACK_OUT),
    ("let go, not swapped", "h1", COMMITTING, LET_GO, Action.BACK_OUT),
    ("swapped", "h1", SWAPPED, LET_GO, Action.GO_ON_AS_SOURCE),
    ("a page source", "h1", PAGED, found("started", 3, stream_status="postcopy-active"),
     Action.GO_ON_AS_SOURCE),
    ("given back meanwhile", "h1", GIVEN, LET_GO, Action.ADOPT),
    ("given back, yet it runs", "h1", GIVEN, OLD, Action.END),
    ("moved on for good", "h1", DONE, LET_GO, Action.END),
    ("ended over there", "h1", ENDED, LET_GO, Action.END),
    ("fenced, started elsewhere", "h1", Owner(host="h3", epoch=9, state=OwnerState.RUNNING), OLD,
     Action.END),
    ("an older life", "h1", FREE.but(epoch=5, state=OwnerState.STARTING), LET_GO, Action.END),
    ("nobody knows it", "h1", None, OLD, Action.END),
    # On the destination.
    ("memory was coming in", "h2", BOUND, found("incoming", 4, stream_status="active"), Action.END),
    ("waiting for memory", "h2", BOUND, COPY, Action.END),
    ("holds the whole vm", "h2", COMMITTING, LOADED, Action.GO_ON_AS_DESTINATION),
    ("post-copy, not swapped yet", "h2", COMMITTING, found("incoming", 4, qemu_status="paused",
                                                          stream_status="postcopy-active"),
     Action.GO_ON_AS_DESTINATION),
    ("rolled back", "h2", FREE, LOADED, Action.END),
    ("another move by now", "h2", ownership.begin_move(FREE, INTENT.but(id="m-2")), LOADED,
     Action.END),
    ("swapped to us", "h2", SWAPPED, LOADED, Action.GO_ON_AS_DESTINATION),
    ("swapped, quick", "h2", SWAPPED, COPY, Action.GO_ON_AS_DESTINATION),
    ("it runs, nobody was told", "h2", SWAPPED, RAN, Action.GO_ON_AS_DESTINATION),
    ("it runs, and all is done", "h2", DONE, found("started", 4), Action.ADOPT),
    ("it runs, role not written yet", "h2", DONE, RAN, Action.ADOPT),
    ("given back", "h2", GIVEN, LOADED, Action.END),
    ("post-copy, swapped to us", "h2", PAGED, found("incoming", 4, qemu_status="paused",
                                                    stream_status="postcopy-active"),
     Action.GO_ON_AS_DESTINATION),
]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "record", "process", "action"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS]
)
def test_what_a_restarted_agent_does(
    host: str, record: Owner | None, process: Found, action: Action
) -> None:
    verdict = recover.judge(record, process, host=host)
    assert verdict.action is action
    assert verdict.sentence


def test_no_two_hosts_may_run_what_they_find() -> None:
    """For every record, whatever is found on both hosts: at most one side may let it run."""
    runs = {Action.ADOPT, Action.BACK_OUT}
    records = [FREE, BOUND, COMMITTING, SWAPPED, PAGED, DONE, GIVEN, ENDED]
    for record in records:
        here = {recover.judge(record, process, host="h1").action for process in (OLD, LET_GO)}
        there = {
            recover.judge(record, process, host="h2").action
            for process in (COPY, LOADED, RAN, found("started", 4))
        }
        both = here & runs and there & runs
        assert not both, record
