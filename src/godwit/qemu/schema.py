"""Asks QEMU's own description of its commands (``query-qmp-schema``) what they can do.

Type names in there are numbers that change with every build; only commands, events, members and
values have names. So a question is a path of names: ``migrate/channels`` is the argument of a
command, ``migrate-set-capabilities/capabilities/capability/multifd`` a value of an argument's
member, ``query-migrate/->/status/device`` a value in a command's answer. Lists are walked
through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

ANSWER: Final = "->"


class Schema:
    """An answer of ``query-qmp-schema``, indexed."""

    def __init__(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._entries = {str(entry["name"]): entry for entry in entries}

    def has(self, path: str) -> bool:
        """Whether this QEMU knows what the path names."""
        first, *rest = path.split("/")
        command = self._entries.get(first)
        if command is None or command["meta-type"] not in ("command", "event"):
            return False
        if not rest:
            return True
        if rest[0] == ANSWER:
            return self._walk(str(command.get("ret-type")), rest[1:])
        return self._walk(str(command.get("arg-type")), rest)

    def _walk(self, kind: str, names: list[str]) -> bool:
        entry = self._entries.get(kind)
        if entry is None:
            return False
        if entry["meta-type"] == "array":
            return self._walk(str(entry["element-type"]), names)
        if not names:
            return True
        if entry["meta-type"] == "enum":
            return len(names) == 1 and names[0] in _enum_values(entry)
        if entry["meta-type"] == "alternate":
            return any(self._walk(str(m["type"]), names) for m in entry["members"])
        if entry["meta-type"] != "object":
            return False
        for member in entry["members"]:
            if member["name"] == names[0]:
                return self._walk(str(member["type"]), names[1:])
        return False


def _enum_values(entry: Mapping[str, Any]) -> set[str]:
    if "members" in entry:
        return {str(member["name"]) for member in entry["members"]}
    return set(entry["values"])
