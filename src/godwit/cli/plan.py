"""Plans as text: a move's with every check, the candidates, what is expected; a new VM's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.model.units import format_duration, format_size

if TYPE_CHECKING:
    from godwit.model.create import CreatePlan
    from godwit.model.migration import Forecast, MovePlan

_MARKS = {"pass": "✓", "warn": "!", "fail": "✗"}


def render_plan(plan: MovePlan) -> str:
    """The plan, without a newline at its end."""
    to = plan.destination or "nowhere"
    lines = [f"{plan.vm} → {to} ({plan.strategy})" + (f": {plan.reason}" if plan.reason else "")]
    for check in plan.checks:
        lines.append(f"  {_MARKS[check.result]} {check.name}: {check.message}")
        if check.hint and check.result != "pass":
            lines.append(f"      {check.hint}")
    for candidate in plan.candidates:
        mark = _MARKS["pass" if candidate.eligible else "fail"]
        reasons = "; ".join(candidate.reasons)
        lines.append(f"  {mark} host {candidate.host}" + (f": {reasons}" if reasons else ""))
    lines += [f"  {line}" for line in _expected(plan.forecast)]
    if plan.failed:
        lines.append("it would be refused")
    return "\n".join(lines)


def render_create(plan: CreatePlan) -> str:
    """What a VM would be, without a newline at its end."""
    lines = [f"{plan.vm}: {plan.machine}, {plan.cpu_model}, {plan.accelerator}"]
    lines.append(f"  its CPU: {plan.reason}")
    lines += [f"  ✗ host {host}: {why}" for host, why in sorted(plan.cannot.items())]
    return "\n".join(lines)


def _expected(forecast: Forecast) -> list[str]:
    said = []
    if forecast.converges is False:
        said.append("does not converge")
    if forecast.total_ms is not None:
        said.append(f"{format_duration(forecast.total_ms / 1000)} in all")
    if forecast.blackout_ms is not None:
        said.append(f"{format_duration(forecast.blackout_ms / 1000)} dark")
    if forecast.bytes is not None:
        said.append(format_size(forecast.bytes))
    if forecast.dirty_bytes_per_s is not None:
        said.append(f"dirty {format_size(forecast.dirty_bytes_per_s)}/s")
    if not said:
        return []
    return ["expected: " + ", ".join(said) + (f" ({forecast.basis})" if forecast.basis else "")]
