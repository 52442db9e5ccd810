"""``runtime.json``: what an agent must know to find a running QEMU again after its own restart.

Written as a whole but not forced to the disk: it has to survive the death of the agent, not that
of the machine, which takes all QEMUs along (``boot_id`` tells). A file without a process
(``pid`` 0) stands for a start that was under way; whatever answers on its monitor never ran.

``started.json`` is the opposite: a promise that must survive anything, forced to the disk before
the first ``cont`` of an epoch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from godwit.host.files import load_json, remove_durable, save_json
from godwit.host.process import Process
from godwit.model.base import Name, Record
from godwit.model.errors import OperationFailed

RUNTIME: Final = "runtime.json"
STARTED: Final = "started.json"

Role = Literal["started", "incoming"]


class Runtime(Record):
    """A QEMU on this host. ``role`` is how it came up: cold, or waiting for a move's stream.

    ``unlocked``: its images are open without locks, for those of a lost host may still be there.
    ``released``: the whole VM came in, and the source's agent said that it had let go of it.

    ``start_time`` (clock ticks since boot) makes the pid unmistakable; ``taps`` maps card to tap.
    """

    vm: Name
    host: str
    epoch: int
    role: Role
    pid: int = 0
    start_time: int = 0
    boot_id: str = ""
    migration: str | None = None
    run: Path
    state: Path
    cgroup: str = ""
    taps: dict[str, str] = Field(default_factory=dict)
    uuid: str = ""
    argv: tuple[str, ...] = ()
    created_at: float = 0.0
    unlocked: bool = False
    released: bool = False

    @property
    def process(self) -> Process:
        """The identity of the QEMU process."""
        return Process(self.pid, self.start_time)

    @property
    def monitor(self) -> Path:
        """The agent's monitor."""
        return self.run / "qmp.sock"

    @property
    def guard_monitor(self) -> Path:
        """The guard's spare monitor."""
        return self.run / "guard.sock"

    @property
    def serial(self) -> Path:
        """The guest's first serial port."""
        return self.run / "serial.sock"

    @property
    def guest_agent(self) -> Path:
        """The port of the guest's own agent, for a VM that was made with it."""
        return self.run / "guest-agent.sock"

    @property
    def console_log(self) -> Path:
        """Everything the guest ever printed there."""
        return self.state / "console.log"

    @property
    def qemu_log(self) -> Path:
        """What QEMU itself had to say."""
        return self.state / "qemu.log"

    def save(self) -> None:
        """Replace the file; a reader sees the old one or the new one."""
        path = self.run / RUNTIME
        fresh = path.with_name(f".{RUNTIME}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(self.model_dump(mode="json"), stream)
        fresh.replace(path)

    def remove(self) -> None:
        """Forget the QEMU; fine when it is forgotten already."""
        (self.run / RUNTIME).unlink(missing_ok=True)


def load_runtime(run: Path) -> Runtime | None:
    """The record in a VM's run directory, None when there is none; OperationFailed if damaged."""
    try:
        content = load_json(run / RUNTIME)
        return None if content is None else Runtime.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise OperationFailed(
            f"{run / RUNTIME} cannot be read: {error}",
            hint="look for a QEMU of that VM by hand, end it, and remove the file",
        ) from None


def scan(vms: Path) -> tuple[tuple[Runtime, ...], tuple[str, ...]]:
    """All records below ``<run>/vms``, by name, and a sentence for each that cannot be read."""
    found: list[Runtime] = []
    damaged: list[str] = []
    for run in sorted(vms.iterdir()) if vms.is_dir() else ():
        try:
            runtime = load_runtime(run)
        except OperationFailed as error:
            damaged.append(error.message)
            continue
        if runtime is not None:
            found.append(runtime)
    return tuple(found), tuple(damaged)


class Started(Record):
    """The durable note that an epoch was about to run here."""

    epoch: int
    migration_id: str | None = None
    uuid: str = ""  # of the VM: another VM may have had this name before


def note_started(state: Path, *, uuid: str, epoch: int, migration_id: str | None) -> None:
    """Write the note; when this returns it survives a power cut. Lower epochs are refused."""
    before = read_started(state, uuid=uuid)
    if before is not None and before.epoch > epoch:
        raise OperationFailed(
            f"epoch {epoch} cannot start: epoch {before.epoch} was started here already"
        )
    state.mkdir(parents=True, exist_ok=True)
    note = Started(epoch=epoch, migration_id=migration_id, uuid=uuid)
    save_json(state / STARTED, note.model_dump(mode="json"))


def read_started(state: Path, *, uuid: str) -> Started | None:
    """The last note of this very VM, None when none of its epochs ever started here.

    A note of a deleted VM of the same name counts for nothing. OperationFailed if it is damaged.
    """
    try:
        content = load_json(state / STARTED)
        note = None if content is None else Started.model_validate(content)
        return note if note is not None and note.uuid == uuid else None
    except (ValueError, ValidationError) as error:
        raise OperationFailed(f"{state / STARTED} cannot be read: {error}") from None


def noted_epochs(vms: Path) -> dict[str, int]:
    """The last epoch that was ever noted here, for each VM below ``<state>/vms``.

    Of which VM of a name the note is does not matter to who wants to be above all of them.
    OperationFailed if a note is damaged.
    """
    found = {}
    for state in sorted(vms.iterdir()) if vms.is_dir() else ():
        try:
            content = load_json(state / STARTED)
            if content is not None:
                found[state.name] = Started.model_validate(content).epoch
        except (ValueError, ValidationError) as error:
            raise OperationFailed(f"{state / STARTED} cannot be read: {error}") from None
    return found


def forget_started(state: Path) -> None:
    """Remove the note: what it told of never ran, or the VM is gone."""
    if state.is_dir():
        remove_durable(state / STARTED)
