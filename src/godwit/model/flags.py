"""What one action's words are made of: its kind, its options, its arguments.

Nothing here imports pydantic, so that ``godwit --help`` stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from keyword import iskeyword
from typing import Any

from godwit.model.errors import InvalidRequest
from godwit.model.spelling import Sort


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of an action: the request's field, the option's name, what its value is.

    An argument (no option) may stand for several fields, which it says in the order of
    ``covers`` up to the first that is not there: ``VOLUME[:SIZE[:FORMAT]]``.
    """

    field: str
    option: str
    sort: Sort
    help: str
    metavar: str = ""
    many: bool = False
    required: bool = False
    choices: tuple[str, ...] = ()
    completes: str = ""  # the noun whose names complete it
    covers: tuple[str, ...] = ()

    def said(self, fields: dict[str, Any]) -> list[str]:
        """The fields that this argument says, of those that are there."""
        return list(takewhile(fields.__contains__, self.covers or (self.field,)))


@dataclass(frozen=True, slots=True)
class Action:
    """One kind of request: ``vm.migrate`` is said ``vm migrate`` and ``client.vms.migrate``,
    ``vm.disk.add`` is said ``vm disk add`` and ``client.vms.add_disk``."""

    kind: str
    doing: str  # "Move VM {}"
    help: str
    flags: tuple[Flag, ...] = ()
    subject: str = "name"  # the field that the command takes as its first argument; "": none
    arguments: tuple[Flag, ...] = ()  # the arguments after it
    about: str = ""  # the noun that the subject names, where it is not the action's own

    @property
    def noun(self) -> str:
        """``vm`` of ``vm.migrate``."""
        return self.kind.partition(".")[0]

    @property
    def nouns(self) -> str:
        """``vms`` of ``vm.migrate``: where the client has it. Of clusters there is but one."""
        return self.noun if self.noun == "cluster" else f"{self.noun}s"

    @property
    def verb(self) -> str:
        """``migrate`` of ``vm.migrate``, ``disk add`` of ``vm.disk.add``."""
        return self.kind.partition(".")[2].replace(".", " ")

    @property
    def words(self) -> tuple[str, ...]:
        """What follows ``godwit`` on a command line."""
        return tuple(self.kind.split("."))

    @property
    def method(self) -> str:
        """``add_disk`` of ``vm.disk.add``: what the client calls it."""
        name = "_".join(reversed(self.words[1:])).replace("-", "_")
        return f"{name}_" if iskeyword(name) else name

    @property
    def fields(self) -> dict[str, Flag]:
        """Every field but the subject with the option, or else the argument, that says it."""
        covered = {name: one for one in self.arguments for name in one.covers or (one.field,)}
        return covered | {flag.field: flag for flag in self.flags}

    def flag(self, option: str) -> Flag:
        """The flag of that option; InvalidRequest when there is none."""
        for flag in self.flags:
            if flag.option == option:
                return flag
        raise InvalidRequest(
            f"{self.noun} {self.verb} has no option {option}",
            hint=f"run: godwit {self.noun} {self.verb} --help",
        )


def on(option: str, help_: str) -> Flag:
    """A switch."""
    return Flag(option.removeprefix("--").replace("-", "_"), option, "switch", help_)


def host_option(option: str, help_: str) -> Flag:
    """The name of a host."""
    return Flag(option.removeprefix("--"), option, "name", help_, "HOST", completes="host")
