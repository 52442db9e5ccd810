"""The demonstration: a lab, a VM, moves there and back before your eyes, and nothing left behind.

    scripts/demo [--name LAB]

Whatever ends it (a failure, Ctrl-C), the lab is taken down. Killed in the middle, it leaves its
directory ``<labs>/.demo-LAB`` behind; by that the next run knows the lab for its own, and takes it
down first. A lab of that name that somebody else raised is not touched. The person's contexts are
not touched either: the demonstration keeps its own.

Exit codes: 0 done, 1 failed, 2 usage, 4 not possible here, 128 + signal when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from godwit.cli.errors import tell
from godwit.lab import leaks, record
from godwit.lab.demo_moves import Moves
from godwit.lab.demo_stage import Stage
from godwit.lab.down import down
from godwit.lab.layout import checked_name, state_root
from godwit.lab.leaks import Snapshot
from godwit.model.errors import Conflict, GodwitError, OperationFailed, Refused
from godwit.model.units import format_duration

NAME = "demo"
_BUSY_S = 60.0  # how long an earlier demonstration may take to end
_GONE_S = 3.0
# What says which cluster is meant: the demonstration means its own.
_MISLEADING = (
    "GODWIT_URL", "GODWIT_CONTEXT", "GODWIT_TOKEN_FILE", "GODWIT_CA_FILE", "GODWIT_LAB",
)  # fmt: skip


class Interrupted(BaseException):
    """A signal that means: stop and clean up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Demonstration:
    """All of it, from the first look at the machine to the proof that nothing is left."""

    def __init__(self, name: str, home: Path) -> None:
        self._name = name
        self._home = home
        self._stage = Stage(home)
        self._spent: list[tuple[str, float]] = []

    def run(self) -> None:
        """Errors after what was made is gone again: Conflict, OperationFailed, Interrupted."""
        stage = self._stage
        self._clear_leftover()
        self._home.mkdir(parents=True, mode=0o755)
        before = leaks.take(self._name)
        start = time.monotonic()
        try:
            stage.say(
                "A running VM moves between two hosts and does not notice.\n"
                "Each line that begins with $ is a command as you can type it yourself, in a root\n"
                f"shell with  export PATH={Path(sys.executable).parent}:$PATH"
            )
            self._perform(before)
        except BaseException as error:
            heard = stage.heard()
            self._clean_up(before, error, failed=heard and isinstance(error, Exception))
            # A command that failed because nobody reads any more: so did we.
            if isinstance(error, Exception) and not heard:
                raise BrokenPipeError from error
            raise
        self._forget_home()
        stage.say(f"\nDone in {format_duration(time.monotonic() - start)}: {self._phases()}.")
        stage.say("To do this by hand, step by step: docs/tutorial/first-move.md")

    def _perform(self, before: Snapshot) -> None:
        with contextlib.ExitStack() as opened:
            moves = Moves(self._stage, self._name, self._home)
            opened.callback(moves.close)
            self._phase("lab", self._raise_lab)
            self._phase("VM", moves.boot)
            self._phase("live", moves.live)
            self._phase("quick", moves.quick)
            self._phase("cancel", moves.cancelled)
            moves.summary()
            self._phase("script", moves.script)
        self._phase("down", lambda: self._take_down(before))

    def _phase(self, name: str, act: Callable[[], None]) -> None:
        start = time.monotonic()
        act()
        self._spent.append((name, time.monotonic() - start))

    def _phases(self) -> str:
        return ", ".join(f"{name} {spent:.1f} s" for name, spent in self._spent)

    # Up and down

    def _raise_lab(self) -> None:
        stage = self._stage
        stage.heading("Two hosts on this machine")
        stage.say("Each has its own processes, files and network. The wire between them: 1 Gbit/s.")
        words = ("lab", "up", "--hosts", "2", "--name", self._name)
        try:
            stage.godwit(*words, output="drop", progress=True)
        except OperationFailed as error:
            if error.context.get("code") == Refused.exit_code:
                raise Refused("a lab is not possible here", hint="what it said is above") from None
            raise
        stage.godwit("host", "list")

    def _take_down(self, before: Snapshot) -> None:
        self._stage.heading("Taking it all down")
        self._stage.godwit("lab", "down", "--name", self._name, progress=True)
        self._prove_clean(before)

    def _prove_clean(self, before: Snapshot) -> None:
        """Nothing of the lab is on this machine; OperationFailed names what is."""
        until = time.monotonic() + _GONE_S
        while True:
            left = leaks.compare(before, leaks.take(self._name))
            left += [f"child process {pid}" for pid in _children()]
            if not left:
                break
            if time.monotonic() > until:
                raise OperationFailed(f"left behind: {'; '.join(left)}")
            time.sleep(0.1)  # the kernel takes sockets and mounts of a dead namespace apart later
        self._stage.ok("nothing is left: no namespace, process, mount, socket, link, control group")

    def _clean_up(self, before: Snapshot, error: BaseException, *, failed: bool) -> None:
        """After a failure, a signal, or when nobody reads. What goes wrong here is told only."""
        _deaf()
        stage = self._stage
        if failed and isinstance(error, GodwitError) and not error.hint:
            error.hint = f"logs of the lab, if it got so far: {state_root()}/kept-logs"
        stage.say("\nStopped. Taking down what there is.")
        try:
            stage.end_all()
            _patiently(lambda: down(self._name, keep_logs=failed, say=lambda line: stage.ok(line)))
            self._prove_clean(before)
        except GodwitError as another:
            stage.bad(another.message)
            stage.say(f"  godwit lab down --name {self._name} takes it down")
            return  # with its directory, so that the next run knows whose lab this is
        self._forget_home()

    def _clear_leftover(self) -> None:
        """Take down what an earlier run left; Conflict when there is a lab that is not ours."""
        there = leaks.take(self._name)
        lab = there.namespaces or there.groups or there.directories or there.mounts
        if self._home.exists():
            self._stage.say("An earlier demonstration was cut short: taking down what it left.")
            _patiently(lambda: down(self._name, say=lambda line: self._stage.ok(line)))
            self._forget_home()
        elif lab:
            raise Conflict(
                f"there is a lab {self._name} already, and the demonstration did not raise it",
                hint=f"godwit lab down --name {self._name}, or scripts/demo --name OTHER",
            )

    def _forget_home(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._home.parent.rmdir()


def _patiently(act: Callable[[], object]) -> None:
    """Do it again while another command works on the lab: one that was told to end, and ends."""
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            act()
        except Conflict:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)  # its lock is an abstract socket: nothing tells when it is gone
        else:
            return


def _children() -> list[int]:
    """Processes that we started and that are still there."""
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []  # a kernel without this file


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Be the only demonstration of that name; Conflict."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(record.exclusive(f"demo/{name}"))
        except Conflict:
            raise Conflict(
                "another demonstration is running at this moment",
                hint="wait for it, or choose another name: scripts/demo --name OTHER",
            ) from None
        yield


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # What was made is being taken away: a second signal is not needed, and would leave things.
    _deaf()
    raise Interrupted(number)


def _deaf() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(arguments: Sequence[str] | None = None) -> int:
    """The demonstration; the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Raises a lab of two hosts, moves a running VM between them, live and quick, "
        "there and back, cancels a move half-way, and takes everything down again.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage, 4 not possible here, 130 after Ctrl-C.",
    )
    parser.add_argument("--name", default=NAME, help="the lab's name (%(default)s)")
    given = parser.parse_args(arguments)
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        name = checked_name(given.name)
        home = state_root() / f".demo-{name}"
        os.environ["XDG_CONFIG_HOME"] = str(home)
        for variable in _MISLEADING:
            os.environ.pop(variable, None)
        with _alone(name):
            Demonstration(name, home).run()
    except GodwitError as error:
        return tell(error)
    except Interrupted as interrupted:
        return 128 + interrupted.number
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
