"""How a VM's rules are asked for. A room of `godwit.model.requests`, which knows all requests."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from godwit.model.base import Name, Value
from godwit.model.rules import OnShutdown, Rules


class WithRules(Value):
    """The rules as a new VM is given them."""

    priority: int = Field(default=50, ge=0, le=100)
    order: int = Field(default=0, ge=0, le=1000)
    apart: tuple[Name, ...] = Field(default=(), max_length=16)
    allow_hosts: tuple[Name, ...] = Field(default=(), max_length=64)
    restarts: int = Field(default=3, ge=0, le=60)
    autostart: bool = False
    on_shutdown: OnShutdown = "stop"

    @property
    def rules(self) -> Rules:
        """The record of them."""
        return Rules(
            priority=self.priority,
            order=self.order,
            apart=_once(self.apart),
            hosts=_once(self.allow_hosts),
            restarts=self.restarts,
            autostart=self.autostart,
            on_shutdown=self.on_shutdown,
        )


class SetVm(Value):
    """Change a VM's rules, also while it runs; what is not said stays as it is.

    ``apart`` and ``allow_hosts`` replace what was there; ``no_apart`` and ``any_host`` clear it.
    A rule moves nothing by itself: it counts from the VM's next start or move.
    """

    kind: Literal["vm.set"] = "vm.set"
    name: Name
    ha: bool | None = None
    priority: int | None = Field(default=None, ge=0, le=100)
    order: int | None = Field(default=None, ge=0, le=1000)
    apart: tuple[Name, ...] = Field(default=(), max_length=16)
    no_apart: bool = False
    allow_hosts: tuple[Name, ...] = Field(default=(), max_length=64)
    any_host: bool = False
    restarts: int | None = Field(default=None, ge=0, le=60)
    autostart: bool | None = None
    on_shutdown: OnShutdown | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.apart and self.no_apart:
            raise ValueError("say either --apart or --no-apart")
        if self.allow_hosts and self.any_host:
            raise ValueError("say either --allow-host or --any-host")
        if not self.model_dump(exclude_defaults=True, exclude={"kind", "name"}):
            raise ValueError("say what is to change: godwit vm set --help")
        return self

    def applied(self, rules: Rules) -> Rules:
        """Those rules with what is asked for changed."""
        plain = ("priority", "order", "restarts", "autostart", "on_shutdown")
        changes = {
            name: value for name in plain if (value := getattr(self, name, None)) is not None
        }
        if self.apart or self.no_apart:
            changes["apart"] = _once(self.apart)
        if self.allow_hosts or self.any_host:
            changes["hosts"] = _once(self.allow_hosts)
        return rules.but(**changes)


def _once(names: tuple[Name, ...]) -> tuple[Name, ...]:
    return tuple(dict.fromkeys(names))
