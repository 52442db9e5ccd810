"""Tells switches where a VM's address is now, by one RARP frame on the wire.

RARP teaches switches and nobody else: no host changes a neighbour table for it.  QEMU's own
announcement goes through the tap and covers the guest's addresses; this one is for the moment
when the tap just became a port.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self

from godwit.host.ifctl import in_netns, mac_bytes

ETHERTYPE_RARP = 0x8035
_BROADCAST = b"\xff" * 6
_SHORTEST_FRAME = 60


def rarp_frame(mac: str) -> bytes:
    """A reverse-ARP request from and for an address, as an Ethernet frame."""
    raw = mac_bytes(mac)
    header = _BROADCAST + raw + struct.pack("!H", ETHERTYPE_RARP)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 3)  # Ethernet, IPv4, reverse request
    nobody = b"\0" * 4
    return (header + body + raw + nobody + raw + nobody).ljust(_SHORTEST_FRAME, b"\0")


class Announcer:
    """Sends such frames in one network namespace, over one socket kept open.

    Kept, because closing a packet socket waits for the kernel's other processors: 10-20 ms, which
    a VM that is being handed over would spend in the dark. Nothing is ever received on it.
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        self._socket = in_netns(
            netns_fd,
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0),
        )

    def close(self) -> None:
        """Give the socket back; slow, see above."""
        self._socket.close()

    def send(self, ifname: str, mac: str) -> None:
        """One frame out of a link (on a bridge: out of all its ports). Raises OSError."""
        self._socket.sendto(rarp_frame(mac), (ifname, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
