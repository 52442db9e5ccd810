"""How long each step of something took, to be told with it: a total alone explains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from godwit.model.world import Clock


class Laps:
    """Milliseconds by step, in the order of their ends; steps may overlap."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._spent: dict[str, float] = {}

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Measure what is done within, however it ends."""
        start = self._clock.monotonic()
        try:
            yield
        finally:
            self._spent[name] = round(1e3 * (self._clock.monotonic() - start), 1)

    @property
    def spent_ms(self) -> dict[str, float]:
        """What was measured so far."""
        return dict(self._spent)

    def __str__(self) -> str:
        return ", ".join(f"{name} {spent:g} ms" for name, spent in self._spent.items())
