"""How a host is emptied and filled again. A room of `godwit.model.requests`, which knows all."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Value


class _Empties(Value):
    """What emptying a host may do.

    Without a word it is refused, before anything moves, as long as one VM cannot move live.
    ``allow_quick``: such VMs are saved, handed over and restored. ``allow_shutdown``: those that
    cannot move at all are shut down. ``force``: those that still cannot be moved stay where they
    are, and the host keeps its mark with them on it.
    """

    name: Name
    reason: str = Field(default="", max_length=200)
    allow_quick: bool = False
    allow_shutdown: bool = False
    force: bool = False
    max_blackout_ms: float = Field(default=300.0, gt=0, le=3_600_000)
    deadline_s: float = Field(default=600.0, gt=0, le=31_622_400)


class DrainHost(_Empties):
    """Move every VM off a host and let no new one in; the host stays marked ``draining``."""

    kind: Literal["host.drain"] = "host.drain"


class EnterMaintenance(_Empties):
    """Move every VM off a host, then mark it ``maintenance``: it may be switched off."""

    kind: Literal["host.maintenance.enter"] = "host.maintenance.enter"


class ReturnHost(Value):
    """Take a host's mark away, so that it takes VMs again.

    ``bring_back``: the VMs that were there when it was emptied move back, and those that were
    shut down for it start again.
    """

    kind: Literal["host.return"] = "host.return"
    name: Name
    bring_back: bool = False


class ExitMaintenance(Value):
    """End a host's maintenance; ``bring_back`` as for a return."""

    kind: Literal["host.maintenance.exit"] = "host.maintenance.exit"
    name: Name
    bring_back: bool = False
