"""Show how far a task is: a live line on a terminal, one line per stage elsewhere.

Both go to standard error. What is shown never runs backwards, whatever order news arrive in.
``tell`` is called from the client's thread.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from godwit.cli.drain import sentence_of
from godwit.cli.errors import one_line
from godwit.model.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from godwit.model.migration import Migration
    from godwit.model.task import Task


@dataclass(frozen=True, slots=True)
class Seen:
    """One moment of a move, of a VM or of a disk, as it is shown."""

    vm: str
    route: str
    stage: str
    stage_number: int
    percent: float
    bytes_transferred: int
    facts: str
    sentence: str


class Ratchet:
    """Lets the news of moves through only forwards: by stage, percent and bytes."""

    def __init__(self) -> None:
        self._last: dict[str, Seen] = {}

    def take(self, news: Task | Migration) -> Seen | None:
        """What to show now; None when there is nothing, or it is older than what was shown."""
        from godwit.model.migration import Migration

        if isinstance(news, Migration):
            return None if news.state.final else self._of_move(news)
        return None if news.state.final else self._of_disk(news)

    def _of_disk(self, task: Task) -> Seen | None:
        """A disk that is on its way to another image."""
        from godwit.model.migration import STAGES, Stage

        now = task.progress
        if task.request.get("kind") != "vm.disk.move" or "total_bytes" not in now:
            return None
        stage = Stage(now.get("stage", Stage.SETUP.value))
        number, last = STAGES.index(stage), self._last.get(task.id)
        if last is not None and number < last.stage_number:
            return None
        copied, total = int(now.get("copied_bytes", 0)), int(now["total_bytes"])
        percent = 100.0 * copied / total if total else 0.0
        seen = Seen(
            vm=str(task.request.get("name", "")),
            route=f"{task.request.get('disk')} → {now['disk']['volume']}/{now['disk']['format']}",
            stage=stage.value,
            stage_number=number,
            percent=max(percent, last.percent if last else 0.0),
            bytes_transferred=max(copied, last.bytes_transferred if last else 0),
            facts=f"of {format_size(total)}",
            sentence=one_line(task.reason),
        )
        self._last[task.id] = seen
        return seen

    def _of_move(self, move: Migration) -> Seen | None:
        from godwit.model.migration import STAGES

        last = self._last.get(move.id)
        number = STAGES.index(move.progress.stage)
        if last is not None and number < last.stage_number:
            return None
        sent = max(move.progress.bytes_transferred, move.bytes_transferred)
        seen = Seen(
            vm=move.vm,
            route=f"{move.source} → {move.destination}",
            stage=move.progress.stage.value,
            stage_number=number,
            percent=max(move.progress.percent, last.percent if last else 0.0),
            bytes_transferred=max(sent, last.bytes_transferred if last else 0),
            facts=_facts(move),
            sentence=one_line(move.progress.sentence),
        )
        self._last[move.id] = seen
        return seen


def _facts(move: Migration) -> str:
    now = move.progress
    said = []
    if now.dirty_bytes_per_s is not None:
        said.append(f"dirty {format_size(now.dirty_bytes_per_s)}/s")
    if now.expected_blackout_ms is not None:
        said.append(f"blackout ≈ {format_duration(now.expected_blackout_ms / 1000)}")
    if now.throttle_percent:
        said.append(f"throttled {now.throttle_percent} %")
    return "  ".join(said)


class Teller(Protocol):
    """Shows news while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def tell(self, news: Task | Migration) -> None:
        """Show one piece of news."""
        ...


class PlainTeller:
    """One line for each stage that a move enters, also for those that passed between two news."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._ratchet = Ratchet()
        self._shown: dict[str, int] = {}  # how many stages of each move
        self._said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def tell(self, news: Task | Migration) -> None:
        """Print a line for each stage that is new, each sentence that is another."""
        from godwit.model.migration import STAGES

        if said := sentence_of(news):
            if self._said != said:
                self._said = said
                self._out.write(f"{said}\n")
                self._out.flush()
            return
        seen = self._ratchet.take(news)
        if seen is None:
            return
        shown = self._shown.get(news.id, 0)
        for number in range(shown, seen.stage_number + 1):
            now = number == seen.stage_number and seen.sentence
            said = f": {seen.sentence}" if now else ""
            self._out.write(f"{seen.vm} {seen.route}: {STAGES[number].value}{said}\n")
        self._shown[news.id] = max(shown, seen.stage_number + 1)
        self._out.flush()


class LiveTeller:
    """A line with a bar that is redrawn; it is gone when the move is over."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._ratchet = Ratchet()
        self._lock = threading.Lock()
        self._live: Live = Live(
            console=Console(file=out), transient=True, refresh_per_second=8, redirect_stderr=False
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._live.stop()

    def tell(self, news: Task | Migration) -> None:
        """Redraw the line."""
        from rich.text import Text

        if said := sentence_of(news):
            with self._lock:
                self._live.update(Text(said, overflow="ellipsis", no_wrap=True))
            return
        seen = self._ratchet.take(news)
        if seen is not None:
            with self._lock:
                self._live.update(_line(seen))


def _line(seen: Seen) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    for _ in range(3):
        grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(
        Text(f"{seen.vm} {seen.route}"),
        Text(f"{seen.stage:<10}", style="bold"),
        ProgressBar(total=100.0, completed=seen.percent, width=24),
        Text(f"{seen.percent:3.0f} %  {format_size(seen.bytes_transferred)}  {seen.facts}"),
    )
    return grid


def teller(out: TextIO | None = None) -> Teller:
    """The one that fits where standard error goes."""
    out = out or sys.stderr
    return LiveTeller(out) if out.isatty() else PlainTeller(out)
