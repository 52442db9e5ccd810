"""The plan of emptying a host: what goes where, how, in which order, how long, and what cannot."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Record
from godwit.model.migration import Check, Forecast

Way = Literal["live", "quick", "shutdown", "stay"]


class PlannedVm(Record):
    """What is to become of one VM; ``stay``: it cannot leave, and ``reason`` says why.

    ``needs`` is what would let it leave after all: --allow-quick, --allow-shutdown.
    """

    vm: Name
    way: Way
    destination: Name | None = None
    reason: str = ""
    needs: str = ""
    memory_bytes: int = 0
    priority: int = 50
    forecast: Forecast = Forecast()
    checks: tuple[Check, ...] = ()  # those that did not pass


class DrainPlan(Record):
    """The answer to ``host drain --dry-run``; ``vms`` in the order in which they leave.

    ``bound_s``: no schedule under the limits is shorter, by the forecasts; None when one of them is
    not known. ``refused`` is why it would not begin, empty when it would.
    """

    host: Name
    vms: tuple[PlannedVm, ...] = ()
    bound_s: float | None = None
    bound_reason: str = ""
    refused: tuple[str, ...] = ()
    hint: str = ""
    reason: str = ""

    @property
    def failed(self) -> tuple[str, ...]:
        """Why it would be refused."""
        return self.refused

    @property
    def leaving(self) -> tuple[PlannedVm, ...]:
        """The VMs that move or are shut down."""
        return tuple(one for one in self.vms if one.way != "stay")
