"""Control groups on the real trees: version 1 in full, version 2 without its processor part."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from godwit.host import process
from godwit.host.cgroup import CGROUP_ROOT, Cgroup, detect
from godwit.host.cgroup_v1 import CgroupV1
from godwit.host.cgroup_v2 import CgroupV2
from godwit.host.errors import CgroupError
from godwit.host.process import Process

pytestmark = pytest.mark.system
NAME = f"godwit-test-{os.getpid()}/web"
UNIFIED = CGROUP_ROOT / "unified"
BUSY = "while True: pass"
# One thread burns, the main thread waits.
THREADS = (
    "import threading,time\n"
    "def burn():\n while True: pass\n"
    "threading.Thread(target=burn,daemon=True).start()\ntime.sleep(60)"
)


def _v2_root() -> Path | None:
    for root in (UNIFIED, CGROUP_ROOT):
        if (root / "cgroup.controllers").exists():
            return root
    return None


@pytest.fixture(params=["v1", "v2"])
def group(request: pytest.FixtureRequest) -> Cgroup:
    if request.param == "v1":
        if detect().version != 1:
            pytest.skip("no version 1 on this machine")
        return CgroupV1(NAME, CGROUP_ROOT)
    root = _v2_root()
    if root is None:
        pytest.skip("no version 2 on this machine")
    return CgroupV2(NAME, root)


Starter = Callable[[str], Awaitable[Process]]


@pytest.fixture
async def start(group: Cgroup) -> AsyncIterator[Starter]:
    """Python programs inside the group; the group is emptied and removed afterwards."""
    started: list[Process] = []

    async def begin(code: str) -> Process:
        child = process.spawn([sys.executable, "-S", "-c", code])
        started.append(child)
        group.add_process(child.pid)
        return child

    group.create()
    yield begin
    group.kill_all()
    for child in started:
        assert await process.wait_exit(child) == -9
    group.remove()
    assert not group.exists()


async def _burned(pid: int, seconds: float) -> float:
    """Share of a core a process uses over a while."""
    before, start = process.cpu_seconds(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (process.cpu_seconds(pid) - before) / (time.monotonic() - start)


async def _busy(child: Process) -> None:
    async with asyncio.timeout(10):
        while process.cpu_seconds(child.pid) < 0.1:  # noqa: ASYNC110 - no event for this
            await asyncio.sleep(0.005)


async def test_freeze_stops_and_thaw_goes_on(group: Cgroup, start: Starter) -> None:
    child = await start(BUSY)
    await _busy(child)
    assert not group.frozen()
    begun = time.perf_counter()
    await group.freeze()
    print(f"{group.version}: frozen in {(time.perf_counter() - begun) * 1000:.2f} ms")
    assert group.frozen()
    assert await _burned(child.pid, 0.1) == 0
    group.thaw()
    assert not group.frozen()
    assert await _burned(child.pid, 0.2) > 0.1
    group.freeze_now()
    assert group.frozen()
    group.thaw()


async def test_frozen_processes_can_be_killed(group: Cgroup, start: Starter) -> None:
    child = await start(BUSY)
    await group.freeze()
    group.kill_all()
    assert not process.is_alive(child)


async def test_a_living_group_is_not_removed(group: Cgroup, start: Starter) -> None:
    child = await start(BUSY)
    assert group.pids() == (child.pid,)
    with pytest.raises(CgroupError) as caught:
        group.remove()
    assert str(child.pid) in str(caught.value)
    assert process.is_alive(child)
    group.create()  # what could be removed is made again


async def test_usage_counts(group: Cgroup, start: Starter) -> None:
    child = await start(BUSY)
    before = group.cpu_seconds()
    await _busy(child)
    assert 0.03 < group.cpu_seconds() - before < 60


async def test_missing_process_is_an_error(group: Cgroup, start: Starter) -> None:
    with pytest.raises(CgroupError):
        group.add_process(2**22 + 1)


async def test_vcpu_threads_leave_their_process_behind(group: Cgroup, start: Starter) -> None:
    child = await start(THREADS)
    await _busy(child)
    main, burner = process.thread_ids(child.pid)
    group.add_vcpu_threads([burner])

    def where(thread_id: int) -> str:
        lines = Path(f"/proc/{child.pid}/task/{thread_id}/cgroup").read_text().splitlines()
        key = "cpu" if group.version == 1 else ""
        return next(p for _, c, p in (line.split(":", 2) for line in lines) if c == key)

    assert where(burner).endswith("/web/vcpu")
    assert where(main).endswith("/web")
    assert group.pids() == (child.pid,)
    await group.freeze()  # the whole VM, threads of both groups
    assert await _burned(child.pid, 0.1) == 0
    group.thaw()


async def test_quota_slows_the_vcpu_threads_only() -> None:
    if detect().version != 1:
        pytest.skip("version 1 only")
    group = CgroupV1(NAME, CGROUP_ROOT)
    group.create()
    # Two burners, so that the one outside shows that the quota holds for the other alone.
    # The other one is a process of its own: one forked by the child could escape the group
    # before the child is in it, and would burn for ever.
    child = process.spawn([sys.executable, "-S", "-c", BUSY])
    other = process.spawn([sys.executable, "-S", "-c", BUSY])
    try:
        group.add_process(child.pid)
        group.add_process(other.pid)
        await _busy(child)
        group.add_vcpu_threads(process.thread_ids(child.pid))
        assert group.quota() is None
        for cores in (0.2, 0.05, 0.5):
            group.set_quota(cores)
            assert group.quota() == pytest.approx(cores)
            share = await _burned(child.pid, 0.6)
            print(f"quota {cores}: used {share:.3f} of a core")
            assert share < cores * 1.25 + 0.02
            if cores < 0.4:
                assert share > cores * 0.5
        group.clear_quota()
        assert group.quota() is None
    finally:
        group.kill_all()
        for one in (child, other):
            process.kill(one)
            assert await process.wait_exit(one) == -9
        group.remove()


async def test_this_machines_version_is_told() -> None:
    found = detect()
    assert found.version in (1, 2)
    if found.version == 1:
        assert {"cpu", "freezer", "memory"} <= set(found.controllers)
