"""What the agent inside a guest (qemu-guest-agent) is asked, over a port of its own.

    host                                        guest
      |  0xFF, guest-sync-delimited {id} ------>  |   0xFF ends whatever was said half
      |  <-- 0xFF, {return: id}                   |   what came before is somebody else's answer
      |  guest-get-fsinfo, guest-set-time ----->  |

Whether one is there shows only in an answer: the port exists whenever the VM was made with it.
The guest is not trusted: what it says decides nothing but what a person is told or may force.
Commands and replies: QEMU's interop/qemu-ga-ref.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from godwit.model.vm import Disk

ANSWER_S: Final = 3.0
LONGEST: Final = 1 << 20
"""Bytes of one answer; a longer one is a guest that plays with us."""
_MARK: Final = b"\xff"
_SCSI_SLOT: Final = 1  # of the controller in `godwit.qemu.layout`


class NoGuestAgent(Exception):
    """Nobody in the guest answers, or not in a way that can be read."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system that the guest has mounted from one of the VM's disks."""

    device: str
    point: str


class Conversation:
    """An open port whose other end has just answered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, command: str, **arguments: object) -> Any:
        """Run a command in the guest; NoGuestAgent when it refuses or does not answer."""
        await self._send(command, arguments)
        return _returned(await self._line(), command)

    async def synchronise(self) -> None:
        """Skip what an earlier conversation left unread."""
        number = secrets.randbits(31)
        self._writer.write(_MARK)
        await self._send("guest-sync-delimited", {"id": number})
        while True:
            line = await self._line()
            # The answer begins with the mark; an old line does not, or has another number.
            with contextlib.suppress(NoGuestAgent):
                if _returned(line.rpartition(_MARK)[2], "guest-sync-delimited") == number:
                    return

    async def _send(self, command: str, arguments: dict[str, object]) -> None:
        line: dict[str, object] = {"execute": command}
        if arguments:
            line["arguments"] = arguments
        self._writer.write(json.dumps(line).encode() + b"\n")
        await self._writer.drain()

    async def _line(self) -> bytes:
        try:
            return await self._reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise NoGuestAgent(f"the guest's answer does not end: {error}") from None


@asynccontextmanager
async def talking(port: Path, *, timeout: float = ANSWER_S) -> AsyncIterator[Conversation]:
    """A conversation with the guest's agent; ``timeout`` seconds are for all of it.

    NoGuestAgent when there is none, or it takes longer.
    """
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(str(port), limit=LONGEST)
            conversation = Conversation(reader, writer)
            await conversation.synchronise()
            yield conversation
    except TimeoutError:
        raise NoGuestAgent(f"the guest's agent does not answer within {timeout:g} s") from None
    except OSError as error:
        raise NoGuestAgent(f"the port of the guest's agent: {error}") from error
    finally:
        if writer is not None:
            writer.close()


async def mounts(port: Path, disk: Disk, *, timeout: float = ANSWER_S) -> list[Mount]:
    """The file systems on a disk that the guest has mounted; NoGuestAgent."""
    async with talking(port, timeout=timeout) as guest:
        return mounted_from(disk, await guest.ask("guest-get-fsinfo"))


async def set_clock(port: Path, now_s: float, *, timeout: float = ANSWER_S) -> None:
    """Set the guest's clock to ``now_s`` (seconds since 1970, UTC); NoGuestAgent."""
    async with talking(port, timeout=timeout) as guest:
        await guest.ask("guest-set-time", time=round(now_s * 1e9))


def mounted_from(disk: Disk, answer: object) -> list[Mount]:
    """What ``guest-get-fsinfo`` says of one disk. Pure.

    A disk is known by its place on the controller (or by its serial number, which not every guest
    tells); a volume group or RAID over several disks is listed by the guest under each of them.
    """
    found = []
    for entry in answer if isinstance(answer, list) else []:
        try:
            beneath = [one for one in entry.get("disk", []) if _is(disk, one)]
            if beneath:
                device = str(beneath[0].get("dev") or entry["name"])
                found.append(Mount(device, str(entry["mountpoint"])))
        except (AttributeError, KeyError, TypeError):
            continue  # not as it is described: the guest says nothing then
    return sorted(found, key=lambda mount: mount.point)


def _is(disk: Disk, address: dict[str, Any]) -> bool:
    if disk.serial and disk.serial in str(address.get("serial", "")):
        return True
    controller = address.get("pci-controller", {})
    return (
        address.get("bus-type") == "scsi"
        and (controller.get("bus"), controller.get("slot")) == (0, _SCSI_SLOT)
        and (address.get("target"), address.get("unit")) == (disk.lun, 0)
    )


def _returned(line: bytes, command: str) -> Any:
    try:
        answer = json.loads(line)
    except ValueError:
        raise NoGuestAgent(f"{command}: the guest's answer cannot be read") from None
    if isinstance(answer, dict) and "return" in answer:
        return answer["return"]
    said = answer.get("error", {}) if isinstance(answer, dict) else {}
    why = said.get("desc", "no reason") if isinstance(said, dict) else "no reason"
    raise NoGuestAgent(f"{command}: the guest refuses: {str(why)[:200]}")
