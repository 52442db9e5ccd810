"""Errors of the host room, grouped by what a person can do about them.

They are ``OperationFailed`` of the shared tree, so an agent may let them through to a person as
they are.  Argument vectors are printed whole, because no secret is ever on a command line.
"""

from __future__ import annotations

from collections.abc import Sequence

from godwit.model.errors import OperationFailed


class HostError(OperationFailed):
    """This machine refused or failed something that was asked of it."""


class ProgramFailed(HostError):
    """A program ended with a status other than zero (negative: killed by that signal)."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr
        detail = stderr.strip() or "it printed nothing on its error output"
        super().__init__(f"{' '.join(argv)}: exit status {returncode}: {detail}")


class ProgramMissing(HostError):
    """A program that has to be installed is not on the search path."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = tuple(argv)
        super().__init__(
            f"program not found: {argv[0]}", hint=f"install the package that brings {argv[0]}"
        )


class ProgramTimedOut(HostError):
    """A program did not end in time; it and its process group were killed."""

    def __init__(self, argv: Sequence[str], timeout: float) -> None:
        self.argv = tuple(argv)
        self.timeout = timeout
        super().__init__(f"{' '.join(argv)}: no end within {timeout:g} s, killed")


class ProcessGone(HostError):
    """The process that was meant has ended, even if its number is in use again."""


class LinkCommandFailed(HostError):
    """One line of a batch given to ``ip`` failed; lines before it took effect."""

    def __init__(self, line: str, reason: str) -> None:
        self.line = line
        self.reason = reason
        super().__init__(f"ip {line}: {reason}")


class CgroupError(HostError):
    """A control group could not be made, changed or removed."""


class NamespaceError(HostError):
    """A process could not be started in namespaces of its own."""


class LockHeld(HostError):
    """Another process holds the lock."""
