"""Which image is a disk's when its move was cut short, and how the record is written."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import disk_settle
from godwit.agent.disk_journal import (
    Journal,
    Verdict,
    forget_journal,
    judge,
    load_journal,
    named,
    save_journal,
)
from godwit.agent.disk_record import write_back, write_forward, write_new
from godwit.model import keys
from godwit.model.errors import Conflict, OperationFailed
from godwit.model.ownership import Owner
from godwit.model.vm import Disk, Pins, Vm
from godwit.qemu.mirror import Pace, Seen
from godwit.storage.files import LOCAL
from godwit.store.errors import StoreUnavailable
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

PINS = Pins(uuid="u", machine="pc-q35-9.0", cpu_model="Westmere-v1", accelerator="tcg")


def make_vm(*disks: Disk) -> Vm:
    return Vm(name="web", cpus=1, memory_bytes=64 << 20, disks=disks, pins=PINS, created_at=0.0)


def make_disk(folder: Path, n: int) -> Disk:
    return Disk(
        id="disk0",
        volume="shared",
        path=str(folder / f"image{n}"),
        size_bytes=1 << 20,
        format="raw",
        serial="GW0",
        lun=0,
        generation=n,
    )


OLD, NEW = (
    make_disk(Path("/clusterstorage/shared/web"), 0),
    make_disk(Path("/clusterstorage/shared/web"), 1),
)
JOURNAL = Journal(id="t-1", vm="web", uuid="u", old=OLD, new=NEW)


def test_the_machine_is_right_while_it_lives_and_the_record_when_it_is_dead() -> None:
    jobs = ("", "created", "running", "ready", "waiting", "pending", "aborting", "concluded")
    for record, job in itertools.product(("old", "new", "neither"), jobs):
        verdict = judge(record, Seen("new", job))  # type: ignore[arg-type]
        assert verdict in (Verdict.FINISH, Verdict.CORRECT_FORWARD)
        verdict = judge(record, Seen("old", job))  # type: ignore[arg-type]
        if record == "new":
            # Only at its last step are both images equal, so only there it may go on.
            assert verdict is (Verdict.GO_ON if job == "pending" else Verdict.CORRECT_BACK)
        else:
            assert verdict is Verdict.BACK_OUT
    assert judge("old", Seen("new")) is Verdict.CORRECT_FORWARD
    for gone in (None, Seen("neither")):
        assert judge("new", gone) is Verdict.FINISH
        assert judge("old", gone) is Verdict.BACK_OUT
        assert judge("neither", gone) is Verdict.BACK_OUT


def test_a_record_names_one_of_the_two_or_another_vm() -> None:
    assert named(make_vm(OLD), JOURNAL) == "old"
    assert named(make_vm(NEW), JOURNAL) == "new"
    assert named(make_vm(), JOURNAL) == "neither"
    assert named(None, JOURNAL) == "neither"
    other = make_vm(NEW).but(pins=PINS.but(uuid="another"))
    assert named(other, JOURNAL) == "neither", "a VM of the same name"


def test_the_journal_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    assert load_journal(tmp_path / "web") is None
    save_journal(tmp_path / "web", JOURNAL)
    assert load_journal(tmp_path / "web") == JOURNAL
    forget_journal(tmp_path / "web")
    forget_journal(tmp_path / "web")
    assert load_journal(tmp_path / "web") is None
    (tmp_path / "web" / "disk-move.json").write_text("{")
    with pytest.raises(OperationFailed, match="cannot be read"):
        load_journal(tmp_path / "web")


def test_the_guest_waits_for_both_images_only_when_it_outruns_the_copy() -> None:
    pace = Pace()
    assert not pace.blocks(0, 1000, now=0.0)
    assert not pace.blocks(400, 1000, now=9.0)
    assert not pace.blocks(450, 1100, now=18.0), "more to copy than before, but not for long"
    assert pace.blocks(600, 1300, now=19.0)
    assert not Pace().blocks(960, 1000, now=0.0)


# The record.


class Told:
    """A store with a VM and its owner."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.records = Records(self.store)

    async def begin(self, vm: Vm) -> int:
        await self.records.cas(keys.vm_spec("web"), vm, 0)
        return await self.records.cas(keys.vm_owner("web"), Owner(host="h1", epoch=3), 0)

    async def disk(self) -> Disk:
        found = await self.records.vm("web")
        assert found is not None
        return found.value.disks[0]

    async def revision(self) -> int:
        found = await self.records.vm("web")
        assert found is not None
        return found.revision


async def test_the_record_is_written_once_and_only_for_its_owner() -> None:
    told = Told()
    owner = await told.begin(make_vm(OLD))
    with pytest.raises(Conflict, match="somebody else"):
        await write_new(told.records, "web", OLD, NEW, owner=owner - 1)
    assert await told.disk() == OLD
    await write_new(told.records, "web", OLD, NEW, owner=owner)
    assert await told.disk() == NEW
    with pytest.raises(Conflict, match="does not have"):
        await write_new(told.records, "web", OLD, NEW, owner=owner)


@pytest.mark.parametrize("applied", [True, False])
async def test_a_lost_answer_is_found_out(applied: bool) -> None:
    told = Told()
    owner = await told.begin(make_vm(OLD))
    told.store.faults.outcome_unknown_next(applied=applied)
    await write_new(told.records, "web", OLD, NEW, owner=owner)
    assert await told.disk() == NEW


async def test_a_store_that_is_away_before_the_write_is_said_so() -> None:
    told = Told()
    owner = await told.begin(make_vm(OLD))
    told.store.faults.fail_next()
    with pytest.raises(StoreUnavailable):
        await write_new(told.records, "web", OLD, NEW, owner=owner)
    assert await told.disk() == OLD


async def test_what_is_backed_out_makes_a_late_write_fail() -> None:
    told = Told()
    await told.begin(make_vm(OLD))
    before = await told.revision()
    assert await write_back(told.records, "web", OLD, NEW) == make_vm(OLD)
    assert await told.revision() > before, "a dead agent's write compares the old revision"
    assert await write_forward(told.records, "web", OLD, NEW) == make_vm(NEW)
    told.store.faults.fail_next()
    assert await write_back(told.records, "web", OLD, NEW) == make_vm(OLD)
    assert await write_back(told.records, "db", OLD, NEW) is None


# After a restart.


class Left:
    """A host as its agent left it, with both images there; ``steps`` is what was done."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
        self.told, self.seen, self.steps = Told(), seen, list[str]()
        self.fails = False
        self.old, self.new = make_disk(tmp_path, 0), make_disk(tmp_path, 1)
        for disk in (self.old, self.new):
            Path(disk.path).touch()
        paths = SimpleNamespace(
            state=tmp_path,
            vm_state=lambda name: tmp_path / "vms" / name,
            vm_run=lambda name: tmp_path / "run" / name,
        )
        self.desk: Any = SimpleNamespace(
            config=SimpleNamespace(paths=paths),
            records=self.told.records,
            slots={},
            catalog=SimpleNamespace(files_at=lambda _path: LOCAL, sync=self._event),
            brokers=SimpleNamespace(remove=self._serve_no_more),
            event=self._event,
        )
        self.events: list[str] = []
        monkeypatch.setattr(disk_settle, "Mirror", lambda *_: self._mirror())

    def _mirror(self) -> Any:
        def step(name: str) -> Any:
            async def carry_out() -> None:
                self.steps.append(name)
                if self.fails and name == "finalize":
                    raise OperationFailed("no")

            return carry_out

        async def seen() -> Seen:
            return self.seen

        names = ("finalize", "abandon", "forget", "close_old")
        return SimpleNamespace(seen=seen, **{name: step(name) for name in names})

    async def _serve_no_more(self, _vm: str, disk: Disk) -> None:
        self.steps.append(f"unserve {disk.generation}")

    async def _event(self, *words: Any, **_more: Any) -> None:
        self.events += words[-1:]

    async def settle(self, record: Disk, *, keep: bool = False, machine: bool = True) -> Disk:
        """Which image is the disk's afterwards."""
        vm = make_vm(record)
        await self.told.begin(vm)
        journal = Journal(id="t-1", vm="web", uuid="u", old=self.old, new=self.new, keep=keep)
        save_journal(self.desk.config.paths.vm_state("web"), journal)
        if machine:
            now = await disk_settle.settle_running(self.desk, vm, object())  # type: ignore[arg-type]
            assert now.disks == ((await self.told.disk()),)
        else:
            await disk_settle.settle_others(self.desk)
        assert load_journal(self.desk.config.paths.vm_state("web")) is None
        return await self.told.disk()

    @property
    def there(self) -> list[int]:
        return [disk.generation for disk in (self.old, self.new) if Path(disk.path).exists()]


@pytest.mark.parametrize(
    ("device", "job", "record", "end", "steps"),
    [
        ("old", "running", 0, 0, ["abandon", "unserve 1"]),
        ("old", "pending", 0, 0, ["abandon", "unserve 1"]),
        ("old", "", 0, 0, ["abandon", "unserve 1"]),
        ("old", "pending", 1, 1, ["finalize", "forget", "close_old", "unserve 0"]),
        ("old", "concluded", 1, 0, ["abandon", "unserve 1"]),
        ("new", "concluded", 1, 1, ["forget", "close_old", "unserve 0"]),
        ("new", "", 0, 1, ["forget", "close_old", "unserve 0"]),
    ],
)
async def test_what_was_cut_short_is_settled(
    device: Any,
    job: str,
    record: int,
    end: int,
    steps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = Left(tmp_path, monkeypatch, Seen(device, job))
    now = await left.settle((left.old, left.new)[record])
    assert now.generation == end
    assert left.there == [end], "the other image is gone"
    assert left.steps == steps


async def test_a_volume_that_is_away_does_not_keep_a_vm_from_being_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Left(tmp_path, monkeypatch, Seen("new", ""))

    async def away(_path: Path) -> None:
        raise TimeoutError(110, "10.94.0.1 does not answer within 10 s")

    left.desk.catalog.files_at = lambda _path: SimpleNamespace(remove=away)
    assert await left.settle(left.new) == left.new
    assert "could not be deleted: 10.94.0.1 does not answer" in left.events[-1]


async def test_a_machine_that_keeps_its_old_image_corrects_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Left(tmp_path, monkeypatch, Seen("old", "pending"))
    left.fails = True
    assert await left.settle(left.new) == left.old
    assert left.there == [0]
    assert left.steps == ["finalize", "abandon", "unserve 1"]


@pytest.mark.parametrize("record", [0, 1])
async def test_without_a_machine_the_record_decides(
    record: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Left(tmp_path, monkeypatch, Seen("neither"))
    wanted = (left.old, left.new)[record]
    assert await left.settle(wanted, machine=False) == wanted
    assert left.there == [record]


async def test_an_old_image_that_was_to_be_kept_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Left(tmp_path, monkeypatch, Seen("new", ""))
    await left.settle(left.new, keep=True)
    assert left.there == [0, 1]
