"""What an ownership record becomes when it comes out of a backup; pure.

Since the backup was taken a VM may have been started anew, elsewhere, any number of times: what
the record says is then a lie, and its epoch is lower than the ones that hosts and storage gates
have seen. So every epoch is raised above all that any host has seen, and no VM counts as running.

One exception, for a store that is moved while VMs run: a VM whose record is proven by its host.
It runs there, alone, at just that epoch, and no host has seen a higher one. Then nothing happened
since, and its epoch may stay, which it must while its QEMU lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from godwit.model.ownership import Owner, OwnerState

# Above what was prepared somewhere and never noted by a host.
MARGIN = 1_000
# For hosts that cannot be asked: a VM would have to be started so often since the backup.
LEAP = 1_000_000


@dataclass(frozen=True, slots=True)
class HostSaid:
    """What a host knows by itself: the highest epoch of each VM, and what runs now."""

    seen: Mapping[str, int] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The record to write, and why; or (None) why there can be none."""

    owner: Owner | None
    reason: str


def restored(
    vm: str,
    owner: Owner,
    said: Mapping[str, HostSaid],
    *,
    absent: bool = False,
    keep_running: bool = False,
) -> Verdict:
    """Judge one VM. ``absent``: a host could not be asked, and its VMs are known to be gone."""
    seen = max([owner.epoch, *(one.seen.get(vm, 0) for one in said.values())])
    running = {host: one.running[vm] for host, one in said.items() if vm in one.running}
    if running:
        if keep_running and _proven(owner, running, seen):
            return Verdict(owner, f"runs on {owner.host} at epoch {owner.epoch}, as recorded")
        return Verdict(None, _objection(owner, running, keep_running=keep_running))
    epoch = seen + 1 + MARGIN + (LEAP if absent else 0)
    if owner.state is OwnerState.SAVED and seen == owner.epoch and not absent:
        return Verdict(owner.but(epoch=epoch), f"saved; epoch {owner.epoch} becomes {epoch}")
    stopped = owner.but(
        epoch=epoch, state=OwnerState.STOPPED, migration=None, saved=None, paused=False
    )
    why = f"was {owner.state.value}, is stopped" if owner.state is not OwnerState.STOPPED else ""
    why = f"{why or 'stopped'}; epoch {owner.epoch} becomes {epoch}"
    if owner.saved is not None:
        why += "; its saved memory is void, for it may have run since"
    return Verdict(stopped, why)


def _proven(owner: Owner, running: Mapping[str, int], seen: int) -> bool:
    alone = dict(running) == {owner.host: owner.epoch}
    still = owner.migration is None and owner.state is OwnerState.RUNNING
    return alone and still and seen == owner.epoch


def _objection(owner: Owner, running: Mapping[str, int], *, keep_running: bool) -> str:
    places = " and ".join(f"on {host} at epoch {epoch}" for host, epoch in sorted(running.items()))
    if not keep_running:
        return f"runs {places}"
    recorded = f"{owner.state.value} on {owner.host} at epoch {owner.epoch}"
    if owner.migration is not None:
        recorded += f", being moved by {owner.migration.id}"
    return f"runs {places}, but the backup says: {recorded}"
