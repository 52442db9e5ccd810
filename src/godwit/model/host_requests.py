"""What can be asked about a host. A room of `godwit.model.requests`, which knows them all."""

from __future__ import annotations

from typing import Literal

from godwit.model.base import Name, Value


class ConfirmHostDown(Value):
    """Say that a host which does not answer is off, so that what waits for its word goes on.

    Refused while the host answers. A wrong word may cost data: what that host still writes lands
    after newer writes.
    """

    kind: Literal["host.confirm-down"] = "host.confirm-down"
    name: Name
