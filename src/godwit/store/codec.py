"""The client's side of etcd's JSON: typed values to request bodies and answers to typed values.

Keys and values travel as base64, 64-bit integers as strings, and a field with its zero value is
left out.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from godwit.store.api import (
    Compare,
    CompareTarget,
    KeyValue,
    Op,
    OpKind,
    OpResult,
    StoreStatus,
    TxnResult,
    WatchBatch,
    WatchEvent,
    WatchKind,
)

Json = dict[str, Any]

# The field of a Compare message that holds the operand.
OPERAND_FIELD = {
    CompareTarget.VERSION: "version",
    CompareTarget.CREATE: "create_revision",
    CompareTarget.MOD: "mod_revision",
    CompareTarget.VALUE: "value",
    CompareTarget.LEASE: "lease",
}


def key_bytes(key: str) -> bytes:
    """A key as the store orders it. Foreign keys that are not UTF-8 survive the round trip."""
    return key.encode("utf-8", "surrogateescape")


def key_text(key: bytes) -> str:
    """The inverse of :func:`key_bytes`."""
    return key.decode("utf-8", "surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    r"""The first key after all keys that start with ``prefix``; ``\0`` means "no end"."""
    head = prefix.rstrip(b"\xff")
    if not head:
        return b"\0"
    return head[:-1] + bytes((head[-1] + 1,))


def prefix_range(prefix: bytes, after: bytes = b"") -> tuple[bytes, bytes]:
    """Key and range end that together mean "everything under this prefix", behind ``after``."""
    return max(prefix or b"\0", after and after + b"\0"), prefix_end(prefix)


def text64(data: bytes) -> str:
    """Bytes as base64 text."""
    return b64encode(data).decode("ascii")


def dump(body: Json) -> bytes:
    """A request body."""
    return json.dumps(body, separators=(",", ":")).encode("ascii")


def span(key: str, *, prefix: bool, after: str = "") -> Json:
    """The ``key`` and ``range_end`` fields."""
    raw = key_bytes(key)
    if not prefix:
        return {"key": text64(raw)}
    start, end = prefix_range(raw, key_bytes(after))
    return {"key": text64(start), "range_end": text64(end)}


def encode_put(key: str, value: bytes, lease: int) -> Json:
    """A PutRequest."""
    body: Json = {"key": text64(key_bytes(key)), "value": text64(value)}
    if lease:
        body["lease"] = str(lease)
    return body


def encode_op(op: Op) -> Json:
    """A RequestOp."""
    if op.kind is OpKind.PUT:
        return {"request_put": encode_put(op.key, op.value, op.lease)}
    body = span(op.key, prefix=op.prefix)
    return {"request_range" if op.kind is OpKind.GET else "request_delete_range": body}


def encode_compare(compare: Compare) -> Json:
    """A Compare."""
    operand = compare.operand
    return {
        "key": text64(key_bytes(compare.key)),
        "target": compare.target.value,
        "result": compare.result.value,
        OPERAND_FIELD[compare.target]: text64(operand)
        if isinstance(operand, bytes)
        else str(operand),
    }


def encode_txn(compare: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op]) -> Json:
    """A TxnRequest."""
    return {
        "compare": [encode_compare(one) for one in compare],
        "success": [encode_op(op) for op in then],
        "failure": [encode_op(op) for op in orelse],
    }


def number(body: Mapping[str, Any], name: str) -> int:
    """A 64-bit field, 0 when left out."""
    return int(body.get(name, 0))


def header(body: Mapping[str, Any], name: str = "revision") -> int:
    """A number out of the answer's header."""
    return number(body.get("header", {}), name)


def decode_kv(body: Json) -> KeyValue:
    """A KeyValue message."""
    return KeyValue(
        key=key_text(b64decode(body.get("key", ""))),
        value=b64decode(body.get("value", "")),
        create_revision=number(body, "create_revision"),
        mod_revision=number(body, "mod_revision"),
        version=number(body, "version"),
        lease=number(body, "lease"),
    )


def decode_kvs(body: Json) -> tuple[KeyValue, ...]:
    """The keys of a RangeResponse."""
    return tuple(decode_kv(kv) for kv in body.get("kvs", ()))


def _decode_response(op: Op, body: Json) -> OpResult:
    if op.kind is OpKind.GET:
        return OpResult(op.kind, kvs=decode_kvs(body.get("response_range", {})))
    if op.kind is OpKind.DELETE:
        return OpResult(op.kind, deleted=number(body.get("response_delete_range", {}), "deleted"))
    return OpResult(op.kind)


def decode_txn(body: Json, then: Sequence[Op], orelse: Sequence[Op]) -> TxnResult:
    """A TxnResponse, read with the steps that were asked for."""
    succeeded = bool(body.get("succeeded", False))
    branch = then if succeeded else orelse
    responses = body.get("responses", [])
    return TxnResult(
        succeeded=succeeded,
        revision=header(body),
        responses=tuple(
            _decode_response(op, one) for op, one in zip(branch, responses, strict=True)
        ),
    )


def _decode_event(body: Json) -> WatchEvent:
    prev = body.get("prev_kv")
    return WatchEvent(
        kind=WatchKind.DELETE if body.get("type") == "DELETE" else WatchKind.PUT,
        kv=decode_kv(body["kv"]),
        prev=None if prev is None else decode_kv(prev),
    )


def decode_events(body: Json) -> list[WatchBatch]:
    """The events of a WatchResponse, which may span revisions, as one batch per revision."""
    groups: dict[int, list[WatchEvent]] = {}
    for one in body.get("events", ()):
        event = _decode_event(one)
        groups.setdefault(event.kv.mod_revision, []).append(event)
    return [WatchBatch(revision, tuple(events)) for revision, events in sorted(groups.items())]


def decode_status(body: Json) -> StoreStatus:
    """A StatusResponse."""
    return StoreStatus(
        revision=header(body),
        member_id=header(body, "member_id"),
        cluster_id=header(body, "cluster_id"),
        leader=number(body, "leader"),
        raft_term=number(body, "raftTerm"),
        version=str(body.get("version", "")),
        db_size=number(body, "dbSize"),
    )


def count_voters(body: Json) -> int:
    """How many members of a MemberListResponse vote; learners do not."""
    return sum(not member.get("isLearner", False) for member in body.get("members", ()))
