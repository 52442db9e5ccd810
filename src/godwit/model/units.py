"""Sizes, durations and rates: read what people type, print what they can read.

Base units are bytes, seconds and bits per second. Size suffixes are binary (``2G`` = 2 GiB), as
with every hypervisor; rate suffixes are decimal, as with every network.
"""

from __future__ import annotations

import math
import re

from godwit.model.errors import InvalidRequest

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?b)?\s*$", re.IGNORECASE)
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*$", re.IGNORECASE)
_RATE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)bit(?:/s|ps)?\s*$", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LARGEST_SIZE = 1 << 60

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def parse_size(text: str | int) -> int:
    """Bytes of ``512M``, ``2G``, ``1.5GiB`` or a bare number of bytes; InvalidRequest if not."""
    if isinstance(text, int):
        text = str(text)
    match = _SIZE.match(text)
    if not match:
        raise InvalidRequest(f"{text!r} is not a size", hint="write a size like 512M or 2G")
    power = " kmgtp".index(match[2].lower() or " ")
    size = int(float(match[1]) * 1024**power) if "." in match[1] else int(match[1]) * 1024**power
    if not 0 < size <= _LARGEST_SIZE:
        raise InvalidRequest(
            f"{text!r} is not a usable size", hint="give a size above zero and at most 1024P"
        )
    return size


def parse_duration(text: str | float, *, bare: str = "s") -> float:
    """Seconds of ``200ms``, ``10m``, ``1h``; a bare number is in the unit ``bare``."""
    if isinstance(text, int | float):
        text = repr(text)
    match = _DURATION.match(text)
    if not match:
        raise InvalidRequest(f"{text!r} is not a duration", hint="write it like 200ms, 30s or 10m")
    seconds = float(match[1]) * _SECONDS[(match[2] or bare).lower()]
    if not 0 < seconds <= 366 * 86400:
        raise InvalidRequest(
            f"{text!r} is not a usable duration", hint="give more than zero and at most a year"
        )
    return seconds


def parse_rate(text: str) -> int:
    """Bits per second of ``1gbit``, ``100mbit`` (decimal)."""
    match = _RATE.match(text)
    if not match:
        raise InvalidRequest(f"{text!r} is not a rate", hint="write it like 1gbit or 100mbit")
    rate = int(float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " "))
    if not 0 < rate <= 10**13:
        raise InvalidRequest(f"{text!r} is not a usable rate", hint="write it like 1gbit")
    return rate


def format_size(size: float) -> str:
    """``256 MiB``: at most three digits before the unit."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} PiB"


def format_duration(seconds: float) -> str:
    """``87 ms``, ``4.2 s``, ``3 m 20 s``: what a person would say."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} m {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} m"
