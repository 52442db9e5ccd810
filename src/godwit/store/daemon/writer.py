"""The one thread that writes: takes whatever is queued, commits it together, reports back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from godwit.store.daemon.database import Commit, Database

_MAX_BATCH = 256


class Writer:
    """Makes commits durable in the order they are submitted.

    ``on_durable(count)`` and ``on_failure(error)`` are called in the writer's thread: the first
    ``count`` commits ever submitted are on disk, or nothing more will be.
    """

    def __init__(
        self,
        database: Database,
        *,
        on_durable: Callable[[int], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._database = database
        self._on_durable = on_durable
        self._on_failure = on_failure
        self._queue: SimpleQueue[Commit | None] = SimpleQueue()
        self.submitted = 0
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, commit: Commit) -> int:
        """Queue a commit; its number in the order of all commits."""
        self.submitted += 1
        self._queue.put(commit)
        return self.submitted

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        durable = 0
        try:
            while True:
                batch, more = self._next_batch()
                if batch:
                    self._database.commit(batch)
                    durable += len(batch)
                    self._on_durable(durable)
                if not more:
                    return
                self._database.fold(idle=self._queue.empty())
        except Exception as error:
            self._on_failure(error)

    def _next_batch(self) -> tuple[list[Commit], bool]:
        batch: list[Commit] = []
        entry = self._queue.get()
        while entry is not None:
            batch.append(entry)
            if len(batch) == _MAX_BATCH:
                return batch, True
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return batch, True
        return batch, False
