"""What a host's agent answers when a manager asks which QEMUs it has."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Record

ProcessState = Literal["starting", "running", "frozen", "paused", "incoming", "postmigrate"]


class QemuProcess(Record):
    """One QEMU. ``epoch``: the one of its durable note, or the one it would get (``incoming``).

    ``driven``: a move's engine works on it, which knows better than anybody. ``complete``: it holds
    the whole VM. ``released``: and the source's agent said that it had let go of it.
    ``known``: the agent has its monitor; one that it has not is believed to run.
    """

    vm: Name
    epoch: int
    state: ProcessState
    migration: str = ""
    driven: bool = False
    complete: bool = False
    released: bool = False
    known: bool = True


class HostProcesses(Record):
    """All QEMUs of a host in this boot of it."""

    host: Name
    boot_id: str
    processes: tuple[QemuProcess, ...] = ()
