"""A store's content goes into a file and comes out again; no VM runs on a record that lies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from godwit.form import backup
from godwit.form.backup import Backup
from godwit.form.restore_rules import LEAP, MARGIN, HostSaid, restored
from godwit.model import keys
from godwit.model.errors import InvalidRequest, OperationFailed, Refused
from godwit.model.host import HostInfo, QemuFacts
from godwit.model.ownership import MoveIntent, Owner, OwnerState, SavedState
from godwit.store.memory import MemoryStore
from godwit.store.records import Records, encode
from godwit.store.whole import until_whole

RUNS = Owner(host="host1", epoch=5, state=OwnerState.RUNNING)
SAVED = Owner(
    host="host1",
    epoch=5,
    state=OwnerState.SAVED,
    saved=SavedState(path="/x", epoch=5, disk_ids=("d1",)),
)


def said(seen: int | None = None, running: int | None = None) -> HostSaid:
    return HostSaid(
        seen={} if seen is None else {"web": seen},
        running={} if running is None else {"web": running},
    )


def test_epochs_rise_above_all_that_any_host_has_seen() -> None:
    answers = {"host1": said(5), "host2": said(9), "host3": said()}
    verdict = restored("web", RUNS, answers)
    assert verdict.owner is not None
    assert verdict.owner.epoch == 9 + 1 + MARGIN
    assert verdict.owner.state is OwnerState.STOPPED
    assert "was running, is stopped" in verdict.reason


def test_a_record_newer_than_every_note_counts_too() -> None:
    verdict = restored("web", RUNS.but(epoch=40), {"host1": said(5)})
    assert verdict.owner is not None
    assert verdict.owner.epoch == 41 + MARGIN


def test_hosts_that_cannot_be_asked_cost_a_leap() -> None:
    verdict = restored("web", RUNS, {"host1": said(5)}, absent=True)
    assert verdict.owner is not None
    assert verdict.owner.epoch == 6 + MARGIN + LEAP


def test_saved_memory_is_void_once_it_may_have_run_since() -> None:
    kept = restored("web", SAVED, {"host1": said(5)})
    assert kept.owner is not None
    assert kept.owner.state is OwnerState.SAVED
    assert kept.owner.saved == SAVED.saved
    for answers, absent in (({"host1": said(6)}, False), ({"host1": said(5)}, True)):
        void = restored("web", SAVED, answers, absent=absent)
        assert void.owner is not None
        assert (void.owner.state, void.owner.saved) == (OwnerState.STOPPED, None)
        assert "void" in void.reason


@pytest.mark.parametrize(
    ("owner", "answers", "words"),
    [
        (RUNS, {"host1": said(5, 5)}, ""),
        (RUNS, {"host1": said(5, 5), "host2": said(5)}, ""),
        (RUNS, {"host1": said(5, 5), "host2": said(6)}, "runs on host1 at epoch 5"),
        (RUNS, {"host2": said(5, 5)}, "runs on host2 at epoch 5, but the backup says: running on"),
        (RUNS, {"host1": said(6, 6)}, "at epoch 6, but the backup says"),
        (RUNS, {"host1": said(5, 5), "host2": said(5, 5)}, "on host1 at epoch 5 and on host2"),
        (RUNS.but(state=OwnerState.STOPPED), {"host1": said(5, 5)}, "says: stopped"),
        (
            RUNS.but(
                migration=MoveIntent(id="m-1", method="live", source="host1", destination="host2")
            ),
            {"host1": said(5, 5)},
            "being moved by m-1",
        ),
    ],
)
def test_a_vm_goes_on_only_when_its_host_proves_the_record(
    owner: Owner, answers: dict[str, HostSaid], words: str
) -> None:
    verdict = restored("web", owner, answers, keep_running=True)
    if words:
        assert verdict.owner is None
        assert words in verdict.reason
    else:
        assert verdict.owner == owner
    assert restored("web", owner, answers).owner is None


async def _filled(*, count: int = 250) -> MemoryStore:
    store = MemoryStore()
    info = HostInfo(
        name="host1",
        agent_url="https://127.0.0.1:1",
        cpus=1,
        memory_bytes=1,
        qemu=QemuFacts(version=(10, 0, 0), accelerator="tcg"),
        migration_address="127.0.0.1",
    )
    await store.put(keys.host_info("host1"), encode(info))
    await store.put(keys.vm_owner("web"), encode(RUNS))
    for number in range(count):
        await store.put(f"{keys.ROOT}more/{number:04}", bytes([number % 256, 0, 255]))
    lease = await store.lease_grant(60)
    await store.put(keys.host_lease("host1"), b"{}", lease=lease.id)
    await store.put(keys.host_renewal("host1"), b"{}")
    return store


async def test_what_comes_out_is_what_went_in(tmp_path: Path) -> None:
    store = await _filled()
    made = await backup.export(store, tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert len(made.records) == 252
    assert keys.host_lease("host1") not in made.records
    assert keys.host_renewal("host1") not in made.records  # its last word may be another by then
    assert made.revision == (await store.range(keys.ROOT)).revision
    other = MemoryStore()
    planned = backup.plan(made, {"host1": said(7)}, gone=(), keep_running=False)
    old = dataclasses.replace(made, records={**made.records, keys.host_renewal("host1"): b"{}"})
    assert backup.plan(old, {"host1": said(7)}, gone=(), keep_running=False) == planned
    await backup.import_into(other, made, planned, by="test")
    found = {kv.key: kv.value for kv in (await other.range(keys.ROOT)).kvs}
    events = {key for key in found if key.startswith(keys.EVENTS)}
    assert len(events) == 1
    assert {key: value for key, value in found.items() if key not in events} == {
        **made.records,
        keys.vm_owner("web"): encode(RUNS.but(epoch=8 + MARGIN, state=OwnerState.STOPPED)),
    }
    with pytest.raises(Refused, match="is not empty"):
        await backup.import_into(other, made, planned, by="test")
    with pytest.raises(Refused, match="exists"):
        await backup.export(store, tmp_path / "file")


@pytest.mark.parametrize("damage", ["cut", "byte", "line", "not ours"])
async def test_a_damaged_file_is_not_believed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file"
    await backup.export(await _filled(count=3), path)
    lines = path.read_text().splitlines()
    match damage:
        case "cut":
            lines = lines[:-1]
        case "byte":
            lines[2] = lines[2].replace('"key": "', '"key": "/x', 1)
        case "line":
            del lines[3]
        case _:
            lines = ["hello", "world"]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidRequest, match=r"damaged|whole"):
        backup.read(path)


async def test_every_host_is_asked_or_named_as_gone(tmp_path: Path) -> None:
    made = await backup.export(await _filled(count=1), tmp_path / "file")

    async def silent(_info: HostInfo) -> Any:
        raise OperationFailed("no answer")

    async def speaks(_info: HostInfo) -> Any:
        return {"seen": {"web": 7}, "running": {"other": 3}}

    assert await backup.ask_hosts(made.hosts(), silent) == {}
    with pytest.raises(Refused, match="do not say which epochs they have seen: host1"):
        backup.plan(made, {}, gone=(), keep_running=False)
    answers = await backup.ask_hosts(made.hosts(), speaks)
    with pytest.raises(Refused, match="other runs on host1 and is not in the backup"):
        backup.plan(made, answers, gone=(), keep_running=True)
    planned = backup.plan(made, {}, gone=("host1",), keep_running=False)
    owner = Owner.model_validate_json(planned.records[keys.vm_owner("web")])
    assert owner.epoch > LEAP


class Ends(MemoryStore):
    """Dies after some transactions."""

    left = 3

    async def txn(self, *args: Any, **more: Any) -> Any:
        if self.left == 0:
            raise ConnectionError("gone")
        self.left -= 1
        return await super().txn(*args, **more)


async def test_a_half_filled_store_is_not_used_and_can_be_filled_to_its_end(
    tmp_path: Path,
) -> None:
    made = await backup.export(await _filled(), tmp_path / "file")
    planned = backup.plan(made, {}, gone=("host1",), keep_running=False)
    store = Ends()
    with pytest.raises(ConnectionError):
        await backup.import_into(store, made, planned, by="test")
    waiting = asyncio.create_task(until_whole(store), name="waiting")
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    store.left = 100
    await backup.import_into(store, made, planned, by="test")
    await asyncio.wait_for(waiting, 10)
    other = Backup(**{**_fields(made), "sha256": "another"})
    with pytest.raises(Refused, match="not empty"):
        await backup.import_into(store, other, planned, by="test")


async def test_an_import_into_a_store_that_somebody_uses_says_so(tmp_path: Path) -> None:
    made = await backup.export(await _filled(count=1), tmp_path / "file")
    planned = backup.plan(made, {}, gone=("host1",), keep_running=False)
    store = MemoryStore()
    mark = json.dumps({"sha256": made.sha256}).encode()
    await store.put(keys.RESTORING, mark)
    await store.put(keys.vm_owner("stranger"), b"{}")
    with pytest.raises(OperationFailed, match="something else"):
        await backup.import_into(store, made, planned, by="test")
    assert await Records(store).store.get(keys.RESTORING) is not None


def _fields(made: Backup) -> dict[str, Any]:
    return {name: getattr(made, name) for name in Backup.__slots__}
