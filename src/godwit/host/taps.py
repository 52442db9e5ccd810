"""Taps for QEMU: made as descriptors, gone with the last descriptor.

Nothing here is persistent, so a QEMU that dies takes its taps along and leaves no leak.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from godwit.host.errors import HostError
from godwit.host.ifctl import LinkControl, in_netns, mac_bytes, request

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000


@dataclass(frozen=True, slots=True)
class Tap:
    """A tap and its open queues; pass ``fds`` to QEMU, then close ours."""

    name: str
    fds: tuple[int, ...]

    def close(self) -> None:
        """Close our descriptors; the tap vanishes unless QEMU holds them too."""
        for descriptor in self.fds:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def host_side_mac(vm_mac: str) -> str:
    """Address for the host's side of a VM's tap: never the VM's own, higher than any bridge's."""
    return "fe:" + mac_bytes(vm_mac)[1:].hex(":")


def open_tap(
    name: str,
    *,
    mtu: int = 1500,
    queues: int = 1,
    vm_mac: str | None = None,
    netns_fd: int | None = None,
) -> Tap:
    """Make a tap, down and on no bridge, with one descriptor per queue.

    With ``vm_mac`` its own address is derived from the VM's.  Raises HostError when the name is
    taken or /dev/net/tun is missing; nothing stays behind then.
    """
    return in_netns(netns_fd, lambda: _open_tap(name, mtu=mtu, queues=queues, vm_mac=vm_mac))


def _open_tap(name: str, *, mtu: int, queues: int, vm_mac: str | None) -> Tap:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        for queue in range(queues):
            descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            fds.append(descriptor)
            # Only the first queue makes the link; it must not attach to somebody else's.
            exclusive = _IFF_TUN_EXCL if queue == 0 else 0
            fcntl.ioctl(descriptor, _TUNSETIFF, request(name, struct.pack("H", flags | exclusive)))
        _silence(name)
        with LinkControl() as control:
            if mtu != 1500:
                control.set_mtu(name, mtu)
            if vm_mac is not None:
                control.set_mac(name, host_side_mac(vm_mac))
    except OSError as error:
        Tap(name, tuple(fds)).close()
        raise HostError(f"cannot make tap {name}: {error.strerror}") from error
    except BaseException:
        Tap(name, tuple(fds)).close()
        raise
    return Tap(name, tuple(fds))


def _silence(name: str) -> None:
    """Keep the host's IPv6 off the tap: it would talk into the guest's network by itself."""
    path = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    with contextlib.suppress(OSError):
        path.write_text("1")
