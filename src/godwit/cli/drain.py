"""How a host is emptied, as text: the plan before, and where it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from godwit.cli.errors import one_line
from godwit.model.units import format_duration, format_size

if TYPE_CHECKING:
    from godwit.model.drain import DrainPlan, PlannedVm
    from godwit.model.migration import Migration
    from godwit.model.task import Task

# Pieces of work whose task says itself, in a sentence, how far it is.
_TOLD = frozenset(
    {
        *("host.drain", "host.return", "host.maintenance.enter", "host.maintenance.exit"),
        "cluster.update",
    }
)


def sentence_of(news: Task | Migration) -> str:
    """How far a host's drain, return or update is; empty for any other news."""
    request = getattr(news, "request", None)
    if request is None or request.get("kind") not in _TOLD or news.state.final:
        return ""
    return "" if news.reason == "accepted" else one_line(news.reason)


def render_drain(plan: DrainPlan) -> str:
    """The plan, without a newline at its end."""
    lines = [f"empty {plan.host}" + (f": {plan.reason}" if plan.reason else "")]
    for number, one in enumerate(plan.vms, 1):
        lines.append(f"  {number:2}. {_what(one)}")
        if one.way != "live" and one.reason:
            lines.append(
                f"      {one.reason}" + (f" ({one.needs} lets it go)" if one.needs else "")
            )
        lines += [f"      ! {check.name}: {check.message}" for check in one.checks]
    if plan.bound_s is not None:
        why = f" ({plan.bound_reason})" if plan.bound_reason else ""
        lines.append(f"at least {format_duration(plan.bound_s)} in all{why}")
    elif plan.bound_reason:
        lines.append(f"how long it takes is not known: {plan.bound_reason}")
    if plan.refused:
        lines.append("it would be refused:")
        lines += [f"  ✗ {reason}" for reason in plan.refused]
        if plan.hint:
            lines.append(f"    {plan.hint}")
    return "\n".join(lines)


def _what(one: PlannedVm) -> str:
    size = format_size(one.memory_bytes)
    if one.way == "stay":
        return f"✗ {one.vm} ({size}) stays"
    if one.way == "shutdown":
        return f"! {one.vm} ({size}) is shut down"
    said = []
    if one.forecast.total_ms is not None:
        said.append(f"{format_duration(one.forecast.total_ms / 1000)} in all")
    if one.forecast.blackout_ms is not None:
        said.append(f"{format_duration(one.forecast.blackout_ms / 1000)} dark")
    expected = f": {', '.join(said)}" if said else ""
    return f"{one.vm} ({size}) → {one.destination}, {one.way}{expected}"
