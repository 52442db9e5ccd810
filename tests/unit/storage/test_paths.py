"""Looking at a volume: what is found, and a path that hangs hangs nobody but the child."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from godwit.model.errors import InvalidRequest
from godwit.model.volume import Volume
from godwit.storage.paths import DirProber, probe, prober


@pytest.fixture
async def looks(tmp_path: Path) -> AsyncIterator[DirProber]:
    one = DirProber(tmp_path / "shared", "h1")
    (tmp_path / "shared").mkdir()
    yield one
    await one.close()


async def test_a_good_path_shows_its_sizes_and_which_volume_it_is(
    looks: DirProber, tmp_path: Path
) -> None:
    first = await looks.probe(10)
    assert first.ok, first.reason
    assert first.capacity_bytes
    assert first.used_bytes is not None
    assert len(first.identity) == 32
    child = looks._process
    again = await looks.probe(10, identity=first.identity)
    assert again.ok
    assert looks._process == child
    other = await probe(Volume(name="shared"), 10.0, root=tmp_path, host="h2")
    assert other.identity == first.identity


async def test_an_empty_mount_point_is_not_the_volume(looks: DirProber, tmp_path: Path) -> None:
    known = (await looks.probe(10)).identity
    (tmp_path / "shared/.godwit/volume-id").unlink()
    found = await looks.probe(10, identity=known)
    assert not found.ok
    assert "is it mounted?" in found.reason
    assert not (tmp_path / "shared/.godwit/volume-id").exists()
    (tmp_path / "shared/.godwit/volume-id").write_text("another\n")
    found = await looks.probe(10, identity=known)
    assert "volume another lies at" in found.reason


async def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    one = DirProber(tmp_path / "gone", "h1")
    found = await one.probe(10)
    await one.close()
    assert not found.ok
    assert found.firm
    assert found.reason.endswith("No such file or directory")


async def test_a_path_that_hangs_is_known_in_time_and_left_behind(
    looks: DirProber, tmp_path: Path
) -> None:
    assert (await looks.probe(10)).ok
    held = tmp_path / "shared/.godwit/volume-id"
    text = held.read_text()
    held.unlink()
    os.mkfifo(held)  # whoever opens it waits for a writer
    found = await looks.probe(0.2)
    assert (found.ok, found.hung, found.firm) == (False, True, True)
    assert "did not answer within 0.2 s" in found.reason
    held.unlink()
    held.write_text(text)
    assert (await looks.probe(10)).ok


async def test_a_cancelled_look_leaves_no_child_in_the_middle_of_an_answer(
    looks: DirProber,
) -> None:
    assert (await looks.probe(10)).ok
    task = asyncio.create_task(looks.probe(10))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await looks.probe(10)).ok


def test_a_kind_that_nobody_can_look_at(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="of kind dir"):
        prober(Volume(name="v"), root=tmp_path, host="h", kinds={})
