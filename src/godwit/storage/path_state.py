"""From looks at a volume to what this host does about it. Pure.

    new ------good--> direct            direct --failed--> suspect --failed--> lost
    new ----failed--> lost              direct ----hung--> lost
    lost -----good--> healing           suspect --good---> direct
    healing --good--> healing, after ``heal_s`` seconds of it direct
    healing -failed-> lost              a doubt moves nothing but direct -> suspect

An error may be a moment's and is looked at again at once. Silence is believed the first time: it
took as long as a guest may wait. A doubt is a look that failed and may say more of this machine
than of the path; only many in a row count. A path that breaks again soon after it came back has to
hold twice as long the next time, so that nothing swings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Literal

from godwit.model.volume import VolumeState
from godwit.storage.paths import PathProbe

HEAL_S: Final = 3.0
LONGEST_HEAL_S: Final = 30.0
QUIET_S: Final = 600.0
"""Seconds a path must have held for its past to be forgotten."""
DOUBTS: Final = 5


class PathStep(StrEnum):
    """Where this host's path to a volume stands."""

    NEW = "new"
    DIRECT = "direct"
    SUSPECT = "suspect"
    LOST = "lost"
    HEALING = "healing"


class Seen(StrEnum):
    """What a look comes down to."""

    GOOD = "good"
    DOUBT = "doubt"
    FAILED = "failed"
    HUNG = "hung"


TABLE: Final[Mapping[tuple[PathStep, Seen], PathStep]] = {
    (PathStep.NEW, Seen.GOOD): PathStep.DIRECT,
    (PathStep.NEW, Seen.DOUBT): PathStep.NEW,
    (PathStep.NEW, Seen.FAILED): PathStep.LOST,
    (PathStep.NEW, Seen.HUNG): PathStep.LOST,
    (PathStep.DIRECT, Seen.GOOD): PathStep.DIRECT,
    (PathStep.DIRECT, Seen.DOUBT): PathStep.SUSPECT,
    (PathStep.DIRECT, Seen.FAILED): PathStep.SUSPECT,
    (PathStep.DIRECT, Seen.HUNG): PathStep.LOST,
    (PathStep.SUSPECT, Seen.GOOD): PathStep.DIRECT,
    (PathStep.SUSPECT, Seen.DOUBT): PathStep.SUSPECT,
    (PathStep.SUSPECT, Seen.FAILED): PathStep.LOST,
    (PathStep.SUSPECT, Seen.HUNG): PathStep.LOST,
    (PathStep.LOST, Seen.GOOD): PathStep.HEALING,
    (PathStep.LOST, Seen.DOUBT): PathStep.LOST,
    (PathStep.LOST, Seen.FAILED): PathStep.LOST,
    (PathStep.LOST, Seen.HUNG): PathStep.LOST,
    (PathStep.HEALING, Seen.GOOD): PathStep.HEALING,
    (PathStep.HEALING, Seen.DOUBT): PathStep.HEALING,
    (PathStep.HEALING, Seen.FAILED): PathStep.LOST,
    (PathStep.HEALING, Seen.HUNG): PathStep.LOST,
}


@dataclass(frozen=True, slots=True)
class PathView:
    """What is believed of one path. Times are monotonic seconds.

    ``since`` is when the step began, ``heal_s`` how long it must hold before it is used again.
    """

    step: PathStep = PathStep.NEW
    reason: str = ""
    since: float = 0.0
    doubts: int = 0
    heal_s: float = HEAL_S

    @property
    def usable(self) -> bool:
        """Whether I/O belongs on this path; one that nobody has looked at yet is believed good."""
        return self.step in (PathStep.NEW, PathStep.DIRECT, PathStep.SUSPECT)

    @property
    def hurried(self) -> bool:
        """Whether the next look should be at once."""
        return self.step is PathStep.SUSPECT


def read(probe: PathProbe) -> Seen:
    """What a look comes down to."""
    if probe.ok:
        return Seen.GOOD
    if not probe.firm:
        return Seen.DOUBT
    return Seen.HUNG if probe.hung else Seen.FAILED


def step(
    view: PathView, probe: PathProbe, *, now: float, longest_heal_s: float = LONGEST_HEAL_S
) -> PathView:
    """What is believed after one more look.

    ``longest_heal_s``: what a path that breaks again and again has to hold for at most.
    """
    seen = read(probe)
    after = TABLE[view.step, seen]
    doubts = view.doubts + 1 if seen is Seen.DOUBT else 0
    if doubts >= DOUBTS:
        after, doubts = PathStep.LOST, 0
    healing = view.step is PathStep.HEALING is after
    if healing and seen is Seen.GOOD and now - view.since >= view.heal_s:
        after = PathStep.DIRECT
    heal_s = view.heal_s
    if after is PathStep.LOST and view.usable and view.step is not PathStep.NEW:
        # Measured from its return: a suspicion in between began a step, but proved nothing.
        held = now - view.since
        heal_s = HEAL_S if held > QUIET_S else min(view.heal_s * 2, longest_heal_s)
    if after is view.step:
        reason = "" if after is PathStep.DIRECT else (probe.reason or view.reason)
        return replace(view, doubts=doubts, reason=reason)
    reason = "" if after is PathStep.DIRECT else probe.reason or view.reason
    return PathView(after, reason, now, doubts, heal_s)


Way = Literal["direct", "redirected", "waiting"]


@dataclass(frozen=True, slots=True)
class VmWay:
    """How a VM of this host does its I/O on the volume; ``through`` is the peer's name."""

    vm: str
    way: Way
    through: str = ""
    reason: str = ""


def volume_state(
    view: PathView, vms: Sequence[VmWay], *, planned: bool = False
) -> tuple[VolumeState, str]:
    """What this host tells of the volume, with the sentence that explains it."""
    if view.usable and not planned:
        waiting = [one for one in vms if one.way == "waiting"]
        if waiting:
            return VolumeState.PAUSED, _waits(waiting)
        left = sorted({one.through for one in vms if one.way == "redirected"})
        if left:
            return VolumeState.REDIRECTED, f"going back from {', '.join(left)}"
        return VolumeState.DIRECT, ""
    why = "planned" if planned and view.usable else f"lost path: {view.reason}"
    if view.step is PathStep.HEALING:
        why = f"the path is back, it must hold for {view.heal_s:g} s ({view.reason})"
    waiting = [one for one in vms if one.way != "redirected"]
    if waiting:
        return VolumeState.PAUSED, f"{why}; {_waits(waiting)}"
    if vms or planned:
        peers = ", ".join(sorted({one.through for one in vms})) or "nobody yet"
        return VolumeState.REDIRECTED, f"{why}; I/O goes through {peers}"
    return VolumeState.UNAVAILABLE, why


def _waits(waiting: Sequence[VmWay]) -> str:
    first = waiting[0]
    more = f", and {len(waiting) - 1} more" if len(waiting) > 1 else ""
    return f"{first.vm} waits{more}: {first.reason or 'its I/O does not go on'}"
