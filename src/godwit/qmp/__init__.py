"""Monitor sessions for QEMU and qemu-storage-daemon: the only place that knows the protocol."""

from godwit.qmp.errors import (
    MonitorError,
    MonitorLost,
    MonitorTimeout,
    MonitorUnreachable,
    QmpError,
)
from godwit.qmp.events import Event, EventStream
from godwit.qmp.session import DEFAULT_TIMEOUT, Monitor

__all__ = [
    "DEFAULT_TIMEOUT",
    "Event",
    "EventStream",
    "Monitor",
    "MonitorError",
    "MonitorLost",
    "MonitorTimeout",
    "MonitorUnreachable",
    "QmpError",
]
