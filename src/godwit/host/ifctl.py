"""Changes one link at once through ioctl: up, down, bridge port, MTU, address.

These calls happen while a VM is dark, so they start no program: one system call each.  Setting
links up and everything else that is not urgent goes through ``links``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from godwit.host import _libc
from godwit.host.errors import HostError

T = TypeVar("T")

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFMTU = 0x8921
_SIOCSIFMTU = 0x8922
_SIOCSIFHWADDR = 0x8924
_SIOCGIFHWADDR = 0x8927
_SIOCGIFINDEX = 0x8933
_SIOCBRADDIF = 0x89A2
_SIOCBRDELIF = 0x89A3
_IFF_UP = 0x1
_ARPHRD_ETHER = 1
_CLONE_NEWNET = 0x40000000
_NAME_BYTES = 16
# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
_NLMSG_HEADER = 16
_RTM_NEWLINK = 16
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_IFLA_LINKINFO = 18
_IFLA_INFO_SLAVE_KIND, _IFLA_INFO_SLAVE_DATA = 4, 5
_IFLA_BRPORT_FLUSH = 24
_NET = Path("/sys/class/net")


def in_netns(netns_fd: int | None, act: Callable[[], T]) -> T:
    """Call something short in another network namespace (None: in ours).

    A thread of its own enters the namespace and ends afterwards, so no other thread is moved.
    """
    if netns_fd is None:
        return act()
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _libc.setns(netns_fd, _CLONE_NEWNET)
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="in-netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def request(name: str, tail: bytes = b"") -> bytes:
    """A ``struct ifreq`` for a link."""
    raw = name.encode()
    if not 0 < len(raw) < _NAME_BYTES:
        raise HostError(f"{name!r} cannot name a link: 1 to 15 bytes")
    return struct.pack("16s24s", raw, tail)


def mac_bytes(mac: str) -> bytes:
    """The six bytes of an Ethernet address like ``52:54:00:12:34:56``."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6 or len(mac) != 17:
        raise ValueError(f"{mac!r} is not an Ethernet address")
    return raw


class LinkControl:
    """Fast changes of links in one network namespace, over one socket kept open.

    Thread-safe.  All methods raise OSError with the link's name when the kernel refuses.
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        self._socket = in_netns(
            netns_fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        )

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def __enter__(self) -> LinkControl:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, number: int, name: str, tail: bytes = b"") -> bytes:
        try:
            return fcntl.ioctl(self._socket, number, request(name, tail))[_NAME_BYTES:]
        except OSError as error:
            raise OSError(error.errno, f"link {name}: {error.strerror}") from error

    def index(self, name: str) -> int:
        """The kernel's number of a link."""
        return int(struct.unpack_from("i", self._call(_SIOCGIFINDEX, name))[0])

    def exists(self, name: str) -> bool:
        """Whether there is a link of this name."""
        try:
            self.index(name)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return True

    def _flags(self, name: str) -> int:
        return int(struct.unpack_from("H", self._call(_SIOCGIFFLAGS, name))[0])

    def is_up(self, name: str) -> bool:
        """Whether the link is set up (its carrier may still be missing)."""
        return bool(self._flags(name) & _IFF_UP)

    def up(self, name: str) -> None:
        """Set a link up."""
        self._call(_SIOCSIFFLAGS, name, struct.pack("H", self._flags(name) | _IFF_UP))

    def down(self, name: str) -> None:
        """Set a link down."""
        self._call(_SIOCSIFFLAGS, name, struct.pack("H", self._flags(name) & ~_IFF_UP))

    def mtu(self, name: str) -> int:
        """The MTU of a link in bytes."""
        return int(struct.unpack_from("i", self._call(_SIOCGIFMTU, name))[0])

    def set_mtu(self, name: str, mtu: int) -> None:
        """Set the MTU of a link in bytes."""
        self._call(_SIOCSIFMTU, name, struct.pack("i", mtu))

    def mac(self, name: str) -> str:
        """The Ethernet address of a link."""
        return self._call(_SIOCGIFHWADDR, name)[2:8].hex(":")

    def set_mac(self, name: str, mac: str) -> None:
        """Set the Ethernet address of a link."""
        self._call(_SIOCSIFHWADDR, name, struct.pack("H6s", _ARPHRD_ETHER, mac_bytes(mac)))

    def attach(self, bridge: str, port: str) -> None:
        """Make a link a port of a bridge; fine when it is one already."""
        try:
            self._call(_SIOCBRADDIF, bridge, struct.pack("i", self.index(port)))
        except OSError as error:
            if error.errno != errno.EBUSY or master(port) != bridge:
                raise

    def detach(self, bridge: str, port: str) -> None:
        """Take a port out of a bridge; fine when it is not one of its ports."""
        try:
            self._call(_SIOCBRDELIF, bridge, struct.pack("i", self.index(port)))
        except OSError as error:
            if error.errno != errno.EINVAL or master(port) == bridge:
                raise


def master(name: str, net: Path = _NET) -> str | None:
    """The bridge a link is a port of; None when it is none (in the namespace /sys shows)."""
    link = net / name / "master"
    return link.readlink().name if link.is_symlink() else None


def speed_bits(name: str, net: Path = _NET) -> int | None:
    """Speed of a link in bits per second as its driver tells it, None when it does not."""
    try:
        megabits = int((net / name / "speed").read_text())
    except OSError:
        return None
    return megabits * 1_000_000 if megabits > 0 else None


def flush_learned(port: str) -> None:
    """Let a bridge forget which addresses it learned behind one port (``fdb_flush`` in ``ip``).

    Over netlink, in microseconds; OSError when the link is no bridge port.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as channel:
        channel.settimeout(1.0)
        channel.bind((0, 0))
        channel.send(_flush_message(socket.if_nametoindex(port)))
        answer = channel.recv(4096)
    code = struct.unpack_from("=i", answer, _NLMSG_HEADER)[0]
    if code:
        raise OSError(-code, f"link {port}: {os.strerror(-code)}")


def _flush_message(index: int) -> bytes:
    """RTM_NEWLINK { IFLA_LINKINFO { slave kind "bridge", slave data { flush } } }, to be acked."""
    data = _attribute(_IFLA_BRPORT_FLUSH, b"")
    info = _attribute(_IFLA_INFO_SLAVE_KIND, b"bridge\0") + _attribute(_IFLA_INFO_SLAVE_DATA, data)
    link = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, 0, 0)
    body = link + _attribute(_IFLA_LINKINFO, info)
    size = _NLMSG_HEADER + len(body)
    return struct.pack("=IHHII", size, _RTM_NEWLINK, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    size = 4 + len(value)
    return struct.pack("=HH", size, kind) + value + b"\0" * (-size % 4)
