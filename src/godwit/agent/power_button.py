"""The power button of a VM, pressed until its guest shuts down."""

from __future__ import annotations

import contextlib

from godwit.model.errors import OperationFailed
from godwit.qemu.machine import Machine

PRESS_AGAIN_S = 5.0


async def press(machine: Machine, vm: str, timeout_s: float) -> None:
    """Return when the guest has shut down; OperationFailed when it has not in ``timeout_s``."""
    left = timeout_s
    with machine.monitor.events("SHUTDOWN") as events:
        while left > 0:
            # A guest that is still booting does not hear the button: press it again.
            await machine.powerdown()
            with contextlib.suppress(TimeoutError):
                await events.wait(timeout=min(left, PRESS_AGAIN_S))
                return
            left -= PRESS_AGAIN_S
    raise OperationFailed(
        f"the guest of {vm} did not shut down within {timeout_s:g} s",
        hint=f"cut its power: godwit vm stop {vm} --force",
    )
