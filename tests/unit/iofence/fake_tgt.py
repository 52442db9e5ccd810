"""A tgtd for tests: a program `tgtadm` whose answers are in the real one's words, and sessions that
are real connections to this process. ``said`` is what it was asked."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

TARGET = "iqn.2026-11.org.example:luns"
OTHER = """\
Target 1: iqn.2026-11.org.example:other
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
    LUN information:
    Account information:
    ACL information:
        ALL
"""

PROGRAM = """#!{python} -I
import json, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect({socket!r})
    asked.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
    text, error = json.loads(asked.makefile().readline())
print(text, end="")
sys.exit("tgtadm: " + error if error else 0)
"""


class Refusal(Exception):
    """What the program prints on its error output."""


class FakeTgt:
    """``ghosts``: for so many looks a session whose connection has ended is still there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ghosts, self.port = folder, 3, 0
        self.up, self.name = True, TARGET
        self.acl = ["127.0.0.1"]
        self.nexuses: list[tuple[int, str]] = []
        self.said: list[str] = []
        self._ending: dict[tuple[int, str], int] = {}
        self._socket = folder / "adm"
        program = folder / "tgtadm"
        program.write_text(PROGRAM.format(python=sys.executable, socket=str(self._socket)))
        program.chmod(0o755)
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        target = await asyncio.start_server(self._session, "127.0.0.1", 0)
        self.port = target.sockets[0].getsockname()[1]
        self._servers = [target, await asyncio.start_unix_server(self._asked, self._socket)]

    async def stop(self) -> None:
        for server in self._servers:
            server.close()

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        argv: list[str] = json.loads(await reader.readline())
        self.said.append(" ".join(argv))
        try:
            answer = (self._act(dict(zip(argv[::2], argv[1::2], strict=True))), "")
        except Refusal as error:
            answer = ("", str(error))
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()

    def _act(self, words: dict[str, str]) -> str:
        if not self.up:
            raise Refusal("can't connect to tgt daemon, Connection refused")
        assert words["--lld"] == "iscsi"
        verb = words["--op"], words["--mode"]
        if verb == ("show", "target"):
            return OTHER + self._show()
        assert words["--tid"] == "2"
        if verb == ("bind", "target"):
            self.acl.append(words["--initiator-address"])
        elif verb == ("unbind", "target"):
            if words["--initiator-address"] not in self.acl:
                raise Refusal("can't find the binding")
            self.acl.remove(words["--initiator-address"])
        elif verb == ("delete", "conn"):
            # The real one closes the connection; its nexus goes with the last command.
            if int(words["--sid"]) not in [number for number, _ in self.nexuses]:
                raise Refusal("can't find the session")
        else:
            raise AssertionError(verb)
        return ""

    def _show(self) -> str:
        for one in list(self._ending):
            self._ending[one] -= 1
            if not self._ending[one]:
                del self._ending[one]
                self.nexuses.remove(one)
        lines = [f"Target 2: {self.name}", "    System information:", "        Driver: iscsi"]
        lines += ["        State: ready", "    I_T nexus information:"]
        for number, where in self.nexuses:
            lines += [f"        I_T nexus: {number}"]
            lines += ["            Initiator: iqn.2026-11.io.godwit:host1 alias: none"]
            lines += ["            Connection: 0", f"                IP Address: {where}"]
        lines += ["    LUN information:", "        LUN: 0", "            Type: controller"]
        lines += ["            SCSI ID: IET     00020000", "            Backing store flags: "]
        lines += ["    Account information:", "    ACL information:"]
        return "\n".join([*lines, *(f"        {entry}" for entry in self.acl)]) + "\n"

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A login is one byte; the session ends some looks after its connection."""
        where = writer.get_extra_info("peername")[0]
        if await reader.read(1) and where in self.acl:
            nexus = (len(self.said) + 7, where)
            self.nexuses.append(nexus)
            writer.write(b"+")
            await reader.read()
            self._ending[nexus] = self.ghosts
        writer.close()
