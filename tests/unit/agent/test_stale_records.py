"""Records that put a VM on a host that has nothing of it: what its agent decides, and what not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.adopt import _stale_records
from godwit.manager.views import vm_state
from godwit.model import keys, ownership
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.vm import Pins, Vm, VmState, VmStatus
from godwit.qemu.runtime import note_started
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

PINS = Pins(uuid="u", machine="pc-q35-9.0", cpu_model="Westmere-v1", accelerator="tcg")
VM = Vm(name="web", cpus=1, memory_bytes=64 << 20, pins=PINS, created_at=0.0)
MINE = Owner(host="host1", epoch=4, state=OwnerState.RUNNING)
AWAY = MoveIntent(id="m-1", method="live", source="host1", destination="host2")
HERE = MoveIntent(id="m-1", method="live", source="host2", destination="host1")
BOUND = ownership.committing(ownership.begin_move(MINE, AWAY), "m-1")
TAKEN = ownership.swap(ownership.begin_move(MINE.but(host="host2"), HERE), "m-1")


class Desk:
    """The parts of host1 that are asked."""

    def __init__(self, folder: Path) -> None:
        self.records = Records(MemoryStore())
        self.host = "host1"
        self.slots: dict[str, Any] = {}
        self.events: list[str] = []
        self.told: list[VmStatus] = []
        self.config = SimpleNamespace(
            paths=SimpleNamespace(
                vm_run=lambda name: folder / "run" / name,
                vm_state=lambda name: folder / "state" / name,
            )
        )

    async def event(self, kind: str, *_: Any, **__: Any) -> None:
        self.events.append(kind)

    async def publish_status(self, _vm: str, status: VmStatus) -> None:
        self.told.append(status)


async def test_what_ran_before_this_boot_is_told_at_once_and_left_to_the_cluster(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path)
    await desk.records.cas(keys.vm_spec("web"), VM, 0)
    await desk.records.cas(keys.vm_owner("web"), MINE, 0)
    await _stale_records(desk, noted=set())  # type: ignore[arg-type]
    found = await desk.records.owner("web")
    assert found is not None
    assert found.value == MINE
    [told] = desk.told
    state, reason = vm_state(MINE, told, leased=True)
    assert state is VmState.FAILED
    assert "the cluster settles" in reason


@pytest.mark.parametrize("ha", [True, False])
@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("owner", [BOUND, ownership.begin_move(MINE, AWAY)])
async def test_a_move_from_here_is_left_to_the_cluster(
    tmp_path: Path, owner: Owner, noted: bool, ha: bool
) -> None:
    """Its destination may hold the whole VM; here nobody knows."""
    desk = Desk(tmp_path)
    await desk.records.cas(keys.vm_spec("web"), VM.but(ha=ha), 0)
    await desk.records.cas(keys.vm_owner("web"), owner, 0)
    await _stale_records(desk, noted={"web"} if noted else set())  # type: ignore[arg-type]
    found = await desk.records.owner("web")
    assert found is not None
    assert found.value == owner
    assert desk.events == ["vm.failed"]


async def test_a_move_to_here_that_had_started_is_recorded_as_stopped(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    state = tmp_path / "state" / "web"
    state.mkdir(parents=True)
    note_started(state, uuid="u", epoch=TAKEN.epoch, migration_id="m-1")
    await desk.records.cas(keys.vm_spec("web"), VM, 0)
    await desk.records.cas(keys.vm_owner("web"), TAKEN, 0)
    await _stale_records(desk, noted={"web"})  # type: ignore[arg-type]
    found = await desk.records.owner("web")
    assert found is not None
    assert (found.value.state, found.value.migration) == (OwnerState.STOPPED, None)


async def test_a_copy_that_never_started_here_is_given_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    await desk.records.cas(keys.vm_spec("web"), VM, 0)
    await desk.records.cas(keys.vm_owner("web"), TAKEN, 0)
    desk.clock = None  # type: ignore[attr-defined]
    await _stale_records(desk, noted=set())  # type: ignore[arg-type]
    found = await desk.records.owner("web")
    assert found is not None
    assert (found.value.host, found.value.epoch) == ("host2", TAKEN.epoch + 1)
