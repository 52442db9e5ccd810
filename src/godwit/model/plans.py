"""Which kind of plan answers to which request, of those that have one (``words.PLANNED``)."""

from __future__ import annotations

from godwit.model.create import CreatePlan
from godwit.model.drain import DrainPlan
from godwit.model.migration import MovePlan

Plan = MovePlan | DrainPlan | CreatePlan


def plan_of(kind: str) -> type[MovePlan] | type[DrainPlan] | type[CreatePlan]:
    """The plan of requests of a kind."""
    if kind == "vm.create":
        return CreatePlan
    return MovePlan if kind == "vm.migrate" else DrainPlan
