"""Links, bridges and addresses through ``ip -json -batch -``: one program for a list of changes.

The functions named after things (``bridge``, ``veth``, ...) are pure and return one batch line
each, which is also what an administrator would type after ``ip``.  :func:`apply` runs a list of
them, in order, and stops at the first that fails; :func:`undo_lines` removes what was added.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.host.errors import HostError, LinkCommandFailed, ProgramFailed
from godwit.host.ifctl import mac_bytes
from godwit.host.run import run, run_async

_BATCH = ("ip", "-json", "-batch", "-")
_TIMEOUT = 20.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,15}")
_NETNS = re.compile(r"[A-Za-z0-9._-]{1,100}")
_FAILED_LINE = re.compile(r"Command failed -:(\d+)")


def _link(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise HostError(f"{name!r} cannot name a link", hint="1 to 15 letters, digits, . _ -")
    return name


def _mtu(mtu: int) -> int:
    if not 68 <= mtu <= 65535:
        raise HostError(f"an MTU of {mtu} bytes is not possible")
    return mtu


def _netns(netns: str | int) -> str:
    """A namespace as ``ip`` takes it: a name, or the number of a process inside it."""
    if isinstance(netns, int):
        return str(netns)
    if not _NETNS.fullmatch(netns) or netns.isdigit():
        raise HostError(f"{netns!r} cannot name a network namespace")
    return netns


def stable_mac(seed: str) -> str:
    """A locally administered Ethernet address that is the same for the same words."""
    digest = hashlib.sha256(seed.encode()).digest()
    return "02:" + digest[:5].hex(":")


def bridge(name: str, *, mtu: int = 1500, mac: str | None = None) -> str:
    """Add a bridge that forwards at once, set up.

    With ``mac`` it keeps that address; else it would change with its ports.  Multicast snooping
    is off: a VM that has just moved is in no group yet, and would miss IPv6 neighbour discovery.
    """
    address = "" if mac is None else f"address {mac_bytes(mac).hex(':')} "
    return (
        f"link add name {_link(name)} mtu {_mtu(mtu)} {address}up type bridge "
        "stp_state 0 forward_delay 0 mcast_snooping 0"
    )


def veth(name: str, peer: str, *, mtu: int = 1500, peer_netns: str | int | None = None) -> str:
    """Add a pair of joined links, the second one in another namespace if given; both down."""
    there = "" if peer_netns is None else f" netns {_netns(peer_netns)}"
    return (
        f"link add name {_link(name)} mtu {_mtu(mtu)} type veth "
        f"peer name {_link(peer)} mtu {mtu}{there}"
    )


def move(name: str, netns: str | int) -> str:
    """Move a link into another namespace, where it is down."""
    return f"link set dev {_link(name)} netns {_netns(netns)}"


def up(name: str) -> str:
    """Set a link up."""
    return f"link set dev {_link(name)} up"


def down(name: str) -> str:
    """Set a link down."""
    return f"link set dev {_link(name)} down"


def attach(port: str, bridge_name: str) -> str:
    """Make a link a port of a bridge."""
    return f"link set dev {_link(port)} master {_link(bridge_name)}"


def detach(port: str) -> str:
    """Take a port out of its bridge."""
    return f"link set dev {_link(port)} nomaster"


def delete(name: str) -> str:
    """Delete a link (of a pair: both)."""
    return f"link del dev {_link(name)}"


def set_mtu(name: str, mtu: int) -> str:
    """Set the MTU of a link in bytes."""
    return f"link set dev {_link(name)} mtu {_mtu(mtu)}"


def set_mac(name: str, mac: str) -> str:
    """Set the Ethernet address of a link."""
    return f"link set dev {_link(name)} address {mac_bytes(mac).hex(':')}"


def no_ipv6_address(name: str) -> str:
    """Keep a link without an automatic IPv6 address (a port needs none)."""
    return f"link set dev {_link(name)} addrgenmode none"


def address(name: str, cidr: str) -> str:
    """Give a link an address like ``10.92.0.11/24``."""
    return f"address add {ipaddress.ip_interface(cidr)} dev {_link(name)}"


def flush_addresses(name: str) -> str:
    """Take all addresses from a link."""
    return f"address flush dev {_link(name)}"


def route(destination: str, via: str) -> str:
    """Add a route; ``default`` or a network like ``10.0.0.0/8``."""
    target = destination if destination == "default" else str(ipaddress.ip_network(destination))
    return f"route add {target} via {ipaddress.ip_address(via)}"


def undo_lines(lines: Iterable[str]) -> list[str]:
    """Lines that delete the links which these lines add, last first."""
    names = [words[3] for words in map(str.split, lines) if words[:3] == ["link", "add", "name"]]
    return [delete(name) for name in reversed(names)]


def _batch(lines: Sequence[str]) -> bytes:
    for line in lines:
        if "\n" in line:
            raise HostError("a batch line holds a line break")
    return "".join(f"{line}\n" for line in lines).encode()


def _explain(lines: Sequence[str], error: ProgramFailed) -> HostError:
    """The failed line in the words of ``ip``; the error itself when it is about something else."""
    found = _FAILED_LINE.search(error.stderr)
    if found is None:
        return error
    reason = _FAILED_LINE.sub("", error.stderr).strip().splitlines()
    return LinkCommandFailed(lines[int(found.group(1)) - 1], reason[0] if reason else "refused")


def _answers(text: bytes) -> list[Any]:
    """The JSON values of a batch, one after another."""
    decoder, rest, found = json.JSONDecoder(), text.decode().strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].lstrip()
    return found


def apply(lines: Sequence[str], *, netns: str | None = None) -> list[Any]:
    """Run batch lines in a namespace; returns the JSON answers of those that show something.

    Raises LinkCommandFailed for the first line that fails; the lines before it took effect.
    """
    if not lines:
        return []
    try:
        return _answers(run(_BATCH, input=_batch(lines), timeout=_TIMEOUT, netns=netns))
    except ProgramFailed as error:
        raise _explain(lines, error) from error


async def apply_async(lines: Sequence[str], *, netns: str | None = None) -> list[Any]:
    """Like :func:`apply`, without blocking the event loop."""
    if not lines:
        return []
    try:
        return _answers(await run_async(_BATCH, input=_batch(lines), timeout=_TIMEOUT, netns=netns))
    except ProgramFailed as error:
        raise _explain(lines, error) from error


@dataclass(frozen=True, slots=True)
class Link:
    """One link as it is now."""

    name: str
    index: int
    kind: str  # bridge, veth, tun, ...; empty for hardware and loopback
    mac: str
    mtu: int
    is_up: bool
    master: str | None
    rx_bytes: int
    tx_bytes: int
    rx_packets: int
    tx_packets: int


def _as_link(row: dict[str, Any]) -> Link:
    received, sent = (row.get("stats64", {}).get(way, {}) for way in ("rx", "tx"))
    return Link(
        name=row["ifname"],
        index=row["ifindex"],
        kind=row.get("linkinfo", {}).get("info_kind", ""),
        mac=row.get("address", ""),
        mtu=row["mtu"],
        is_up="UP" in row["flags"],
        master=row.get("master"),
        rx_bytes=received.get("bytes", 0),
        tx_bytes=sent.get("bytes", 0),
        rx_packets=received.get("packets", 0),
        tx_packets=sent.get("packets", 0),
    )


def show(netns: str | None = None) -> dict[str, Link]:
    """All links of a namespace by name, with their counters."""
    argv = ("ip", "-json", "-details", "-statistics", "link", "show")
    rows = json.loads(run(argv, timeout=_TIMEOUT, netns=netns) or b"[]")
    return {link.name: link for link in map(_as_link, rows)}


@dataclass(frozen=True, slots=True)
class Counters:
    """What a link has carried so far."""

    rx_bytes: int
    tx_bytes: int
    rx_packets: int
    tx_packets: int


def counters(name: str, net: Path = Path("/sys/class/net")) -> Counters:
    """Counters of a link of the namespace that /sys shows; quick, starts no program."""
    folder = net / name / "statistics"

    def read(key: str) -> int:
        try:
            return int((folder / key).read_text())
        except FileNotFoundError as error:
            raise HostError(f"there is no link {name}") from error

    return Counters(*map(read, ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")))
