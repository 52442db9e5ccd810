"""The rows of lists as JSON, and which of them a reader asked for: all, some fields, a page.

A row is made when somebody reads it and kept as long as the records it was made of are the same
values. So a list that is read again and again costs what changed in between.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

from pydantic import BaseModel, create_model

from godwit.manager import views
from godwit.manager.snapshot import Snapshot
from godwit.model.errors import InvalidRequest
from godwit.model.vm import VmState

T = TypeVar("T")
Fields = frozenset[str]
ALL: Final[Fields] = frozenset()
AT_ONCE: Final = 250  # rows made before others have their turn: some milliseconds
CHOICES_KEPT: Final = 4  # different choices of fields whose rows are kept


@dataclass(frozen=True, slots=True)
class Page:
    """Names of the objects to show, and the last of them when there are more behind it."""

    names: Sequence[str]
    more_after: str = ""


def page_of(names: Sequence[str], *, limit: int | None, after: str) -> Page:
    """``names`` are sorted; those behind ``after``, at most ``limit``. Pure."""
    start = bisect_right(names, after) if after else 0
    end = len(names) if limit is None else min(len(names), start + limit)
    chosen = names[start:end]
    return Page(chosen, chosen[-1] if chosen and end < len(names) else "")


def fields_of(kind: type[BaseModel], text: str) -> Fields:
    """The fields that a reader asks for, comma-separated; none named: all of them (`ALL`)."""
    asked = frozenset(part.strip() for part in text.split(",") if part.strip())
    unknown = sorted(asked - kind.model_fields.keys())
    if unknown:
        raise InvalidRequest(
            f"there is no field {unknown[0]!r}", hint=f"choose of: {', '.join(kind.model_fields)}"
        )
    return asked


def encode(value: BaseModel, fields: Fields) -> bytes:
    """One row."""
    if fields:
        part = _part(type(value), fields)
        value = part.model_construct(**{name: getattr(value, name) for name in fields})
    return value.model_dump_json().encode()


@lru_cache(maxsize=32)
def _part(kind: type[BaseModel], fields: Fields) -> type[BaseModel]:
    """A row of only these fields: four times as quick as leaving the others out each time."""
    chosen: dict[str, Any] = {
        name: (info.annotation, ...) for name, info in kind.model_fields.items() if name in fields
    }
    return create_model(f"{kind.__name__}Part", **chosen)


class VmRows:
    """The rows of ``vm list``. They may be read by many at once; a snapshot stays as it is."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Fields, dict[str, tuple[tuple[Any, ...], bytes]]] = OrderedDict()
        self.made = 0  # rows ever made

    async def of(self, snapshot: Snapshot, names: Iterable[str], fields: Fields) -> list[bytes]:
        """A row for each of ``names`` that is a VM of the snapshot."""
        kept = self._choice(fields, snapshot)
        rows, turn = [], self.made + AT_ONCE
        for name in names:
            if name not in snapshot.vms:
                continue
            parts = _parts(snapshot, name)
            found = kept.get(name)
            if found is None or not _same(found[0], parts):
                found = kept[name] = parts, self._make(snapshot, name, fields)
            rows.append(found[1])
            if self.made >= turn:
                turn = self.made + AT_ONCE
                await asyncio.sleep(0)
        return rows

    def _choice(
        self, fields: Fields, snapshot: Snapshot
    ) -> dict[str, tuple[tuple[Any, ...], bytes]]:
        kept = self._kept.setdefault(fields, {})
        self._kept.move_to_end(fields)
        while len(self._kept) > CHOICES_KEPT:
            self._kept.popitem(last=False)
        if len(kept) > 2 * len(snapshot.vms):
            for gone in kept.keys() - snapshot.vms.keys():
                del kept[gone]
        return kept

    def _make(self, snapshot: Snapshot, name: str, fields: Fields) -> bytes:
        self.made += 1
        view = views.vm_of(snapshot, name)
        return b"" if view is None else encode(view, fields)


def _parts(snapshot: Snapshot, name: str) -> tuple[Any, ...]:
    """Everything that a VM's row is made of, the records first."""
    owner = snapshot.owners.get(name)
    host = owner.host if owner is not None else None
    return (
        snapshot.vms[name],
        owner,
        snapshot.statuses.get(name),
        host in snapshot.leases,
        host in snapshot.agents,
        snapshot.clones.get(name, ()),
    )


def _same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    """Records are compared as values that are never changed: another one is another value."""
    return one[0] is two[0] and one[1] is two[1] and one[2] is two[2] and one[3:] == two[3:]


def choose_vms(snapshot: Snapshot, *, host: str | None, state: VmState | None) -> Sequence[str]:
    """Names of the VMs that run (or would) on ``host`` and are in ``state``, sorted. Pure.

    InvalidRequest for a state that no VM of ours can be in.
    """
    if state is not None and not state.known:
        words = ", ".join(VmState)
        raise InvalidRequest(f"there is no state {state.value!r}", hint=f"one of {words}")
    if host is None and state is None:
        return snapshot.vm_names
    found = []
    for name in snapshot.vm_names:
        owner = snapshot.owners.get(name)
        if host is not None and (owner is None or owner.host != host):
            continue
        now, _ = views.state_of_vm(snapshot, name)
        if state is not None and now is not state:
            continue
        if host is not None and now in (VmState.STOPPED, VmState.SAVED):
            continue  # its last place only: nothing of it is there
        found.append(name)
    return found
