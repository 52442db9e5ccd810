"""Typed access to the records: values in, values out, every write a compare-and-swap.

A read gives the value with the revision it was read at; a write names that revision, so that a
late or repeated writer fails instead of overwriting. ``CasFailed`` carries nothing: read again.

What a newer version keeps in a record is read along and written back (`godwit.model.skew`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from godwit.model import keys
from godwit.model.base import Record
from godwit.model.errors import TooOld
from godwit.model.event import Event
from godwit.model.host import HostInfo
from godwit.model.migration import Migration
from godwit.model.network import Network
from godwit.model.ownership import Owner
from godwit.model.task import Task
from godwit.model.vm import Vm, VmStatus
from godwit.store.api import Compare, KeyValue, Op, Store, absent, delete, mod_is, put

T = TypeVar("T", bound=Record)
_LOG = logging.getLogger("godwit.store")


class Unreadable(TooOld, ValueError):
    """A record holds what this version does not know: nothing may be concluded from it."""

    def __init__(self, key: str, error: ValidationError) -> None:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole of it"
        super().__init__(
            f"{key} holds what this version of Godwit cannot read ({where}: {first['msg']})",
            hint="upgrade whoever says this to the version of the others; until then it acts as if "
            "it could not see that record",
            key=key,
        )


class CasFailed(Exception):
    """Somebody changed the record (or one compared with it) since it was read."""


@dataclass(frozen=True)
class Versioned(Generic[T]):
    """A value and the store revision of its last change (0 = it does not exist yet)."""

    value: T
    revision: int


def encode(value: Record) -> bytes:
    """The stored form of a record."""
    return value.model_dump_json(exclude_none=True).encode()


class Records:
    """The store as typed records. Errors of the store pass through unchanged."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def get(
        self, key: str, kind: type[T], *, timeout: float | None = None
    ) -> Versioned[T] | None:
        """The record at ``key``, read linearizably; None when there is none, or Unreadable."""
        found = await self.store.get(key, timeout=timeout)
        return None if found is None else decode(found, kind)

    async def list(
        self, prefix: str, kind: type[T], *, suffix: str = "", whole: bool = False
    ) -> dict[str, Versioned[T]]:
        """All records under ``prefix`` whose key ends in ``suffix``, by key.

        One that cannot be read is left out and told in the log; with ``whole`` it is Unreadable:
        for who concludes something from what is *not* in the list.
        """
        found: dict[str, Versioned[T]] = {}
        for kv in (await self.store.range(prefix)).kvs:
            if not kv.key.endswith(suffix):
                continue
            try:
                found[kv.key] = decode(kv, kind)
            except Unreadable as error:
                if whole:
                    raise
                _LOG.error("%s", error.message)
        return found

    async def cas(
        self,
        key: str,
        value: Record,
        expected: int,
        *,
        compare: Sequence[Compare] = (),
        also: Sequence[Op] = (),
        lease: int = 0,
        timeout: float | None = None,
    ) -> int:
        """Write ``value`` if ``key`` still has revision ``expected`` (0 = absent) and ``compare``.

        ``also`` is written in the same transaction. Returns the new revision; CasFailed when a
        comparison failed; an outcome that is not known is the store's own error.
        """
        guard = mod_is(key, expected) if expected else absent(key)
        answer = await self.store.txn(
            [guard, *compare], [put(key, encode(value), lease=lease), *also], timeout=timeout
        )
        if not answer.succeeded:
            raise CasFailed(key)
        return answer.revision

    async def update(
        self,
        key: str,
        kind: type[T],
        change: Callable[[T], T],
        *,
        also: Sequence[Op] = (),
        timeout: float | None = None,
    ) -> Versioned[T] | None:
        """Read, change, write; again when somebody was faster. None when the record is gone.

        Only for changes that are right whoever wrote before: ``change`` sees the newest value
        each time and may raise to refuse.
        """
        for attempt in range(20):
            found = await self.get(key, kind, timeout=timeout)
            if found is None:
                return None
            value = change(found.value)
            try:
                revision = await self.cas(key, value, found.revision, also=also, timeout=timeout)
            except CasFailed:
                # Contention, not an event to wait for: back off a little, differently each time.
                await asyncio.sleep(0.001 * attempt * (1 + secrets.randbelow(100) / 100))
                continue
            return Versioned(value, revision)
        raise CasFailed(key)

    async def owner(self, vm: str, *, timeout: float | None = None) -> Versioned[Owner] | None:
        """The ownership record of a VM, read linearizably."""
        return await self.get(keys.vm_owner(vm), Owner, timeout=timeout)

    async def vm(self, vm: str) -> Versioned[Vm] | None:
        """The definition of a VM."""
        return await self.get(keys.vm_spec(vm), Vm)

    async def vms(self) -> dict[str, Vm]:
        """All VM definitions by name; Unreadable if one is: its images would seem free."""
        found = await self.list(keys.VMS, Vm, suffix="/spec", whole=True)
        return {record.value.name: record.value for record in found.values()}

    async def hosts(self) -> dict[str, HostInfo]:
        """All published host facts by name."""
        found = await self.list(keys.HOSTS, HostInfo, suffix="/info")
        return {record.value.name: record.value for record in found.values()}

    async def networks(self) -> dict[str, Network]:
        """All VM networks by name."""
        found = await self.list(keys.NETWORKS, Network)
        return {record.value.name: record.value for record in found.values()}

    async def migration(self, migration_id: str) -> Versioned[Migration] | None:
        """A move's record."""
        return await self.get(keys.migration(migration_id), Migration)

    async def task(self, task_id: str) -> Versioned[Task] | None:
        """A task's record."""
        return await self.get(keys.task(task_id), Task)

    async def write_status(self, vm: str, status: VmStatus) -> None:
        """Publish what the owner's agent last saw; a hint, so the last writer wins."""
        await self.store.put(keys.vm_status(vm), encode(status))

    async def append_event(
        self,
        kind: str,
        subject: str,
        message: str,
        *,
        at: float,
        level: Literal["info", "warning", "error"] = "info",
        data: dict[str, Any] | None = None,
    ) -> Event:
        """Add a line to the event log; its id sorts by time."""
        event = new_event(kind, subject, message, at=at, level=level, data=data)
        await self.store.put(keys.event(event.id), encode(event))
        return event

    async def forget(self, key: str, expected: int, *, also: Sequence[Op] = ()) -> None:
        """Delete a record if it still has revision ``expected``; CasFailed otherwise."""
        answer = await self.store.txn([mod_is(key, expected)], [delete(key), *also])
        if not answer.succeeded:
            raise CasFailed(key)


def new_event(
    kind: str,
    subject: str,
    message: str,
    *,
    at: float,
    level: Literal["info", "warning", "error"] = "info",
    data: dict[str, Any] | None = None,
) -> Event:
    """An event with an id that sorts by time: 16 hex digits of nanoseconds and 4 random ones."""
    return Event(
        id=f"{time.time_ns():016x}-{secrets.token_hex(2)}",
        time=at,
        kind=kind,
        subject=subject,
        message=message,
        level=level,
        data=data or {},
    )


def decode(kv: KeyValue, kind: type[T]) -> Versioned[T]:
    """A stored value as its record, for what a watch handed out; Unreadable for another thing."""
    try:
        return Versioned(kind.model_validate_json(kv.value), kv.mod_revision)
    except ValidationError as error:
        raise Unreadable(kv.key, error) from error
