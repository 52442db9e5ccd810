"""What each host state means, as data; the reference is rendered from it."""

from __future__ import annotations

from dataclasses import dataclass

from godwit.cluster.facts import Timings
from godwit.model.host import HostState

_T = Timings()


@dataclass(frozen=True)
class Meaning:
    """One row of the reference."""

    state: HostState
    when: str
    vms: str
    takes: str
    next: str


MEANINGS = (
    Meaning(HostState.UP, "its guard renews the lease, its agent answers", "run", "yes", "nothing"),
    Meaning(
        HostState.UNMANAGED,
        "its guard renews the lease, its agent is away",
        "run on",
        "no",
        "its service manager starts the agent again",
    ),
    Meaning(
        HostState.ISOLATED,
        f"no renewal for {_T.freeze_s:g} s, or for longer while its agent answers",
        "a guard that lives has frozen those with `ha`; the others run on",
        "no",
        f"lost at {_T.takeover_s:g} s; back before: thawed, unless the record moved",
    ),
    Meaning(
        HostState.DOWN,
        f"no renewal for {_T.takeover_s:g} s and no answer, its power device says off, or a person "
        "says so",
        "those with `ha` start elsewhere once a rung of the ladder is proof",
        "no",
        "the others wait for the host",
    ),
    Meaning(
        HostState.DRAINING,
        "marked: its VMs are being moved away",
        "run on until they have moved",
        "no",
        "maintenance, when it is empty",
    ),
    Meaning(
        HostState.MAINTENANCE,
        "marked",
        "none are meant to be there",
        "no",
        "it takes VMs again when the mark is taken away",
    ),
    Meaning(
        HostState.QUARANTINED,
        f"it lost the store {_T.isolations} times within an hour and came back",
        "run on",
        "no",
        "a person looks, then: `godwit host return`",
    ),
)


def as_markdown() -> str:
    """The table of ``docs/reference/host-states.md``."""
    rows = [f"| `{m.state.value}` | {m.when} | {m.vms} | {m.takes} | {m.next} |" for m in MEANINGS]
    head = "| state | when | its VMs | takes new ones | what happens next |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])
