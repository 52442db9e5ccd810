"""The store over the network: etcd's v3 JSON gateway (3.4 and newer) or our own store daemon."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from math import ceil

from godwit.store import codec, errors
from godwit.store.api import (
    Compare,
    KeyValue,
    Lease,
    Op,
    RangeResult,
    StoreStatus,
    TxnResult,
    Watch,
)
from godwit.store.codec import Json
from godwit.store.http import VerifyPeer
from godwit.store.transport import Transport
from godwit.store.watch import ClientWatch, High

_DEFAULT_TIMEOUT_S = 5.0


class StoreClient:
    """Implements :class:`godwit.store.api.Store`. One event loop only.

    ``endpoints`` are ``unix:/path`` or ``https://host:port``; ``timeout`` is the default deadline
    of a call in seconds. ``verify_peer`` gets the TLS object of each new connection and raises when
    the peer is not the store; without it the context's own check decides. Connections are made
    when first needed and kept.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str = "",
        verify_peer: VerifyPeer | None = None,
        timeout: float = _DEFAULT_TIMEOUT_S,
    ) -> None:
        self._transport = Transport(
            endpoints,
            ssl_context=ssl_context,
            server_hostname=server_hostname,
            verify_peer=verify_peer,
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
        timeout: float | None = None,
    ) -> RangeResult:
        body = codec.span(prefix, prefix=True)
        if limit:
            body["limit"] = str(limit)
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
        answer = await self._call("/v3/maintenance/status", {}, timeout)
        return StoreStatus(
            revision=codec.header(answer),
            member_id=codec.header(answer, "member_id"),
            cluster_id=codec.header(answer, "cluster_id"),
            leader=codec.number(answer, "leader"),
            raft_term=codec.number(answer, "raftTerm"),
            version=str(answer.get("version", "")),
            db_size=codec.number(answer, "dbSize"),
        )

    async def without_leader(self) -> bool | None:
        return False  # one daemon is its own leader; a cluster's members are asked one by one

    async def compact(self, revision: int, *, timeout: float | None = None) -> None:
        await self._call("/v3/kv/compaction", {"revision": str(revision)}, timeout, write=True)

    async def aclose(self) -> None:
        for watch in list(self._watches):
            await watch.aclose()
        self._transport.close()

    # -- inside

    async def _call(
        self, path: str, body: Json, timeout: float | None, *, write: bool = False
    ) -> Json:
        limit = self._timeout if timeout is None else timeout
        return await self._transport.call(path, codec.dump(body), write=write, timeout=limit)

    async def _ordered(self, path: str, body: Json, timeout: float | None, *, write: bool) -> Json:
        """A call whose answer must be at least as new as everything answered before it began."""
        floor = self._high.mark()
        answer = await self._call(path, body, timeout, write=write)
        self._high.check(answer, floor)
        return answer

    async def _range(self, body: Json, linearizable: bool, timeout: float | None) -> Json:
        if linearizable:
            return await self._ordered("/v3/kv/range", body, timeout, write=False)
        return await self._call("/v3/kv/range", body | {"serializable": True}, timeout)
