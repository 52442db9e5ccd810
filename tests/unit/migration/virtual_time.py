"""An event loop whose time jumps: hours pass in milliseconds, real unix sockets keep working.

Whenever no socket is ready and no thread works, the clock jumps to the next timer. Everything a
test talks to must therefore live in its own process.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

EPOCH = 1_750_000_000.0
_STUCK_S = 5.0


class _Jumping(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.busy = 0  # work in threads: time stands still meanwhile

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self.busy:
            ready = super().select(_STUCK_S)
            if not ready:
                raise RuntimeError("nothing will ever happen: the scenario is stuck")
            return ready
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 1000 and moves only when everybody waits."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return 1000.0 + self._jumping.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        self._jumping.busy += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._idle)
        return future

    def _idle(self, _future: Any) -> None:
        self._jumping.busy -= 1


class VirtualClock:
    """Implements ``Clock`` on the running loop; ``skew`` is what the wall clock is off."""

    def __init__(self, skew: float = 0.0) -> None:
        self.skew = skew

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def realtime(self) -> float:
        return EPOCH + self.monotonic() + self.skew

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """An async test in virtual time."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    assert inspect.iscoroutinefunction(test)
    return wrapper
