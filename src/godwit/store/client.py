"""The store over the network: etcd's v3 JSON gateway (3.4 and newer) or our own store daemon."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from math import ceil

from godwit.store import codec, errors
from godwit.store.api import (
    Compare,
    KeyValue,
    Lease,
    MemberView,
    Op,
    RangeResult,
    StoreStatus,
    TxnResult,
    Watch,
)
from godwit.store.codec import Json
from godwit.store.high import High, Mark
from godwit.store.http import Endpoint, MakeSocket, VerifyPeer
from godwit.store.members import leader_of, majority_without_leader
from godwit.store.transport import HAS_LEADER, STATUS, Transport
from godwit.store.watch import ClientWatch

_DEFAULT_TIMEOUT_S = 5.0
WITHOUT_LEADER_S = 1.0
"""Seconds that members have to say whether they follow a leader."""
_MEMBERS = "/v3/cluster/member/list"


class StoreClient:
    """Implements :class:`godwit.store.api.Store`. One event loop only.

    ``endpoints`` are ``unix:/path`` or ``https://host:port``, one for each member, the one to ask
    first in front; ``timeout`` is the default deadline of a call in seconds. ``verify_peer`` gets
    the TLS object of each new connection and raises when the peer is not the store; without it the
    context's own check decides. ``make_socket`` makes the sockets to members in another way.
    Connections are made when first needed and kept.

    What needs the cluster's consent is refused at once by an etcd member without a leader, and goes
    to another member; see ``transport`` for what each kind of failure costs.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str = "",
        verify_peer: VerifyPeer | None = None,
        make_socket: MakeSocket | None = None,
        timeout: float = _DEFAULT_TIMEOUT_S,
    ) -> None:
        self._transport = Transport(
            endpoints,
            ssl_context=ssl_context,
            server_hostname=server_hostname,
            verify_peer=verify_peer,
            make_socket=make_socket,
        )
        self._timeout = timeout
        self._high = High()
        self._watches: set[ClientWatch] = set()

    # -- keys

    async def get(
        self, key: str, *, linearizable: bool = True, timeout: float | None = None
    ) -> KeyValue | None:
        body = codec.span(key, prefix=False)
        kvs = codec.decode_kvs(await self._range(body, linearizable, timeout))
        return kvs[0] if kvs else None

    async def range(
        self,
        prefix: str,
        *,
        linearizable: bool = True,
        limit: int = 0,
        after: str = "",
        keys_only: bool = False,
        timeout: float | None = None,
    ) -> RangeResult:
        body = codec.span(prefix, prefix=True, after=after)
        if limit:
            body["limit"] = str(limit)
        if keys_only:
            body["keys_only"] = True
        answer = await self._range(body, linearizable, timeout)
        return RangeResult(codec.decode_kvs(answer), codec.header(answer))

    async def put(
        self, key: str, value: bytes, *, lease: int = 0, timeout: float | None = None
    ) -> int:
        body = codec.encode_put(key, value, lease)
        return codec.header(await self._ordered("/v3/kv/put", body, timeout, write=True))

    async def delete(self, key: str, *, prefix: bool = False, timeout: float | None = None) -> int:
        body = codec.span(key, prefix=prefix)
        answer = await self._ordered("/v3/kv/deleterange", body, timeout, write=True)
        return codec.number(answer, "deleted")

    async def txn(
        self,
        compare: Sequence[Compare],
        then: Sequence[Op],
        orelse: Sequence[Op] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        body = codec.encode_txn(compare, then, orelse)
        answer = await self._ordered("/v3/kv/txn", body, timeout, write=True)
        return codec.decode_txn(answer, then, orelse)

    # -- leases

    async def lease_grant(
        self, ttl_s: int, *, lease_id: int = 0, timeout: float | None = None
    ) -> Lease:
        body = {"TTL": str(ceil(ttl_s)), "ID": str(lease_id)}
        answer = await self._call("/v3/lease/grant", body, timeout, write=True)
        return Lease(codec.number(answer, "ID"), codec.number(answer, "TTL"))

    async def lease_keepalive(self, lease_id: int, *, timeout: float | None = None) -> int:
        # Renewing twice does no harm, so it may be tried at another member like a read.
        answer = await self._call("/v3/lease/keepalive", {"ID": str(lease_id)}, timeout)
        ttl = codec.number(answer.get("result", {}), "TTL")
        if ttl <= 0:
            raise errors.LeaseNotFound(f"lease {lease_id} is gone")
        return ttl

    async def lease_time_to_live(self, lease_id: int, *, timeout: float | None = None) -> int:
        answer = await self._call("/v3/lease/timetolive", {"ID": str(lease_id)}, timeout)
        ttl = codec.number(answer, "TTL")
        if ttl < 0:
            raise errors.LeaseNotFound(f"lease {lease_id} is gone")
        return ttl

    async def lease_revoke(self, lease_id: int, *, timeout: float | None = None) -> None:
        await self._call("/v3/lease/revoke", {"ID": str(lease_id)}, timeout, write=True)

    # -- the rest

    def watch(self, prefix: str, *, start_revision: int | None = None) -> Watch:
        watch = ClientWatch(
            self._transport,
            prefix,
            start_revision=start_revision,
            timeout=self._timeout,
            high=self._high,
            on_close=self._watches.discard,
        )
        self._watches.add(watch)
        return watch

    async def status(self, *, timeout: float | None = None) -> StoreStatus:
        # Asked without HAS_LEADER: a member may say that it has none.
        return codec.decode_status(await self._call(STATUS, {}, timeout, leader=False))

    async def members(self, *, timeout: float | None = None) -> tuple[MemberView, ...]:
        limit = self._timeout if timeout is None else timeout
        asked = [self._view(endpoint, limit) for endpoint in self._transport.endpoints]
        return tuple(await asyncio.gather(*asked))

    async def _view(self, endpoint: Endpoint, timeout: float) -> MemberView:
        floor = self._high.mark()
        until = asyncio.get_running_loop().time() + timeout
        try:
            answer = await self._transport.call_at(
                endpoint,
                STATUS,
                b"{}",
                timeout=timeout,
                judge=lambda found: self._high.check(found, floor, ordered=False),
            )
            status = codec.decode_status(answer)
        except errors.StoreError as error:
            return MemberView(endpoint.url, problem=error.message)
        left = until - asyncio.get_running_loop().time()
        try:
            # Version 3.5 would ask the leader otherwise.
            body = codec.dump({"linearizable": False})
            listed = await self._transport.call_at(endpoint, _MEMBERS, body, timeout=left)
        except errors.StoreError:
            return MemberView(endpoint.url, status)  # the embedded store has no such list
        return MemberView(endpoint.url, status, codec.count_voters(listed))

    async def without_leader(self) -> bool | None:
        views = await self.members(timeout=WITHOUT_LEADER_S)
        if majority_without_leader(views):
            return True
        return False if leader_of(views) is not None else None

    async def compact(self, revision: int, *, timeout: float | None = None) -> None:
        await self._call("/v3/kv/compaction", {"revision": str(revision)}, timeout, write=True)

    async def aclose(self) -> None:
        for watch in list(self._watches):
            await watch.aclose()
        self._transport.close()

    # -- inside

    async def _call(
        self,
        path: str,
        body: Json,
        timeout: float | None,
        *,
        write: bool = False,
        leader: bool = True,
        ordered: bool = False,
    ) -> Json:
        """Ask; ``ordered``: the answer must be as new as everything answered before it began."""
        floor = self._high.mark()
        return await self._transport.call(
            path,
            codec.dump(body),
            write=write,
            timeout=self._timeout if timeout is None else timeout,
            judge=lambda answer: self._judge(answer, floor, ordered=ordered),
            extra=HAS_LEADER if leader else "",
        )

    def _judge(self, answer: Json, floor: Mark, *, ordered: bool) -> None:
        self._high.check(answer.get("result", answer), floor, ordered=ordered)

    async def _ordered(self, path: str, body: Json, timeout: float | None, *, write: bool) -> Json:
        return await self._call(path, body, timeout, write=write, ordered=True)

    async def _range(self, body: Json, linearizable: bool, timeout: float | None) -> Json:
        if linearizable:
            return await self._ordered("/v3/kv/range", body, timeout, write=False)
        body |= {"serializable": True}
        return await self._call("/v3/kv/range", body, timeout, leader=False)
