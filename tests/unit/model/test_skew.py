"""Daemons of different versions: what older ones wrote is read, what newer ones write is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from godwit.model import ownership
from godwit.model.base import Record, Value
from godwit.model.errors import TooOld
from godwit.model.host import HostState, HostView
from godwit.model.membership import Renewal
from godwit.model.ownership import MoveIntent, MovePhase, Owner, OwnerState, Restarts, SavedState
from godwit.model.skew import (
    LEVEL,
    Speaks,
    behind,
    common_level,
    newest,
    our_own,
    supported,
    unknown_verb,
)
from godwit.model.vm import VmState, VmStatus

from .wire_kinds import GOLDEN, RELEASE, all_kinds, all_words, every_record, nested, with_news

FILES = sorted(GOLDEN.glob("*/*.json"))
CHANGED: dict[Any, Any] = {str: "b", int: 4, float: 4.5, bool: False}
NEWS = {"of": ["a", "later", {"version": None}], "at": 1.5}


def kept(before: Any, after: Any, *, where: str = "") -> list[str]:
    """What of ``before`` is not in ``after`` as it was; more is allowed."""
    if isinstance(before, dict) and isinstance(after, dict):
        lost = [f"{where}.{name} is gone" for name in before.keys() - after.keys()]
        for name in before.keys() & after.keys():
            lost += kept(before[name], after[name], where=f"{where}.{name}")
        return lost
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for number, (one, other) in enumerate(zip(before, after, strict=True))
            for line in kept(one, other, where=f"{where}[{number}]")
        ]
    return [] if before == after else [f"{where} was {before!r} and is {after!r}"]


def stored(record: Record) -> Any:
    """As `godwit.store.records.encode` writes it."""
    return json.loads(record.model_dump_json(exclude_none=True))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_what_a_release_wrote_is_read_and_written_back(file: Path) -> None:
    kind, text = all_kinds()[file.stem], file.read_text()
    assert kept(json.loads(text), stored(kind.model_validate_json(text))) == []


def test_every_kind_has_its_example() -> None:
    missing = [name for name in all_kinds() if not (GOLDEN / RELEASE / f"{name}.json").exists()]
    assert missing == [], "run: .venv/bin/python tests/unit/model/wire_kinds.py"
    assert our_own().version.startswith(f"{RELEASE}."), "a new release: set RELEASE, write its own"


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("words-*.json")), ids=lambda file: file.stem)
def test_no_word_of_a_release_is_taken_away(file: Path) -> None:
    today = all_words()
    for field, words in json.loads(file.read_text()).items():
        assert set(words) <= set(today.get(field, ())), field


@pytest.mark.parametrize("name", sorted(all_kinds()))
def test_fields_of_the_future_survive_a_change_by_us(name: str) -> None:
    kind = all_kinds()[name]
    full = json.loads((GOLDEN / RELEASE / f"{name}.json").read_text())
    future = with_news(full, kind, {"of_the_future": NEWS})
    plain = [one for one, info in kind.model_fields.items() if info.annotation in CHANGED]
    changes = {one: CHANGED[kind.model_fields[one].annotation] for one in plain[:1]}
    written = stored(kind.model_validate(future).but(**changes))
    assert kept({**future, **changes}, written) == []
    assert json.dumps(written).count("of_the_future") == json.dumps(future).count("of_the_future")


def test_no_request_is_part_of_a_record() -> None:
    """A request refuses what it does not know: a record with one in it would be refused whole."""
    odd = {(kind, part) for kind in every_record() for part in nested(kind)}
    assert {pair for pair in odd if not issubclass(pair[1], Record)} == set()


def test_what_is_strict_is_a_request() -> None:
    strict, todo = set(), list(Value.__subclasses__())
    while todo:
        kind = todo.pop()
        if not issubclass(kind, Record) and kind.__module__.startswith("godwit."):
            todo += kind.__subclasses__()
            strict.add(kind)
    answers = {kind.__name__ for kind in strict if "kind" not in kind.model_fields}
    assert answers == {"CutAsk", "NewToken", "JoinAsk", "NewDisk", "WithRules", "_Empties"}


MOVE = MoveIntent(id="m1", method="live", source="h1", destination="h2")
NEW_OWNER = Owner.model_validate({"host": "h1", "epoch": 3, "state": "running", "later": NEWS})
MOVING = NEW_OWNER.but(migration=MoveIntent.model_validate({**dict(MOVE), "later": NEWS}))
MOVED = MOVING.but(host="h2", epoch=4)


@pytest.mark.parametrize(
    "after",
    [
        ownership.power_on(NEW_OWNER.but(state=OwnerState.STOPPED), host="h2"),
        ownership.running(NEW_OWNER),
        ownership.stopped(NEW_OWNER),
        ownership.saved(NEW_OWNER, SavedState(path="/x", epoch=3, disk_ids=())),
        ownership.begin_move(NEW_OWNER, MOVE),
        ownership.committing(MOVING, "m1"),
        ownership.swap(MOVING, "m1"),
        ownership.finished(MOVED, "m1"),
        ownership.rolled_back(MOVING, "m1"),
        ownership.gift_back(MOVED, "m1"),
        ownership.fail_over(NEW_OWNER, host="h2"),
    ],
)
def test_no_step_of_an_ownership_loses_what_is_newer(after: Owner) -> None:
    assert stored(after)["later"] == NEWS
    if after.migration is not None and after.migration != MOVE:
        assert "later" in stored(after)["migration"]


def test_a_failover_ends_all_that_was_bound_and_power_on_keeps_the_image() -> None:
    image = SavedState(path="/x", epoch=3, disk_ids=())
    lost = MOVING.but(paused=True, saved=image, unlock=True)
    after = ownership.fail_over(lost, host="h2")
    assert (after.migration, after.saved, after.paused, after.unlock) == (None, None, False, True)
    assert (after.host, after.epoch, after.state) == ("h2", 4, OwnerState.STARTING)
    on = ownership.power_on(NEW_OWNER.but(state=OwnerState.SAVED, saved=image), host="h2")
    assert (on.saved, on.epoch, on.paused) == (image, 4, False)


def test_counted_restarts_keep_what_is_newer() -> None:
    times = Restarts.model_validate({"times": [1.0], "later": NEWS}).with_one(5000.0)
    assert times.times == (5000.0,)
    assert "later" in stored(times)


@pytest.mark.parametrize(
    "fields",
    [{"state": "floating"}, {"migration": {**dict(MOVE), "phase": "mirrored"}}],
)
def test_a_word_that_is_acted_on_is_not_guessed(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Owner.model_validate({"host": "h1", "epoch": 3, **fields})


def test_a_word_that_is_only_shown_is_shown() -> None:
    status = VmStatus.model_validate({"state": "dreaming", "host": "h1"})
    assert status.state == "dreaming"
    assert status.state not in list(VmState)
    assert stored(status.but(reason="x"))["state"] == "dreaming"
    row = {"name": "h1", "state": "asleep", "vms": 0, "cpus": 1, "memory_bytes": 1}
    assert HostView.model_validate({**row, "memory_free_bytes": 0}).state == "asleep"
    assert HostState("up") is HostState.UP
    with pytest.raises(ValidationError):
        HostView.model_validate({**row, "memory_free_bytes": 0, "state": 7})


def test_a_renewal_in_newer_words_is_a_renewal_and_proves_nothing() -> None:
    said = {"boot_id": "b", "number": 9, "guard": "armed-twice", "watchdog": True}
    assert Renewal.model_validate(said).guard == "unarmed"
    assert Renewal.model_validate({**said, "guard": "armed"}).guard == "armed"


def speaks(version: str, level: int = LEVEL) -> Speaks:
    return Speaks(version=version, level=level)


def test_one_minor_version_apart_is_supported_either_way() -> None:
    assert supported(speaks("0.1.0"), speaks("0.1.9"))
    assert supported(speaks("0.2.0"), speaks("0.1.0"))
    assert supported(speaks("0.1.0"), speaks("0.2.0rc1"))
    assert not supported(speaks("0.1.0"), speaks("0.3.0"))
    assert not supported(speaks("1.1.0"), speaks("0.1.0"))
    assert supported(Speaks(), speaks("0.3.0"))  # nobody knows


def test_who_is_behind_is_told_how_far() -> None:
    assert behind(speaks("0.2.0"), speaks("0.2.0")) == ""
    assert behind(speaks("0.2.0"), speaks("0.1.0")) == ""
    assert behind(speaks("0.1.0"), speaks("0.2.0")) == "it is Godwit 0.1.0, older than Godwit 0.2.0"
    assert behind(speaks("0.1.0"), speaks("0.3.1")) == (
        "it is Godwit 0.1.0, more than one minor version behind Godwit 0.3.1: not supported"
    )
    old = speaks("0.1.0", level=0)
    assert behind(old, speaks("0.1.0")) == "it is an older build of Godwit 0.1.0"
    assert "tells no version" in behind(Speaks(), speaks("0.1.0"))


def test_the_newest_is_the_goal_and_the_lowest_level_holds() -> None:
    said = {"a": speaks("0.1.0", 0), "b": speaks("0.2.0", 2), "c": speaks("0.2.0", 1)}
    assert newest(said) == said["b"]
    assert common_level(said) == 0
    assert common_level({"b": said["b"], "c": said["c"]}) == 1
    assert newest({}) == our_own()


def test_an_unknown_verb_names_who_is_to_be_upgraded() -> None:
    error = unknown_verb("h2", "POST /v1/x", its=speaks("0.1.0"), ours=speaks("0.2.0"))
    assert isinstance(error, TooOld)
    assert (error.code, error.exit_code, error.http_status) == ("too-old", 4, 409)
    assert "too old for this (POST /v1/x): it is Godwit 0.1.0" in error.message
    assert "upgrade Godwit on h2" in error.hint
    build = unknown_verb("h2", "x", its=speaks("0.2.0", 0), ours=speaks("0.2.0"))
    assert "an older build of Godwit 0.2.0" in build.message
    ahead = unknown_verb("h2", "x", its=speaks("0.3.0"), ours=speaks("0.2.0"))
    assert "no longer knows x" in ahead.message
    assert "other hosts and managers" in ahead.hint
    assert MovePhase.INTENT.value == "intent"
