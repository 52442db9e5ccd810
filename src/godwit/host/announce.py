"""Tells switches where a VM's address is now, by one RARP frame on the wire.

RARP teaches switches and nobody else: no host changes a neighbour table for it.  QEMU's own
announcement goes through the tap and covers the guest's addresses; this one is for the moment
when the tap just became a port.
"""

from __future__ import annotations

import socket
import struct

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


def gratuitous(ifname: str, mac: str, *, netns_fd: int | None = None) -> None:
    """Send one frame out of a link (on a bridge: out of all its ports).  Raises OSError."""

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as channel:
            channel.bind((ifname, 0))
            channel.send(rarp_frame(mac))

    in_netns(netns_fd, send)
