"""Connections of a real server process: whose they are, and until when it has them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from godwit.host import process, tcpserved
from godwit.host.process import Process

# Accepts two, reads from each until its end, and closes each only when it is told to.
SERVER = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
ends = [listener.accept()[0] for _ in range(2)]
print("accepted", flush=True)
for one in ends:
    while one.recv(100): pass
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what another process closes is no event
            await asyncio.sleep(0.005)


async def test_a_server_is_found_by_its_port(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert [one.pid for one in tcpserved.servers(port)] == [_ours().pid]
    listener.close()
    assert tcpserved.servers(port) == ()


async def test_connections_are_hung_up_and_stay_until_the_server_closes_them(
    listener: socket.socket,
) -> None:
    address = listener.getsockname()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", SERVER, str(listener.fileno())),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        pass_fds=(listener.fileno(),),
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    found = process.identify(server.pid)
    assert found is not None
    listener.close()
    other = socket.create_connection(address, source_address=("127.0.0.3", 0))
    with socket.create_connection(address, source_address=("127.0.0.2", 0)) as ours, other:
        assert await asyncio.wait_for(server.stdout.readline(), 10) == b"accepted\n"
        seen = tcpserved.held(found, address[1], ["127.0.0.2"])
        assert [one.peer for one in seen] == ["127.0.0.2"]
        assert len(tcpserved.held(found, address[1], ["127.0.0.2", "127.0.0.3"])) == 2
        inodes = [one.inode for one in seen]
        tcpserved.hang_up(found, inodes)  # it reads the end, and could still answer
        ours.settimeout(0.1)
        with pytest.raises(TimeoutError):
            ours.recv(1)
        tcpserved.hang_up(found, inodes, answers=False)
        ours.settimeout(10)
        assert ours.recv(1) == b""
        assert tcpserved.still_held(found, inodes) == set(inodes), "it has not closed it"
        other.sendall(b"the other one goes on")
    assert await asyncio.wait_for(server.stdout.readline(), 10) == b"ended\n"
    server.stdin.write(b"\n")
    await server.wait()
    await until(lambda: not tcpserved.still_held(found, inodes))
    assert tcpserved.held(found, address[1], ["127.0.0.2"]) == ()
    tcpserved.hang_up(found, inodes)


async def test_one_that_was_reset_is_told_of_all_the_same(listener: socket.socket) -> None:
    """Its peer is gone from the kernel's list, and what was read from it may be under way."""
    port = listener.getsockname()[1]
    one = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))
    accepted, _ = listener.accept()
    with accepted:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.close()
        await until(lambda: any(seen.peer == "" for seen in tcpserved.held(_ours(), port, [])))
        inode = f"socket:[{os.fstat(accepted.fileno()).st_ino}]"
        assert inode in {seen.inode for seen in tcpserved.held(_ours(), port, ["127.0.0.9"])}
        with socket.socket():  # one that never was a connection, and that nobody closes
            assert len(tcpserved.held(_ours(), port, ["127.0.0.9"])) == 1
            assert tcpserved.held(_ours(), port + 1, ["127.0.0.2"]) == ()
    assert inode not in {seen.inode for seen in tcpserved.held(_ours(), port, [])}


def _ours() -> Process:
    found = process.identify(os.getpid())
    assert found is not None
    return found
