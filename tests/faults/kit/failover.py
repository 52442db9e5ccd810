"""A host is lost: its highly available VMs run elsewhere soon, never twice; the others wait for it.

``power``: everything on it ends at once. ``management``: its management network is cut, so that it
cannot renew its lease; its guard has frozen what may be taken over before that happens. When QEMU
last computed is read from its own trace, from the guard's log, and from the moment of the cut.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any, Literal

from godwit.lab import fault
from godwit.lab.layout import MGMT
from godwit.qemu.intervals import Span, overlaps

from . import etcd_members, evidence, formats
from .cluster import MIB, Cluster
from .guest import Guest
from .report import Say, Section, tell

Loss = Literal["power", "management"]
WRITER, IDLE, PLAIN = "ha-writer", "ha-idle", "plain"
DISK = "shared:64M:qcow2"
BOOTING_S = 20.0
PATIENCE_S = 60.0
LOGS_S = 1.0
MEMORY_MIB = 128
RESTARTS = 60  # the same VMs lose their hosts all the hour


def run(
    cluster: Cluster,
    *,
    loss: Loss,
    rounds: int = 1,
    store_leader: int = 0,
    manager_leader: int = 0,
    disk: str = DISK,
    say: Say = tell,
) -> Section:
    """Lose the host that runs two highly available VMs and a plain one, so many times.

    Of these rounds ``store_leader`` hit the host of the leader of etcd, and ``manager_leader``
    that of the leading manager.
    """
    section = Section(f"failover {loss}")
    _make(cluster, WRITER, ha=True, disks=[disk])
    _make(cluster, IDLE, ha=True)
    _make(cluster, PLAIN, ha=False)
    found, losses, victim = [], Losses(), cluster.hosts[0]
    for number in range(rounds):
        victim = cluster.hosts[number % len(cluster.hosts)]
        if number < store_leader:
            victim = etcd_members.agreed(cluster)
        elif number < store_leader + manager_leader:
            victim = etcd_members.leading_manager(cluster)
        found.append(_round(cluster, loss, victim, losses))
        say(f"{loss} of {victim} lost, {number + 1}/{rounds}: {found[-1]['booting_s']}")
    section.figures = {"rounds": found}
    _judge(section, loss, found)
    cluster.admit(victim)  # what stayed there is removed, and that asks its agent
    for name in (WRITER, IDLE, PLAIN):
        cluster.remove(name)
    return section


class Losses:
    """When each host's power was cut: what ran there ran no longer, and could not write it down."""

    def __init__(self) -> None:
        self._times: list[tuple[str, float]] = []

    def add(self, host: str, at: float) -> None:
        """A host's power was cut."""
        self._times.append((host, at))

    def cut(self, span: Span) -> Span:
        """The stretch as it really ended."""
        ends = [at for host, at in self._times if host == span.host and at > span.start]
        return replace(span, end=min([span.end, *ends]))


def _make(cluster: Cluster, vm: str, *, ha: bool, disks: list[str] | None = None) -> None:
    words = f"godwit.ip={cluster.address(vm)}/22 godwit.host={vm}"
    made = cluster.client.vms.create(
        vm, memory_bytes=MEMORY_MIB * MIB, image="demo", append=words, networks=["lan"],
        disks=disks or [], ha=ha, restarts=RESTARTS,
    )  # fmt: skip
    cluster.client.wait(made)


def bring(cluster: Cluster, vm: str, host: str) -> Guest:
    """Have the VM running there, once the cluster has settled what became of it."""
    evidence.await_settled(cluster, vm)
    row = cluster.client.vms.get(vm)
    if row.state.value != "running":
        return cluster.boot(vm, host=host)
    if row.host != host:
        done = cluster.move(vm, host)
        assert done.state.value == "completed", done.reason
        cluster.await_task(vm)
    return cluster.guest(vm)


def _round(cluster: Cluster, loss: Loss, victim: str, losses: Losses) -> dict[str, Any]:
    cluster.admit(victim)
    guests = {vm: bring(cluster, vm, victim) for vm in (WRITER, IDLE, PLAIN)}
    guests[WRITER].ask("log dev=sda rate=50 fresh=1", timeout=20.0)
    epochs = {vm: cluster.owner(vm).epoch for vm in guests}
    led = _leads(cluster)
    before = guests[PLAIN].stats()["uptime_s"]
    time.sleep(LOGS_S)  # there is something to lose
    logged = dict(guests[WRITER].stats()["log"])
    at = time.time()
    if loss == "power":
        losses.add(victim, at)
    _lose(cluster, loss, victim)
    elsewhere = {vm: _await_elsewhere(cluster, vm, victim) for vm in (WRITER, IDLE)}
    answers = {vm: _answers(guests[vm]) for vm in (WRITER, IDLE)}
    spans = {vm: _spans(cluster, vm, at, losses) for vm in (WRITER, IDLE)}
    plain = cluster.owner(PLAIN)
    _return(cluster, loss, victim)
    left = _left(cluster, victim)
    ran_on = guests[PLAIN].stats()["uptime_s"] if loss == "management" else 0.0
    told = _disk(cluster, logged)
    found: dict[str, Any] = {
        "victim": victim,
        "held": sorted(what for what, host in led.items() if host == victim),
        "elsewhere": elsewhere,
        "answers_after_s": {vm: s if s is None else round(s - at, 2) for vm, s in answers.items()},
        "booting_s": {
            vm: first_elsewhere(spans[vm], at, victim, epochs[vm]) for vm in (WRITER, IDLE)
        },
        "twice": {vm: [str(pair) for pair in overlaps(seen)] for vm, seen in spans.items()},
        "epochs": {vm: (epochs[vm], cluster.owner(vm).epoch) for vm in epochs},
        "plain_stays": (plain.host, plain.epoch) == (victim, epochs[PLAIN]),
        "records": told,
        "left": left,
        "steps": [e.message for e in cluster.events(WRITER) if e.time >= at],
    }
    if loss == "management":
        found["plain_ran_on"] = ran_on > before
    return found


def _leads(cluster: Cluster) -> dict[str, str]:
    """Who leads the store and the managers, where that is a host."""
    if cluster.lab.layout.store != "etcd":
        return {}
    return {
        "store": etcd_members.agreed(cluster),
        "manager": etcd_members.leading_manager(cluster),
    }


def _lose(cluster: Cluster, loss: Loss, victim: str) -> None:
    if loss == "power":
        fault.power_off(cluster.lab, victim)
        cluster.refresh()
    else:
        fault.cut_network(cluster.lab, victim, MGMT.name)


def _return(cluster: Cluster, loss: Loss, victim: str) -> None:
    if loss == "power":
        fault.power_on(cluster.lab, victim)
        cluster.refresh()
    cluster.heal()


def _await_elsewhere(cluster: Cluster, vm: str, victim: str) -> str:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        owner = cluster.owner(vm)
        if owner.host != victim and owner.state.value == "running":
            return str(owner.host)
        time.sleep(0.1)  # read past every cut; the event stream has its own tests
    return ""


def _answers(guest: Guest) -> float | None:
    """When the guest answered; None when it did not."""
    try:
        guest.await_answer(PATIENCE_S)
    except Exception:
        return None
    return time.time()


def _disk(cluster: Cluster, logged: dict[str, Any]) -> dict[str, Any]:
    """What the closed image holds of the records that the lost guest had acknowledged."""
    cluster.client.wait(cluster.client.vms.stop(WRITER, force=True))
    (disk,) = cluster.client.vms.get(WRITER).disks
    path = formats.outside(cluster, disk)
    return {
        **asdict(formats.read_log(path, disk, logged)),
        "check": formats.image_check(path, disk),
    }


def _spans(cluster: Cluster, vm: str, since: float, losses: Losses) -> tuple[Span, ...]:
    """When the VM's vCPUs ran: what its guard held frozen did not, nor what had no power."""
    seen = [losses.cut(span) for span in evidence.spans(cluster, vm, since=since - 1.0)]
    return tuple(one for one in seen if one.end >= since - 1.0)


def first_elsewhere(spans: tuple[Span, ...], at: float, victim: str, epoch: int) -> float | None:
    """Seconds from the loss until vCPUs of a later epoch ran elsewhere."""
    later = [span.start for span in spans if span.host != victim and span.epoch > epoch]
    return round(min(later) - at, 2) if later else None


def _left(cluster: Cluster, victim: str) -> list[str]:
    """QEMUs of the taken VMs that the old host still has."""
    until = time.monotonic() + 10.0
    while True:
        found = [
            f"{vm}: pid {copy.pid}"
            for vm in (WRITER, IDLE)
            for copy in evidence.copies(cluster, vm)
            if copy.host == victim
        ]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def _judge(section: Section, loss: Loss, rounds: list[dict[str, Any]]) -> None:
    booting = [s for one in rounds for s in one["booting_s"].values()]
    section.judge(
        f"{loss} of a host lost: its highly available VMs are booting elsewhere within "
        f"{BOOTING_S:g} s, each time",
        all(s is not None and s <= BOOTING_S for s in booting),
        booting,
    )
    section.judge(
        f"{loss}: their guests answer again",
        all(s is not None for one in rounds for s in one["answers_after_s"].values()),
        [one["answers_after_s"] for one in rounds],
    )
    section.judge(
        f"{loss}: no VM ever ran twice",
        not any(pairs for one in rounds for pairs in one["twice"].values()),
        [one["twice"] for one in rounds],
    )
    section.judge(
        f"{loss}: epochs rise for what was taken, and for nothing else",
        all(
            (after > before) == (vm != PLAIN)
            for one in rounds
            for vm, (before, after) in one["epochs"].items()
        )
        and all(one["plain_stays"] for one in rounds),
        [one["epochs"] for one in rounds],
    )
    section.judge(
        f"{loss}: every acknowledged record is on the disk",
        all(
            one["records"]["acknowledged"] > 0
            and not one["records"]["lost"]
            and not one["records"]["torn"]
            and one["records"]["check"] in ("clean", "none")
            for one in rounds
        ),
        [one["records"] for one in rounds],
    )
    section.judge(
        f"{loss}: nothing of them is left on the host that comes back",
        not any(one["left"] for one in rounds),
        [one["left"] for one in rounds],
    )
    if loss == "management":
        section.judge(
            "management: a VM that is not highly available ran on all the time",
            all(one["plain_ran_on"] for one in rounds),
            [one["plain_ran_on"] for one in rounds],
        )
