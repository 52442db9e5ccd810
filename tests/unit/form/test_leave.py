"""A host leaves: what forbids it, and what happens to one that is needed after all."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.form.conftest import Formed

from godwit.manager.leave_rules import needs
from godwit.manager.work import leave
from godwit.model import keys
from godwit.model.errors import Refused
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.vm import Disk, Pins, Vm
from godwit.store.records import encode
from godwit.wire.errors import PeerRefused
from godwit.wire.identity import STORE

RUNS = Owner(host="host2", epoch=1, state=OwnerState.RUNNING)


def info(name: str) -> HostInfo:
    return HostInfo(
        name=name,
        agent_url="https://127.0.0.1:1",
        cpus=1,
        memory_bytes=1 << 30,
        qemu=QemuFacts(version=(10, 0, 0), accelerator="tcg"),
        migration_address="127.0.0.1",
    )


def vm(*, disks: tuple[Disk, ...] = ()) -> Vm:
    pins = Pins(uuid="6b7a", machine="pc-q35-10.0", cpu_model="qemu64-v1", accelerator="tcg")
    return Vm(name="web", memory_bytes=64 << 20, cpus=1, pins=pins, disks=disks, created_at=0.0)


def disk(**fields: Any) -> Disk:
    common = {"id": "d1", "size_bytes": 1, "serial": "s", "lun": 0, "path": "/x"}
    return Disk.model_validate({**common, **fields})


def test_what_needs_a_host() -> None:
    stopped = RUNS.but(state=OwnerState.STOPPED)
    move = MoveIntent(id="m-1", method="live", source="host1", destination="host2")
    local = frozenset({"local"})
    cases = [
        (vm(), RUNS, "runs there"),
        (vm(), RUNS.but(host="host1"), ""),
        (vm(), RUNS.but(host="host1", migration=move), "is being moved by m-1"),
        (vm(), stopped, ""),
        (vm(disks=(disk(volume="shared"),)), stopped, ""),
        (vm(disks=(disk(volume="local"),)), stopped, "has disks there"),
        (vm(disks=(disk(volume="shared", local=True),)), stopped, "has disks there"),
        (vm(disks=(disk(volume="", source="device", format="raw"),)), stopped, "has disks there"),
        (vm(disks=(disk(volume="local"),)), stopped.but(host="host1"), ""),
    ]
    for spec, owner, why in cases:
        assert needs(spec, owner, "host2", local=local) == why


async def _member(cluster: Formed) -> None:
    await cluster.join("host2", await cluster.token())
    written = await cluster.store.put(keys.host_info("host2"), encode(info("host2")))
    await cluster.manager.world.cache.reached(written)


async def _remove(cluster: Formed, **fields: Any) -> dict[str, Any]:
    path = "/v1/hosts/host2/actions/remove"
    answer = await cluster.api.request("POST", path, json=fields, query={"wait": 20})
    found: dict[str, Any] = answer.json()
    return found


async def test_a_vm_that_came_in_between_puts_the_host_back(cluster: Formed) -> None:
    """It was started after the look and before the host was off the list."""
    await _member(cluster)
    world = cluster.manager.world
    await cluster.store.put(keys.vm_spec("web"), encode(vm()))
    revision = await cluster.store.put(keys.vm_owner("web"), encode(RUNS))
    await world.cache.reached(revision)
    with pytest.raises(Refused, match="web runs there"):
        await leave._off_the_list(world, "host2", info("host2"))
    assert await cluster.store.get(keys.host_info("host2")) is not None
    with pytest.raises(PeerRefused, match="host2 is still needed: web runs there"):
        await _remove(cluster)
    listed = await cluster.authority.lists.newest("host")
    assert listed.value.serials == frozenset()


async def test_a_member_of_the_store_is_taken_out_of_it_first(cluster: Formed) -> None:
    await _member(cluster)
    issuer = cluster.authority.issuer
    from godwit.wire.ca import request

    issuer.certify(request(STORE, "host2")[1], role=STORE, name="host2", now=0.0)
    refused = await _remove(cluster)
    assert refused["state"] == "failed"
    assert "a member of the store is on host2, too" in refused["reason"]
    assert await cluster.store.get(keys.host_info("host2")) is not None
    done = await _remove(cluster, store=True)
    assert done["state"] == "completed"
    assert "3 certificates were revoked" in done["reason"]
    assert (await cluster.store.range(f"{keys.HOSTS}host2/")).kvs == ()
