"""Read every record of the cluster in pages, and make one list of one revision out of them.

    page 1 (revision 10) ... page 2 (revision 12) ... page 3 (revision 15)
    watch from 11: what changed up to 15 replaces what older pages said

A store that answers one page after the other serves everybody else in between, where one answer
with everything holds it up: leases are renewed there. Neither is a large cluster's list bounded by
how long one answer may be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from godwit.manager.keyspace import place_of
from godwit.model import keys
from godwit.store.api import KeyValue, Store, Watch, WatchKind

PAGE: Final = 2000  # records, a megabyte or two
AT_ONCE: Final = 16  # values fetched one by one ...
MANY: Final = 500  # ... or all of them once more
# A watch that has nothing to say of the time between the pages: others than our records changed.
SILENCE_S: Final = 1.0


@dataclass(slots=True)
class Listed:
    """Records by key, true at ``revision``; ``first``, ``last``: revisions of those pages.

    ``bare``: without values, but for the keys in ``whole``.
    """

    bare: bool = False
    first: int = 0
    last: int = 0
    revision: int = 0
    records: dict[str, KeyValue] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)


async def read_pages(store: Store, *, page: int = PAGE, bare: bool = False) -> Listed:
    """All records; true at the first page's revision if nothing changes. Raises StoreError."""
    found, after = Listed(bare=bare), ""
    while True:
        answer = await store.range(keys.ROOT, limit=page, after=after, keys_only=bare)
        found.first = found.first or answer.revision
        found.last = answer.revision
        found.records.update((kv.key, kv) for kv in answer.kvs)
        if len(answer.kvs) < page:
            found.revision = found.first
            return found
        after = answer.kvs[-1].key


async def catch_up(watch: Watch, listed: Listed) -> None:
    """Bring the list to the revision of its last page, from a watch of what came after its first.

    A watch that stays silent proves nothing: the list then keeps its first page's revision, and
    what the watch tells later of the time in between is older than some of its records.
    Raises StoreError, and Compacted when the history is gone already.
    """
    while listed.revision < listed.last:
        try:
            async with asyncio.timeout(SILENCE_S):
                batch = await anext(watch)
        except (TimeoutError, StopAsyncIteration):
            return
        for event in batch.events:
            key, revision = event.kv.key, event.kv.mod_revision
            known = listed.records.get(key)
            if revision <= listed.first or (known is not None and known.mod_revision >= revision):
                continue
            if event.kind is WatchKind.DELETE:
                listed.records.pop(key, None)
            else:
                listed.records[key] = event.kv
                listed.whole.add(key)
        listed.revision = max(listed.revision, batch.revision)


async def fill_in(store: Store, listed: Listed, known: Mapping[str, int]) -> None:
    """Fetch the values of a bare list's records whose revisions are not the known ones."""
    wanted = [
        key
        for key, kv in listed.records.items()
        if key not in listed.whole and known.get(key) != kv.mod_revision and place_of(key)
    ]
    found: dict[str, KeyValue | None] = {}
    if len(wanted) > MANY:
        found.update((await read_pages(store)).records)
    else:
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            found |= zip(some, await asyncio.gather(*map(store.get, some)), strict=True)
    for key in wanted:
        if (kv := found.get(key)) is not None:
            listed.records[key] = kv
        else:  # deleted just now: the watch is going to tell
            del listed.records[key]
