"""What an administrator, or the cluster, has said of a host: no new VMs there, and why.

A mark is no statement about the host's health: a host in maintenance may be up or down, and a
mark outlives both. It lies at ``hosts/NAME/mark`` and changes by compare-and-swap.
"""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Record

MarkState = Literal["draining", "maintenance", "quarantined"]


class HostMark(Record):
    """``left`` are the VMs that were there and may be brought back; ``stopped``, of those, the
    ones that were shut down to empty the host.

    ``task`` is the drain that works on it, ``cancelled`` who called that drain off. ``since`` is
    when the mark was set, ``by`` who asked for it.
    """

    state: MarkState
    since: float
    reason: str = ""
    by: str = ""
    left: tuple[Name, ...] = ()
    stopped: tuple[Name, ...] = ()
    task: str = ""
    cancelled: str = ""
