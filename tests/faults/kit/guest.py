"""The demo guest's control port, asked from the client machine of a lab."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from godwit.host.netns import opened_netns, socket_in_netns

CONTROL_PORT = 7777
ECHO_PORT = 7


class NoAnswer(Exception):
    """The guest did not answer in time."""


@dataclass(frozen=True)
class Guest:
    """A guest by its address; datagrams may be lost, so everything is asked until answered."""

    netns: str
    address: str

    def ask(self, command: str, *, timeout: float = 5.0, each: float = 0.5) -> dict[str, Any]:
        """The answer to a command; NoAnswer. A slow command needs a larger ``each``."""
        until = time.monotonic() + timeout
        with opened_netns(self.netns) as descriptor:
            channel = socket_in_netns(descriptor, kind=socket.SOCK_DGRAM)
        with channel:
            channel.connect((self.address, CONTROL_PORT))
            number = 0
            while time.monotonic() < until:
                number += 1
                channel.settimeout(max(0.01, min(each, until - time.monotonic())))
                try:
                    channel.send(f"{command} id={number}\n".encode())
                    answer = json.loads(channel.recv(65536))
                except TimeoutError:
                    continue
                except OSError:
                    time.sleep(0.05)
                    continue
                if not answer.get("ok"):
                    raise AssertionError(f"{command}: {answer.get('error')}")
                return dict(answer)
        raise NoAnswer(f"{self.address} did not answer {command!r} within {timeout:g} s")

    def stats(self, *, timeout: float = 5.0) -> dict[str, Any]:
        """Everything the guest counts."""
        return dict(self.ask("stats", timeout=timeout)["stats"])

    def alive(self, *, timeout: float = 3.0) -> bool:
        """Whether it answers."""
        try:
            self.ask("ping", timeout=timeout, each=0.2)
        except NoAnswer:
            return False
        return True

    def await_answer(self, timeout: float) -> None:
        """Wait for the first answer after a start."""
        self.ask("ping", timeout=timeout, each=0.3)
