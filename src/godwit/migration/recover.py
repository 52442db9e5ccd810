"""What a restarted agent does with a QEMU it finds: a pure table over record and process.

"Never run on belief, only on the record": the inputs are the owner record read linearizably, the
durable runtime note of the process and what its monitor says. Nothing here acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from godwit.model.ownership import MovePhase, Owner, OwnerState


class Action(StrEnum):
    """What to do with the found process."""

    ADOPT = "adopt"  # it is the VM: watch it, touch nothing
    GO_ON_AS_SOURCE = "go-on-as-source"  # the swap is done: wait for D, then end this copy
    BACK_OUT = "back-out"  # end the stream, change the record, let the VM run here
    GO_ON_AS_DESTINATION = "go-on-as-destination"  # the record decides; keep watching it
    END = "end"  # not ours to run: kill it


@dataclass(frozen=True)
class Found:
    """A QEMU process found after a restart."""

    role: Literal["started", "incoming"]
    epoch: int  # the epoch it was started for (incoming: the one it would get)
    migration: str  # the move it was started for (incoming), else ""
    qemu_status: str  # query-status; "" = silent
    stream_status: str  # query-migrate


@dataclass(frozen=True)
class Verdict:
    """The action, and the sentence that explains it."""

    action: Action
    sentence: str


def judge(owner: Owner | None, found: Found, *, host: str) -> Verdict:
    """Decide for one found process."""
    if owner is None:
        return Verdict(Action.END, "no record knows this VM")
    move = owner.migration
    if owner.host == host and owner.epoch == found.epoch:
        if move is None or move.destination == host:
            if found.role == "incoming" and (move is not None or found.qemu_status != "running"):
                return Verdict(
                    Action.GO_ON_AS_DESTINATION, f"the record gives it to us at epoch {owner.epoch}"
                )
            return Verdict(Action.ADOPT, f"it runs for its owner at epoch {owner.epoch}")
        return _source(found)
    if _given_back(owner, found, host=host):
        return Verdict(Action.ADOPT, f"it was given back to us as epoch {owner.epoch}")
    if move is not None and move.source == host and owner.host == move.destination:
        pages = " and still needs pages from here" if move.phase is MovePhase.PAGE_SOURCE else ""
        return Verdict(Action.GO_ON_AS_SOURCE, f"{owner.host} owns it{pages}")
    waiting = move is not None and found.role == "incoming" and move.id == found.migration
    if waiting and found.stream_status.startswith("postcopy"):
        return Verdict(Action.GO_ON_AS_DESTINATION, "post-copy: there may be no other way; waiting")
    if waiting and found.stream_status == "completed":
        return Verdict(Action.GO_ON_AS_DESTINATION, "it holds the whole VM; the record decides")
    if waiting:
        return Verdict(Action.END, "the agent was away while memory came in: the source runs on")
    return Verdict(
        Action.END,
        f"the record names {owner.host or 'nobody'} at epoch {owner.epoch}, "
        f"this process is of epoch {found.epoch}",
    )


def _given_back(owner: Owner, found: Found, *, host: str) -> bool:
    """The destination returned the VM while our agent was away: this is still the copy of before.

    A start here would also have raised the epoch, but not to ``running`` without a new process.
    """
    return (
        owner.host == host
        and owner.epoch == found.epoch + 2
        and owner.migration is None
        and owner.state is OwnerState.RUNNING
        and found.role == "started"
        and found.qemu_status != "running"
    )


def _source(found: Found) -> Verdict:
    """The record still binds us as the source of a move whose driver died."""
    return Verdict(
        Action.BACK_OUT,
        "the agent of the source was restarted during the move: the VM stays here "
        f"(stream {found.stream_status or 'none'})",
    )
