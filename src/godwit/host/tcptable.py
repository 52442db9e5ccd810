"""The kernel's tables of sockets in our network namespace, as /proc shows them."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
UDP_TABLES: Final = (Path("/proc/net/udp"), Path("/proc/net/udp6"))
LISTENING: Final = 10  # TCP_LISTEN, also the first byte of TCP_INFO

End = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One connection, or a listening socket. ``unsent``: bytes that the kernel still delivers.

    ``inode`` is empty when no process has it: not accepted yet, or ended.
    """

    here: End
    there: End
    state: int
    unsent: int
    inode: str


def rows(tables: Sequence[Path] = TABLES) -> Iterator[Row]:
    """What the tables list now; a kernel without IPv6 has only one of them."""
    for table in tables:
        with contextlib.suppress(FileNotFoundError):
            for line in table.read_text().splitlines()[1:]:
                words = line.split()
                yield Row(
                    here=_end(words[1]),
                    there=_end(words[2]),
                    state=int(words[3], 16),
                    unsent=int(words[4].partition(":")[0], 16),
                    inode=words[9] if len(words) > 9 and words[9] != "0" else "",
                )


def udp_ports(tables: Sequence[Path] = UDP_TABLES) -> frozenset[int]:
    """The local ports at which somebody takes datagrams."""
    return frozenset(row.here[1] for row in rows(tables))


def plain(address: str) -> str:
    """An IPv4 address that lives in an IPv6 socket is an IPv4 address; a scope is left out."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def _end(text: str) -> End:
    """Address and port as the kernel's table has them: words of the machine's own byte order."""
    address, _, port = text.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    return str(ipaddress.ip_address(packed)), int(port, 16)
