"""What a dead process left unsent must not arrive when its link is back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

import pytest

from godwit.host import links
from godwit.host.cgroup import wait_until
from godwit.host.netns import opened_netns, socket_in_netns
from godwit.host.process import Process, freeze, kill, spawn, stands_still, wait_exit
from godwit.host.run import run
from godwit.host.tcpcut import TcpCopies

pytestmark = pytest.mark.system
WRITER = """
import socket, sys
one = socket.create_connection(("10.95.7.2", 7000))
print("there", flush=True)
sys.stdin.readline()
one.sendall(b"late write")
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def wire(ns: str, ns2: str) -> tuple[str, str]:
    lines = [links.veth("cut0", "cut1", peer_netns=ns2), links.address("cut0", "10.95.7.1/24")]
    links.apply([*lines, links.up("cut0")], netns=ns)
    links.apply([links.address("cut1", "10.95.7.2/24"), links.up("cut1")], netns=ns2)
    return ns, ns2


@pytest.mark.parametrize("dropped", [True, False], ids=["reset", "left alone"])
async def test_an_unsent_write_of_a_dead_process(wire: tuple[str, str], dropped: bool) -> None:
    """Left alone it does arrive: this is the fault that the copies are against."""
    here, there = wire
    with opened_netns(there) as descriptor:
        listener = socket_in_netns(descriptor, kind=socket.SOCK_STREAM)
    with listener:
        listener.bind(("10.95.7.2", 7000))
        listener.listen(1)
        listener.setblocking(False)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            plug = theirs.fileno()
            argv = ["nsenter", f"--net=/run/netns/{here}", sys.executable, "-c", WRITER]
            writer = spawn(argv, stdin=plug, stdout=plug)
            theirs.close()
            try:
                await _plant(ours, listener, writer, wire, dropped=dropped)
            finally:
                kill(writer)
                await wait_exit(writer)


async def _plant(
    ours: socket.socket,
    listener: socket.socket,
    writer: Process,
    wire: tuple[str, str],
    *,
    dropped: bool,
) -> None:
    here, there = wire
    loop = asyncio.get_running_loop()
    said, told = await asyncio.open_connection(sock=ours)
    async with asyncio.timeout(20):
        served, _ = await loop.sock_accept(listener)
        with served:
            assert await said.readline() == b"there\n"
            links.apply([links.down("cut1")], netns=there)
            told.write(b"go\n")
            assert await said.readline() == b"sent\n"
            copies, seen = TcpCopies(), TcpCopies()
            freeze(writer)
            assert wait_until(lambda: stands_still(writer), 2.0)
            seen.refresh(writer)
            names = seen.names
            assert len(names) == 1
            seen.close()
            if dropped:
                copies.refresh(writer)
                assert len(copies) == 1
            kill(writer)
            await wait_exit(writer)
            told.close()
            assert copies.reset() == int(dropped)
            assert _unsent(here, names) == (() if dropped else names)
            links.apply([links.up("cut1")], netns=there)
            if dropped:
                # Longer than the kernel needs when it is left alone, see the other case.
                with pytest.raises(TimeoutError):
                    await _anything(served, 2.0)
            else:
                assert await loop.sock_recv(served, 64) == b"late write"
                assert wait_until(lambda: not _unsent(here, names), 5.0)


def _unsent(here: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """What a successor of the holder sees, who lives where the writer did."""
    line = f"from godwit.host.tcpcut import unsent; print(*unsent({names!r}), sep='\\n')"
    said = run([sys.executable, "-c", line], timeout=10.0, netns=here)
    return tuple(said.decode().split())


async def _anything(served: socket.socket, timeout: float) -> None:
    """Return when data comes in; the end of the connection is none."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        with contextlib.suppress(ConnectionResetError):
            if await loop.sock_recv(served, 64):
                return
        await asyncio.Event().wait()
