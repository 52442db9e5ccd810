"""The real qemu-ga, on this machine instead of in a guest; and a guest that has none."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.system.qemu.guest_tools import guest_agent

from godwit.host.inotify import CREATED, PathWatch
from godwit.qemu.guest_agent import NoGuestAgent, set_clock, talking

pytestmark = pytest.mark.system
NOBODY = 65534


@pytest.fixture
async def port() -> AsyncIterator[Path]:
    """Where it listens; it runs as nobody, so that it can change nothing here."""
    with tempfile.TemporaryDirectory(prefix="gwga-") as name:
        folder = Path(name)
        shutil.chown(folder, NOBODY, NOBODY)
        path = folder / "agent.sock"
        argv = [str(guest_agent()), "-m", "unix-listen", "-p", str(path), "-t", str(folder)]
        with PathWatch(folder, mask=CREATED) as made:
            agent = await asyncio.create_subprocess_exec(
                *argv, user=NOBODY, group=NOBODY, extra_groups=[], stderr=asyncio.subprocess.DEVNULL
            )
            try:
                async with asyncio.timeout(10):
                    while not path.exists():
                        await made.changed()
                    while not await _listens(path):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)  # bound: no event tells the rest
                yield path
            finally:
                agent.kill()
                await agent.wait()


async def _listens(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except ConnectionRefusedError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_the_real_one_is_understood(port: Path) -> None:
    async with talking(port) as guest:
        said = await guest.ask("guest-info")
        commands = {one["name"]: one["enabled"] for one in said["supported_commands"]}
        assert commands["guest-get-fsinfo"]
        assert commands["guest-set-time"]
        found = await guest.ask("guest-get-fsinfo")
    assert {"mountpoint", "name", "disk"} <= found[0].keys()
    # Refused, for it is nobody: an error of the real one is an error here.
    with pytest.raises(NoGuestAgent, match="guest-set-time: the guest refuses"):
        await set_clock(port, 1.0)
