"""An event loop in a thread of its own, so that the synchronous client works anywhere.

Also inside a program (or notebook) that runs a loop itself. The thread ends with ``close`` or
with the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import wait
from typing import Any, TypeVar

T = TypeVar("T")

_HEED_S = 0.1  # how long Ctrl-C may go unheeded
_END_S = 2.0  # how long cancelled work may take to clean up


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile, instead of an exception at any place.

    Raised inside of a wait it may leave a lock of the future taken, and the loop's thread waiting
    for that lock for ever; and just before a wait it does not wake it up. In threads other than
    the first, and where the program has a handler of its own, nothing changes.
    """
    pressed: list[int] = []
    first = threading.current_thread() is threading.main_thread()
    if not first or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class LoopThread:
    """Runs coroutines for a thread that waits for them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="godwit-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. An interrupt (Ctrl-C) cancels it, sees it end and passes on."""
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await work
            finally:
                ended.set()

        with _interrupts() as interrupted:
            future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
            while not wait((future,), timeout=_HEED_S).done and not interrupted():
                pass
            if interrupted():
                if future.cancel():
                    ended.wait(_END_S)
                raise KeyboardInterrupt
            return future.result()

    def each(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of an asynchronous stream; leaving the loop early closes it."""

        waiting: set[asyncio.Task[Any]] = set()

        async def following() -> tuple[T] | None:
            if (task := asyncio.current_task()) is not None:
                waiting.clear()
                waiting.add(task)
            try:
                return (await anext(stream),)
            except StopAsyncIteration:
                return None

        async def closing() -> None:
            # A stream closes only when idle. An interrupted wait may still be on its way out, or
            # nobody has told it: Ctrl-C may come before `run` has its hands on it.
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)
            await stream.aclose()

        try:
            while (item := self.run(following())) is not None:
                yield item[0]
        finally:
            if self._loop.is_running():
                self.run(closing())

    def close(self) -> None:
        """End the thread; what still runs there is cancelled."""
        if self._loop.is_closed():
            return
        self.run(_cancel_the_rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_the_rest() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
