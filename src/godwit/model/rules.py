"""What a VM's owner wants of the cluster: where it may run, what it must be kept apart from, what
comes first when there is not room for all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from godwit.model.base import Name, Record

OnShutdown = Literal["stop", "restart"]


class Rules(Record):
    """The rules of one VM; ``Vm.ha`` beside them says whether it is restarted elsewhere at all.

    ``priority``: the higher one is restarted, and moved off a host, first. ``order``: among VMs of
    one priority the lower one starts first after a loss of power. ``apart``: names of groups; VMs
    that share one are kept on different hosts. ``hosts``: the only ones it may run on, empty for
    all. ``restarts``: how often an hour a failover may start it. ``autostart``: it is started again
    after a loss of power even without ``ha``. ``on_shutdown``: what a clean shutdown inside the
    guest means.
    """

    priority: int = Field(default=50, ge=0, le=100)
    order: int = Field(default=0, ge=0, le=1000)
    apart: tuple[Name, ...] = Field(default=(), max_length=16)
    hosts: tuple[Name, ...] = Field(default=(), max_length=64)
    restarts: int = Field(default=3, ge=0, le=60)
    autostart: bool = False
    on_shutdown: OnShutdown = "stop"
