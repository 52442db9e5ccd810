"""How checks are collected: one list of one category, with words for hosts and their figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from godwit.model.validation import Category, Result, ValidationCheck

V = TypeVar("V", bound=Hashable)


class Findings(list[ValidationCheck]):
    """The checks of one category, in the order in which they were made."""

    def __init__(self, category: Category) -> None:
        super().__init__()
        self._category = category

    def say(
        self, result: Result, name: str, message: str, hint: str = "", hosts: Iterable[str] = ()
    ) -> None:
        """Add a check."""
        self.append(
            ValidationCheck(
                category=self._category,
                name=name,
                result=result,
                message=message,
                hint=hint,
                hosts=tuple(sorted(set(hosts))),
            )
        )

    def ok(self, name: str, message: str) -> None:
        """Nothing is wrong with it."""
        self.say("pass", name, message)

    def warn(self, name: str, message: str, hint: str, hosts: Iterable[str] = ()) -> None:
        """It works, and wants to be read."""
        self.say("warn", name, message, hint, hosts)

    def fail(self, name: str, message: str, hint: str, hosts: Iterable[str] = ()) -> None:
        """It has to be put right."""
        self.say("fail", name, message, hint, hosts)


def by_value(values: Mapping[str, V]) -> dict[V, list[str]]:
    """The hosts that share each value; what most have comes first."""
    found: dict[V, list[str]] = defaultdict(list)
    for host, value in sorted(values.items()):
        found[value].append(host)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[1])))


def odd_ones(values: Mapping[str, V]) -> list[str]:
    """The hosts that differ from what most of them have; all where nothing prevails."""
    groups = list(by_value(values).values())
    if len(groups) > 1 and len(groups[0]) == len(groups[1]):
        return sorted(values)
    return sorted(host for group in groups[1:] for host in group)


def listed(values: Mapping[str, V]) -> str:
    """``1400 on host2; 1500 on host1, host3``, the rarest first: that is where to look."""
    groups = reversed(by_value(values).items())
    return "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in groups)


def names(hosts: Iterable[str]) -> str:
    """``host1, host2``, in order."""
    return ", ".join(sorted(set(hosts)))


def dotted(version: Iterable[int]) -> str:
    """``10.0.2``."""
    return ".".join(map(str, version))
