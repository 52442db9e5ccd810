"""User data on its way to a guest: kept for root alone, written onto a CD that asks nobody."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from godwit.agent.files import Files
from godwit.agent.seeds import Seeds
from godwit.model.disks import USER_DATA, is_user_data
from godwit.model.errors import InvalidRequest, NotFound, Refused
from godwit.model.vm import Disk
from godwit.storage.files import LOCAL

DATA = b"#cloud-config\npassword: secret\n"
DIGEST = hashlib.sha256(DATA).hexdigest()


async def chunks(data: bytes = DATA) -> AsyncIterator[bytes]:
    size = 7 if len(data) < 1000 else 1 << 16
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    (tmp_path / "shared").mkdir()
    return SimpleNamespace(
        config=SimpleNamespace(paths=SimpleNamespace(volumes=tmp_path)),
        equipment=SimpleNamespace(binary=SimpleNamespace(user=None)),
        clock=SimpleNamespace(realtime=lambda: 1e9),
        slots={},
        catalog=SimpleNamespace(
            files=lambda _volume: LOCAL,
            files_at=lambda _path: LOCAL,
            get=lambda name: SimpleNamespace(name=name, kind="dir"),
            check_inside=lambda path, _volume: path,
        ),
        host="host1",
    )


async def test_kept_for_root_and_written_for_one_vm(desk: Any, tmp_path: Path) -> None:
    seeds = Seeds(desk)
    kept = Path((await seeds.put(DIGEST, chunks()))["path"])
    assert (kept.read_bytes(), kept.stat().st_mode & 0o777) == (DATA, 0o600)
    assert kept.parent.stat().st_mode & 0o077 == 0
    for _ in range(2):  # a manager that took the task over asks again
        answer = await seeds.make("web", USER_DATA + DIGEST, instance_id="u-1", hostname="web")
    path = Path(answer["path"])
    assert path == tmp_path / "shared" / "web" / "seed0.iso"
    assert path.stat().st_mode & 0o777 == 0o400
    assert b"instance-id: u-1\nlocal-hostname: web\n" in path.read_bytes()
    assert DATA in path.read_bytes()
    image = path.with_name("disk0.qcow2")
    image.touch()
    disk = Disk(id="disk0", volume="shared", path=str(image), size_bytes=1, serial="s", lun=0)
    await Files(desk).delete_disks("web", [disk])
    assert [one.name for one in path.parent.iterdir()] == [path.name], "it is no part of a disk"
    await Files(desk).delete_disks("web", [], whole=True)
    assert not path.parent.exists()


async def test_what_is_refused(desk: Any, tmp_path: Path) -> None:
    seeds = Seeds(desk)
    with pytest.raises(Refused, match="damaged"):
        await seeds.put("0" * 64, chunks())
    with pytest.raises(Refused, match="at most 1 MiB"):
        await seeds.put(DIGEST, chunks(bytes(2 << 20)))
    about = {"instance_id": "u", "hostname": "web"}
    with pytest.raises(NotFound, match="is not there"):
        await seeds.make("web", USER_DATA + DIGEST, **about)
    for path in ("/etc/shadow", USER_DATA + "../../x", USER_DATA + "A" * 64):
        assert not is_user_data(path)
        with pytest.raises(InvalidRequest, match="is no user data"):
            await seeds.make("web", path, **about)
    desk.slots["web"] = None
    with pytest.raises(Refused, match="runs here"):
        await seeds.make("web", USER_DATA + DIGEST, **about)
    assert list((tmp_path / "shared").iterdir()) == []
