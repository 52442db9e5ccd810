"""Every step of a gate from every state, and walks that no step may turn into two open images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from godwit.model.errors import Conflict, Refused
from godwit.storage import gate as gates
from godwit.storage.gate import TABLE, Gate, GateState, Step

CLOSED = Gate(epoch=3)
OPENING = gates.acquire(CLOSED, epoch=4)
OPEN = gates.done(OPENING)
CLOSING = gates.release(OPEN)
UNKNOWN = gates.lost(CLOSING, "no answer")
AT = {gate.state: gate for gate in (CLOSED, OPENING, OPEN, CLOSING, UNKNOWN)}

ACTS: dict[Step, Callable[[Gate], Gate]] = {
    Step.ACQUIRE: lambda gate: gates.acquire(gate, epoch=9, via="image"),
    Step.RELEASE: gates.release,
    Step.DONE: gates.done,
    Step.REFUSED: lambda gate: gates.refused(gate, "no"),
    Step.LOST: lambda gate: gates.lost(gate, "silent"),
    Step.FENCED: gates.fenced,
}
# Steps that are no step: what is wanted is so already.
IDLE = {
    (GateState.OPEN, Step.ACQUIRE),
    (GateState.CLOSED, Step.RELEASE),
    (GateState.CLOSED, Step.LOST),
}


@pytest.mark.parametrize("state", GateState)
@pytest.mark.parametrize("step", Step)
def test_every_step_from_every_state(state: GateState, step: Step) -> None:
    if (state, step) in IDLE:
        assert ACTS[step](AT[state]).state is state
    elif (state, step) in TABLE:
        assert ACTS[step](AT[state]).state is TABLE[state, step]
    else:
        with pytest.raises(Conflict) as refusal:
            ACTS[step](AT[state])
        assert refusal.value.hint


def test_only_a_closed_gate_opens_and_only_the_end_of_the_daemon_ends_doubt() -> None:
    into_opening = {state for (state, _), to in TABLE.items() if to is GateState.OPENING}
    assert into_opening == {GateState.CLOSED}
    out_of_unknown = {
        step
        for (state, step), to in TABLE.items()
        if state is GateState.UNKNOWN and to is not GateState.UNKNOWN
    }
    assert out_of_unknown == {Step.FENCED}


@pytest.mark.parametrize("gate", AT.values(), ids=str)
def test_lower_epochs_are_refused_everywhere(gate: Gate) -> None:
    with pytest.raises(Refused, match="epoch 2 is over"):
        gates.acquire(gate, epoch=2)


def test_epoch_stays_when_a_gate_closes() -> None:
    assert gates.done(CLOSING).epoch == 4
    assert gates.fenced(UNKNOWN).epoch == 4
    assert gates.refused(OPENING, "no").epoch == 4


def test_an_open_gate_takes_a_higher_epoch_without_a_step() -> None:
    again = gates.acquire(OPEN, epoch=6)
    assert (again.state, again.epoch) == (GateState.OPEN, 6)


def test_an_open_gate_cannot_lead_elsewhere() -> None:
    with pytest.raises(Conflict, match="the gate is open"):
        gates.acquire(OPEN, epoch=5, via="peer")


@pytest.mark.parametrize("gate", [OPENING, OPEN, CLOSING, UNKNOWN], ids=lambda g: g.state)
def test_the_end_of_a_daemon_leaves_an_open_image_unsettled(gate: Gate) -> None:
    assert gates.fenced(gate).unsettled
    assert not gates.settled(gates.fenced(gate)).unsettled


def test_a_closed_gate_and_a_redirected_one_are_settled() -> None:
    assert not gates.fenced(gates.done(CLOSING)).unsettled
    peer = gates.done(gates.acquire(CLOSED, epoch=4, via="peer"))
    assert not gates.fenced(peer).unsettled


def test_unsettled_stays_until_it_opens_or_is_synced() -> None:
    dead = gates.fenced(OPEN)
    assert gates.fenced(dead).unsettled
    tried = gates.acquire(dead, epoch=5)
    assert gates.refused(tried, "locked").unsettled
    assert not gates.done(tried).unsettled


def test_syncing_an_image_that_may_be_open_settles_nothing() -> None:
    with pytest.raises(Conflict):
        gates.settled(OPEN)


@pytest.mark.parametrize("gate", AT.values(), ids=lambda g: g.state)
def test_found_after_a_restart_of_the_agent(gate: Gate) -> None:
    assert gates.found(gate, open_now=False).state is GateState.CLOSED
    expected = GateState.OPEN if gate.state is GateState.OPEN else GateState.CLOSING
    assert gates.found(gate, open_now=True).state is expected


class Walk(RuleBasedStateMachine):
    """A daemon that carries out, refuses or swallows what it is told, and dies at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.images = 0
        self.highest = 0
        self.late: list[int] = []

    @precondition(lambda self: self.gate.state is GateState.CLOSED)
    @rule(rise=st.integers(0, 2))
    def begin_opening(self, rise: int) -> None:
        self.highest += rise
        self.gate = gates.acquire(self.gate, epoch=self.highest)

    @precondition(lambda self: self.gate.state in (GateState.OPENING, GateState.CLOSING))
    @rule(answer=st.sampled_from(["done", "refused", "lost", "late"]))
    def answer(self, answer: str) -> None:
        change = 1 if self.gate.state is GateState.OPENING else -1
        if answer == "done":
            self.images += change
            self.gate = gates.done(self.gate)
        elif answer == "refused":
            self.gate = gates.refused(self.gate, "no")
        else:
            self.gate = gates.lost(self.gate, "silent")
            if answer == "late":
                self.late.append(change)

    @precondition(lambda self: self.late)
    @rule()
    def late_command_is_carried_out(self) -> None:
        self.images += self.late.pop()

    @precondition(lambda self: self.gate.state is GateState.OPEN)
    @rule()
    def begin_closing(self) -> None:
        self.gate = gates.release(self.gate)

    @rule()
    def any_other_step_is_refused_or_idle(self) -> None:
        for step in (Step.ACQUIRE, Step.RELEASE, Step.DONE):
            if (self.gate.state, step) not in TABLE and (self.gate.state, step) not in IDLE:
                with pytest.raises(Refused):
                    ACTS[step](self.gate)

    @rule()
    def daemon_ends(self) -> None:
        self.images, self.late = 0, []
        self.gate = gates.fenced(self.gate)

    @invariant()
    def never_two_open_images(self) -> None:
        assert self.images in (0, 1)

    @invariant()
    def closed_means_closed(self) -> None:
        assert self.gate.may_be_open or (self.images == 0 and not self.late)

    @invariant()
    def open_means_open(self) -> None:
        assert self.gate.state is not GateState.OPEN or self.images == 1

    @invariant()
    def epochs_only_rise(self) -> None:
        assert self.gate.epoch <= self.highest


def test_no_walk_opens_an_image_twice() -> None:
    run_state_machine_as_test(Walk, settings=settings(max_examples=300, deadline=None))
