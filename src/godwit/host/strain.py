"""How long threads wait for a processor, by the kernel's scheduler statistics.

``/proc/PID/task/TID/schedstat`` holds nanoseconds on a processor and nanoseconds spent ready to
run but waiting for one (Documentation/scheduler/sched-stats). A kernel without them shows zeros,
or no such file: then no strain is seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

VCPU_THREADS = "CPU "
"""What QEMU's ``debug-threads`` calls the threads of vCPUs begins with this."""


@dataclass(frozen=True)
class Times:
    """Nanoseconds so far."""

    computed: int = 0
    waited: int = 0


class Strain:
    """The strain of some processes between one reading and the next.

    The guest's own threads are left out: they are as busy as the guest likes, and may be held to a
    quota, which counts as waiting.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[int, int], Times] = {}

    def read(self, pids: Iterable[int]) -> float:
        """How many times longer than it computed; 1 when nothing waited, or nothing is known.

        The first reading of a process begins with it: only what comes later counts.
        """
        now = {(pid, thread): times for pid in pids for thread, times in _threads(pid)}
        computed = waited = 0
        for key, times in now.items():
            if (before := self._before.get(key)) is not None:
                computed += times.computed - before.computed
                waited += times.waited - before.waited
        self._before = now
        return (computed + waited) / computed if computed > 0 else 1.0


def _threads(pid: int) -> Iterable[tuple[int, Times]]:
    try:
        folders = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return
    for folder in folders:
        try:
            if (folder / "comm").read_text().startswith(VCPU_THREADS):
                continue
            computed, waited, _ = (folder / "schedstat").read_text().split()
        except (OSError, ValueError):  # it has ended, or the kernel keeps no statistics
            continue
        yield int(folder.name), Times(int(computed), int(waited))
