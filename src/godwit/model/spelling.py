"""How a value is written and read: text and back without loss, one rule for each sort of value.

Nothing here imports pydantic, so that ``godwit --help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from godwit.model.errors import InvalidRequest
from godwit.model.units import parse_duration, parse_size

if TYPE_CHECKING:
    from godwit.model.requests import NewDisk

Sort = Literal[
    "name",
    "text",
    "path",
    "count",
    "size",
    "ms",
    "seconds",
    "switch",
    "onoff",
    "disk",
    "place",
    "choice",
]

_UNITS = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))


def plain(number: float) -> str:
    """A number with no exponent, that reads back as exactly the same float."""
    text = format(Decimal(repr(number)), "f")
    return text.removesuffix(".0")


def spell_size(size: int) -> str:
    """``512M``: the largest unit that loses nothing."""
    for unit, factor in _UNITS:
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def _spell_seconds(seconds: float) -> str:
    if seconds % 60 == 0:
        return f"{int(seconds) // 60}m"
    return f"{plain(seconds)}s"


def _spell_place(place: dict[str, Any]) -> str:
    words = [place["volume"]]
    if "size_bytes" in place:
        words.append(spell_size(place["size_bytes"]))
    return ":".join(words + ([place["format"]] if "format" in place else []))


def _read_exactly(text: str, unit: str, scale: float) -> float:
    # Converted by way of seconds, 0.3 ms would come back as another float.
    seconds = parse_duration(text, bare=unit)
    number = text.strip().lower()
    number = number.removesuffix(unit).strip()
    try:
        return float(number)
    except ValueError:
        return seconds * scale


def _read_count(text: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit():
        raise InvalidRequest(f"{text!r} is not a number", hint="write a whole number like 2")
    return int(text)


def _read_onoff(text: str) -> bool:
    if text not in ("on", "off"):
        raise InvalidRequest(f"{text!r} is neither on nor off", hint="write on or off")
    return text == "on"


def read_disk(text: str) -> dict[str, Any]:
    """The new disk of ``VOLUME:SIZE[:FORMAT]``; InvalidRequest when it is not one."""
    disk = _read_place(text)
    if "size_bytes" not in disk:
        raise _not_a_disk(text)
    return disk


def disk_fields(disk: NewDisk | str) -> dict[str, Any]:
    """A new disk as fields, whichever way it was given; InvalidRequest as `read_disk`."""
    return read_disk(disk) if isinstance(disk, str) else disk.model_dump(mode="json")


def _read_place(text: str) -> dict[str, Any]:
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise _not_a_disk(text)
    place: dict[str, Any] = {"volume": parts[0]}
    if len(parts) > 1:
        place["size_bytes"] = parse_size(parts[1])
    return place | ({"format": parts[2]} if len(parts) == 3 else {})


def _not_a_disk(text: str) -> InvalidRequest:
    return InvalidRequest(
        f"{text!r} is not a disk", hint="write VOLUME:SIZE[:FORMAT], like shared:2G"
    )


_SPELL: dict[str, Callable[[Any], str]] = {
    "size": spell_size,
    "ms": lambda value: f"{plain(value)}ms",
    "seconds": _spell_seconds,
    "onoff": lambda value: "on" if value else "off",
    "disk": _spell_place,
    "place": _spell_place,
}
_READ: dict[str, Callable[[str], Any]] = {
    "size": parse_size,
    "ms": lambda text: _read_exactly(text, "ms", 1000.0),
    "seconds": lambda text: _read_exactly(text, "s", 1.0),
    "disk": read_disk,
    "place": _read_place,
    "count": _read_count,
    "onoff": _read_onoff,
}


def spell(sort: Sort, value: Any) -> str:
    """The text of one JSON value, as people type it."""
    return _SPELL.get(sort, str)(value)


def read(sort: Sort, text: str) -> Any:
    """The JSON value of one text; InvalidRequest says what is wrong with it."""
    return _READ.get(sort, str)(text)
