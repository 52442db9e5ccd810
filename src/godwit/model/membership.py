"""How a host's membership shows in the store: what its guard writes with every renewal."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from godwit.model.base import Record


def _armed_or_not(word: object) -> object:
    """A word of a newer guard proves nothing to us; but its host has renewed, and is not lost."""
    return word if word == "armed" else "unarmed"


class Renewal(Record):
    """The last renewal of a host's lease, written every 3 s by its guard.

    It outlives that lease, with the last words that came of the host. A taker sees it change and
    counts on its own monotonic clock from the last change that it read; what it writes compares
    that this record did not change since.

    ``number`` rises with each renewal of one boot. ``armed``: the deadline is really being kept for
    the highly available VMs of this host, their freezer was tried. ``watchdog``: something resets
    the host when its guard does not keep it. Both are proof only together: a guard that is dead or
    frozen keeps nothing.
    """

    boot_id: str
    number: int
    guard: Annotated[Literal["armed", "unarmed"], BeforeValidator(_armed_or_not)]
    watchdog: bool
