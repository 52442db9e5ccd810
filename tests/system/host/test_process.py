"""Starting processes as somebody else, and what it costs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from godwit.host import process
from godwit.host.errors import ProgramMissing

pytestmark = pytest.mark.system


async def test_user_group_and_nothing_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    out = tmp_path / "out"
    child = process.spawn(
        ["sh", "-c", "grep -E '^(Uid|Gid|Groups|CapInh|CapPrm|CapEff):' /proc/self/status; umask"],
        user=(65534, 65533),
        groups=[65532],
        stdout=out,
        umask=0o027,
    )
    assert await process.wait_exit(child) == 0
    lines = out.read_text().split("\n")
    assert lines[0].split() == ["Uid:"] + ["65534"] * 4
    assert lines[1].split() == ["Gid:"] + ["65533"] * 4
    assert lines[2].split() == ["Groups:", "65532"]
    assert [line.split()[1] for line in lines[3:6]] == ["0" * 16] * 3
    assert lines[6] == "0027"


async def test_spawning_is_quick() -> None:
    spent: dict[bool, list[float]] = {True: [], False: []}
    ballast = bytearray(90 << 20)  # as big as an agent may be
    for index in range(0, len(ballast), 4096):
        ballast[index] = 1
    for _ in range(10):
        for as_user in (True, False):
            start = time.perf_counter()
            child = process.spawn(["true"], user=(65534, 65534) if as_user else None)
            spent[as_user].append((time.perf_counter() - start) * 1000)
            assert await process.wait_exit(child) == 0
    user, root = statistics.median(spent[True]), statistics.median(spent[False])
    print(
        f"spawn from {len(ballast) >> 20} MiB: as another user {user:.2f} ms, as root {root:.2f} ms"
    )
    assert user < 100


async def test_a_user_cannot_run_what_is_missing_or_forbidden(tmp_path: Path) -> None:
    with pytest.raises(ProgramMissing):
        process.spawn(["godwit-no-such-program"], user=(65534, 65534))
    private = tmp_path / "private"
    private.write_text("#!/bin/sh\n")
    private.chmod(0o700)
    child = process.spawn([str(private)], user=(65534, 65534))
    assert await process.wait_exit(child) not in (0, None)
