"""The stamping guest can fail: QEMU 7.2 under emulation loses pages, and is refused for it."""

from __future__ import annotations

import pytest
from tests.system.qemu.old_qemu import NoOldQemu, old_qemu

from .kit import old

pytestmark = [pytest.mark.system, pytest.mark.faults]


def test_an_old_qemu_is_refused_and_would_lose_pages() -> None:
    try:
        binary = old_qemu()
    except NoOldQemu as problem:
        pytest.skip(str(problem))
    section = old.run(binary)
    assert section.failed == [], section.figures
