"""Daemons of different versions in one cluster: what holds between them, and what people are told.

While hosts are upgraded one after the other, every pair of daemons meets that is at most one minor
version apart, in either order. Between them:

    fields   are added with a default that means "as before". Whoever does not know one keeps it
             (`model.base.Record`) and acts as before.
    words    (a new state, a new kind, a new step of a task) are written only once every daemon of
             the cluster is of the level that brought them: readers of older ones refuse such a
             record with the reason, for they cannot know what it asks of them.
    verbs    that an agent does not know are refused as ``TooOld``, which names the host to upgrade.
    nothing  is ever taken away, given another meaning or another default.

A *level* counts what daemons have to agree on, apart from versions, which only people need:

    0   told no level: drops the fields that it does not know when it changes a record
    1   keeps fields that it does not know

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from godwit.model.base import Record
from godwit.model.errors import TooOld

LEVEL: Final = 1
_RELEASE = re.compile(r"^(\d+)\.(\d+)(?:\.(\d+))?")


class Speaks(Record):
    """What a daemon says of itself; of one that says nothing all is at its default."""

    version: str = ""
    level: int = 0

    @property
    def release(self) -> tuple[int, int, int]:
        """Major, minor and patch; zeros for what it does not tell."""
        found = _RELEASE.match(self.version)
        return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)

    @property
    def words(self) -> str:
        """How people call it."""
        return f"Godwit {self.version}" if self.version else "a Godwit that tells no version"


def our_own() -> Speaks:
    """What this very program is."""
    from importlib import metadata  # costs the command line more than all the rest of this

    try:
        version = metadata.version("godwit")
    except metadata.PackageNotFoundError:
        version = ""
    return Speaks(version=version, level=LEVEL)


def supported(one: Speaks, other: Speaks) -> bool:
    """Whether the two may be in one cluster: at most one minor version apart.

    Who tells no version is taken for one that may: nothing speaks against it.
    """
    if not (one.version and other.version):
        return True
    (major, minor, _), (its_major, its_minor, _) = one.release, other.release
    return major == its_major and abs(minor - its_minor) <= 1


def newest(daemons: Mapping[str, Speaks]) -> Speaks:
    """The one that all others are to become; our own when there is none."""
    return max(daemons.values(), key=_rank, default=our_own())


def common_level(daemons: Mapping[str, Speaks]) -> int:
    """The level that all have, and so the newest whose words may be written; ours at most."""
    return min((one.level for one in daemons.values()), default=LEVEL)


def behind(one: Speaks, other: Speaks) -> str:
    """Why ``one`` has to be upgraded to be what ``other`` is; empty when it has not."""
    if _rank(one) >= _rank(other):
        return ""
    than = other.words
    if not supported(one, other):
        return f"it is {one.words}, more than one minor version behind {than}: not supported"
    if one.release == other.release:
        return f"it is an older build of {than}"
    return f"it is {one.words}, older than {than}"


def unknown_verb(host: str, verb: str, *, its: Speaks, ours: Speaks) -> TooOld:
    """The error for an agent that does not know what it was asked for."""
    if _rank(its) > _rank(ours):
        return TooOld(
            f"the agent of {host} no longer knows {verb}: it is {its.words}, newer than who asks",
            hint="upgrade the other hosts and managers to what it is",
            host=host,
        )
    return TooOld(
        f"the agent of {host} is too old for this ({verb}): it is {_older(its, ours)}",
        hint=f"upgrade Godwit on {host} and restart its agent; its VMs run on meanwhile",
        host=host,
    )


def _older(its: Speaks, ours: Speaks) -> str:
    return its.words if its.release != ours.release else f"an older build of {ours.words}"


def _rank(one: Speaks) -> tuple[tuple[int, int, int], int]:
    return one.release, one.level
