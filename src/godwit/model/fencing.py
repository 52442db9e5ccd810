"""What managers and the fencing daemon of a storage server say to each other.

A cut is of one host from one place of a server, for the sake of one VM, in one silence of that
host. Several may stand for the same host and place; it is let in again when the last one is lifted.
"""

from __future__ import annotations

from pydantic import Field

from godwit.model.base import Name, Record, Value
from godwit.model.volume import Beneath

PORT = 7102


def place_of(volume: Beneath) -> str:
    """What a volume stands on, as its server's fencing daemon calls it; empty for other kinds."""
    if volume.kind == "iscsi":
        return f"iscsi {volume.target}"
    if volume.kind == "nfs":
        return f"nfs {volume.export.rstrip('/') or '/'}"
    return ""


class CutAsk(Value):
    """Shut ``host`` out of ``place``. ``boot_id`` and ``revision``: the last renewal heard of it
    (`godwit.cluster.facts.Heard.identity`)."""

    place: str
    host: Name
    vm: Name
    boot_id: str = ""
    revision: int = 0


class Cut(Record):
    """A cut that stands. ``id`` rises with each one that is asked for, also again for the same VM:
    who lifts one names it, and so cannot lift a later one. ``at`` is wall-clock time."""

    id: int
    place: str
    host: Name
    vm: Name
    boot_id: str = ""
    revision: int = 0
    by: str = ""
    at: float = 0.0


class CutDone(Record):
    """The server confirmed it: nothing of the host reaches the place any more, or is under way."""

    cut: Cut
    said: str = ""


class PlaceSeen(Record):
    """A place that the daemon guards. ``hosts``: whom it can shut out. ``why``: why it can shut out
    nobody just now, empty when it can."""

    place: str
    hosts: tuple[Name, ...] = ()
    why: str = ""


class FenceStatus(Record):
    """Everything a fencing daemon knows; ``cuts`` is the truth about what is cut off."""

    name: str
    places: tuple[PlaceSeen, ...] = ()
    cuts: tuple[Cut, ...] = Field(default=())
