"""Event streams: encoding, resume, slow readers, and a server that goes and comes back."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.wire.conftest import App, Pki, running

from godwit.wire.http import PeerClient, PeerRefused, PeerUnreachable
from godwit.wire.server import ServerTls
from godwit.wire.sse import EventHub, SseEvent, SseParser

_WORD = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=8)
_DATA = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=30)
_EVENTS = st.lists(
    st.builds(
        SseEvent,
        data=_DATA,
        event=_WORD.filter(lambda w: w[0] != " "),
        id=_WORD.filter(lambda w: w[0] != " "),
    ),
    max_size=6,
)


@given(events=_EVENTS, cuts=st.lists(st.integers(1, 12), max_size=60), crlf=st.booleans())
def test_events_survive_any_cutting(events: list[SseEvent], cuts: list[int], crlf: bool) -> None:
    raw = b": hello\n\n".join([b"", *(event.encode() for event in events)])
    raw = raw.replace(b"\n", b"\r\n") if crlf else raw
    parser, found, sizes = SseParser(), [], iter(cuts)
    while raw:
        size = next(sizes, 7)
        found += parser.feed(raw[:size])
        raw = raw[size:]
    assert found == events


def test_an_id_cannot_smuggle_a_second_event() -> None:
    with pytest.raises(ValueError, match="single lines"):
        SseEvent(data="x", id="1\n\ndata: forged").encode()


def test_an_endless_line_is_refused() -> None:
    parser = SseParser()
    assert list(parser.feed(b"x" * 4_000_000)) == []
    with pytest.raises(ValueError, match="4 MiB"):
        list(parser.feed(b"x" * 1_000_000))


async def test_resume_gives_exactly_what_was_missed() -> None:
    hub = EventHub(capacity=4)
    for number in range(4):
        hub.publish(str(number), event_id=f"id{number}")
    follow = hub.follow(last_event_id="id1")
    assert [(await anext(follow)).data for _ in range(2)] == ["2", "3"]  # type: ignore[union-attr]
    hub.publish("4", event_id="id4")
    assert (await anext(follow)).id == "id4"  # type: ignore[union-attr]
    hub.close()
    assert [event async for event in follow] == []


async def test_an_unknown_or_evicted_id_is_told_to_start_anew() -> None:
    hub = EventHub(capacity=2)
    for number in range(4):
        hub.publish(str(number), event_id=f"id{number}")
    for lost in ("id0", "of another life"):
        event = await anext(hub.follow(last_event_id=lost))
        assert event is not None
        assert (event.event, event.id) == ("reset", "id3")


async def test_a_slow_reader_is_reset_and_holds_nothing() -> None:
    hub = EventHub(capacity=3)
    follow = hub.follow(idle_s=0.01)
    assert await anext(follow) is None  # idle
    for number in range(10):
        hub.publish(str(number))
    first = await anext(follow)
    assert first is not None
    assert first.event == "reset"
    hub.publish("after")
    assert (await anext(follow)).data == "after"  # type: ignore[union-attr]
    assert len(hub._ring) == len(hub._positions) == 3


async def test_a_stream_survives_the_restart_of_its_server(pki: Pki) -> None:
    app, tls = App(), ServerTls(pki.identity("host", "host1"), {"host"})
    seen: list[str] = []

    async with running(app, tls) as (server, url), PeerClient(url, tls=pki.client()) as client:
        events = client.events("/events", last_event_id="0")
        app.hub.publish("zero", event_id="0")
        app.hub.publish("one", event_id="1")
        seen.append((await anext(events)).data)
        async with asyncio.timeout(1.5):  # an open stream does not hold up the stop
            await server.stop(grace_s=5)
        app.hub.publish("two", event_id="2")
        async with running(app, tls, port=int(url.rpartition(":")[2])):
            async with asyncio.timeout(5):
                seen.append((await anext(events)).data)
            await events.aclose()
    assert seen == ["one", "two"]
    assert app.resumed_from == ["0", "1"]


async def test_keepalives_hold_a_quiet_stream_and_silence_breaks_it(pki: Pki) -> None:
    app, tls = App(), ServerTls(pki.identity("host", "host1"), {"host"})
    async with running(app, tls) as (_, url), PeerClient(url, tls=pki.client()) as client:
        # The server says something every 0.2 s: far more often than the patient one asks for.
        patient = asyncio.ensure_future(anext(client.events("/events", idle_s=2.0)))
        await app.streams(1)
        await asyncio.wait({patient}, timeout=2.5)
        assert app.resumed_from == [None]
        hasty = asyncio.ensure_future(anext(client.events("/events", idle_s=0.05)))
        await app.streams(3)  # silence broke its first one
        for one in (patient, hasty):
            one.cancel()
            await asyncio.wait({one})


async def test_following_gives_up_when_it_cannot_begin(pki: Pki) -> None:
    app, tls = App(), ServerTls(pki.identity("host", "host1"), {"host"})
    async with running(app, tls) as (server, url), PeerClient(url, tls=pki.client()) as client:
        with pytest.raises(PeerRefused):
            await anext(client.events("/fail"))
        await server.stop()
        with pytest.raises(PeerUnreachable):
            await anext(client.events("/events"))
