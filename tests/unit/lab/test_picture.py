"""The strip of answers: where the gap is, how long, and that nothing else looks like one."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from godwit.lab.picture import GAP_COLUMNS, LOST, WIDTH, column_ms, draw, longest_gap
from godwit.lab.probe import Samples, analyse

MS = 1_000_000
START = 7 * 10**12


def probed(count: int, answered: Callable[[int], bool], *, missed: range = range(0)) -> Samples:
    """A probe at every millisecond; what was not sent at all stays out."""
    ticks = [number for number in range(count) if number not in missed]
    sent = [START + number * MS for number in ticks]
    arrived = [
        at + MS // 2 if answered(number) else 0 for at, number in zip(sent, ticks, strict=True)
    ]
    return Samples(sent, arrived)


def test_a_gap_of_62_ms() -> None:
    samples = probed(2000, lambda n: not 1000 <= n < 1062)
    gap = longest_gap(samples)
    assert gap is not None
    assert gap.ms == 62.0
    assert column_ms(samples) == 5.0
    assert draw(samples) == (
        "█████████████████████████············▅██████████████████████████",
        "-125 ms                  └── 62 ms ──┘                   +195 ms",
    )


def test_every_question_answered() -> None:
    samples = probed(2000, lambda _: True)
    assert longest_gap(samples) is None
    assert draw(samples) == ("█" * WIDTH, "0" + "+2.0 s".rjust(WIDTH - 1))


def test_a_single_loss_is_seen_and_not_pointed_at() -> None:
    strip, below = draw(probed(2000, lambda n: n != 700))
    assert strip.count("▇") == 1
    assert strip.count("█") == WIDTH - 1
    assert "└" not in below


def test_a_silence_at_the_end_is_a_gap() -> None:
    samples = probed(1000, lambda n: n < 600)
    gap = longest_gap(samples)
    assert gap is not None
    assert gap.ms == 399.0  # as far as was asked
    assert draw(samples)[0].endswith(LOST)


def test_nothing_was_ever_answered() -> None:
    samples = probed(500, lambda _: False)
    gap = longest_gap(samples)
    assert gap is not None
    assert gap.ms == 499.0
    assert set(draw(samples)[0].strip()) == {LOST}


def test_nothing_was_asked() -> None:
    assert draw(Samples([], [])) == ("nothing was asked",)


def test_what_the_probe_itself_missed_is_blank() -> None:
    samples = probed(2000, lambda n: not 1000 <= n < 1060, missed=range(900, 940))
    strip, _ = draw(samples)
    assert " " in strip.strip()
    gap = longest_gap(samples)
    assert gap is not None
    assert gap.ms == 60.0


@given(st.integers(5, 9000), st.integers(1, 900), st.integers(20, 900))
def test_any_gap_is_drawn_in_full_and_agrees_with_the_report(
    length: int, before: int, after: int
) -> None:
    samples = probed(before + length + after, lambda n: not before <= n < before + length)
    gap = longest_gap(samples)
    assert gap is not None
    assert gap.ms == length == analyse(samples).blackout_ms
    lines = draw(samples)
    assert all(len(line) <= WIDTH for line in lines)
    shown = lines[0].count(LOST) * column_ms(samples)
    assert length - column_ms(samples) <= shown <= length
    assert lines[0].count(LOST) <= GAP_COLUMNS
    assert "└" in lines[1]
