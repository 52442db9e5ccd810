"""Images on two hosts, of which one is the disk: the owner record says whose."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent import local_disks as room
from godwit.agent.local_disks import AlongNote, keeps, make_room, mark_of, note_source, settle_soon
from godwit.model import keys
from godwit.model.errors import Conflict, Refused
from godwit.model.ownership import MoveIntent, Owner, OwnerState
from godwit.model.vm import Disk, Pins, Vm
from godwit.store.memory import MemoryStore
from godwit.store.records import Records

NOTE = AlongNote(vm="web", uuid="u", migration="m-1", paths=("/x",))
MOVE = MoveIntent(id="m-1", method="live", source="h1", destination="h2")


def test_the_owner_keeps_its_images_once_the_move_has_ended() -> None:
    here = Owner(host="h1", epoch=3, state=OwnerState.RUNNING)
    for host in ("h1", "h2"):
        assert keeps(here.but(migration=MOVE), NOTE, host) is None, "not decided yet"
        swapped = here.but(host="h2", epoch=4, migration=MOVE)
        assert keeps(swapped, NOTE, host) is None, "the source still has to end its copy"
        assert keeps(None, NOTE, host) is False
    assert (keeps(here, NOTE, "h1"), keeps(here, NOTE, "h2")) == (True, False)
    later = here.but(migration=MOVE.but(id="m-2"))
    assert (keeps(later, NOTE, "h1"), keeps(later, NOTE, "h2")) == (True, False)


class Host:
    """A host's own storage, and what its agent shares."""

    def __init__(self, root: Path, name: str, store: MemoryStore) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        (root / name).mkdir()
        paths = SimpleNamespace(state=root / name, vm_state=lambda vm: root / name / "vms" / vm)
        self.slept = asyncio.Event()
        self.desk: Any = SimpleNamespace(
            host=name,
            along=asyncio.Lock(),
            config=SimpleNamespace(paths=paths),
            records=Records(store),
            clock=SimpleNamespace(sleep=self._sleep),
            equipment=SimpleNamespace(binary=SimpleNamespace(user=None)),
            background=self._background,
        )
        disk = Disk(
            id="disk0",
            volume="own",
            path=str(root / name / "web" / "disk0.qcow2"),
            size_bytes=1 << 20,
            serial="s",
            lun=0,
            local=True,
        )
        pins = Pins(uuid="u", machine="m", cpu_model="c", accelerator="tcg")
        self.vm = Vm(
            name="web", cpus=1, memory_bytes=1 << 28, disks=(disk,), pins=pins, created_at=0.0
        )
        self.image = Path(disk.path)

    async def _sleep(self, _seconds: float) -> None:
        self.slept.set()
        await asyncio.sleep(0)

    def _background(self, work: Any, _name: str) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    async def settled(self) -> None:
        settle_soon(self.desk, "web")
        await asyncio.gather(*self.tasks)

    @property
    def noted(self) -> bool:
        return (self.desk.config.paths.vm_state("web") / room.NOTE).exists()


@pytest.fixture
async def hosts(tmp_path: Path) -> tuple[Host, Host, Records]:
    store = MemoryStore()
    one, two = Host(tmp_path, "h1", store), Host(tmp_path, "h2", store)
    one.image.parent.mkdir()
    one.image.touch()
    records = Records(store)
    owner = Owner(host="h1", epoch=3, state=OwnerState.RUNNING, migration=MOVE)
    await records.cas(keys.vm_owner("web"), owner, 0)
    await note_source(one.desk, one.vm, "m-1")
    await make_room(two.desk, two.vm, "m-1", "h1")
    assert two.image.exists()
    return one, two, records


@pytest.mark.parametrize("moved", [True, False])
async def test_one_image_is_left(hosts: tuple[Host, Host, Records], moved: bool) -> None:
    one, two, records = hosts
    settle_soon(one.desk, "web")
    settle_soon(two.desk, "web")
    await asyncio.wait_for(one.slept.wait(), 5)
    assert one.image.exists()
    assert two.image.exists(), "while it is not decided both stay"
    change = {"host": "h2", "epoch": 4} if moved else {}
    await records.update(
        keys.vm_owner("web"), Owner, lambda owner: owner.but(migration=None, **change)
    )
    await one.settled()
    await two.settled()
    assert (one.image.exists(), two.image.exists()) == (not moved, moved)
    assert not one.noted
    assert not two.noted
    assert list(one.image.parent.parent.glob("web/.*")) == [], "the mark is gone"


async def test_storage_that_both_see_is_no_host_s_own(tmp_path: Path) -> None:
    """Defined as local by mistake: the source's image must not be taken for an old copy."""
    store = MemoryStore()
    one, two = Host(tmp_path, "h1", store), Host(tmp_path, "h2", store)
    one.image.parent.mkdir()
    one.image.touch()
    await note_source(one.desk, one.vm, "m-1")
    assert mark_of(one.image, "h1").exists()
    with pytest.raises(Refused, match="shared, not local"):
        await make_room(two.desk, one.vm, "m-1", "h1")
    assert one.image.exists()
    assert not two.noted


async def test_what_lies_there_already_is_not_overwritten(tmp_path: Path) -> None:
    two = Host(tmp_path, "h2", MemoryStore())
    two.image.parent.mkdir()
    two.image.write_text("somebody's")
    with pytest.raises(Conflict, match="exists on h2 already"):
        await make_room(two.desk, two.vm, "m-1", "h1")
    assert two.image.read_text() == "somebody's"


async def test_what_an_earlier_move_left_makes_room(hosts: tuple[Host, Host, Records]) -> None:
    _one, two, records = hosts
    again = MOVE.but(id="m-2")
    await records.update(keys.vm_owner("web"), Owner, lambda owner: owner.but(migration=again))
    two.image.write_text("half")
    await make_room(two.desk, two.vm, "m-2", "h1")
    assert two.image.read_bytes()[:4] == b"QFI\xfb", "a new image"
