"""A disk on its way to another image: what is asked of a host, and how far it is."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from godwit.model.base import Record
from godwit.model.migration import MoveState, Stage
from godwit.model.vm import Disk


class DiskMoveAsk(Record):
    """``disk`` is to lie in ``target`` from now on; its old image is deleted unless ``keep``.

    ``max_bytes_per_s`` 0 is no limit; it holds for a VM that runs.
    """

    id: str = Field(pattern=r"^[a-z0-9-]{1,63}$")
    disk: Disk
    target: Disk
    keep: bool = False
    max_bytes_per_s: int = Field(default=0, ge=0)


class DiskMove(Record):
    """How far it is, in the stages of every move; bytes as the guest counts them.

    ``switched``: the VM's record names the new image (of a running VM the host writes it).
    ``stood_ms`` is how long the VM stood still for the switch. ``error`` is problem+json.
    """

    id: str
    vm: str
    stage: Stage = Stage.SETUP
    state: MoveState = MoveState.RUNNING
    copied_bytes: int = 0
    total_bytes: int = 0
    switched: bool = False
    stood_ms: float | None = None
    reason: str = ""
    error: dict[str, Any] | None = None
