"""``disk-move.json``: a disk that was on its way to another image, for the agent that comes after.

Which image is the disk's, at every step of a move while its VM runs:

    image made, copied, both equal          the old one: the record names it, QEMU writes to it
    the VM stands, both equal and flushed   either; the record names the old one
    the record is written                   either; the record names the new one
    QEMU's device takes to it, the VM runs  the new one

So the record in the store is right whenever QEMU is dead. While QEMU lives, its device is right:
what it writes to is the disk. `judge` puts the two together. Durable, in the VM's state directory,
from before the new image is made until the one that is not the disk's is gone.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from godwit.host.files import load_json, remove_durable, save_json
from godwit.model.base import Name, Record
from godwit.model.errors import OperationFailed
from godwit.model.vm import Disk, Vm
from godwit.qemu.mirror import Seen, Where

JOURNAL: Final = "disk-move.json"
_FINAL_STEP: Final = "pending"

HOLDS: Final = ("copied", "equal", "recorded", "switched")
"""Where a lab can hold the move of a disk: before the switch, with both images equal and flushed,
with the record written, and with the VM running on the new image and the old one still open."""

GROWTH_HOLDS: Final = ("closed", "grown", "served")
"""Where a lab can hold a growth for which the VM stands still: with the image closed, with it
larger and nobody told, and with it open again and only its guest not told."""


class Journal(Record):
    """A move of a disk as it was begun; ``keep`` its old image afterwards."""

    id: str
    vm: Name
    uuid: str
    old: Disk
    new: Disk
    keep: bool = False


class Verdict(StrEnum):
    """What to do about a move that its agent did not finish."""

    BACK_OUT = "back-out"  # the old image is the disk's: close and delete the new one
    GO_ON = "go-on"  # the record names the new one and QEMU waits to take to it
    CORRECT_BACK = "correct-back"  # QEMU kept the old one: the record has to say so, then back out
    FINISH = "finish"  # the new image is the disk's: close and delete the old one
    CORRECT_FORWARD = "correct-forward"  # QEMU has the new one: the record has to say so, finish


def judge(record: Where, seen: Seen | None) -> Verdict:
    """Which image is the disk's, and what is left to do; ``seen`` is None without a QEMU. Pure."""
    if seen is None or seen.device == "neither":
        return Verdict.FINISH if record == "new" else Verdict.BACK_OUT
    if seen.device == "new":
        return Verdict.CORRECT_FORWARD if record == "old" else Verdict.FINISH
    if record != "new":
        return Verdict.BACK_OUT
    return Verdict.GO_ON if seen.job == _FINAL_STEP else Verdict.CORRECT_BACK


def named(vm: Vm | None, journal: Journal) -> Where:
    """Which of the two images a VM's record names. Pure."""
    if vm is None or vm.pins.uuid != journal.uuid:
        return "neither"
    paths = {disk.path for disk in vm.disks if disk.id == journal.old.id}
    if journal.new.path in paths:
        return "new"
    return "old" if journal.old.path in paths else "neither"


def replaced(vm: Vm, disk: Disk) -> Vm:
    """The VM with this disk in the place of the one with its id. Pure."""
    return vm.but(disks=tuple(disk if one.id == disk.id else one for one in vm.disks))


def save_journal(state: Path, journal: Journal) -> None:
    """Write it down; when this returns it survives a power cut."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    save_json(state / JOURNAL, journal.model_dump(mode="json"))


def load_journal(state: Path) -> Journal | None:
    """What was begun for a VM, None for nothing; OperationFailed when it is damaged."""
    try:
        content = load_json(state / JOURNAL)
        return None if content is None else Journal.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise OperationFailed(
            f"{state / JOURNAL} cannot be read: {error}",
            hint="look which image the VM's record names, delete the other, and this file",
        ) from None


def forget_journal(state: Path) -> None:
    """Nothing is left to do."""
    if state.is_dir():
        remove_durable(state / JOURNAL)
