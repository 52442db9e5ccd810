"""What can go wrong on a monitor, grouped by what the caller may still assume.

`QmpError`       QEMU answered "no": nothing was done, the session is fine.
`MonitorTimeout` no answer in time: *outcome unknown* when `sent`, the session is fine.
`MonitorLost`    the connection is gone: the outcome of everything in flight is unknown.
"""

from __future__ import annotations

import asyncio


class MonitorError(Exception):
    """Base of everything this package raises on purpose."""


class QmpError(MonitorError):
    """QEMU refused or failed a command, and said so.

    `error_class` is QMP's class (`GenericError`, `CommandNotFound`, `DeviceNotFound`, ...),
    `desc` QEMU's own sentence. Arguments are not kept: they may hold secrets.
    """

    def __init__(self, command: str, *, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class MonitorLost(MonitorError):
    """The monitor's connection ended; QEMU may be dead or may have closed it.

    `command` names the command in flight, if any: it may or may not have been carried out.
    """

    def __init__(self, name: str, reason: str, *, command: str | None = None) -> None:
        during = f" during {command}" if command else ""
        super().__init__(f"monitor {name}: lost{during}: {reason}")
        self.name = name
        self.reason = reason
        self.command = command


class MonitorUnreachable(MonitorLost):
    """No session could be opened before the deadline; nothing was sent."""


class MonitorTimeout(MonitorError, TimeoutError):
    """A command got no answer in time.

    `sent` False: it never left, so nothing happened. `sent` True: the outcome is unknown, the
    command may still be carried out, and `late` is the task that holds the answer when it
    comes (or `QmpError` / `MonitorLost`); it may be awaited, shielded or ignored.
    """

    def __init__(
        self,
        name: str,
        command: str,
        timeout: float,
        *,
        late: asyncio.Task[object] | None = None,
    ) -> None:
        what = "no answer" if late is not None else "not sent"
        super().__init__(f"monitor {name}: {command}: {what} within {timeout:g} s")
        self.name = name
        self.command = command
        self.late = late
        self.sent = late is not None
