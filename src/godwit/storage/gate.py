"""The gate before one disk on one host: who may write, at which epoch. Pure.

    closed --acquire--> opening --done--> open --release--> closing --done--> closed
    opening --refused--> closed     the daemon said no: the image is not open
    closing --refused--> open       the daemon said no: the image is still open
    opening|open|closing --lost--> unknown     no answer: the image may be open or not
    any --fenced--> closed          the daemon's process has ended, and its I/O with it

Invariant: an image is open in a daemon only in ``opening``, ``open``, ``closing`` and ``unknown``,
and only ``closed`` leads to ``opening``. So there are never two open images of one disk behind one
gate, and from ``unknown`` only the end of the daemon leads on.

The step that leads to ``opening`` or ``closing`` is written down before the first command is
sent, so that an agent which dies in between finds a gate to close and not one it believes closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Literal

from godwit.model.base import Record
from godwit.model.errors import Conflict, Refused

Via = Literal["image", "peer"]
"""What an open gate leads to: the image itself, or another host's export of it."""


class GateState(StrEnum):
    """Where a gate stands."""

    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    UNKNOWN = "unknown"


class Step(StrEnum):
    """What may happen to a gate."""

    ACQUIRE = "acquire"
    RELEASE = "release"
    DONE = "done"
    REFUSED = "refused"
    LOST = "lost"
    FENCED = "fenced"


TABLE: Final[Mapping[tuple[GateState, Step], GateState]] = {
    (GateState.CLOSED, Step.ACQUIRE): GateState.OPENING,
    (GateState.OPENING, Step.DONE): GateState.OPEN,
    (GateState.OPENING, Step.REFUSED): GateState.CLOSED,
    (GateState.OPEN, Step.RELEASE): GateState.CLOSING,
    (GateState.CLOSING, Step.DONE): GateState.CLOSED,
    (GateState.CLOSING, Step.REFUSED): GateState.OPEN,
    (GateState.OPENING, Step.LOST): GateState.UNKNOWN,
    (GateState.OPEN, Step.LOST): GateState.UNKNOWN,
    (GateState.CLOSING, Step.LOST): GateState.UNKNOWN,
    (GateState.UNKNOWN, Step.LOST): GateState.UNKNOWN,
    **{(state, Step.FENCED): GateState.CLOSED for state in GateState},
}

_HINTS: Final[Mapping[GateState, str]] = {
    GateState.CLOSED: "acquire it first",
    GateState.OPENING: "wait until it is open",
    GateState.OPEN: "release it first",
    GateState.CLOSING: "wait until it is closed",
    GateState.UNKNOWN: "end the broker of this VM and await its exit: that closes every gate",
}


class Gate(Record):
    """One gate. ``epoch`` is the highest that was ever let in here; it never falls.

    ``via`` says where an open gate leads. ``unsettled``: the daemon ended while the image was
    open, so acknowledged writes may lie in a cache that no flush of a new daemon would reach (it
    flushes only what it wrote itself); the image must be synced before it is served again.
    ``reason`` tells a person why the gate is not where it should be.
    """

    state: GateState = GateState.CLOSED
    epoch: int = 0
    via: Via | None = None
    unsettled: bool = False
    reason: str = ""

    @property
    def may_be_open(self) -> bool:
        """Whether a daemon may have the image open behind this gate."""
        return self.state is not GateState.CLOSED


def _step(gate: Gate, step: Step, **changes: object) -> Gate:
    target = TABLE.get((gate.state, step))
    if target is None:
        raise Conflict(
            f"the gate is {gate.state.value}: {step.value} is not possible",
            hint=_HINTS[gate.state],
        )
    return gate.but(state=target, **changes)


def acquire(gate: Gate, *, epoch: int, via: Via = "image") -> Gate:
    """Begin to open the gate for an epoch.

    A gate that is open the same way stays open and takes the higher epoch: nothing is to be done
    when the answer's state is ``open``. Refused for an epoch lower than one seen before: somebody
    else owned the disk since. Conflict when the gate is not closed.
    """
    if epoch < gate.epoch:
        raise Refused(
            f"epoch {epoch} is over: the disk was opened here for epoch {gate.epoch}",
            hint="read the owner record again",
        )
    if gate.state is GateState.OPEN and gate.via == via:
        return gate.but(epoch=epoch)
    return _step(gate, Step.ACQUIRE, epoch=epoch, via=via, reason="")


def release(gate: Gate) -> Gate:
    """Begin to close the gate; a closed one stays closed. Conflict when it is under way."""
    if gate.state is GateState.CLOSED:
        return gate
    return _step(gate, Step.RELEASE)


def done(gate: Gate) -> Gate:
    """What was begun is done: the gate is open, or closed with everything flushed."""
    closed = gate.state is GateState.CLOSING
    # Opened or closed in order: the image was synced before, or flushed by its close.
    return _step(gate, Step.DONE, via=None if closed else gate.via, unsettled=False, reason="")


def refused(gate: Gate, reason: str) -> Gate:
    """The daemon answered no to what was begun, and nothing has changed."""
    opening = gate.state is GateState.OPENING
    return _step(gate, Step.REFUSED, via=None if opening else gate.via, reason=reason)


def lost(gate: Gate, reason: str) -> Gate:
    """The daemon's answer did not come; a closed gate had no question and stays closed."""
    if gate.state is GateState.CLOSED:
        return gate
    return _step(gate, Step.LOST, reason=reason)


def fenced(gate: Gate) -> Gate:
    """The daemon's process has ended: no write of it can land any more, the gate is closed.

    What a peer had written is on its disk (a peer's export writes through), so only a gate that
    led to the image is left unsettled.
    """
    open_image = gate.may_be_open and gate.via != "peer"
    reason = "the broker ended while the gate was " + gate.state.value if open_image else ""
    return _step(gate, Step.FENCED, via=None, unsettled=gate.unsettled or open_image, reason=reason)


def settled(gate: Gate) -> Gate:
    """The image was synced by somebody while no daemon had it open."""
    if gate.may_be_open:
        raise Conflict(f"the gate is {gate.state.value}", hint=_HINTS[gate.state])
    return gate.but(unsettled=False, reason="")


def found(gate: Gate, *, open_now: bool) -> Gate:
    """The gate after a restart of the agent, by whether the daemon has its image open.

    What was under way is to be closed (the answer is ``closing``): whoever asked for it is gone.
    """
    if not open_now:
        return gate.but(state=GateState.CLOSED, via=None, reason="")
    if gate.state is GateState.OPEN:
        return gate
    return gate.but(
        state=GateState.CLOSING, reason=f"it was {gate.state.value} when the agent died"
    )
