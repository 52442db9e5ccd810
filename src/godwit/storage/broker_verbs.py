"""What a broker says to its daemon: sequences of QMP commands, each of them small.

They raise what the monitor raises: `QmpError` (the daemon said no), `MonitorTimeout` and
`MonitorLost` (the outcome is unknown). `Unclear` is a "no" to a step that takes another one back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Final

from godwit.model.errors import OperationFailed
from godwit.qemu.snapshots import Held, held_image
from godwit.qmp import MonitorError, QmpError
from godwit.storage import nodes
from godwit.storage.broker_daemon import Daemon
from godwit.storage.nodes import BrokerDisk, Node

DELETED: Final = "BLOCK_EXPORT_DELETED"


class Unclear(MonitorError):
    """The daemon refused to undo a step, so nobody knows what it has open."""


async def named_nodes(daemon: Daemon, *, timeout: float) -> dict[str, int]:
    """The named nodes and the bytes each shows."""
    answer = await daemon.execute("query-named-block-nodes", {"flat": True}, timeout=timeout)
    return {str(node["node-name"]): int(node["image"]["virtual-size"]) for node in answer}


async def export_ids(daemon: Daemon, *, timeout: float) -> frozenset[str]:
    """The exports there are."""
    answer: list[dict[str, Any]] = await daemon.execute("query-block-exports", timeout=timeout)
    return frozenset(str(one["id"]) for one in answer)


async def add_closed(daemon: Daemon, disk: BrokerDisk, export: Node, *, timeout: float) -> None:
    """Add a disk's placeholder, the node above it, and its export."""
    over = nodes.export_node(disk, over=nodes.failing_node_name(disk.id))
    for node in (*nodes.placeholder_nodes(disk), over):
        await daemon.execute("blockdev-add", node, timeout=timeout)
    await daemon.execute("block-export-add", export, timeout=timeout)


async def open_target(daemon: Daemon, disk: BrokerDisk, target: Node, *, timeout: float) -> None:
    """Open what the gate leads to, see that it has the right size, and let I/O through.

    After `QmpError` or `OperationFailed` it is not open.
    """
    name = str(target["node-name"])
    added, there = await _at_once(
        daemon.execute("blockdev-add", target, timeout=timeout),
        named_nodes(daemon, timeout=timeout),
    )
    if isinstance(added, BaseException):
        raise added
    try:
        if isinstance(there, BaseException):
            raise there
        check_size(disk, there.get(name, 0))
        await reopen(daemon, disk, over=name, timeout=timeout)
    except (QmpError, OperationFailed) as error:
        try:
            await daemon.execute("blockdev-del", {"node-name": name}, timeout=timeout)
        except QmpError as refusal:
            raise Unclear(f"{error}, and then {refusal}") from error
        raise


async def reopen(daemon: Daemon, disk: BrokerDisk, *, over: str, timeout: float) -> None:
    """Put the disk's export over another node; what is left is drained and flushed first."""
    options = {"options": [nodes.export_node(disk, over=over)]}
    await daemon.execute("blockdev-reopen", options, timeout=timeout)


async def close_target(daemon: Daemon, disk: BrokerDisk, node: str, *, timeout: float) -> None:
    """Let no I/O through and close what the gate led to.

    After `QmpError` it is open as before (the last flush failed).
    """
    # A node that the export was not taken off is in use, so it is not deleted either.
    off, deleted = await _at_once(
        reopen(daemon, disk, over=nodes.failing_node_name(disk.id), timeout=timeout),
        daemon.execute("blockdev-del", {"node-name": node}, timeout=timeout),
    )
    if isinstance(off, BaseException):
        raise off
    if isinstance(deleted, QmpError):
        raise Unclear(str(deleted)) from deleted
    if isinstance(deleted, BaseException):
        raise deleted


async def delete_export(daemon: Daemon, export: str, *, force: bool, timeout: float) -> None:
    """Take an export away; `QmpError` when a client uses it and not ``force``. Fine if it is gone.

    Forced, its clients lose their connection and what they had not heard of is unanswered.
    """
    with daemon.monitor.events(DELETED) as deleted:
        arguments = {"id": export, "mode": "hard" if force else "safe"}
        try:
            await daemon.execute("block-export-del", arguments, timeout=timeout)
        except QmpError:
            if export not in await export_ids(daemon, timeout=timeout):
                return
            raise
        await deleted.wait(lambda event: event.data.get("id") == export, timeout=timeout)


async def delete_nodes(daemon: Daemon, names: Sequence[str], *, timeout: float) -> None:
    """Remove those of the nodes that exist, in this order."""
    for name in names:
        try:
            await daemon.execute("blockdev-del", {"node-name": name}, timeout=timeout)
        except QmpError:
            if name in await named_nodes(daemon, timeout=timeout):
                raise


async def held_images(daemon: Daemon, *, timeout: float) -> dict[str, Held]:
    """The snapshots in each named node's image, and the bytes that takes."""
    answer = await daemon.execute("query-named-block-nodes", {"flat": True}, timeout=timeout)
    return {str(node["node-name"]): held_image(node["image"]) for node in answer}


async def take_snapshots(
    daemon: Daemon, nodes_: Sequence[str], tag: str, *, timeout: float
) -> None:
    """A snapshot in each of these images, or in none."""
    kind = "blockdev-snapshot-internal-sync"
    actions = [{"type": kind, "data": {"device": node, "name": tag}} for node in nodes_]
    await daemon.execute("transaction", {"actions": actions}, timeout=timeout)


async def drop_snapshot(daemon: Daemon, node: str, tag: str, *, timeout: float) -> None:
    """Give back what a snapshot takes."""
    arguments = {"device": node, "name": tag}
    await daemon.execute("blockdev-snapshot-delete-internal-sync", arguments, timeout=timeout)


def check_size(disk: BrokerDisk, size_bytes: int) -> None:
    """OperationFailed unless the image shows the guest what its record says."""
    if size_bytes != disk.size_bytes:
        raise OperationFailed(
            f"{disk.path} holds {size_bytes} bytes, the record says {disk.size_bytes}",
            hint="was the image replaced? put the right one back",
        )


async def _at_once(first: Awaitable[object], second: Awaitable[object]) -> list[Any]:
    """Send the second before the first is answered, and return what each gave or raised.

    The daemon takes them in this order. A VM may stand still meanwhile, and a round trip is a
    millisecond of it.
    """
    return list(await asyncio.gather(first, second, return_exceptions=True))
