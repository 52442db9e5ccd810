"""VMs with disks, and what tests ask of a cluster about them."""

from __future__ import annotations

from typing import Any

from manager_fakes import GIB, host_info

from godwit.manager.snapshot import Snapshot
from godwit.model.ownership import Owner
from godwit.model.vm import Disk, Pins, Vm

PINS = Pins(uuid="u-1", machine="pc-q35-10.0", cpu_model="Nehalem-v1", accelerator="tcg")
SHARED = "/clusterstorage/shared"


def disk(number: int = 0, **changes: Any) -> Disk:
    fields: dict[str, Any] = {
        "id": f"disk{number}",
        "volume": "shared",
        "path": f"{SHARED}/web/disk{number}.qcow2",
        "size_bytes": 2 * GIB,
        "serial": f"GW{number}",
        "lun": number,
    }
    return Disk(**{**fields, **changes})


def make_vm(name: str = "web", *disks: Disk, **changes: Any) -> Vm:
    fields: dict[str, Any] = {"cpus": 1, "memory_bytes": 1 << 28, "pins": PINS, "created_at": 1.0}
    return Vm(name=name, disks=disks, **{**fields, **changes})


def snapshot(*vms: Vm, **changes: Any) -> Snapshot:
    hosts = {name: host_info(name) for name in ("host1", "host2")}
    alive = frozenset(hosts)
    fields: dict[str, Any] = {
        "vms": {vm.name: vm for vm in vms},
        "owners": {vm.name: Owner() for vm in vms},
        "hosts": hosts,
        "leases": alive,
        "agents": alive,
    }
    return Snapshot(**{**fields, **changes})


async def spec(api: Any, vm: str = "web") -> Vm:
    found = await api.records.vm(vm)
    assert found is not None
    value: Vm = found.value
    return value


async def add(api: Any, **body: Any) -> Any:
    task = await api.act("POST", "/v1/vms/web/disks", {"volume": "shared", **body})
    assert task["state"] == "completed", task
    return task["result"]


def verbs(api: Any, host: str = "host1") -> list[str]:
    return [verb for verb, _ in api.agents[host].calls if verb not in ("publish", "start")]
