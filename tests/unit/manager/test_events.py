"""The event stream: order, ids, resuming on the same manager and on another."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from godwit.manager.cache import Change
from godwit.manager.feed import AT_ONCE, Feed
from godwit.manager.keyspace import place_of
from godwit.model import keys
from godwit.model.event import Event
from godwit.model.migration import Migration, MoveState, Progress, Stage
from godwit.wire.sse import KEEPALIVE, SseEvent, SseParser


async def read(api: Any, count: int, **options: Any) -> list[Any]:
    found = []
    async with asyncio.timeout(5), contextlib.aclosing(api.events("/v1/events", **options)) as feed:
        async for event in feed:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_a_task_is_told_live_and_again_from_the_start(api: Any) -> None:
    reader = asyncio.create_task(read(api.api, 3))
    await asyncio.sleep(0.1)  # the reader has no sign for "connected" to wait for
    await api.make_vm("web")
    live = await reader
    assert [event.event for event in live] == ["task.updated", "task.updated", "vm.created"]
    told = [Event.model_validate_json(event.data) for event in live]
    assert told[0].data["task"]["state"] == "running"
    assert told[2].subject == "vm/web"
    ids = [int(event.id) for event in live]
    assert ids == sorted(ids)
    again = await read(api.api, 1, query={"since": 0, "kind": "vm.created"})
    assert json.loads(again[0].data)["id"] == told[2].id


async def test_resume_loses_nothing_and_other_replicas_agree(cluster: Any) -> None:
    async with cluster.serve() as api:
        await cluster.make_vm("web", start="host1")
        await cluster.act("POST", "/v1/vms/web/actions/migrate", {"to": "host2"})
        known = (await cluster.store.range(keys.ROOT)).revision
        everything = await read(api, 12, query={"since": 0})
        ids = [event.id for event in everything]
        assert [int(i) for i in ids] == sorted(int(i) for i in ids)
        for resume_at in sorted(set(ids[:-1])):
            # The item that carries an id ends its revision; what follows is what was missed.
            ended = ids.index(resume_at)
            rest = await read(api, 1, last_event_id=resume_at)
            assert rest[0].data == everything[ended + 1].data
    assert int(everything[-1].id) <= known
    # A new manager has no recent changes in memory: it answers the last state of each record.
    async with cluster.serve() as api:
        said = await read(api, 5, query={"since": 0, "subject": "vm/web"})
        kinds = [event.event for event in said]
        assert kinds.count("vm.created") == 1
        moves = [json.loads(e.data) for e in said if e.event.startswith("migration.")]
        assert moves[0]["data"]["migration"]["state"] == "completed"
        last = json.loads(said[-1].data)
        assert last["data"]["task"]["state"] == "completed"
        assert last["id"].startswith("t-")


async def test_progress_and_stages_of_a_move_are_told(api: Any) -> None:
    await api.make_vm("web", start="host1")
    reader = asyncio.create_task(read(api.api, 4, query={"subject": "migration/m-1"}))
    await asyncio.sleep(0.1)
    records = api.records
    move = Migration(id="m-1", vm="web", source="host1", destination="host2", log=("why",))
    revision = await records.cas(keys.migration("m-1"), move, 0)
    for percent, stage in ((1, Stage.SETUP), (30, Stage.PRECOPY), (60, Stage.PRECOPY)):
        progress = Progress(stage=stage, percent=percent, sentence=f"{percent} %")
        move = move.but(state=MoveState.RUNNING, progress=progress)
        revision = await records.cas(keys.migration("m-1"), move, revision)
    events = await reader
    assert [e.event for e in events] == ["migration.stage"] * 3 + ["migration.progress"]
    last = Event.model_validate_json(events[-1].data)
    assert last.data["migration"]["progress"]["percent"] == 60
    assert "log" not in last.data["migration"], "bulky parts are read from the record"
    Migration.model_validate(last.data["migration"])


def event_change(revision: int, name: str, **options: Any) -> Change:
    key = keys.event(name)
    event = Event(id=name, time=1.0, kind="test.one", subject="vm/a", message=name)
    place = place_of(key)
    assert place is not None
    return Change(revision, key, place, None, event, **options)


async def collect(feed: Feed, count: int, **options: Any) -> list[Any]:
    parser, found = SseParser(), []
    stream = feed.stream(**options)
    async with asyncio.timeout(5), contextlib.aclosing(stream):
        async for chunk in stream:
            found += list(parser.feed(chunk))
            if len(found) >= count:
                return found
    return found


async def test_of_one_revision_only_the_last_item_moves_the_resume_point() -> None:
    feed = Feed(now=lambda: 0.0)
    feed.take((event_change(7, "before"),))
    feed.take((event_change(9, "a"), event_change(9, "b")))
    found = await collect(feed, 3, since=0)
    assert [(e.id, json.loads(e.data)["id"]) for e in found] == [
        ("7", "before"),
        ("7", "a"),
        ("9", "b"),
    ]
    # A reader cut off after "a" resumes at 7 and sees "a" again rather than losing "b".
    again = await collect(feed, 2, since=7)
    assert [json.loads(e.data)["id"] for e in again] == ["a", "b"]


async def test_a_slow_reader_is_sent_away_and_finds_everything_on_return() -> None:
    feed = Feed(now=lambda: 0.0, capacity=4)
    feed.take((event_change(1, "e00"),))
    stream = feed.stream()
    hello = await anext(stream)
    assert b"id: 1\n" in hello
    for number in range(2, 12):
        feed.take((event_change(number, f"e{number:02}"),))
    assert [chunk async for chunk in stream] == [], "it was overtaken"
    found = await collect(feed, 10, since=1)
    assert [e.id for e in found] == [str(number) for number in range(2, 12)]


async def test_silence_is_filled_with_keepalives() -> None:
    feed = Feed(now=lambda: 0.0, keepalive_s=0.01)
    stream = feed.stream()
    await anext(stream)
    assert await anext(stream) == KEEPALIVE
    feed.close()
    assert [chunk async for chunk in stream] == []


async def test_an_item_is_made_once_however_many_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    encode = SseEvent.encode

    def counted(event: SseEvent) -> bytes:
        made.append(event.id)
        return encode(event)

    monkeypatch.setattr(SseEvent, "encode", counted)
    feed = Feed(now=lambda: 0.0)
    streams = [feed.stream() for _ in range(50)]
    for stream in streams:
        await anext(stream)
    feed.take((event_change(5, "a"),))
    told = {await anext(stream) for stream in streams}
    assert len(told) == 1
    assert made == ["5"]


async def test_what_came_together_goes_out_together() -> None:
    feed = Feed(now=lambda: 0.0)
    stream = feed.stream(kinds={"test.one"})
    await anext(stream)
    for number in range(1, AT_ONCE + 11):
        feed.take((event_change(number, f"e{number:03}"),))
    parser = SseParser()
    first, second = list(parser.feed(await anext(stream))), list(parser.feed(await anext(stream)))
    assert (len(first), len(second)) == (AT_ONCE, 10)
    assert [int(event.id) for event in (*first, *second)] == list(range(1, AT_ONCE + 11))
