"""The source of a move loses its power in the middle of the hand-over: go on, or start anew.

``completed``: it has let go of the VM and told the destination so, which then goes on with all of
its memory: no boot, no stamp amiss, no counter of the guest that falls. ``committing``: nobody
knows whether it had gone on by itself, so the VM starts from its disks. Never two run.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from godwit.lab import fault
from godwit.model.processes import HostProcesses
from godwit.qemu.intervals import overlaps

from . import evidence, stamping
from .cluster import MIB, Cluster
from .failover import RESTARTS, Losses
from .guest import Guest, NoAnswer
from .report import Say, Section, tell

Point = Literal["completed", "committing"]
VM = "handed"
DISK = "shared:64M:qcow2"
MEMORY_MIB = 256
RUNS_S = 20.0
TOLD_S, PATIENCE_S = 10.0, 60.0


def run(cluster: Cluster, *, rounds: int = 1, anew: int = 1, say: Say = tell) -> Section:
    """So many times a source is lost after it let go, and ``anew`` times before."""
    section = Section("adoption")
    _make(cluster)
    points: list[Point] = [*(["completed"] * rounds), *(["committing"] * anew)]
    losses, found = Losses(), list[dict[str, Any]]()
    for number, point in enumerate(points, 1):
        found.append(_round(cluster, point, losses))
        one = found[-1]
        say(f"lost at {point}, {number}/{len(points)}: runs after {one['runs_s']} s, {one['said']}")
    section.figures = {"rounds": found}
    _judge(section, found)
    cluster.remove(VM)
    return section


def _make(cluster: Cluster) -> None:
    words = f"godwit.ip={cluster.address(VM)}/22 godwit.host={VM} "
    made = cluster.client.vms.create(
        VM, memory_bytes=MEMORY_MIB * MIB, image="demo", networks=["lan"], disks=[DISK], ha=True,
        append=words + stamping.words(stamping.WRITE_MB_S), restarts=RESTARTS,
    )  # fmt: skip
    cluster.client.wait(made)
    cluster.boot(VM, host=cluster.hosts[0])


def _round(cluster: Cluster, point: Point, losses: Losses) -> dict[str, Any]:
    guest, before = cluster.guest(VM), cluster.owner(VM)
    source = str(before.host)
    destination = cluster.other(source)
    found, counted = stamping.read_pages(guest)
    was_up = guest.stats()["uptime_s"]
    cluster.hold(source, point, "source")
    migration = cluster.begin(VM, destination)
    cluster.await_held(source, point, "source")
    told = point == "completed" and _told(cluster, destination)
    at = time.time()
    losses.add(source, at)
    fault.power_off(cluster.lab, source)
    cluster.refresh()
    owner = _settled(cluster, source, before.epoch)
    answered = _answers(guest)
    up, asked_at = guest.stats()["uptime_s"] if answered else 0.0, time.time()
    bad, after = stamping.read_pages(guest) if answered else (None, {})
    move = cluster.await_end(migration, timeout=PATIENCE_S)
    spans = [losses.cut(span) for span in evidence.spans(cluster, VM, since=at - 1.0)]
    later = [span.start for span in spans if span.host != source and span.epoch > before.epoch]
    # One that was booted has been up for as long as it runs elsewhere, the other for longer.
    booted = bool(answered and later) and up - (asked_at - min(later)) < was_up / 2
    kept = cluster.reservations()
    fault.power_on(cluster.lab, source)
    cluster.refresh()
    cluster.heal()
    return {
        "point": point,
        "source": source,
        "destination": destination,
        "told": told,
        "owner": owner,
        "epochs": (before.epoch, cluster.owner(VM).epoch),
        "runs_s": round(min(later) - at, 2) if later else None,
        "answers": answered,
        "booted": booted,
        "bad": [found, bad],
        "fallen": stamping.fallen(counted, after) if after else None,
        "twice": [str(pair) for pair in overlaps(tuple(spans))],
        "reserved": kept,
        "outcome": move.state.value if move else "no record",
        "left": _left(cluster, source),
        "said": [e.message for e in cluster.events(VM) if e.time >= at and "failover" in e.kind],
    }


def _told(cluster: Cluster, destination: str) -> bool:
    """Whether the destination's agent says that its copy was let go of, within a moment."""
    until = time.monotonic() + TOLD_S
    while time.monotonic() < until:
        said = cluster.lab.agent(destination, "GET", "/v1/processes")
        if any(
            one.vm == VM and one.released for one in HostProcesses.model_validate(said).processes
        ):
            return True
        time.sleep(0.05)  # an agent has no event for what it was told
    return False


def _settled(cluster: Cluster, source: str, epoch: int) -> dict[str, Any]:
    """The record once the VM runs elsewhere and nothing binds it; as it is when the time is up."""
    until = time.monotonic() + PATIENCE_S
    while True:
        owner = cluster.owner(VM)
        over = owner.host != source and owner.epoch > epoch and owner.migration is None
        if (over and owner.state.value == "running") or time.monotonic() > until:
            return {"host": owner.host, "state": owner.state.value, "free": owner.migration is None}
        time.sleep(0.1)  # read past every cut; the event stream has its own tests


def _answers(guest: Guest) -> bool:
    try:
        guest.await_answer(PATIENCE_S)
    except NoAnswer:
        return False
    return True


def _left(cluster: Cluster, source: str) -> list[str]:
    """QEMUs that the source has when it is back."""
    return [f"pid {one.pid}" for one in evidence.copies(cluster, VM) if one.host == source]


def _judge(section: Section, rounds: list[dict[str, Any]]) -> None:
    whole = [one for one in rounds if one["point"] == "completed"]
    anew = [one for one in rounds if one["point"] == "committing"]
    section.judge(
        "a source is lost after it let go: the VM goes on at the destination at the next epoch",
        all(
            one["told"]
            and one["owner"] == {"host": one["destination"], "state": "running", "free": True}
            and one["epochs"][1] == one["epochs"][0] + 1
            and one["outcome"] == "completed"
            for one in whole
        ),
        [(one["owner"], one["epochs"], one["outcome"]) for one in whole],
    )
    section.judge(
        "without a boot: no counter of the guest fell, no stamp of its memory is amiss",
        all(
            one["answers"] and not one["booted"] and one["fallen"] == {} and one["bad"] == [0, 0]
            for one in whole
        ),
        [(one["booted"], one["fallen"], one["bad"]) for one in whole],
    )
    section.judge(
        f"its vCPUs run again within {RUNS_S:g} s, each time",
        all(one["runs_s"] is not None and one["runs_s"] <= RUNS_S for one in rounds),
        [one["runs_s"] for one in rounds],
    )
    section.judge(
        "a source is lost before it let go: the VM is booted anew, and the move has failed",
        all(one["booted"] and one["outcome"] == "failed" for one in anew),
        [(one["booted"], one["outcome"]) for one in anew],
    )
    section.judge(
        "no VM ever ran twice", not any(one["twice"] for one in rounds),
        [one["twice"] for one in rounds],
    )  # fmt: skip
    section.judge(
        "nothing is left behind: no memory kept for it, no QEMU on the host that comes back",
        not any(one["reserved"] or one["left"] for one in rounds),
        [(one["reserved"], one["left"]) for one in rounds],
    )
