"""Limits what a link sends, with a token bucket, and reads back what the kernel made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from godwit.host.errors import HostError
from godwit.host.run import run

_TIMEOUT = 10.0
_LATENCY_MS = 20
# The bucket holds this much time of the rate, for the kernel's timer does not fire at every
# packet, and at least one largest segment, for a longer one would never pass.
_BURST_SECONDS = 0.001
_SMALLEST_BURST = 70_000


@dataclass(frozen=True, slots=True)
class Shaping:
    """A limit on what a link sends."""

    rate_bits: int
    burst_bytes: int


def burst_bytes(rate_bits: int) -> int:
    """Size of the token bucket for a rate in bits per second."""
    return max(_SMALLEST_BURST, round(rate_bits / 8 * _BURST_SECONDS))


def shape_argv(ifname: str, rate_bits: int) -> list[str]:
    """The command that limits a link to a rate, replacing a limit it has."""
    if rate_bits < 8_000:
        raise HostError(f"a rate of {rate_bits} bit/s is too small to shape")
    return [
        *("tc", "qdisc", "replace", "dev", ifname, "root", "tbf"),
        *("rate", f"{rate_bits}bit"),
        *("burst", str(burst_bytes(rate_bits))),
        *("latency", f"{_LATENCY_MS}ms"),
    ]


def shape(ifname: str, rate_bits: int, *, netns: str | None = None) -> Shaping:
    """Limit what a link sends to ``rate_bits`` a second and return what the kernel made of it."""
    run(shape_argv(ifname, rate_bits), timeout=_TIMEOUT, netns=netns)
    made = shaping(ifname, netns=netns)
    if made is None:
        raise HostError(f"link {ifname} is not limited although tc said so")
    return made


def unshape(ifname: str, *, netns: str | None = None) -> None:
    """Take the limit from a link; fine when it has none."""
    if shaping(ifname, netns=netns) is not None:
        run(["tc", "qdisc", "del", "dev", ifname, "root"], timeout=_TIMEOUT, netns=netns)


def shaping(ifname: str, *, netns: str | None = None) -> Shaping | None:
    """The limit a link has, None when it has none."""
    text = run(["tc", "-json", "qdisc", "show", "dev", ifname], timeout=_TIMEOUT, netns=netns)
    return parse_shaping(json.loads(text or b"[]"))


def parse_shaping(rows: Sequence[dict[str, Any]]) -> Shaping | None:
    """The limit in what ``tc -json qdisc show`` printed."""
    for row in rows:
        if row.get("kind") == "tbf" and row.get("root"):
            options = row["options"]
            return Shaping(rate_bits=options["rate"] * 8, burst_bytes=options["burst"])
    return None
