"""The sockets on which the storage brokers of this host are reached: they outlive every daemon."""

from __future__ import annotations

import socket
from pathlib import Path

from godwit.storage.broker import listen

FOLDER = "nbd"


class BrokerSockets:
    """One listening socket for each VM that has a broker, kept open here.

    Not in the VM's own directory, which QEMU's user cannot enter: QEMU connects by itself.
    """

    def __init__(self, run: Path, user: tuple[int, int] | None) -> None:
        self._run = run
        self._user = user
        self._listeners: dict[str, socket.socket] = {}

    def path(self, vm: str) -> Path:
        """Where a VM's broker is reached."""
        return self._run / FOLDER / f"{vm}.sock"

    def listen(self, vm: str) -> socket.socket:
        """Bind it anew."""
        self.hang_up(vm)
        folder = self.path(vm).parent
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)  # may be passed, not read
        found = self._listeners[vm] = listen(self.path(vm), user=self._user)
        return found

    def known(self, vm: str) -> socket.socket:
        """The one that clients know; bound anew after a restart of the agent."""
        return self._listeners.get(vm) or self.listen(vm)

    def hang_up(self, vm: str) -> None:
        """Close and remove it."""
        if (listener := self._listeners.pop(vm, None)) is not None:
            listener.close()
        self.path(vm).unlink(missing_ok=True)

    def close(self) -> None:
        """The agent ends; the paths stay."""
        for listener in self._listeners.values():
            listener.close()
