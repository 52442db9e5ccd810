"""How a host's membership shows in the store: what its guard writes with every renewal."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Record


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
    guard: Literal["armed", "unarmed"]
    watchdog: bool
