"""A finished move as a small picture: when each stage was, and where the VM stood still.

Pure text in, text out: the same for the command line, the demonstration and a log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.model.units import format_duration, format_size

if TYPE_CHECKING:
    from godwit.model.migration import Migration, StageTime

WIDTH = 48
LIVE, DARK = "█", "▓"
_NAMES = 10  # columns that the longest name of a stage takes
# The VM stands still from within `switchover` until `resume` is over.
_STILL = frozenset({"switchover", "handover", "resume"})


def render_timeline(move: Migration, *, width: int = WIDTH) -> str:
    """The picture of a move, without a newline at its end; ``width`` columns for the bars."""
    lines = [_headline(move)]
    if move.stages:
        end_s = max(stage.start_s + stage.duration_ms / 1000 for stage in move.stages)
        end_s = max(end_s, 1e-6)
        lines.append("")
        lines += [_stage(stage, end_s, width, dark=_was_dark(move)) for stage in move.stages]
        lines.append(_ruler(end_s, width))
    lines += _passes(move)
    lines += _forecast(move)
    if move.reason:
        lines.append(f"why       {move.reason}")
    return "\n".join(line.rstrip() for line in lines)


def _ms(milliseconds: float) -> str:
    return format_duration(milliseconds / 1000)


def _was_dark(move: Migration) -> bool:
    return move.blackout_ms is not None


def _headline(move: Migration) -> str:
    how = (
        move.method
        if move.strategy in (move.method, "precopy")
        else f"{move.method}, {move.strategy}"
    )
    said = [f"{move.vm}: {move.source} → {move.destination} ({how})", f"{move.state.value}"]
    if move.total_ms is not None:
        said[-1] += f" in {_ms(move.total_ms)}"
    if move.blackout_ms is not None:
        said.append(f"dark {_ms(move.blackout_ms)}")
    if move.bytes_transferred:
        said.append(format_size(move.bytes_transferred))
    return ", ".join(said)


def _stage(stage: StageTime, end_s: float, width: int, *, dark: bool) -> str:
    scale = width / end_s
    first = min(round(stage.start_s * scale), width - 1)
    last = round((stage.start_s + stage.duration_ms / 1000) * scale)
    length = max(1, min(last, width) - first)  # what was, is seen
    still = dark and stage.name.value in _STILL
    bar = " " * first + (DARK if still else LIVE) * length
    mark = "  VM still" if still else ""
    return f"{stage.name.value:<{_NAMES}}{bar:<{width}}  {_ms(stage.duration_ms):>8}{mark}"


def _ruler(end_s: float, width: int) -> str:
    end = format_duration(end_s)
    return " " * _NAMES + "0" + end.rjust(width - 1)


def _passes(move: Migration) -> list[str]:
    if not move.passes:
        return []
    said = [f"{format_size(one.bytes)} in {_ms(one.duration_ms)}" for one in move.passes]
    if len(said) > 4:
        said = [*said[:2], f"… {len(said) - 4} more …", *said[-2:]]
    dirty = max(one.dirty_bytes_per_s for one in move.passes)
    return ["passes    " + " · ".join(said), f"dirtied   at most {format_size(dirty)}/s"]


def _forecast(move: Migration) -> list[str]:
    told = []
    if move.forecast.total_ms is not None and move.total_ms is not None:
        told.append(f"{_ms(move.forecast.total_ms)} in all (was {_ms(move.total_ms)})")
    if move.forecast.blackout_ms is not None and move.blackout_ms is not None:
        told.append(f"{_ms(move.forecast.blackout_ms)} dark (was {_ms(move.blackout_ms)})")
    return ["expected  " + ", ".join(told)] if told else []
