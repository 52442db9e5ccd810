"""The policy on streams of samples: from lists, and from a small simulated guest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.migration import policy
from godwit.migration.policy import Decision, Sample, decide, start
from godwit.model.migration import MoveLimits

MIB = 1 << 20
OVERHEAD_MS = 60.0


@dataclass
class Guest:
    """Passes over memory on a link, as QEMU makes them; samples every ``every`` seconds."""

    used: float
    dirty: float  # bytes/s at full speed
    link: float
    working_set: float = 1e18
    every: float = 0.2

    def play(
        self,
        limits: MoveLimits,
        *,
        overhead_ms: float = OVERHEAD_MS,
        until: float = 900.0,
        link_at: Callable[[float], float] | None = None,
    ) -> Story:
        now, remaining, transferred, number, dirtied = 0.0, self.used, 0.0, 1, 0.0
        state = start(limits, overhead_ms=overhead_ms, now=now)
        story = Story(limits_ms=[state.knobs.limit_ms])
        step = self.every / 10
        while now < until:
            for _ in range(10):
                now += step
                link = link_at(now) if link_at else self.link
                quota = state.knobs.quota
                moved = min(remaining, link * step)
                remaining -= moved
                transferred += moved
                dirtied = min(self.working_set, self.used, dirtied + self.dirty * quota * step)
                if remaining <= 0:
                    remaining, dirtied, number = dirtied, 0.0, number + 1
                    if remaining / link * 1000 <= state.knobs.limit_ms:
                        story.ended = f"switchover at {now:.1f} s"
                        story.at = now
                        story.pause_ms = remaining / link * 1000
                        return story
            sample = Sample(
                at=now,
                transferred=int(transferred),
                remaining=int(remaining),
                dirty_bytes_per_s=self.dirty * state.knobs.quota,
                link_bytes_per_s=link,
                pass_number=number,
            )
            state, decision = decide(state, sample, limits, overhead_ms=overhead_ms)
            story.note(now, state, decision)
            if decision.abort or decision.postcopy:
                story.ended, story.at = ("abort" if decision.abort else "post-copy"), now
                return story
        story.ended = "endless"
        return story


@dataclass
class Story:
    """What became of it."""

    limits_ms: list[float]
    quotas: tuple[float, ...] = ()
    sentences: tuple[str, ...] = ()
    ended: str = ""
    at: float = 0.0
    first_act_at: float | None = None
    pause_ms: float = 0.0

    def note(self, now: float, state: policy.Progressing, decision: Decision) -> None:
        if decision.sentence:
            self.sentences += (decision.sentence,)
            self.first_act_at = now if self.first_act_at is None else self.first_act_at
        if decision.limit_ms is not None:
            self.limits_ms.append(decision.limit_ms)
        if decision.quota is not None:
            self.quotas += (decision.quota,)
        assert state.knobs.limit_ms == self.limits_ms[-1]


def test_an_idle_guest_needs_no_decision() -> None:
    story = Guest(used=200 * MIB, dirty=0.5 * MIB, link=119 * MIB).play(MoveLimits())
    assert story.ended.startswith("switchover")
    assert story.sentences == ()
    assert story.pause_ms <= policy.FIRST_LIMIT_MS


@pytest.mark.parametrize("used_mib", [512, 4096, 16384])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.8])
def test_a_guest_whose_passes_shrink_is_never_acted_upon(used_mib: int, ratio: float) -> None:
    """However long one pass takes: not the time counts, but whether each is shorter."""
    limits = MoveLimits(allow_throttle=True, allow_postcopy=True)
    story = Guest(used=used_mib * MIB, dirty=ratio * 119 * MIB, link=119 * MIB).play(limits)
    assert story.ended.startswith("switchover"), story
    assert story.quotas == ()
    assert all("vCPUs" not in sentence for sentence in story.sentences)


def test_a_guest_that_nearly_fits_gets_the_limit_doubled_step_by_step() -> None:
    """A small set of pages written all the time: 60 ms of link, whatever the passes do."""
    guest = Guest(used=300 * MIB, dirty=110 * MIB, link=119 * MIB, working_set=7 * MIB)
    story = guest.play(MoveLimits())
    assert story.ended.startswith("switchover")
    assert story.limits_ms[:3] == [20, 40, 80]
    assert story.limits_ms[-1] <= 160
    assert story.quotas == ()
    assert all("the pause may now take" in sentence for sentence in story.sentences)


def test_a_writer_at_twice_the_link_is_given_up_with_words_within_a_minute() -> None:
    guest = Guest(used=512 * MIB, dirty=240 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits())
    assert story.ended == "abort"
    assert story.first_act_at is not None
    assert story.at - story.first_act_at < 60
    assert story.sentences[-1] == (
        "it does not converge within the budget of 300 ms: the guest writes 240 MiB/s, "
        "the link carries 120 MiB/s; allow it with --allow-postcopy or --allow-throttle"
    )


@pytest.mark.parametrize("used_gib", [1, 4, 16, 64])
def test_a_stall_ends_within_a_minute_however_large_the_guest(used_gib: int) -> None:
    """The stall begins when the second pass turns out no smaller than the first."""
    guest = Guest(used=used_gib * 1024 * MIB, dirty=240 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits(), until=4000)
    assert story.ended == "abort"
    assert story.first_act_at is not None
    assert story.at - story.first_act_at <= 60


def test_what_is_not_allowed_is_named_and_what_is_allowed_is_not() -> None:
    guest = Guest(used=512 * MIB, dirty=20_000 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits(allow_throttle=True))
    assert story.ended == "abort"
    assert story.sentences[-1].endswith("; allow it with --allow-postcopy")


def test_throttled_until_it_converges() -> None:
    guest = Guest(used=512 * MIB, dirty=240 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits(allow_throttle=True))
    assert story.ended.startswith("switchover"), story
    assert story.quotas[0] == pytest.approx(0.3)
    assert list(story.quotas) == sorted(story.quotas, reverse=True)
    assert story.pause_ms <= 240


def test_a_throttle_that_does_not_help_goes_on_to_its_floor_and_ends() -> None:
    guest = Guest(used=512 * MIB, dirty=240 * MIB, link=120 * MIB)

    class Stubborn(Guest):
        pass

    stubborn = Stubborn(guest.used, guest.dirty * 1000, guest.link, working_set=guest.used)
    story = stubborn.play(MoveLimits(allow_throttle=True))
    assert story.ended == "abort"
    assert story.quotas[-1] == policy.MIN_QUOTA


def test_post_copy_where_it_is_allowed() -> None:
    guest = Guest(used=512 * MIB, dirty=240 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits(allow_postcopy=True))
    assert story.ended == "post-copy"
    assert story.limits_ms == [policy.FIRST_LIMIT_MS]  # no pause fits a guest that outruns the link
    assert "finishing by post-copy" in story.sentences[-1]


def test_throttle_comes_before_post_copy() -> None:
    guest = Guest(used=512 * MIB, dirty=240_000 * MIB, link=120 * MIB, working_set=400 * MIB)
    story = guest.play(MoveLimits(allow_postcopy=True, allow_throttle=True))
    assert story.quotas
    assert story.ended == "post-copy"


def test_a_frozen_link_is_given_up_within_seconds() -> None:
    guest = Guest(used=4096 * MIB, dirty=1 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits(), link_at=lambda now: 120 * MIB if now < 3 else 1e-9)
    assert story.ended == "abort"
    assert story.at == pytest.approx(3 + policy.FREEZE_S, abs=0.5)
    assert "the migration network or the destination is frozen" in story.sentences[-1]


def test_a_link_that_stumbles_is_not_given_up() -> None:
    guest = Guest(used=1024 * MIB, dirty=1 * MIB, link=120 * MIB)
    story = guest.play(MoveLimits(), link_at=lambda now: 1e-9 if 3 < now < 7.5 else 120 * MIB)
    assert story.ended.startswith("switchover")


BUDGETS = st.floats(min_value=1, max_value=5000)


@given(
    budget=BUDGETS,
    overhead=st.floats(min_value=0, max_value=3000),
    dirty=st.floats(min_value=0, max_value=500),
    working=st.floats(min_value=1, max_value=600),
    throttle=st.booleans(),
)
def test_the_limit_is_never_above_the_budget_and_never_falls(
    budget: float, overhead: float, dirty: float, working: float, throttle: bool
) -> None:
    limits = MoveLimits(max_blackout_ms=budget, allow_throttle=throttle)
    guest = Guest(used=600 * MIB, dirty=dirty * MIB, link=119 * MIB, working_set=working * MIB)
    story = guest.play(limits, overhead_ms=overhead, until=120)
    assert story.ended != "endless"
    assert all(limit <= budget for limit in story.limits_ms)
    assert story.limits_ms == sorted(story.limits_ms)
    if budget > overhead + policy.FIRST_LIMIT_MS:
        assert story.limits_ms[-1] + overhead <= budget + 0.001
    assert all(policy.MIN_QUOTA <= quota < 1 for quota in story.quotas)


@given(samples=st.lists(st.tuples(*[st.integers(0, 1 << 40)] * 2, st.integers(0, 9)), max_size=40))
def test_any_stream_of_samples_is_survived(samples: list[tuple[int, int, int]]) -> None:
    """Odd readings (zero rates, passes that jump) lead to decisions, never to an exception."""
    limits = MoveLimits(allow_throttle=True)
    state, number = start(limits, overhead_ms=60, now=0), 0
    for at, (transferred, remaining, passes) in enumerate(samples):
        number += passes
        sample = Sample(
            at=float(at),
            transferred=transferred,
            remaining=remaining,
            dirty_bytes_per_s=0.0,
            link_bytes_per_s=0.0,
            pass_number=number,
        )
        state, decision = decide(state, sample, limits, overhead_ms=60)
        assert decision.limit_ms is None or decision.limit_ms <= 240


@pytest.mark.parametrize(
    ("past", "expected"),
    [((), policy.RESERVE_MS), ((50.0,), 50.0), ((40.0, 90.0, 50.0, 60.0), 90.0)],
)
def test_what_is_kept_free_of_the_budget_covers_most_past_moves(
    past: tuple[float, ...], expected: float
) -> None:
    assert policy.overhead(past) == expected
