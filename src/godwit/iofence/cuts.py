"""The list of who is shut out: durable before anything is carried out, and read first of all.

Its numbers never come again, also over a restart: whoever lifts a cut names one, and one that was
asked for meanwhile is another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from godwit.host.files import load_json, write_durable
from godwit.model.base import Record
from godwit.model.errors import OperationFailed
from godwit.model.fencing import Cut, CutAsk

FILE = "cuts.json"


class _Kept(Record):
    last: int = 0
    cuts: tuple[Cut, ...] = ()


class CutBook:
    """The cuts that stand. Each change is on the disk when the call returns, or did not happen."""

    def __init__(self, state: Path) -> None:
        """Read it. OperationFailed when it is damaged: then nobody knows whom to keep out."""
        self._path = state / FILE
        state.mkdir(parents=True, exist_ok=True)
        try:
            found = load_json(self._path)
            self._kept = _Kept() if found is None else _Kept.model_validate(found)
        except (ValueError, ValidationError) as error:
            raise OperationFailed(
                f"the list of cuts cannot be read: {error}",
                hint=f"mend {self._path}; without it lost hosts would be let in again",
            ) from error

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All that stand, the oldest first."""
        return self._kept.cuts

    def hosts(self, place: str) -> frozenset[str]:
        """Who is shut out of a place."""
        return frozenset(cut.host for cut in self.cuts if cut.place == place)

    def add(self, ask: CutAsk, *, by: str, at: float) -> Cut:
        """One more, with a number of its own; it takes the place of one for the same VM."""
        number = self._kept.last + 1
        cut = Cut(id=number, by=by, at=at, **ask.model_dump())
        others = (one for one in self.cuts if _whose(one) != _whose(cut))
        self._write(number, (*others, cut))
        return cut

    def find(self, number: int) -> Cut | None:
        """The cut of this number, None when it does not stand."""
        return next((cut for cut in self.cuts if cut.id == number), None)

    def remove(self, number: int) -> None:
        """It stands no more."""
        self._write(self._kept.last, (cut for cut in self.cuts if cut.id != number))

    def _write(self, last: int, cuts: Iterable[Cut]) -> None:
        kept = _Kept(last=last, cuts=tuple(cuts))
        write_durable(self._path, kept.model_dump_json().encode())
        self._kept = kept


def _whose(cut: Cut) -> tuple[str, str, str]:
    return cut.place, cut.host, cut.vm
