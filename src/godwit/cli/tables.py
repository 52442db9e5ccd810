"""Lists and single objects as text columns, straight from the API's JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from godwit.cli.errors import one_line
from godwit.model.units import format_duration, format_size

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _text(field: str) -> Callable[[Row], str]:
    return lambda row: plain(row.get(field))


def _size(field: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(field) is None else format_size(row[field])


def _ms(field: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(field) is None else format_duration(row[field] / 1000)


def _when(field: str) -> Callable[[Row], str]:
    return lambda row: when(row.get(field))


def when(seconds: float | None) -> str:
    """A local date and time; ``-`` when there is none."""
    if not seconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def plain(value: Any) -> str:
    """One value as a person reads it, on one line."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or "-"
    if isinstance(value, dict):
        said = (f"{key}={plain(one)}" for key, one in value.items() if one not in (None, "", []))
        return " ".join(said) or "-"
    return one_line(str(value))


def _reached(row: Row) -> str:
    """The hosts of a volume; how each reaches it where that is not direct."""
    hosts = row.get("hosts") or {}
    said = (
        host if seen.get("state") == "direct" else f"{host} ({seen.get('state')})"
        for host, seen in hosts.items()
    )
    return plain(list(said))


COLUMNS: dict[str, tuple[Column, ...]] = {
    "vm": (
        ("NAME", _text("name")),
        ("STATE", _text("state")),
        ("HOST", _text("host")),
        ("CPUS", _text("cpus")),
        ("MEMORY", _size("memory_bytes")),
        ("HA", _text("ha")),
        ("REASON", _text("reason")),
    ),
    "host": (
        ("NAME", _text("name")),
        ("STATE", _text("state")),
        ("VMS", _text("vms")),
        ("CPUS", _text("cpus")),
        ("MEMORY", _size("memory_bytes")),
        ("FREE", _size("memory_free_bytes")),
        ("GODWIT", _text("version")),
        ("REASON", _text("reason")),
    ),
    "host-standing": (
        ("HOST", _text("name")),
        ("STATE", _text("state")),
        ("VMS", _text("vms")),
        ("GODWIT", _text("version")),
        ("MEANING", _text("words")),
        ("NEXT", _text("next")),
    ),
    "network": (
        ("NAME", _text("name")),
        ("BRIDGE", _text("bridge")),
        ("MTU", _text("mtu")),
        ("SUBNET", _text("subnet")),
        ("VMS", _text("vms")),
        ("HOSTS", _text("hosts")),
    ),
    "volume": (
        ("NAME", _text("name")),
        ("KIND", _text("kind")),
        ("HEALTH", _text("health")),
        ("USED", _size("used_bytes")),
        ("CAPACITY", _size("capacity_bytes")),
        ("HOSTS", _reached),
    ),
    "disk": (
        ("ID", _text("id")),
        ("LUN", _text("lun")),
        ("SIZE", _size("size_bytes")),
        ("FORMAT", _text("format")),
        ("TIER", _text("effective_tier")),
        ("VOLUME", _text("volume")),
        ("PATH", _text("path")),
    ),
    "checkpoint": (
        ("NAME", _text("name")),
        ("MADE", _when("created_at")),
        ("DISKS", _text("disks")),
        ("VM RAN", _text("running")),
    ),
    "migration": (
        ("ID", _text("id")),
        ("VM", _text("vm")),
        ("FROM", _text("source")),
        ("TO", _text("destination")),
        ("METHOD", _text("method")),
        ("STATE", _text("state")),
        ("TOTAL", _ms("total_ms")),
        ("BLACKOUT", _ms("blackout_ms")),
        ("BYTES", _size("bytes_transferred")),
        ("ACCEPTED", _when("accepted_at")),
    ),
    "task": (
        ("ID", _text("id")),
        ("ACTION", lambda row: plain((row.get("request") or {}).get("kind"))),
        ("SUBJECT", _text("subject")),
        ("STATE", _text("state")),
        ("BY", _text("by")),
        ("CREATED", _when("created_at")),
        ("REASON", _text("reason")),
    ),
}
# What the columns of the lists that may be long are made of; the API is asked for nothing else.
FIELDS: dict[str, tuple[str, ...]] = {
    "vm": ("name", "state", "host", "cpus", "memory_bytes", "ha", "reason"),
    "host": (
        *("name", "state", "vms", "cpus", "memory_bytes", "memory_free_bytes", "version", "reason"),
    ),
}
_NUMBERS = {
    *("VMS", "CPUS", "MEMORY", "FREE", "MTU", "TOTAL", "BLACKOUT", "BYTES"),
    *("LUN", "SIZE", "USED", "CAPACITY"),
}


def table(noun: str, rows: Sequence[Row]) -> str:
    """A list as aligned columns under a head line."""
    columns = COLUMNS[noun]
    cells = [[title for title, _ in columns]]
    cells += [[show(row) for _, show in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(_line(line, widths, columns) for line in cells)


def _line(cells: list[str], widths: list[int], columns: Sequence[Column]) -> str:
    padded = [
        cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
        for cell, width, (title, _) in zip(cells, widths, columns, strict=True)
    ]
    return "  ".join(padded).rstrip()


def sheet(row: Row) -> str:
    """One object, a field on each line; what is empty is left out."""
    lines: list[tuple[str, str]] = []
    for field, value in row.items():
        if value in (None, "", [], {}):
            continue
        lines += _field(field, value)
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name.ljust(width)}  {text}".rstrip() for name, text in lines)


def _field(field: str, value: Any) -> list[tuple[str, str]]:
    name = field.removesuffix("_bytes").removesuffix("_ms").removesuffix("_at").replace("_", " ")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [(name if index == 0 else "", plain(one)) for index, one in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()):
        rows = [f"{key}: {plain(one)}" for key, one in value.items()]
        return [(name if index == 0 else "", text) for index, text in enumerate(rows)]
    if field.endswith("_bytes"):
        return [(name, format_size(value))]
    if field.endswith("_ms") and isinstance(value, int | float):
        return [(name, format_duration(value / 1000))]
    if field.endswith("_at") or field == "time":
        return [(name, when(value))]
    return [(name, plain(value))]
