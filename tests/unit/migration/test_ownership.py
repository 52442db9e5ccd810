"""The owner record: its table of steps, and a walk through everything that may happen to a move.

The walk keeps writes in flight: a swap may be delivered late, twice or never. Whatever happens, no
two hosts run the VM, who runs it is named by the record, and epochs only rise.
"""

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

from godwit.model import ownership
from godwit.model.errors import Conflict, Refused
from godwit.model.ownership import MoveIntent, MovePhase, Owner, OwnerState, SavedState

INTENT = MoveIntent(id="m-1", method="live", source="h1", destination="h2")
FREE = Owner(host="h1", epoch=3, state=OwnerState.RUNNING)
BOUND = ownership.begin_move(FREE, INTENT)
SWAPPED = ownership.swap(BOUND, "m-1")
IMAGE = SavedState(path="/x", epoch=3, disk_ids=())
Step = Callable[[Owner], Owner]

STEPS: dict[str, Step] = {
    "power_on": lambda owner: ownership.power_on(owner, host="h3"),
    "saved": lambda owner: ownership.saved(owner, IMAGE),
    "begin_move": lambda owner: ownership.begin_move(owner, INTENT),
    "committing": lambda owner: ownership.committing(owner, "m-1"),
    "swap": lambda owner: ownership.swap(owner, "m-1"),
    "finished": lambda owner: ownership.finished(owner, "m-1"),
    "rolled_back": lambda owner: ownership.rolled_back(owner, "m-1"),
    "gift_back": lambda owner: ownership.gift_back(owner, "m-1"),
}
ALLOWED: dict[str, tuple[Owner, set[str]]] = {
    "stopped": (ownership.stopped(FREE), {"power_on", "saved"}),
    "free": (FREE, {"saved", "begin_move"}),
    "saved": (ownership.saved(FREE, IMAGE), {"power_on", "saved"}),
    "bound": (BOUND, {"committing", "swap", "finished", "rolled_back"}),
    "swapped": (SWAPPED, {"committing", "swap", "finished", "gift_back"}),
    "other move": (
        ownership.begin_move(FREE, INTENT.but(id="m-2")),
        set(),
    ),
}


@pytest.mark.parametrize("state", ALLOWED)
@pytest.mark.parametrize("step", STEPS)
def test_the_table_of_steps(state: str, step: str) -> None:
    owner, allowed = ALLOWED[state]
    if step in allowed:
        assert STEPS[step](owner).epoch >= owner.epoch
    else:
        with pytest.raises((Refused, Conflict)) as refused:
            STEPS[step](owner)
        assert refused.value.hint


def test_only_taking_and_handing_over_raise_the_epoch() -> None:
    raised = {
        (state, step)
        for state, (owner, allowed) in ALLOWED.items()
        for step in allowed
        if STEPS[step](owner).epoch != owner.epoch
    }
    assert {step for _, step in raised} == {"power_on", "swap", "gift_back"}
    assert SWAPPED.epoch == FREE.epoch + 1
    assert ownership.gift_back(SWAPPED, "m-1").epoch == FREE.epoch + 2


def test_the_finished_moves_id_stays_until_the_destination_runs() -> None:
    assert SWAPPED.migration is not None
    assert (SWAPPED.host, SWAPPED.migration.id) == ("h2", "m-1")
    assert ownership.finished(SWAPPED, "m-1").migration is None
    paged = ownership.swap(BOUND, "m-1", postcopy=True)
    assert paged.migration is not None
    assert paged.migration.phase is MovePhase.PAGE_SOURCE


def test_what_the_user_wanted_travels_along() -> None:
    paused = ownership.running(FREE, paused=True)
    swapped = ownership.swap(ownership.begin_move(paused, INTENT), "m-1")
    assert swapped.paused
    assert ownership.finished(swapped, "m-1").paused
    assert ownership.gift_back(swapped, "m-1").paused


def test_a_move_to_where_it_is_or_of_what_does_not_run_is_refused() -> None:
    for owner, intent in (
        (FREE, INTENT.but(destination="h1")),
        (FREE, INTENT.but(source="h9")),
        (ownership.stopped(FREE), INTENT),
    ):
        with pytest.raises(Refused):
            ownership.begin_move(owner, intent)


class Walk(RuleBasedStateMachine):
    """Two hosts, one record with revisions, and writes that may arrive late."""

    roll_back_writes = True

    def __init__(self) -> None:
        super().__init__()
        self.record = FREE
        self.revision = 1
        self.runs = {"h1"}
        self.flying: list[tuple[Owner, int]] = []
        self.number = 0
        self.seen: tuple[Owner, int] | None = None  # what the source of the move last wrote
        self.proven = False
        self.may_have_run = False
        self.epochs = [self.record.epoch]

    def cas(self, value: Owner, expected: int) -> bool:
        if expected != self.revision:
            return False
        self.record, self.revision = value, self.revision + 1
        self.epochs.append(value.epoch)
        return True

    @property
    def move(self) -> MoveIntent | None:
        return self.record.migration

    @precondition(lambda self: self.move is None and self.record.state is OwnerState.RUNNING)
    @rule(method=st.sampled_from(["live", "quick"]))
    def intent(self, method: str) -> None:
        source = str(self.record.host)
        self.number += 1
        bound = ownership.begin_move(
            self.record,
            MoveIntent(
                id=f"m-{self.number}",
                method="quick" if method == "quick" else "live",
                source=source,
                destination="h2" if source == "h1" else "h1",
            ),
        )
        assert self.cas(bound, self.revision)
        self.seen, self.proven, self.may_have_run = (bound, self.revision), False, False

    def binding(self) -> bool:
        return self.move is not None and self.record.host == self.move.source

    @precondition(binding)
    @rule()
    def proof_point(self) -> None:
        """QEMU says completed: the source does not run by itself any more."""
        assert self.move is not None
        self.runs.discard(self.move.source)
        self.proven = True

    @precondition(lambda self: self.proven and self.seen is not None)
    @rule()
    def send_swap(self) -> None:
        assert self.seen is not None
        owner, revision = self.seen
        if owner.migration is not None:
            self.flying.append((ownership.swap(owner, owner.migration.id), revision))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data: st.DataObject, again: bool) -> None:
        number = data.draw(st.integers(0, len(self.flying) - 1))
        value, revision = self.flying[number] if again else self.flying.pop(number)
        self.cas(value, revision)

    @precondition(binding)
    @rule(answered=st.booleans())
    def roll_back(self, answered: bool) -> None:
        """First the record, then (if the answer came) the vCPUs."""
        assert self.move is not None
        source = self.move.source
        free = ownership.rolled_back(self.record, self.move.id)
        if self.roll_back_writes:
            assert self.cas(free, self.revision)
        if answered:
            self.runs.add(source)

    @precondition(lambda self: self.move is None and self.record.state is OwnerState.RUNNING)
    @rule()
    def owner_goes_on(self) -> None:
        """Whoever reads that it owns the VM, and that no move binds it, lets it run."""
        self.runs.add(str(self.record.host))

    def handed(self) -> bool:
        return self.move is not None and self.record.host == self.move.destination

    @precondition(handed)
    @rule()
    def destination_starts(self) -> None:
        assert self.move is not None
        self.runs.add(self.move.destination)
        self.may_have_run = True

    @precondition(lambda self: self.handed() and not self.may_have_run)
    @rule()
    def gift(self) -> None:
        assert self.move is not None
        assert self.cas(ownership.gift_back(self.record, self.move.id), self.revision)

    @precondition(lambda self: self.handed() and self.may_have_run)
    @rule()
    def finish(self) -> None:
        assert self.move is not None
        assert self.cas(ownership.finished(self.record, self.move.id), self.revision)

    @precondition(lambda self: self.record.state is OwnerState.RUNNING and not self.binding())
    @rule()
    def qemu_dies_and_is_noticed(self) -> None:
        self.runs.discard(str(self.record.host))
        assert self.cas(ownership.stopped(self.record), self.revision)

    @precondition(lambda self: self.move is None and self.record.state is OwnerState.STOPPED)
    @rule(host=st.sampled_from(["h1", "h2"]))
    def power_on(self, host: str) -> None:
        assert self.cas(ownership.power_on(self.record, host=host), self.revision)
        assert self.cas(ownership.running(self.record), self.revision)
        self.runs.add(host)

    @invariant()
    def at_most_one_runs_and_the_record_names_it(self) -> None:
        assert len(self.runs) <= 1
        assert self.runs <= {self.record.host}

    @invariant()
    def epochs_only_rise(self) -> None:
        assert self.epochs == sorted(self.epochs)


class TestWalk(Walk.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class ForgetfulWalk(Walk):
    """Planted: a roll-back that only runs the VM again, without touching the record."""

    roll_back_writes = False


def test_the_walk_finds_a_roll_back_that_does_not_write() -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            ForgetfulWalk,
            settings=settings(max_examples=500, stateful_step_count=30, deadline=None),
        )
