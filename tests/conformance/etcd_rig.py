"""Real etcd members: one on loopback, or three with a network of their own each.

Three members live in network namespaces on two networks: clients come over one, members talk
over the other. So a member can be cut off from its peers alone, from clients alone, or altogether,
with packets that vanish and connections that stay open, as on a broken switch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from godwit.host import links, netns
from godwit.host.netns import opened_netns, socket_in_netns
from godwit.host.run import with_netns
from godwit.store import errors
from godwit.store.api import MemberView
from godwit.store.client import StoreClient
from godwit.store.etcd import EtcdMember, argv
from godwit.store.members import leader_of
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.identity import STORE_MEMBER_DNS, Identity
from godwit.wire.tls import ClientTls, Expect

CLIENTS, PEERS = "c", "p"
CLIENT_ADDRESS = "10.99.1.1"


def etcd_program() -> str:
    """The installed etcd; a test without it is skipped."""
    found = shutil.which("etcd", path=f"{os.environ.get('PATH', '')}:/usr/bin")
    if found is None:
        pytest.skip("etcd is not installed (Debian package etcd-server)")
    return found


class EtcdProcess:
    """A member's process: started, killed, frozen, started again on the same data."""

    def __init__(self, member: EtcdMember, words: tuple[str, ...], log: Path) -> None:
        self.member = member
        self.words = words
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(number)
            self.process.wait(10)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None


def daemon_context(directory: Path) -> ssl.SSLContext:
    """TLS as our daemons speak it: 1.3 only, the peer's role checked apart."""
    return ClientTls.for_daemon(Identity.load(directory), Expect("store")).context


def one_member(directory: Path) -> EtcdProcess:
    """A store of one member on loopback, not started; certificates in ``store`` and ``host``."""
    authority = ClusterCa.create(cluster="one")
    issued = issue(authority, role="store", name="one", ips=["127.0.0.1"])
    write_identity(directory / "store", issued)
    write_identity(directory / "host", issue(authority, role="host", name="host1"))
    member = EtcdMember("one", "127.0.0.1", free_port(), free_port())
    words = argv(
        member,
        [member],
        data=directory / "one.data",
        tls=directory / "store",
        member_dns=STORE_MEMBER_DNS,
        cluster=f"one-{os.getpid()}",
        program=etcd_program(),
    )
    return EtcdProcess(member, words, directory / "etcd.log")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Trio:
    """Three members of one store. Every test leaves them as it found them: ``heal``."""

    directory: Path
    prefix: str
    members: dict[str, EtcdProcess] = field(default_factory=dict)
    opened: list[StoreClient] = field(default_factory=list)

    # Making

    @classmethod
    @contextlib.contextmanager
    def up(cls, directory: Path) -> Iterator[Trio]:
        program = etcd_program()
        trio = cls(directory, f"gwt{os.getpid()}")
        authority = ClusterCa.create(cluster="trio")
        made = [
            EtcdMember(f"m{n}", f"10.99.1.1{n}", peer_address=f"10.99.2.1{n}") for n in (1, 2, 3)
        ]
        write_identity(directory / "host", issue(authority, role="host", name="host1"))
        try:
            trio._wire([member.name for member in made])
            for member in made:
                tls = directory / member.name
                ips = [member.address, member.peer_address]
                write_identity(tls, issue(authority, role="store", name=member.name, ips=ips))
                words = argv(
                    member,
                    made,
                    data=directory / f"{member.name}.data",
                    tls=tls,
                    member_dns=STORE_MEMBER_DNS,
                    cluster=trio.prefix,
                    program=program,
                )
                inside = tuple(with_netns(words, trio.netns(member.name)))
                log = directory / f"{member.name}.log"
                trio.members[member.name] = EtcdProcess(member, inside, log)
            for process in trio.members.values():
                process.start()
            asyncio.run(trio.serving())
            yield trio
        finally:
            for process in trio.members.values():
                process.end()
            for name in ("sw", "client", *(member.name for member in made)):
                with contextlib.suppress(Exception):
                    netns.delete(trio.netns(name))

    def netns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def _wire(self, names: list[str]) -> None:
        for name in ("sw", "client", *names):
            netns.create(self.netns(name))
        switch = [line for net in (CLIENTS, PEERS) for line in self._bridge(net)]
        for name in names:
            for net in (CLIENTS, PEERS):
                switch += self._cable(name, net)
        switch += self._cable("client", CLIENTS)
        links.apply(switch, netns=self.netns("sw"))
        for number, name in enumerate(names, 1):
            ends = [
                (f"{CLIENTS}0", f"10.99.1.1{number}/24"),
                (f"{PEERS}0", f"10.99.2.1{number}/24"),
            ]
            self._address(name, ends)
        self._address("client", [(f"{CLIENTS}0", f"{CLIENT_ADDRESS}/24")])

    @staticmethod
    def _bridge(net: str) -> list[str]:
        return [links.bridge(f"br-{net}"), links.up(f"br-{net}")]

    def _cable(self, name: str, net: str) -> list[str]:
        port = f"{name}-{net}"
        return [
            links.veth(port, f"{net}0", peer_netns=self.netns(name)),
            *self._plug(name, net),
        ]

    @staticmethod
    def _plug(name: str, net: str) -> list[str]:
        port = f"{name}-{net}"
        return [links.attach(port, f"br-{net}"), links.up(port)]

    def _address(self, name: str, ends: list[tuple[str, str]]) -> None:
        lines = [links.up("lo")]
        for port, cidr in ends:
            lines += [links.address(port, cidr), links.up(port)]
        links.apply(lines, netns=self.netns(name))

    # Asking

    def client(self, *first: str, place: str = "client", timeout: float = 5.0) -> StoreClient:
        """A client of all members, ``first`` ones in front, in a namespace."""
        order = [*first, *(name for name in self.members if name not in first)]

        def make_socket(_host: str) -> socket.socket:
            with opened_netns(self.netns(place)) as space:
                return socket_in_netns(space, socket.AF_INET)

        client = StoreClient(
            [self.members[name].member.client_url for name in order],
            ssl_context=daemon_context(self.directory / "host"),
            make_socket=make_socket,
            timeout=timeout,
        )
        self.opened.append(client)
        return client

    async def views(self) -> tuple[MemberView, ...]:
        client = self.client(timeout=1.0)
        try:
            return await client.members()
        finally:
            await client.aclose()

    async def agreed(self, members: int, *, within: float = 20.0) -> str:
        """The leader, once as many members answer and follow the same one."""
        until = time.monotonic() + within
        while True:
            views = await self.views()
            leader = leader_of(views)
            following = [
                view
                for view in views
                if view.status and leader and view.status.leader == leader.status.member_id  # type: ignore[union-attr]
            ]
            if leader is not None and len(following) >= members:
                return self._name(leader.endpoint)
            assert time.monotonic() < until, f"they do not agree: {views}\n{self.logs()}"
            await asyncio.sleep(0.05)  # nothing announces an election

    async def serving(self, *, within: float = 30.0) -> str:
        """The leader, once every member carries out writes.

        After a cut a member may follow its leader again while what it sends there still waits for
        a retransmission.
        """
        leader = await self.agreed(3, within=within)
        for name in self.members:
            until = time.monotonic() + within
            while True:
                client = self.client(name, timeout=3.0)
                try:
                    await client.put(f"serving/{name}", b"")
                    if client._transport.current.host == self.members[name].member.address:
                        break
                except errors.StoreError:
                    assert time.monotonic() < until, f"{name} does not serve\n{self.logs()}"
                finally:
                    await client.aclose()
                await asyncio.sleep(0.05)  # nothing announces it
        return leader

    def _name(self, url: str) -> str:
        return next(name for name, p in self.members.items() if p.member.client_url == url)

    def others(self, *names: str) -> list[str]:
        return [name for name in self.members if name not in names]

    def logs(self) -> str:
        return "\n".join(p.log.read_text(errors="replace")[-500:] for p in self.members.values())

    # Faults

    def cut(self, name: str, *nets: str) -> None:
        lines = [links.detach(f"{name}-{net}") for net in nets or (CLIENTS, PEERS)]
        links.apply(lines, netns=self.netns("sw"))

    async def heal(self) -> None:
        for client in self.opened:
            await client.aclose()
        self.opened.clear()
        nets = [(name, net) for name in self.members for net in (CLIENTS, PEERS)]
        lines = [line for name, net in nets for line in self._plug(name, net)]
        links.apply(lines, netns=self.netns("sw"))
        for process in self.members.values():
            if process.runs:
                process.thaw()
            else:
                process.start()
        await self.serving()
