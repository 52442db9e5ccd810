"""What is read out of a guest's answers, and a guest that plays with us."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from godwit.model.vm import Disk
from godwit.qemu.guest_agent import Mount, NoGuestAgent, mounted_from, mounts, set_clock

DISK = Disk(
    id="disk1", volume="shared", path="/clusterstorage/shared/web/d", size_bytes=1, serial="GW7",
    lun=3,
)  # fmt: skip


def entry(point: str = "/data", **address: Any) -> dict[str, Any]:
    place = {
        "bus-type": "scsi", "bus": 0, "target": 3, "unit": 0, "dev": "/dev/sdb1",
        "pci-controller": {"domain": 0, "bus": 0, "slot": 1, "function": 0},
    }  # fmt: skip
    return {"name": "sdb1", "mountpoint": point, "type": "ext4", "disk": [place | address]}


def test_a_disk_is_known_by_its_place_or_serial() -> None:
    assert mounted_from(DISK, [entry()]) == [Mount("/dev/sdb1", "/data")]
    assert mounted_from(DISK, [entry(target=2)]) == []
    assert mounted_from(DISK, [entry(unit=1)]) == [], "a CD drive is no disk"
    assert mounted_from(DISK, [entry(**{"bus-type": "sata"})]) == []
    other = {"domain": 0, "bus": 6, "slot": 0, "function": 0}
    elsewhere: dict[str, Any] = {"pci-controller": other}
    assert mounted_from(DISK, [entry(**elsewhere)]) == []
    named = entry(target=9, serial="0QEMU_QEMU_HARDDISK_GW7")
    assert mounted_from(DISK, [named]) == [Mount("/dev/sdb1", "/data")]


def test_what_is_not_as_described_says_nothing() -> None:
    strange: list[Any] = [None, 7, {}, {"disk": [{}]}, {"mountpoint": "/x", "disk": [3]}]
    assert mounted_from(DISK, strange) == []
    assert mounted_from(DISK, {"a": 1}) == []
    assert mounted_from(DISK, [*strange, entry("/b"), entry("/a")]) == [
        Mount("/dev/sdb1", "/a"),
        Mount("/dev/sdb1", "/b"),
    ]


Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def guest(port: Path, answer: Answer) -> AsyncIterator[list[str]]:
    """An agent that has something of an earlier conversation left to say."""
    heard: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            writer.write(b'{"return": "of yesterday"}\n{"ret')
            while line := await reader.readline():
                command = json.loads(line.lstrip(b"\xff"))
                heard.append(command["execute"])
                if command["execute"] == "guest-sync-delimited":
                    reply = {"return": command["arguments"]["id"]}
                    writer.write(b"\xff" + json.dumps(reply).encode() + b"\n")
                else:
                    await answer(command, writer)

    server = await asyncio.start_unix_server(serve, port)
    async with server:
        yield heard


async def test_what_is_left_of_an_earlier_conversation_is_skipped(tmp_path: Path) -> None:
    async def well(_command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"return": [entry()]}).encode() + b"\n")

    port = tmp_path / "agent.sock"
    async with guest(port, well) as heard:
        assert await mounts(port, DISK) == [Mount("/dev/sdb1", "/data")]
    assert heard == ["guest-sync-delimited", "guest-get-fsinfo"]


async def test_refusals_silence_and_floods_are_no_agent(tmp_path: Path) -> None:
    async def refuses(_command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"error": {"class": "GenericError", "desc": "not today"}}\n')

    async def silent(_command: dict[str, Any], _writer: asyncio.StreamWriter) -> None:
        return

    async def floods(_command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * (2 << 20) + b"\n")

    async def babbles(_command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"[1, 2\n")

    said = {
        "not today": refuses,
        "within 0.2 s": silent,
        "does not end": floods,
        "cannot be read": babbles,
    }
    for number, (words, answer) in enumerate(said.items()):
        port = tmp_path / f"{number}.sock"
        async with guest(port, answer):
            with pytest.raises(NoGuestAgent, match=words):
                await set_clock(port, 1.0, timeout=0.2 if answer is silent else 5.0)
    with pytest.raises(NoGuestAgent, match="the port"):
        await mounts(tmp_path / "nobody.sock", DISK)
