"""The deadline: what the guard does with a highly available VM when renewals stay away; pure.

    seconds after the last answered renewal was sent (CLOCK_BOOTTIME)
     0        3        6      8      9      10              12            14.4
     renewed  renewed  ...    |      |      |               |             |
                              freeze kill   the watchdog    the lease     a taker may
                                     what   resets the      runs out      begin
                                     ran on host

The rule: before a taker may begin, every VM that it could take stands still, is dead, or its host
was reset. A VM that stands still runs on only when the lease was renewed *and* the owner record,
read linearizably after that, still says this host and epoch: whoever takes over compares that the
renewal did not change since it began to count, so after the renewal nobody's count is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from godwit.model.ownership import Owner, OwnerState

FREEZE_S = 8.0
KILL_S = 9.0
"""A VM that its freezer could not stop by then is killed, else it would cost the whole host."""
RESET_S = 10.0


class Stand(StrEnum):
    """What was last seen of a VM's processes."""

    RUNNING = "running"
    FREEZING = "freezing"  # asked for, and not true yet
    FROZEN = "frozen"
    GONE = "gone"


class Word(StrEnum):
    """What the owner record says of the copy that runs here."""

    OURS = "ours"
    MOVED = "moved"


class Step(StrEnum):
    """What to do with a VM."""

    NOTHING = "nothing"
    FREEZE = "freeze"
    ASK = "ask"  # read the owner record
    THAW = "thaw"
    KILL = "kill"


@dataclass(frozen=True)
class Copy:
    """A VM under the deadline. Times are seconds of one clock.

    ``word`` is what the record said, when it was asked after the renewal that was sent at
    ``word_of``. ``serves_pages``: its vCPUs never run again, but another host reads its memory.
    """

    vm: str
    stand: Stand
    word: Word | None = None
    word_of: float = 0.0
    serves_pages: bool = False


@dataclass(frozen=True)
class Decision:
    """The step, and the sentence that goes to the log and to people."""

    step: Step
    sentence: str = ""


_NOTHING = Decision(Step.NOTHING)


def decide(copy: Copy, *, renewed_at: float, counts_from: float, now: float) -> Decision:
    """``renewed_at`` and ``counts_from`` are those of ``lease.HostLease``."""
    if copy.stand is Stand.GONE:
        return _NOTHING
    if copy.word is Word.MOVED:
        return Decision(Step.KILL, "the owner record names another host or epoch: killed")
    late = now - counts_from
    if copy.stand is Stand.RUNNING:
        if late < FREEZE_S or copy.serves_pages:
            return _NOTHING
        return Decision(Step.FREEZE, f"the lease was not renewed for {late:.1f} s: frozen")
    if late >= FREEZE_S:
        if copy.stand is Stand.FROZEN:
            return _NOTHING
        if late >= KILL_S:
            return Decision(Step.KILL, f"it did not freeze within {KILL_S - FREEZE_S:g} s: killed")
        return Decision(Step.FREEZE, "it does not stand still yet")
    if now - renewed_at >= FREEZE_S:
        return _NOTHING  # nobody can take over, and nobody can be asked
    if copy.word is Word.OURS and now - copy.word_of < FREEZE_S:
        return Decision(Step.THAW, "the lease is renewed and the record unchanged: it runs on")
    return Decision(Step.ASK)


def next_look(copy: Copy, *, counts_from: float, now: float) -> float | None:
    """Seconds until time alone changes the decision; None when it never does."""
    if copy.stand is Stand.GONE or copy.serves_pages:
        return None
    due = [counts_from + limit - now for limit in (FREEZE_S, KILL_S)]
    return min((left for left in due if left > 0), default=None)


def fed_until(copies: tuple[Copy, ...], *, counts_from: float, now: float) -> float:
    """Until when the watchdog may be left to run out.

    While everything stands still there is no hurry; else it is the deadline itself, so that a guard
    which is dead or frozen by then cannot miss it.
    """
    still = all(c.stand in (Stand.FROZEN, Stand.GONE) or c.serves_pages for c in copies)
    return RESET_S + (max(counts_from, now) if still else counts_from)


def judge(owner: Owner | None, *, host: str, epoch: int) -> tuple[Word, str]:
    """What a record, read linearizably, says of a copy on ``host`` at ``epoch``.

    A copy that a move binds is left to the agents of both hosts, which know it better: before its
    swap the source's record is unchanged, after it the source's copy is stopped by QEMU itself, and
    a copy on its way in runs only when its agent has read the record.
    """
    if owner is None:
        return Word.MOVED, "no record knows it"
    move = owner.migration
    if move is not None and host in (move.source, move.destination):
        return Word.OURS, f"the move {move.id} decides"
    if owner.host == host and owner.epoch == epoch + 2 and owner.state is OwnerState.RUNNING:
        return Word.OURS, "it was given back by a host that never started it"
    if owner.host != host or owner.epoch != epoch:
        return Word.MOVED, f"it belongs to {owner.host or 'nobody'} at epoch {owner.epoch}"
    if owner.state not in (OwnerState.RUNNING, OwnerState.STARTING):
        return Word.MOVED, f"it is {owner.state.value}"
    return Word.OURS, f"it is ours at epoch {epoch}"
