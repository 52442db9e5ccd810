"""Measures the way between two addresses: the largest undivided packet, and bytes a second.

    one end (source)                           other end (`Listening`, open once, closes by itself)
    | UDP: token, number, padding -----------> |  each of full size, "do not fragment" set
    | <----------------- token, number, length |  a small answer: only one direction is measured
    | TCP: token, then bytes ----------------> |  counts them, up to a number or a time
    | <------------------ bytes, nanoseconds   |  by its own clock, first to last byte

Nothing is encrypted and nothing of anybody's is in it: the token only keeps strangers out, and came
to both ends over TLS. IP_PMTUDISC_PROBE (ip(7)) sets "do not fragment" and ignores what the kernel
believes of the path.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from godwit.host.run import run_async

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3  # linux/in.h, linux/in6.h
_HEADERS = {4: 20 + 8, 6: 40 + 8}
_SMALLEST = {4: 576, 6: 1280}
_NUMBER = struct.Struct("!I")
_ANSWER = struct.Struct("!II")
_COUNT = struct.Struct("!QQ")
_TRIES, _PATIENCE_S = 4, 0.5
_QUICK_TRIES, _QUICK_S = 2, 0.25
_CHUNK = 1 << 18
_HELD_BYTES = 1 << 19  # what the kernel may hold: what is left of it goes out after the time is up
_DRAIN_S = 3.0
_IDLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that holds an address, which is given with its prefix length."""

    name: str
    address: str
    mtu: int


async def interfaces() -> dict[str, Interface]:
    """Every address of this host's network namespace with its interface, as ``ip`` shows them."""
    rows: list[dict[str, Any]] = json.loads(
        await run_async(("ip", "-json", "address", "show"), timeout=20.0) or b"[]"
    )
    return {
        str(entry["local"]): Interface(
            row["ifname"], f"{entry['local']}/{entry['prefixlen']}", row["mtu"]
        )
        for row in rows
        for entry in row.get("addr_info", ())
        if "local" in entry
    }


def _socket(address: str, kind: socket.SocketKind) -> socket.socket:
    """A non-blocking socket bound to the address, at a port that the kernel chooses."""
    version = ipaddress.ip_address(address).version
    made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
    try:
        made.setblocking(False)
        made.bind((address, 0))
    except BaseException:
        made.close()
        raise
    return made


def _undivided(udp: socket.socket) -> None:
    if udp.family == socket.AF_INET:
        udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        udp.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)


class Listening:
    """The end that is measured towards. `serve` it as a task; it ends by itself."""

    def __init__(self, address: str, *, peer: str, token: bytes, rate: bool) -> None:
        """Open the ports on ``address``, for ``peer`` alone. OSError when it is not ours."""
        self._peer, self._token = peer, token
        with contextlib.ExitStack() as undo:
            self._udp = undo.enter_context(_socket(address, socket.SOCK_DGRAM))
            self._tcp = undo.enter_context(_socket(address, socket.SOCK_STREAM)) if rate else None
            if self._tcp is not None:
                self._tcp.listen(1)
            self._open = undo.pop_all()

    @property
    def udp_port(self) -> int:
        """Where probes of the path's packet size are answered."""
        return int(self._udp.getsockname()[1])

    @property
    def tcp_port(self) -> int:
        """Where bytes are counted; 0 when no rate is to be measured."""
        return int(self._tcp.getsockname()[1]) if self._tcp is not None else 0

    async def serve(self, *, bytes_limit: int, seconds_limit: float, open_s: float) -> None:
        """Answer for ``open_s``, or until nobody asks any more; then close.

        With a rate until its bytes have been counted.
        """
        echo = asyncio.create_task(self._answer_probes(open_s), name="path probes")
        try:
            async with asyncio.timeout(open_s):
                if self._tcp is not None:
                    await self._count(self._tcp, bytes_limit, seconds_limit)
                else:
                    await echo
        except (TimeoutError, OSError):
            return  # nobody came, or they left: the other end says so
        finally:
            echo.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await echo
            self._open.close()

    async def _answer_probes(self, patience_s: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    packet, sender = await loop.sock_recvfrom(self._udp, 1 << 16)
            except TimeoutError:
                return
            head = len(self._token) + _NUMBER.size
            known = hmac.compare_digest(packet[: len(self._token)], self._token)
            if known and sender[0] == self._peer and len(packet) >= head:
                patience_s = _IDLE_S
                number = _NUMBER.unpack(packet[len(self._token) : head])[0]
                with contextlib.suppress(OSError):  # the way back is cut
                    answer = self._token + _ANSWER.pack(number, len(packet))
                    await loop.sock_sendto(self._udp, answer, sender)

    async def _count(self, listener: socket.socket, limit: int, seconds_limit: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, sender = await loop.sock_accept(listener)
            with connection:
                connection.setblocking(False)
                if sender[0] != self._peer or not await self._is_known(connection):
                    continue
                counted, spent = await _drain(connection, limit, seconds_limit + _DRAIN_S)
                await loop.sock_sendall(connection, _COUNT.pack(counted, int(spent * 1e9)))
                return

    async def _is_known(self, connection: socket.socket) -> bool:
        try:
            async with asyncio.timeout(2.0):
                said = await _exactly(connection, len(self._token))
        except (OSError, TimeoutError, EOFError):
            return False
        return hmac.compare_digest(said, self._token)


async def _drain(connection: socket.socket, limit: int, seconds: float) -> tuple[int, float]:
    """Bytes until the end of the stream, the limit or the time, and the seconds they took."""
    loop, buffer = asyncio.get_running_loop(), bytearray(_CHUNK)
    counted, began, ended = 0, 0.0, 0.0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while counted < limit:
                received = await loop.sock_recv_into(connection, buffer)
                ended = time.monotonic()
                if not received:
                    break
                # The first piece starts the clock and does not count: it came before it.
                counted, began = (counted + received, began) if began else (0, ended)
    return counted, ended - began


async def _exactly(connection: socket.socket, size: int) -> bytes:
    loop, found = asyncio.get_running_loop(), b""
    while len(found) < size:
        piece = await loop.sock_recv(connection, size - len(found))
        if not piece:
            raise EOFError("the other end has closed the connection")
        found += piece
    return found


async def largest_packet(local: str, remote: str, port: int, *, token: bytes, full: int) -> int:
    """Size in bytes, IP header included, of the largest packet up to ``full`` that arrives whole.

    0: not even a small one does. Some tries each, so that one lost packet proves nothing. OSError
    when the address is not ours or no route leads there.
    """
    version = ipaddress.ip_address(local).version
    headers, smallest = _HEADERS[version], min(_SMALLEST[version], full)
    with _socket(local, socket.SOCK_DGRAM) as udp:
        _undivided(udp)
        probe = _Probe(udp, (remote, port), token)
        if await probe.arrives(full - headers, tries=_TRIES, patience_s=_PATIENCE_S):
            return full
        if not await probe.arrives(smallest - headers, tries=_TRIES, patience_s=_PATIENCE_S):
            return 0
        good, bad = smallest, full
        while bad - good > 1:
            middle = (good + bad) // 2
            arrived = await probe.arrives(middle - headers, tries=_QUICK_TRIES, patience_s=_QUICK_S)
            good, bad = (middle, bad) if arrived else (good, middle)
        return good


class _Probe:
    def __init__(self, udp: socket.socket, target: tuple[str, int], token: bytes) -> None:
        self._udp, self._target, self._token = udp, target, token
        self._number = 0

    async def arrives(self, size: int, *, tries: int, patience_s: float) -> bool:
        """Whether a datagram of that many bytes is answered as having come in whole."""
        loop = asyncio.get_running_loop()
        for _ in range(tries):
            self._number += 1
            packet = (self._token + _NUMBER.pack(self._number)).ljust(size, b"\0")
            try:
                await loop.sock_sendto(self._udp, packet, self._target)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:  # larger than our interface lets through
                    raise
                return False
            with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                async with asyncio.timeout(patience_s):
                    if await self._answered(len(packet)):
                        return True
        return False

    async def _answered(self, size: int) -> bool:
        wanted = self._token + _ANSWER.pack(self._number, size)
        while True:  # a late answer to an earlier try is no answer to this one
            answer, sender = await asyncio.get_running_loop().sock_recvfrom(self._udp, 256)
            if sender[:2] == self._target and hmac.compare_digest(answer, wanted):
                return True


@dataclass(frozen=True, slots=True)
class Rate:
    """What one transfer carried, by the clock of the end that received it."""

    bytes: int
    seconds: float

    @property
    def bits_per_s(self) -> float:
        """Bits a second, 0.0 when nothing could be counted."""
        return 8 * self.bytes / self.seconds if self.seconds > 0 else 0.0


async def rate(
    local: str, remote: str, port: int, *, token: bytes, bytes_limit: int, seconds_limit: float
) -> Rate:
    """Send up to so many bytes for so many seconds; what arrived. OSError, TimeoutError, EOFError
    when the other end is not there or stops."""
    loop = asyncio.get_running_loop()
    with _socket(local, socket.SOCK_STREAM) as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _HELD_BYTES)
        async with asyncio.timeout(seconds_limit + 3 * _DRAIN_S):
            await loop.sock_connect(tcp, (remote, port))
            await loop.sock_sendall(tcp, token)
            piece, sent = memoryview(bytes(_CHUNK)), 0
            with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
                async with asyncio.timeout(seconds_limit):
                    while sent < bytes_limit + _CHUNK:
                        await loop.sock_sendall(tcp, piece)
                        sent += len(piece)
            with contextlib.suppress(OSError):  # it has counted enough and closed
                tcp.shutdown(socket.SHUT_WR)
            counted, nanoseconds = _COUNT.unpack(await _exactly(tcp, _COUNT.size))
    return Rate(counted, nanoseconds / 1e9)
