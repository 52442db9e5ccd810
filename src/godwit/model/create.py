"""What a new VM would be, before it is made."""

from __future__ import annotations

from pydantic import Field

from godwit.model.base import Name, Record


class CreatePlan(Record):
    """The answer to ``vm create --dry-run``: what the VM would be pinned to, and why.

    ``cannot``: host -> why the VM could not be there. What would be refused is an error instead.
    """

    vm: Name
    machine: str
    cpu_model: str
    accelerator: str
    reason: str
    cannot: dict[Name, str] = Field(default_factory=dict)

    @property
    def failed(self) -> tuple[str, ...]:
        """Always empty: see above."""
        return ()
