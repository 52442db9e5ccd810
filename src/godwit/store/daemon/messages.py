"""The daemon's side of etcd's JSON: request bodies to engine steps, outcomes to answers.

Field names are taken as etcd writes them (``range_end``) and in lower camel case
(``rangeEnd``). A field that we do not implement is refused, never ignored.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from collections.abc import Callable
from typing import Any

from godwit.store import errors
from godwit.store.api import CompareResult, CompareTarget
from godwit.store.codec import OPERAND_FIELD
from godwit.store.daemon.database import Identity
from godwit.store.daemon.feed import record_fields
from godwit.store.engine import Condition, Delete, EngineError, Found, Get, Outcome, Put, Step

Json = dict[str, Any]

# etcd numbers them in this order.
_TARGETS = list(CompareTarget)
_RESULTS = list(CompareResult)


def refuse(message: str) -> EngineError:
    """An invalid argument."""
    return EngineError(errors.INVALID_ARGUMENT, message)


def parse(body: bytes) -> Json:
    """The JSON object of a request."""
    try:
        value = json.loads(body or b"{}")
    except ValueError as error:
        raise refuse(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise refuse("the body is not a JSON object")
    return value


class Fields:
    """The fields of one message, each asked for once; ``done`` refuses what nobody asked for."""

    def __init__(self, body: object) -> None:
        if not isinstance(body, dict):
            raise refuse("expected a JSON object")
        self._left: Json = {_snake(name): value for name, value in body.items()}

    def raw(self, name: str, default: Any = None) -> Any:
        """A field as it came."""
        return self._left.pop(name, default)

    def data(self, name: str) -> bytes:
        """A base64 field, empty when left out."""
        try:
            return b64decode(self.raw(name, ""), validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise refuse(f"illegal base64 data in {name}") from error

    def number(self, name: str) -> int:
        """A 64-bit field, 0 when left out."""
        value = self.raw(name, 0)
        try:
            number = int(value)
        except (ValueError, TypeError) as error:
            raise refuse(f"{name} is not a number") from error
        if not -(1 << 63) <= number < 1 << 63:
            raise refuse(f"{name} does not fit into 64 bits")
        return number

    def flag(self, name: str) -> bool:
        """A boolean field, false when left out."""
        value = self.raw(name, False)
        if not isinstance(value, bool):
            raise refuse(f"{name} is not true or false")
        return value

    def choice(self, name: str, names: list[Any]) -> Any:
        """An enumeration, by name or by number; the first one when left out."""
        value = self.raw(name, 0)
        try:
            return names[abs(value)] if isinstance(value, int) else names[names.index(value)]
        except (ValueError, IndexError) as error:
            raise refuse(f"{value!r} is no {name}") from error

    def many(self, name: str) -> list[Any]:
        """A repeated field."""
        value = self.raw(name, [])
        if not isinstance(value, list):
            raise refuse(f"{name} is not a list")
        return value

    def done(self) -> None:
        """Refuse fields that are not implemented, unless they hold their zero value."""
        extra = [name for name, value in self._left.items() if value not in (0, "", "0", "NONE")]
        if extra:
            raise EngineError(errors.UNIMPLEMENTED, f"not implemented here: {', '.join(extra)}")


def _snake(name: str) -> str:
    if name in ("ID", "TTL") or name.islower():
        return name
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


# -- requests


def read_get(body: object) -> tuple[Get, Callable[[Found], Json], bool]:
    """A RangeRequest: the step, how to answer it, and whether a stale answer is good enough."""
    fields = Fields(body)
    step = Get(fields.data("key"), fields.data("range_end"), fields.number("limit"))
    serializable = fields.flag("serializable")
    keys_only, count_only = fields.flag("keys_only"), fields.flag("count_only")
    fields.choice("sort_order", ["NONE", "ASCEND"])
    fields.choice("sort_target", ["KEY"])
    fields.done()

    def answer(found: Found) -> Json:
        body: Json = {}
        if found.records and not count_only:
            body["kvs"] = [record_fields(record, value=not keys_only) for record in found.records]
            if len(found.records) < found.count:
                body["more"] = True
        if found.count:
            body["count"] = str(found.count)
        return body

    return step, answer, serializable


def read_put(body: object) -> tuple[Put, Callable[[Found], Json]]:
    """A PutRequest."""
    fields = Fields(body)
    step = Put(fields.data("key"), fields.data("value"), fields.number("lease"))
    prev = fields.flag("prev_kv")
    fields.done()

    def answer(found: Found) -> Json:
        return {"prev_kv": record_fields(found.records[0])} if prev and found.records else {}

    return step, answer


def read_delete(body: object) -> tuple[Delete, Callable[[Found], Json]]:
    """A DeleteRangeRequest."""
    fields = Fields(body)
    step = Delete(fields.data("key"), fields.data("range_end"))
    prev = fields.flag("prev_kv")
    fields.done()

    def answer(found: Found) -> Json:
        body: Json = {"deleted": str(found.count)} if found.count else {}
        if prev and found.records:
            body["prev_kvs"] = [record_fields(record) for record in found.records]
        return body

    return step, answer


def _read_op(body: object) -> tuple[Step, str, Callable[[Found], Json]]:
    fields = Fields(body)
    put, get, delete = (fields.raw(f"request_{n}") for n in ("put", "range", "delete_range"))
    fields.done()
    if put is not None:
        step, answer = read_put(put)
        return step, "response_put", answer
    if delete is not None:
        removal, answer = read_delete(delete)
        return removal, "response_delete_range", answer
    if get is not None:
        read, answer, _ = read_get(get)
        return read, "response_range", answer
    raise refuse("an operation without a request")


def _read_compare(body: object) -> Condition:
    fields = Fields(body)
    key, end = fields.data("key"), fields.data("range_end")
    result = fields.choice("result", _RESULTS)
    target = fields.choice("target", _TARGETS)
    name = OPERAND_FIELD[target]
    operand = fields.data(name) if target is CompareTarget.VALUE else fields.number(name)
    fields.done()
    return Condition(key, target, result, operand, end)


def read_txn(
    body: object,
) -> tuple[list[Condition], list[Step], list[Step], Callable[[Outcome, Json], Json]]:
    """A TxnRequest: conditions, both branches, and how to answer."""
    fields = Fields(body)
    conditions = [_read_compare(one) for one in fields.many("compare")]
    success = [_read_op(one) for one in fields.many("success")]
    failure = [_read_op(one) for one in fields.many("failure")]
    fields.done()

    def answer(outcome: Outcome, head: Json) -> Json:
        branch = success if outcome.succeeded else failure
        body: Json = {"header": head}
        if outcome.succeeded:
            body["succeeded"] = True
        if branch:
            small = {"revision": head["revision"]}
            body["responses"] = [
                {name: {"header": small} | reply(found)}
                for (_, name, reply), found in zip(branch, outcome.answers, strict=True)
            ]
        return body

    return conditions, [op[0] for op in success], [op[0] for op in failure], answer


# -- answers


def header(identity: Identity, revision: int) -> Json:
    """The header of every answer."""
    return {
        "cluster_id": str(identity.cluster_id),
        "member_id": str(identity.member_id),
        "revision": str(revision),
        "raft_term": str(identity.term),
    }


_HTTP_STATUS = {
    errors.INVALID_ARGUMENT: 400,
    errors.NOT_FOUND: 404,
    errors.FAILED_PRECONDITION: 412,
    errors.OUT_OF_RANGE: 400,
    errors.UNIMPLEMENTED: 501,
    errors.UNAVAILABLE: 503,
}


def failure(error: EngineError) -> tuple[int, Json]:
    """The HTTP status and body of a refusal."""
    message = f"store: {error.message}"
    return _HTTP_STATUS.get(error.code, 500), {
        "error": message,
        "message": message,
        "code": error.code,
    }
