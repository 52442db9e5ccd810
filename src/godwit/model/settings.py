"""What holds for the whole cluster and may be changed at any time: ``godwit cluster set``."""

from __future__ import annotations

from pydantic import Field

from godwit.model.base import Record


class ClusterSettings(Record):
    """How many moves may be under way at once, and how far CPUs may be promised.

    A limit of 0 is none. ``moves_per_host`` counts every move that leaves a host or comes to it,
    ``moves_per_pair`` those between the same two hosts, ``moves_per_network`` those over the same
    migration network. ``cpus_per_core``: so many virtual CPUs a host may promise for each of its
    own. ``cpu_baseline``: the CPU model that new VMs get; empty: the best that all hosts can give.
    """

    moves_per_host: int = Field(default=1, ge=0, le=64)
    moves_per_pair: int = Field(default=0, ge=0, le=64)
    moves_per_network: int = Field(default=0, ge=0, le=1024)
    cpus_per_core: int = Field(default=32, ge=0, le=256)
    cpu_baseline: str = ""
