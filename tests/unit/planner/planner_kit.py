"""Hosts and VMs as the planner sees them."""

from __future__ import annotations

from typing import Any

from godwit.model.host import HostInfo, QemuFacts
from godwit.planner.placement import Need, Room

GIB = 1 << 30


def info(name: str, **changes: Any) -> HostInfo:
    fields: dict[str, Any] = {
        "name": name,
        "agent_url": "https://127.0.0.1:1",
        "cpus": 4,
        "memory_bytes": 8 * GIB,
        "qemu": QemuFacts(version=(10, 0, 2), accelerator="tcg"),
        "migration_address": "10.93.0.11",
        "migration_subnet": "10.93.0.0/24",
    }
    return HostInfo(**{**fields, **changes})


def room(name: str, *, facts: dict[str, Any] | None = None, **changes: Any) -> Room:
    fields: dict[str, Any] = {"memory_free_bytes": 4 * GIB}
    return Room(info=info(name, **(facts or {})), **{**fields, **changes})


def need(vm: str = "web", **changes: Any) -> Need:
    fields: dict[str, Any] = {"memory_bytes": GIB, "cpus": 1}
    return Need(vm=vm, **{**fields, **changes})
