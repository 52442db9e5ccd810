"""QEMU's migration stream, as commands of one monitor: the only place that spells them.

Facts behind the choices are in ``docs/design/0002`` and ``0003``. In short: capabilities are
sticky, so every one is written each time; ``return-path`` is what makes ``completed`` a proof;
``pause-before-switchover`` gives the moment to commit; the stream's events, not polling, say
what happened; out-of-band ``yank`` frees a source whose peer is frozen.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.migration.policy import Sample
from godwit.qmp import Event, EventStream, Monitor, MonitorError, MonitorLost, QmpError

ENDED = frozenset({"completed", "failed", "cancelled"})
DARK = frozenset({"pre-switchover", "device", "postcopy-active", "postcopy-device"})
_ALL_CAPABILITIES = (
    "xbzrle",
    "auto-converge",
    "events",
    "postcopy-ram",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "late-block-activate",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
    "x-ignore-shared",
    "rdma-pin-all",
    "dirty-bitmaps",
    "x-colo",
    "postcopy-blocktime",
)
TLS_OBJECT = "migration-tls"
STREAM_FD = "migration-stream"
# linux/tcp.h, asm-generic/socket.h; the socket module does not name them
TCP_NOTSENT_LOWAT, SO_SNDBUFFORCE = 25, 32
BUFFER_S = 0.008
LEAST_BUFFER_BYTES = 256 << 10
UNSENT_BYTES = 256 << 10
"""What the kernel may hold of the stream: seconds of the link, or unsent bytes where its speed is
not known. Measured in docs/design/0003: less slows the stream, more is dark time at the end."""
CONNECT_S = 5.0


@dataclass(frozen=True)
class Reading:
    """One ``query-migrate``: its status and, where it has them, the memory figures."""

    status: str
    transferred: int = 0
    remaining: int = 0
    dirty_bytes_per_s: float = 0.0
    link_bytes_per_s: float = 0.0
    pass_number: int = 0
    error: str = ""
    port: int = 0
    expected_downtime_ms: float | None = None
    blocked: tuple[str, ...] = ()

    def sample(self, at: float) -> Sample:
        """The reading as the policy wants it."""
        return Sample(
            at=at,
            transferred=self.transferred,
            remaining=self.remaining,
            dirty_bytes_per_s=self.dirty_bytes_per_s,
            link_bytes_per_s=self.link_bytes_per_s,
            pass_number=self.pass_number,
            postcopy_active=self.status.startswith("postcopy"),
        )


class Stream:
    """The migration commands of one QEMU, on the source or on the destination."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    async def set_capabilities(self, wanted: Iterable[str]) -> None:
        """Switch exactly these on and every other one that this QEMU knows off."""
        known = await self.monitor.execute("query-migrate-capabilities")
        stands = {entry["capability"]: entry["state"] for entry in known}
        wanted = set(wanted)
        if missing := wanted - stands.keys():
            raise QmpError(
                "migrate-set-capabilities",
                error_class="GenericError",
                desc=f"this QEMU has no capability {', '.join(sorted(missing))}",
            )
        # Only what differs: QEMU reads a command byte by byte, a long one takes milliseconds.
        states = [
            {"capability": name, "state": name in wanted}
            for name in _ALL_CAPABILITIES
            if name in stands and stands[name] != (name in wanted)
        ]
        if states:
            await self.monitor.execute("migrate-set-capabilities", {"capabilities": states})

    async def set_parameters(self, **parameters: Any) -> None:
        """Set parameters; underscores stand for QMP's hyphens."""
        arguments = {name.replace("_", "-"): value for name, value in parameters.items()}
        await self.monitor.execute("migrate-set-parameters", arguments)

    async def parameters(self) -> dict[str, Any]:
        """All parameters as they stand (also tells which ones this QEMU has)."""
        answer: dict[str, Any] = await self.monitor.execute("query-migrate-parameters")
        return answer

    async def use_tls(self, directory: Path, *, endpoint: str) -> None:
        """Give QEMU the cluster's certificates for the stream; idempotent."""
        try:
            await self.monitor.execute(
                "object-add",
                {
                    "qom-type": "tls-creds-x509",
                    "id": TLS_OBJECT,
                    "dir": str(directory),
                    "endpoint": endpoint,
                    "verify-peer": True,
                },
            )
        except QmpError as error:
            if "duplicate" not in error.desc.lower():
                raise
            await self.drop_tls()
            await self.use_tls(directory, endpoint=endpoint)

    async def drop_tls(self) -> None:
        """Take the certificates away again; absent ones are no error."""
        try:
            await self.monitor.execute("object-del", {"id": TLS_OBJECT})
        except QmpError:
            return

    async def listen(self, address: str) -> int:
        """Destination: open the stream's port on ``address``; the kernel chooses it."""
        await self.monitor.execute("migrate-incoming", {"uri": f"tcp:{address}:0"}, timeout=5.0)
        port = (await self.read()).port
        if not port:
            raise QmpError(
                "query-migrate", error_class="GenericError", desc="no listening port reported"
            )
        return port

    async def connect_on(self, sock: socket.socket) -> None:
        """Source: start the stream on a connection of our own making.

        QEMU has no option that bounds what its socket holds, and megabytes that it counts as sent
        would still wait there when the VM is stopped: 20-35 ms of every blackout. The socket is
        handed over (and closed here).
        """
        with sock:
            await self.monitor.pass_fd(sock.fileno(), STREAM_FD)
        await self.connect(f"fd:{STREAM_FD}")

    async def connect(self, uri: str, *, resume: bool = False) -> None:
        """Source: start the stream (or pick a broken post-copy one up again)."""
        arguments: dict[str, Any] = {"uri": uri}
        if resume:
            arguments["resume"] = True
        await self.monitor.execute("migrate", arguments, timeout=10.0)

    async def read(self, *, timeout: float = 5.0) -> Reading:
        """The stream as QEMU sees it now."""
        return reading(await self.monitor.execute("query-migrate", timeout=timeout))

    async def go_on(self) -> None:
        """Leave ``pre-switchover``: from here QEMU lets go of the VM by itself."""
        await self.monitor.execute("migrate-continue", {"state": "pre-switchover"}, timeout=5.0)

    async def cancel(self, *, timeout: float = 5.0) -> None:
        """Ask for the end of the stream; the event says when it came."""
        await self.monitor.execute("migrate_cancel", timeout=timeout)

    async def yank(self, *, timeout: float = 2.0) -> None:
        """Cut the stream out-of-band: works while QEMU's main loop hangs on a frozen peer."""
        await self.monitor.execute_oob(
            "yank", {"instances": [{"type": "migration"}]}, timeout=timeout
        )


async def open_stream(
    host: str, port: int, *, from_address: str, rate_bits: int = 0
) -> socket.socket:
    """A blocking TCP socket to the destination's QEMU, from our migration address.

    ``rate_bits`` is the link's speed in bits/s, 0 when it is not known. OSError or TimeoutError
    when the destination cannot be reached.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if from_address:
            sock.bind((from_address, 0))
        async with asyncio.timeout(CONNECT_S):
            await loop.sock_connect(sock, (host, port))
        _limit_backlog(sock, rate_bits)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    return sock


def _limit_backlog(sock: socket.socket, rate_bits: int) -> None:
    """What waits in the socket when the VM is stopped has to be sent while it is dark."""
    if rate_bits:
        size = max(LEAST_BUFFER_BYTES, int(rate_bits / 8 * BUFFER_S))
        with contextlib.suppress(PermissionError):  # not root: the next line does part of it
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, size)
            return
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def reading(answer: dict[str, Any]) -> Reading:
    """The figures of a ``query-migrate`` answer (QEMU 7.2 to 10.x)."""
    ram = answer.get("ram", {})
    page = int(ram.get("page-size", 4096))
    port = 0
    for address in answer.get("socket-address", ()):
        port = int(address.get("port", 0) or 0)
    downtime = answer.get("expected-downtime")
    return Reading(
        status=answer.get("status", "none"),
        transferred=int(ram.get("transferred", 0)),
        remaining=int(ram.get("remaining", 0)),
        dirty_bytes_per_s=float(ram.get("dirty-pages-rate", 0)) * page,
        link_bytes_per_s=float(ram.get("mbps", 0)) * 1e6 / 8,
        pass_number=int(ram.get("dirty-sync-count", 0)),
        error=str(answer.get("error-desc", "")),
        port=port,
        expected_downtime_ms=float(downtime) if downtime is not None else None,
        blocked=tuple(answer.get("blocked-reasons", ())),
    )


async def announce_self(monitor: Monitor) -> None:
    """Let the guest's cards tell the network where they are now; sent at once, then repeated."""
    await monitor.execute(
        "announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100}, timeout=2.0
    )


async def wait_status(
    events: EventStream, wanted: frozenset[str] | set[str], *, timeout: float | None
) -> Event:
    """The next MIGRATION event with one of these statuses; TimeoutError, MonitorLost."""
    return await events.wait(
        lambda event: event.name == "MIGRATION" and event.data.get("status") in wanted,
        timeout=timeout,
    )


async def end_stream(stream: Stream, events: EventStream) -> str:
    """Bring a source's stream to its end, whatever its peer does; returns the final status.

    First politely, then out-of-band. "frozen" when QEMU answers neither: its vCPUs may be
    stopped for good, and the caller must decide what that VM is worth.
    """
    try:
        await stream.cancel(timeout=0.5)
    except QmpError:
        pass
    except MonitorLost:
        return "gone"
    except MonitorError:
        pass
    for attempt in range(3):
        try:
            status = (await stream.read(timeout=0.5)).status
            if status in ENDED or status == "none":
                return status
            await wait_status(events, ENDED, timeout=0.5)
            continue
        except MonitorLost:
            return "gone"
        except (TimeoutError, MonitorError):
            pass
        try:
            await stream.yank(timeout=0.5 + attempt)
        except MonitorLost:
            return "gone"
        except (TimeoutError, MonitorError):
            continue
    return "frozen"
