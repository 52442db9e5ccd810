"""Paths to requests: what each address of etcd's gateway does here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from godwit.store import errors
from godwit.store.codec import dump, text64
from godwit.store.daemon import messages
from godwit.store.daemon.feed import Subscription
from godwit.store.daemon.messages import Fields, Json, read_delete, read_get, read_put, read_txn
from godwit.store.daemon.service import Service
from godwit.store.engine import EngineError

# The oldest release whose API this is; clients choose their paths by it.
API_VERSION = "3.4.0"
_PROGRESS_S = 10.0


class Gateway:
    """Answers requests with JSON; ``watch`` answers with a stream of lines."""

    def __init__(self, service: Service) -> None:
        self._service = service
        calls: dict[str, Callable[[Json], Awaitable[Json]]] = {
            "/v3/kv/range": self._range,
            "/v3/kv/put": self._put,
            "/v3/kv/deleterange": self._delete,
            "/v3/kv/txn": self._txn,
            "/v3/kv/compaction": self._compact,
            "/v3/lease/grant": self._grant,
            "/v3/lease/revoke": self._revoke,
            "/v3/kv/lease/revoke": self._revoke,
            "/v3/lease/keepalive": self._keepalive,
            "/v3/lease/timetolive": self._time_to_live,
            "/v3/kv/lease/timetolive": self._time_to_live,
            "/v3/maintenance/status": self._status,
        }
        self._calls = calls

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """HTTP status and body for anything but a watch."""
        if method == "GET" and path == "/health":
            return 200, dump({"health": "true"})
        if method == "GET" and path == "/version":
            return 200, dump({"etcdserver": API_VERSION, "etcdcluster": API_VERSION})
        call = self._calls.get(path)
        if call is None or method != "POST":
            return 404, dump({"error": "Not Found", "message": "Not Found", "code": 5})
        try:
            return 200, dump(await call(messages.parse(body)))
        except EngineError as error:
            status, reply = messages.failure(error)
            return status, dump(reply)

    def _head(self, revision: int | None = None) -> Json:
        engine = self._service.engine
        return messages.header(
            self._service.identity, engine.revision if revision is None else revision
        )

    async def _range(self, body: Json) -> Json:
        if int(body.pop("revision", 0)):
            raise EngineError(errors.UNIMPLEMENTED, "reads of the past are not implemented here")
        step, answer, serializable = read_get(body)
        found, revision = await self._service.get(step, serializable=serializable)
        return {"header": self._head(revision)} | answer(found)

    async def _put(self, body: Json) -> Json:
        step, answer = read_put(body)
        outcome = await self._service.txn((), (step,))
        return {"header": self._head(outcome.revision)} | answer(outcome.answers[0])

    async def _delete(self, body: Json) -> Json:
        step, answer = read_delete(body)
        outcome = await self._service.txn((), (step,))
        return {"header": self._head(outcome.revision)} | answer(outcome.answers[0])

    async def _txn(self, body: Json) -> Json:
        conditions, success, failure, answer = read_txn(body)
        outcome = await self._service.txn(conditions, success, failure)
        return answer(outcome, self._head(outcome.revision))

    async def _compact(self, body: Json) -> Json:
        fields = Fields(body)
        revision = fields.number("revision")
        fields.flag("physical")
        fields.done()
        await self._service.compact(revision)
        return {"header": self._head()}

    async def _grant(self, body: Json) -> Json:
        fields = Fields(body)
        ttl, lease_id = fields.number("TTL"), fields.number("ID")
        fields.done()
        chosen = await self._service.grant(lease_id, ttl)
        return {"header": self._head(), "ID": str(chosen), "TTL": str(ttl)}

    async def _revoke(self, body: Json) -> Json:
        await self._service.revoke(_lease_id(body))
        return {"header": self._head()}

    async def _keepalive(self, body: Json) -> Json:
        lease_id = _lease_id(body)
        result = {"header": self._head(), "ID": str(lease_id)}
        if ttl := self._service.keepalive(lease_id):
            result["TTL"] = str(ttl)
        return {"result": result}

    async def _time_to_live(self, body: Json) -> Json:
        fields = Fields(body)
        lease_id, keys = fields.number("ID"), fields.flag("keys")
        fields.done()
        left, granted = self._service.time_to_live(lease_id)
        answer = {"header": self._head(), "ID": str(lease_id), "TTL": str(left)}
        if granted:
            answer["grantedTTL"] = str(granted)
        if keys and granted:
            answer["keys"] = [text64(key) for key in self._service.engine.lease_keys(lease_id)]
        return answer

    async def _status(self, body: Json) -> Json:
        identity = self._service.identity
        return {
            "header": self._head(),
            "version": API_VERSION,
            "dbSize": str(self._service.size()),
            "leader": str(identity.member_id),
            "raftTerm": str(identity.term),
        }

    # -- watches

    def subscribe(self, body: bytes) -> WatchStream:
        """The stream of one watch. Raises EngineError when the request is wrong."""
        request = Fields(messages.parse(body))
        fields = Fields(request.raw("create_request", {}))
        request.done()
        key, end = fields.data("key"), fields.data("range_end")
        start = fields.number("start_revision")
        progress, prev = fields.flag("progress_notify"), fields.flag("prev_kv")
        fields.flag("fragment")
        fields.done()
        if not key:
            raise messages.refuse("key is not provided")
        feed = self._service.feed
        place = Subscription(key, end, start if start > 0 else feed.revision + 1)
        return WatchStream(self._service, place, progress=progress, prev=prev)


class WatchStream:
    """What one watch tells its client, line by line."""

    def __init__(
        self, service: Service, place: Subscription, *, progress: bool, prev: bool
    ) -> None:
        self.place = place
        self.closed = False
        self._service = service
        self._progress = progress
        self._prev = prev

    def close(self) -> None:
        """The client went away, or the daemon ends."""
        self.closed = True
        self.place.wake.set()

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Messages until the watch is closed or its history is gone."""
        feed, place = self._service.feed, self.place
        feed.add(place)
        try:
            yield self._line({"created": True}, feed.revision)
            while not self.closed:
                place.wake.clear()
                if place.next < self._service.engine.compact_revision:
                    gone = str(self._service.engine.compact_revision)
                    yield self._line({"canceled": True, "compact_revision": gone}, feed.revision)
                    return
                if place.next <= feed.revision:
                    for revision, events in feed.take(place):
                        listed = ",".join(event.text(prev=self._prev) for event in events)
                        yield self._line({}, revision, f',"events":[{listed}]')
                elif await self._quiet():
                    yield self._line({}, place.next - 1)
        finally:
            feed.remove(place)

    async def _quiet(self) -> bool:
        """Wait for news; true when there was none for so long that progress is due."""
        if not self._progress:
            await self.place.wake.wait()
            return False
        try:
            async with asyncio.timeout(_PROGRESS_S):
                await self.place.wake.wait()
        except TimeoutError:
            return self.place.next == self._service.feed.revision + 1
        return False

    def _line(self, fields: Json, revision: int, events: str = "") -> bytes:
        head = messages.header(self._service.identity, revision)
        body = dump({"header": head} | fields)[:-1]
        return b'{"result":' + body + events.encode("ascii") + b"}}\n"


def _lease_id(body: Any) -> int:
    fields = Fields(body)
    lease_id = fields.number("ID")
    fields.done()
    return lease_id
