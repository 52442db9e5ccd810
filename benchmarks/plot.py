"""The figures as one picture: a strip of dots per peer, its median as a bar; plain SVG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log10
from xml.sax.saxutils import escape

WIDTH = 960
LEFT = 190
RIGHT = 70
ROW = 30
HEAD = 46
FOOT = 34
COLOURS = ("#0b6e99", "#6b7280", "#a3a9b3", "#c2571a", "#8a5a9e", "#3f7d4e", "#b3352f")


@dataclass(frozen=True)
class Panel:
    """One axis and the strips on it: name and values."""

    title: str
    unit: str
    strips: tuple[tuple[str, tuple[float, ...]], ...]

    def height(self) -> int:
        """Its height in pixels."""
        return HEAD + ROW * len(self.strips) + FOOT


def ticks(most: float) -> list[float]:
    """About five round steps from 0 to beyond `most`."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 5
    base = 10 ** int(log10(raw) // 1)
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw)
    return [step * number for number in range(ceil(most / step) + 1)]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The whole picture."""
    height = 40 + sum(panel.height() for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="16">{escape(title)}</text>',
    ]
    top = 40
    for panel in panels:
        parts += _panel(panel, top)
        top += panel.height()
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top: int) -> list[str]:
    most = max((value for _, values in panel.strips for value in values), default=0.0)
    marks = ticks(most)
    scale = (WIDTH - LEFT - RIGHT) / marks[-1]
    bottom = top + HEAD + ROW * len(panel.strips)
    parts = [f'<text x="16" y="{top + 26}" font-weight="bold">{escape(panel.title)}</text>']
    for mark in marks:
        x = LEFT + mark * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{top + HEAD - 8}" x2="{x:.1f}" y2="{bottom}" '
            'stroke="#e3e5e8"/>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{mark:g}'
            f"{escape(' ' + panel.unit) if mark == marks[-1] else ''}</text>"
        )
    for index, (name, values) in enumerate(panel.strips):
        middle = top + HEAD + ROW * index + ROW / 2
        parts += _strip(name, values, middle, scale, COLOURS[index % len(COLOURS)])
    return parts


def _strip(
    name: str, values: Sequence[float], middle: float, scale: float, colour: str
) -> list[str]:
    parts = [f'<text x="{LEFT - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>']
    for index, value in enumerate(values):
        # Neighbours in time are spread up and down, so that equal values stay countable.
        y = middle + (index % 5 - 2) * 3.2
        parts.append(
            f'<circle cx="{LEFT + value * scale:.1f}" cy="{y:.1f}" r="3" fill="{colour}" '
            'fill-opacity="0.55"/>'
        )
    if values:
        seen = statistics.median(values)
        x = LEFT + seen * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{middle - 11:.1f}" x2="{x:.1f}" y2="{middle + 11:.1f}" '
            f'stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{middle + 4:.1f}" fill="{colour}">'
            f"{_short(seen)}</text>"
        )
    return parts


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
