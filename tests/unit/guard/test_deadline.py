"""The deadline as a table, and as a walk: what it lets run, nobody else has taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.guard.deadline import (
    FREEZE_S,
    KILL_S,
    RESET_S,
    Copy,
    Stand,
    Step,
    Word,
    decide,
    fed_until,
    judge,
    next_look,
)
from godwit.model.ownership import MoveIntent, MovePhase, Owner, OwnerState, SavedState

RUNNING, FREEZING, FROZEN, GONE = Stand.RUNNING, Stand.FREEZING, Stand.FROZEN, Stand.GONE
TABLE = [
    # stand, seconds since the last renewal, what the record said, step
    (RUNNING, 0.0, None, Step.NOTHING),
    (RUNNING, 7.99, None, Step.NOTHING),
    (RUNNING, 8.0, None, Step.FREEZE),
    (RUNNING, 60.0, None, Step.FREEZE),
    (FREEZING, 8.5, None, Step.FREEZE),
    (FREEZING, 9.0, None, Step.KILL),
    (FREEZING, 0.5, None, Step.ASK),
    (FROZEN, 8.0, None, Step.NOTHING),
    (FROZEN, 600.0, None, Step.NOTHING),
    (FROZEN, 600.0, Word.OURS, Step.NOTHING),
    (FROZEN, 0.5, None, Step.ASK),
    (FROZEN, 0.5, Word.OURS, Step.THAW),
    (FROZEN, 0.5, Word.MOVED, Step.KILL),
    (FROZEN, 600.0, Word.MOVED, Step.KILL),
    (GONE, 600.0, Word.MOVED, Step.NOTHING),
]


@pytest.mark.parametrize(("stand", "late", "word", "step"), TABLE)
def test_table(stand: Stand, late: float, word: Word | None, step: Step) -> None:
    at = 1000.0 - late
    copy = Copy("web", stand, word=word, word_of=at)
    found = decide(copy, renewed_at=at, counts_from=at, now=1000.0)
    assert found.step is step
    assert bool(found.sentence) == (step in (Step.FREEZE, Step.THAW, Step.KILL))


def test_without_a_leader_nothing_is_stopped_and_nothing_thawed() -> None:
    for stand in (RUNNING, FROZEN):
        copy = Copy("web", stand, word=Word.OURS, word_of=900.0)
        assert decide(copy, renewed_at=900, counts_from=999, now=1000).step is Step.NOTHING


def test_a_word_from_before_the_deadline_thaws_nothing() -> None:
    copy = Copy("web", FROZEN, word=Word.OURS, word_of=900.0)
    assert decide(copy, renewed_at=999, counts_from=999, now=1000).step is Step.ASK


def test_what_serves_the_pages_of_a_moved_vm_goes_on() -> None:
    copy = Copy("web", RUNNING, serves_pages=True)
    assert decide(copy, renewed_at=0, counts_from=0, now=1000).step is Step.NOTHING
    assert next_look(copy, counts_from=0, now=1) is None
    assert fed_until((copy,), counts_from=0, now=1000) == 1000 + RESET_S


def test_the_watchdog_ends_at_the_deadline_unless_all_stands_still() -> None:
    still, moving = Copy("a", FROZEN), Copy("b", FREEZING)
    assert fed_until((still, moving), counts_from=100, now=109) == 110
    assert fed_until((still, Copy("b", GONE)), counts_from=100, now=109) == 119
    assert fed_until((still, Copy("b", RUNNING)), counts_from=100, now=101) == 110


def test_time_alone_is_waited_for() -> None:
    copy = Copy("web", RUNNING)
    assert next_look(copy, counts_from=100, now=101) == pytest.approx(7)
    assert next_look(copy, counts_from=100, now=108.5) == pytest.approx(0.5)
    assert next_look(copy, counts_from=100, now=200) is None
    assert next_look(Copy("web", GONE), counts_from=100, now=101) is None


MOVE = MoveIntent(id="m-1", method="live", source="h1", destination="h2")
OURS = Owner(host="h1", epoch=7, state=OwnerState.RUNNING)
JUDGED = [
    (OURS, Word.OURS),
    (OURS.but(state=OwnerState.STARTING), Word.OURS),
    (OURS.but(paused=True), Word.OURS),
    (None, Word.MOVED),
    (OURS.but(host="h2"), Word.MOVED),
    (OURS.but(epoch=8), Word.MOVED),
    (OURS.but(host="h2", epoch=8), Word.MOVED),
    (OURS.but(host=None), Word.MOVED),
    (OURS.but(state=OwnerState.STOPPED), Word.MOVED),
    (
        OURS.but(state=OwnerState.SAVED, saved=SavedState(path="/x", epoch=7, disk_ids=())),
        Word.MOVED,
    ),
    (OURS.but(migration=MOVE), Word.OURS),
    # Swapped: our copy is stopped by QEMU, and it may be given back.
    (OURS.but(host="h2", epoch=8, migration=MOVE.but(phase=MovePhase.COMMITTING)), Word.OURS),
    (OURS.but(epoch=9), Word.OURS),
    (OURS.but(epoch=9, state=OwnerState.STARTING), Word.MOVED),
    (OURS.but(host="h3", epoch=8, migration=MOVE.but(source="h3")), Word.MOVED),
]


@pytest.mark.parametrize(("owner", "word"), JUDGED)
def test_what_the_record_says(owner: Owner | None, word: Word) -> None:
    found, why = judge(owner, host="h1", epoch=7)
    assert found is word
    assert why


def test_a_copy_on_its_way_in_waits_for_its_agent() -> None:
    owner = Owner(host="h2", epoch=6, state=OwnerState.RUNNING, migration=MOVE.but(source="h2"))
    coming = owner.but(migration=MOVE.but(source="h2", destination="h1"))
    assert judge(coming, host="h1", epoch=7)[0] is Word.OURS
    assert judge(owner.but(migration=None), host="h1", epoch=7)[0] is Word.MOVED


# The walk: a guard, a store that comes and goes, and a taker that has proof of nothing but time.

TICK = 0.1
TAKER_S = 14.4


@dataclass
class World:
    """One VM, and who may run it."""

    freeze_takes: float
    now: float = 100.0
    copy: Copy = field(default_factory=lambda: Copy("web", RUNNING))
    renewed_at: float = 100.0
    changed_at: float = 100.0  # when the taker last saw the renewal change
    next_try: float = 103.0
    pending: list[tuple[float, str, float, Word]] = field(default_factory=list)
    frozen_when: float | None = None
    taken: bool = False
    seen: set[str] = field(default_factory=set)

    def word(self) -> Word:
        return Word.MOVED if self.taken else Word.OURS

    def step(self, *, connected: bool, answer_takes: float) -> None:
        self.now = round(self.now + TICK, 3)
        if connected and self.now >= self.next_try:
            # The store applies it at once, the answer may never come: the worst case for us.
            self.next_try = self.now + 3.0
            self.changed_at = self.now
            self.pending.append((self.now + answer_takes, "renewed", self.now, Word.OURS))
        if not self.taken and self.now - self.changed_at >= TAKER_S:
            self.taken = True
            self.seen.add("taken")
        for entry in [e for e in self.pending if e[0] <= self.now]:
            self.pending.remove(entry)
            if entry[1] == "renewed":
                self.renewed_at = max(self.renewed_at, entry[2])
            else:
                self.copy = replace(self.copy, word=entry[3], word_of=entry[2])
        self.act(connected=connected, answer_takes=answer_takes)
        assert not (self.taken and self.copy.stand is RUNNING), "two may run"
        if self.copy.stand in (RUNNING, FREEZING):
            assert self.now - self.renewed_at < RESET_S + TICK, "the watchdog had to act"

    def act(self, *, connected: bool, answer_takes: float) -> None:
        at = self.renewed_at
        found = decide(self.copy, renewed_at=at, counts_from=at, now=self.now)
        self.seen.add(found.step.value)
        if found.step is Step.FREEZE:
            self.frozen_when = self.frozen_when or self.now + self.freeze_takes
            done = self.now >= self.frozen_when
            self.copy = replace(self.copy, stand=FROZEN if done else FREEZING)
        elif found.step is Step.KILL:
            self.copy = replace(self.copy, stand=GONE)
        elif found.step is Step.THAW:
            self.frozen_when = None
            self.copy = replace(self.copy, stand=RUNNING, word=None)
        elif found.step is Step.ASK and connected:
            asked = [entry for entry in self.pending if entry[1] == "word"]
            if not asked:
                self.pending.append((self.now + answer_takes, "word", at, self.word()))


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 200), st.sampled_from([0.0, 0.4, 1.9]))),
    st.sampled_from([0.0, 0.3, 0.8, 5.0]),
)
def test_what_runs_was_not_taken(stretches: list[tuple[bool, int, float]], takes: float) -> None:
    world = World(takes)
    for connected, ticks, answer_takes in stretches:
        for _ in range(ticks):
            world.step(connected=connected, answer_takes=answer_takes)


def run(*stretches: tuple[bool, float]) -> World:
    world = World(0.2)
    for connected, seconds in stretches:
        for _ in range(round(seconds / TICK)):
            world.step(connected=connected, answer_takes=0.2)
    return world


def test_the_walk_comes_to_each_end() -> None:
    short = run((True, 10), (False, 10), (True, 5))
    assert (short.copy.stand, short.taken) == (RUNNING, False)
    assert {"freeze", "ask", "thaw"} <= short.seen
    lost = run((True, 10), (False, 30), (True, 5))
    assert (lost.copy.stand, lost.taken) == (GONE, True)
    assert "kill" in lost.seen
    assert "kill" not in run((True, 10), (False, 6), (True, 5)).seen
    stuck = World(60.0)
    for _ in range(200):
        stuck.step(connected=False, answer_takes=0)
    assert stuck.copy.stand is GONE
    assert FREEZE_S < KILL_S < RESET_S < TAKER_S
