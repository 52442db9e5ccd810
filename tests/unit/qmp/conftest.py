"""A fake QEMU and an open monitor on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from godwit.qmp import Monitor
from godwit.qmp.fake import FakeQemu


@pytest.fixture
async def qemu(tmp_path: Path) -> AsyncIterator[FakeQemu]:
    fake = FakeQemu(name="web")
    await fake.listen(tmp_path / "a")
    yield fake
    fake.thaw()
    await fake.die()


@pytest.fixture
async def monitor(qemu: FakeQemu, tmp_path: Path) -> AsyncIterator[Monitor]:
    async with await Monitor.connect(tmp_path / "a", name="web", deadline=2) as monitor:
        yield monitor
