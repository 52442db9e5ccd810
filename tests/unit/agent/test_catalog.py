"""The volumes of a host are listed without holding its agent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from godwit.agent import catalog as room
from godwit.agent.catalog import Catalog
from godwit.agent.facts import seen_volumes
from godwit.host.config import QemuConfig


def test_only_directories_are_volumes(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert seen_volumes(tmp_path) == ("local", "shared")
    assert seen_volumes(tmp_path / "nothing") == ()
    assert seen_volumes(tmp_path / "file") == ()


class Hanging:
    """A file system that answers when it is let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.let_go = threading.Event()

    def __call__(self, _root: Path) -> tuple[str, ...]:
        self.calls += 1
        self.let_go.wait(10)
        return ("shared",)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    made = Hanging()
    monkeypatch.setattr(room, "seen_volumes", made)
    yield made
    made.let_go.set()


async def test_one_that_hangs_holds_one_thread_and_nobody_else(
    tmp_path: Path, hanging: Hanging
) -> None:
    paths = SimpleNamespace(volumes=tmp_path)
    config = SimpleNamespace(
        paths=paths,
        tls=SimpleNamespace(dir=tmp_path),
        qemu=QemuConfig(),
        storage=SimpleNamespace(ceph_conf=tmp_path / "ceph.conf"),
    )
    equipment = SimpleNamespace(binary=SimpleNamespace(user=None))
    desk = SimpleNamespace(config=config, equipment=equipment, host="host1")
    catalog = Catalog(desk)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(catalog.names(), timeout=0.05)
    assert hanging.calls == 1
    hanging.let_go.set()
    assert await asyncio.wait_for(catalog.names(), timeout=5) == ("shared",)
    assert await catalog.names() == ("shared",)
    assert hanging.calls == 2, "listed anew each time"
