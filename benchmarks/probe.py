"""A 1 kHz echo probe: when did the guest answer, and when not.

Runs as a process of its own, so that a busy benchmark does not disturb its clock. UDP needs an
echo service on port 7 of the guest, ICMP none. Times are CLOCK_MONOTONIC, which all namespaces
of a machine share.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path


class Probe:
    """A 1 kHz echo probe in a process of its own; reads its answers' times on `stop`."""

    def __init__(self, enter: tuple[str, ...], target: str, *, kind: str = "udp") -> None:
        line = [*enter, sys.executable, str(Path(__file__).resolve()), target, kind]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self) -> tuple[list[float], list[float]]:
        """Times (monotonic) of probes sent without an answer, and of answers."""
        out, _ = self._process.communicate(b"")
        result = json.loads(out)
        return result["lost"], result["answers"]


def probe_loop(target: str, kind: str, *, interval: float = 0.001) -> None:
    """Send a numbered probe each `interval` until stdin ends, then print what was seen."""
    if kind == "udp":
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((target, 7))
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        sock.connect((target, 0))
    sock.setblocking(False)
    sent: list[float] = []
    seen: dict[int, float] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        due = time.monotonic()
        running = True
        while running:
            now = time.monotonic()
            if now >= due:
                with contextlib.suppress(OSError):  # a refused or full path is a lost probe
                    sock.send(_packet(kind, len(sent)))
                sent.append(now)
                due = max(due + interval, now - 5 * interval)
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.fileobj is sys.stdin:
                    running = False
                    continue
                with contextlib.suppress(OSError):
                    number = _number(kind, sock.recv(2048))
                    if number is not None:
                        seen.setdefault(number, time.monotonic())
    lost = [at for number, at in enumerate(sent) if number not in seen]
    json.dump({"lost": lost, "answers": sorted(seen.values())}, sys.stdout)


def _packet(kind: str, number: int) -> bytes:
    if kind == "udp":
        return struct.pack("!Q", number)
    body = struct.pack("!BBHHHQ", 8, 0, 0, os.getpid() & 0xFFFF, number & 0xFFFF, number)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    check = ~(total + (total >> 16)) & 0xFFFF
    return body[:2] + struct.pack("!H", check) + body[4:]


def _number(kind: str, packet: bytes) -> int | None:
    if kind == "udp":
        return int(struct.unpack("!Q", packet[:8])[0])
    body = packet[(packet[0] & 15) * 4 :]
    if body[0] != 0 or struct.unpack("!H", body[4:6])[0] != os.getpid() & 0xFFFF:
        return None
    return int(struct.unpack("!Q", body[8:16])[0])


if __name__ == "__main__":
    probe_loop(sys.argv[1], sys.argv[2])
