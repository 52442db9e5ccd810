"""Waits for changes of files and directories without looking again and again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

from godwit.host import _libc
from godwit.host.process import wait_readable

MODIFIED = 0x2
CLOSED_AFTER_WRITE = 0x8
MOVED_IN = 0x80
CREATED = 0x100
DELETED = 0x200
ENTRIES = MOVED_IN | CREATED | DELETED | CLOSED_AFTER_WRITE


class PathWatch:
    """Wakes up when a watched path changes; a hint, so look at the truth after each wake.

    Changes between two calls of :meth:`changed` are not lost, but may be reported as one.
    """

    def __init__(self, *paths: Path, mask: int = ENTRIES) -> None:
        self._descriptor = _libc.inotify_init()
        try:
            for path in paths:
                _libc.inotify_add(self._descriptor, str(path), mask)
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Stop watching; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> PathWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def changed(self) -> None:
        """Return at the next change, or at once if there was one since the last call."""
        await wait_readable(self._descriptor)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptor, 65536):
                pass
