"""How the demonstration speaks and acts: headings, sentences, and commands that a person can type.

Every command is shown before it runs, exactly as it runs. What it prints goes where ours goes;
what it says beside (progress) is shown on a terminal, and elsewhere only when it failed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from godwit.host.errors import ProcessGone
from godwit.host.process import Process, kill, open_pidfd, send_signal, spawn
from godwit.lab.picture import ANSWERED, LOST
from godwit.model.errors import OperationFailed

LIMIT_S = 120.0  # no command of the demonstration takes longer
_ENDING_S = 30.0  # a command that is told to end may have things to take away
_WIDTH = 78
_BOLD, _GREEN, _RED, _PLAIN = "\033[1m", "\033[32m", "\033[31m", "\033[0m"

Output = Literal["show", "keep", "drop"]


@dataclass(frozen=True, slots=True)
class Running:
    """A command that runs beside the others."""

    process: Process
    words: tuple[str, ...]

    def stop(self) -> None:
        """End it as Ctrl-C would; OperationFailed when it ended badly."""
        send_signal(self.process, signal.SIGINT)
        code = _wait(self.process, _ENDING_S)
        if code:
            raise OperationFailed(f"{_short(self.words)} ended with {code}")


class Stage:
    """Says and does things. ``home`` is the demonstration's own directory."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._godwit = Path(sys.executable).with_name("godwit")
        self._running: list[Process] = []
        self._terminal = sys.stdout.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._colours = self._terminal and not plain

    # Speaking

    def heard(self) -> bool:
        """Whether anybody reads what is said. When the reader of a pipe or the terminal has gone,
        what is said from now on goes nowhere, and does not fail."""
        poll = select.poll()
        poll.register(1, 0)
        gone = select.POLLERR | select.POLLHUP | select.POLLNVAL
        if not any(event & gone for _, event in poll.poll(0)):
            return True
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 1)
        return False

    def say(self, text: str = "") -> None:
        """One line, or several."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def heading(self, text: str) -> None:
        """What comes now."""
        line = f"── {text} ".ljust(_WIDTH, "─")
        self.say(f"\n{self._paint(_BOLD, line)}")

    def ok(self, text: str) -> None:
        """Something that was looked at, and is as it should be."""
        self.say(f"{self._paint(_GREEN, '✓')} {text}")

    def bad(self, text: str) -> None:
        """Something that is not."""
        self.say(f"{self._paint(_RED, '✗')} {text}")

    def picture(self, lines: Sequence[str]) -> None:
        """A strip of answers, and its ruler."""
        strip, *below = lines
        runs = ("".join(run) for _, run in itertools.groupby(strip, key=_colour))
        self.say("  " + "".join(self._paint(_colour(run[0]), run) for run in runs))
        for line in below:
            self.say(f"  {line}")

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colours and colour else text

    def _show(self, words: Sequence[str], more: str = "") -> None:
        self.say(self._paint(_BOLD, f"$ {command_line(words)}{more}"))

    # Acting

    def godwit(self, *words: str, output: Output = "show", progress: bool | None = None) -> str:
        """Show a command and carry it out; what it printed, for ``keep``.

        ``drop`` is for what would only distract. ``progress``: show what it says beside; on a
        terminal only, when None. OperationFailed when it fails, with its code in the context.
        """
        self._show(words)
        with contextlib.ExitStack() as opened:
            out = None if output == "show" else opened.enter_context(self._file())
            visible = self._terminal if progress is None else progress
            beside = None if visible else opened.enter_context(self._file())
            process = self._spawn(
                words, out.fileno() if out else 1, beside.fileno() if beside else 1
            )
            code = self._until_end(process)
            text = _content(out)
            if output == "keep":
                self.say(text.rstrip("\n"))
            if code != 0:
                said = _content(beside).rstrip("\n")
                if said:
                    self.say(said)
                raise OperationFailed(f"{_short(words)} ended with {code}", code=code)
        return text

    def beside(self, *words: str) -> Running:
        """Show a command and start it; it runs when it has said its first line beside."""
        self._show(words, " &")
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as heard:
            try:
                with self._file() as out:
                    process = self._spawn(words, out.fileno(), writing, cwd=str(self._home))
            finally:
                os.close(writing)
            self._running.append(process)
            if not heard.readline():
                raise OperationFailed(f"{_short(words)} did not begin")
        return Running(process, words)

    def end_all(self) -> None:
        """End what still runs; for the way out. Never raises."""
        for process in self._running:
            send_signal(process, signal.SIGTERM)
        for process in self._running:
            _wait(process, _ENDING_S)
        self._running.clear()

    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._home)

    def _spawn(
        self, words: Sequence[str], out: int, beside: int, *, cwd: str | None = None
    ) -> Process:
        sys.stdout.flush()
        # Killed or not, we leave nothing running: a lab that is half made takes itself away.
        argv = ["setpriv", "--pdeathsig", "TERM", "--", str(self._godwit), *words]
        return spawn(argv, stdout=out, stderr=beside, new_session=False, env=os.environ, cwd=cwd)

    def _until_end(self, process: Process) -> int:
        self._running.append(process)  # so that it is ended when we are interrupted here
        code = _wait(process, LIMIT_S)
        self._running.remove(process)
        return code


def command_line(words: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["godwit", *words])


def _short(words: Sequence[str]) -> str:
    return f"godwit {' '.join(words[:2])}"


def _colour(cell: str) -> str:
    return _RED if cell == LOST else _GREEN if cell in ANSWERED else ""


def _content(file: IO[bytes] | None) -> str:
    if file is None:
        return ""
    file.seek(0)
    return file.read().decode(errors="replace")


def _wait(process: Process, limit_s: float) -> int:
    """How a child ended (128 + signal when killed), 0 when that is known already; it is killed
    when it takes too long."""
    try:
        descriptor = open_pidfd(process)
    except ProcessGone:
        return 0
    try:
        if not select.select([descriptor], [], [], limit_s)[0]:
            kill(process)
        status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    except ChildProcessError:
        return 0
    finally:
        os.close(descriptor)
    return 128 - status if status < 0 else status
