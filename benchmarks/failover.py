"""Where the seconds of a failover go: a host loses its power, and its VM answers elsewhere.

    silence    from the loss until the host is lost: nothing was heard for 14.4 s
    proof      until another host owns the VM at the next epoch: at once when the deadline of the
               host's guard and its watchdog are the proof, else after its power device says off
    start      until its QEMU runs there
    guest      until the guest answers; beside it what the same takes when a person starts the VM

Loss and answers are timed here; what is between comes from the cluster's own events, as anybody
can follow them. One lab has watchdogs, the other has power devices alone.

    .venv/bin/python benchmarks/failover.py [--rounds 5] [--output build/bench-failover.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import facts
from ground import GODWIT, Ground, raised

from godwit.lab import fault

HOSTS = 3
VM, ADDRESS = "taken", "10.91.0.130"
RUNGS = ("deadline", "power")
STAGES = ("silence", "proof", "start", "guest")
ENDS = (("host.fencing", "vm.failover"), ("vm.failover",), ("vm.restarted",))
"""The events that end each stage but the last one: the first of them does."""
RESTARTS = 60  # the VM loses its host all the time
PATIENCE_S = 120.0


def say(line: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{line}\n")


class Events:
    """What the cluster says of itself, as `godwit event follow` prints it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def since(self, at: float) -> list[dict[str, Any]]:
        """All from this moment on, oldest first; a line that is being written is left out."""
        found = []
        for line in self._file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [event for event in found if event["time"] >= at]

    def first(self, kinds: tuple[str, ...], at: float) -> float:
        """When the first of these kinds came; TimeoutError when there is none for long."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            times = [event["time"] for event in self.since(at) if event["kind"] in kinds]
            if times:
                return float(min(times))
            time.sleep(0.05)  # another process writes them
        raise TimeoutError(f"no {kinds} for {PATIENCE_S:.0f} s")


@contextlib.contextmanager
def followed(ground: Ground) -> Iterator[Events]:
    """The events from now on, for the time of the run."""
    file = ground.scratch / "events.jsonl"
    with file.open("w") as stream:
        follower = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", str(GODWIT), "event", "follow", "-o", "json"],
            env=ground.environ, stdin=subprocess.DEVNULL, stdout=stream,
        )  # fmt: skip
        try:
            yield Events(file)
        finally:
            follower.terminate()
            follower.wait(timeout=30)


def settled(ground: Ground) -> str:
    """The VM's host, once all hosts are up and the VM runs and answers."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        hosts = {row["name"]: row["state"] for row in ground.must("host", "list")}
        vm = ground.must("vm", "show", VM)
        for name in (name for name, state in hosts.items() if state == "quarantined"):
            ground.must("host", "return", name)  # it was lost often
        if set(hosts.values()) == {"up"} and vm["state"] == "running":
            ground.wait_guest(ADDRESS)
            return str(vm["host"])
        time.sleep(0.2)  # what a person does: looks again
    raise TimeoutError(f"{hosts}, {VM} is {vm['state']}")


def by_hand(ground: Ground) -> float:
    """Seconds from the end of `vm start` to the guest's answer: what no failover can save."""
    host = settled(ground)
    ground.must("vm", "stop", VM, "--force")
    ground.must("vm", "start", VM, "--host", host)
    began = time.time()
    ground.wait_guest(ADDRESS)
    return time.time() - began


def lost(ground: Ground, events: Events) -> dict[str, float]:
    """One round: the seconds of each stage."""
    victim = settled(ground)
    at = time.time()
    ground.lab = fault.power_off(ground.lab, victim)
    marks = [at, *(events.first(kinds, at) for kinds in ENDS)]
    ground.wait_guest(ADDRESS)
    marks.append(time.time())
    ground.lab = fault.power_on(ground.lab, victim)
    row = {
        stage: round(end - begin, 3)
        for stage, begin, end in zip(STAGES, marks, marks[1:], strict=False)
    }
    return row | {"all": round(marks[-1] - at, 3)}


def measure(ground: Ground, rung: str, rounds: int) -> dict[str, Any]:
    """So many losses, and as many starts by hand between them."""
    ground.must(
        "vm", "create", VM, "--memory", "256M", "--image", "demo", "--network", "lan", "--ha",
        "--restarts", str(RESTARTS), "--append", f"godwit.ip={ADDRESS}/22 godwit.host={VM}",
    )  # fmt: skip
    ground.must("vm", "start", VM)
    figures: dict[str, Any] = {rung: [], "by_hand": []}
    with followed(ground) as events:
        for number in range(rounds):
            figures["by_hand"].append(round(by_hand(ground), 3))
            figures[rung].append(lost(ground, events))
            say(f"{rung} {number + 1}: {figures[rung][-1]}")
    return figures


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Medians of each stage, and the guest's part beside a start by hand."""
    found: dict[str, Any] = {
        rung: {
            stage: round(statistics.median(row[stage] for row in figures[rung]), 2)
            for stage in (*STAGES, "all")
        }
        for rung in RUNGS
    }
    hand = statistics.median(figures["by_hand"])
    found["by_hand_s"] = round(hand, 2)
    found["guest_of_by_hand"] = {rung: round(found[rung]["guest"] / hand, 2) for rung in RUNGS}
    return found


def main() -> int:
    """0 when everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/bench-failover.json"))
    given = parser.parse_args()
    figures: dict[str, Any] = {"by_hand": []}
    for rung in RUNGS:
        with raised(say, rate="1gbit", hosts=HOSTS, watchdog=rung == "deadline") as ground:
            found = measure(ground, rung, given.rounds)
        figures = {**found, **figures, "by_hand": figures["by_hand"] + found["by_hand"]}
    result = {
        "commit": facts.commit(),
        "cpus": os.cpu_count(),
        "qemu": facts.said("qemu-system-x86_64", "--version"),
        "load_at_end": os.getloadavg()[0],
        "hosts": HOSTS,
        "rounds": figures,
        "summary": summary(figures),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
