"""A host is lost for which nothing but its storage server can answer: no watchdog, a dead BMC.

``power``: everything on it ends at once. ``isolated``: its management and VM networks are cut while
its guard and its agent hang, so that nobody freezes its VMs: its QEMU goes on and writes, as far as
the storage server lets it. What the lost host still wrote is read from outside, from the moment at
which the server confirmed that it is cut off: the images are raw, and the guests that start
elsewhere write nothing by themselves.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from godwit.host.process import cpu_seconds
from godwit.iofence.cuts import FILE
from godwit.lab import fault, serving
from godwit.lab.layout import LAN, MGMT, STORAGE
from godwit.model import keys
from godwit.model.errors import Refused
from godwit.model.event import Event
from godwit.model.vm import Disk

from . import evidence, formats
from .cluster import MIB, Cluster
from .failover import RESTARTS, bring, first_elsewhere
from .guest import Guest
from .report import Say, Section, tell

Loss = Literal["power", "isolated"]
WRITER, PLAIN = "ha-writer", "plain"
BOOTING_S = 20.0
PATIENCE_S = 60.0
WATCH_S = 3.0
LOGS_S = 1.0
MEMORY_MIB = 128


def run(
    cluster: Cluster, *, losses: tuple[Loss, ...], plain: bool = True, say: Say = tell
) -> Section:
    """Lose a host once for each of ``losses``. ``plain``: beside a VM without HA and disks.

    The lab has no watchdogs. After the last loss the host is not waited for when ``plain`` is left
    out: whoever is short of time takes the lab down then.
    """
    section = Section(f"failover {cluster.lab.layout.storage}")
    _make(cluster)
    if plain:
        _define(cluster, PLAIN)
    found = []
    for number, loss in enumerate(losses):
        victim = cluster.hosts[number % len(cluster.hosts)]
        found.append(_round(cluster, loss, victim, plain=plain))
        say(f"{loss}: {victim} lost, {number + 1}/{len(losses)}: {found[-1]['booting_s']}")
    section.figures = {"rounds": found}
    _judge(section, found, plain=plain)
    for name in (WRITER, PLAIN) if plain else ():
        cluster.remove(name)
    return section


def _define(cluster: Cluster, vm: str, disks: tuple[str, ...] = ()) -> None:
    words = f"godwit.ip={cluster.address(vm)}/22 godwit.host={vm}"
    made = cluster.client.vms.create(
        vm, memory_bytes=MEMORY_MIB * MIB, image="demo", append=words, networks=["lan"],
        disks=list(disks), restarts=RESTARTS,
    )  # fmt: skip
    cluster.client.wait(made)


def _make(cluster: Cluster) -> None:
    """Its only disk is served; that it may be highly available says that the rung is there."""
    if cluster.lab.layout.storage == "iscsi":
        _define(cluster, WRITER)
        cluster.client.wait(cluster.client.vms.add_disk(WRITER, volume=serving.LUNS, lun=1))
    else:
        _define(cluster, WRITER, ("shared:64M:raw",))
    until = time.monotonic() + PATIENCE_S
    while True:  # managers ask the daemon every few seconds
        try:
            cluster.client.wait(cluster.client.vms.set(WRITER, ha=True))
            return
        except Refused:
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


def _round(cluster: Cluster, loss: Loss, victim: str, *, plain: bool) -> dict[str, Any]:
    cluster.admit(victim)
    writer = bring(cluster, WRITER, victim)
    if plain:
        bring(cluster, PLAIN, victim)
    (disk,) = cluster.client.vms.get(WRITER).disks
    epoch = cluster.owner(WRITER).epoch
    writer.ask("log dev=sda rate=50 fresh=1", timeout=20.0)
    time.sleep(LOGS_S)  # there is something to lose
    logged = dict(writer.stats()["log"])
    at = time.time()
    _lose(cluster, loss, victim)
    fenced = _await_fenced(cluster, victim, at)
    cut = _cuts(cluster)
    first, began = _digest(cluster, disk), _computed(cluster, victim)
    to = _await_elsewhere(cluster, victim)
    time.sleep(WATCH_S)
    last, ended = _digest(cluster, disk), _computed(cluster, victim)
    answers = _answers(writer)
    # The images were read meanwhile, so that the moment comes from the guest's own trace.
    spans = evidence.spans(cluster, WRITER, since=at)
    found: dict[str, Any] = {
        "loss": loss,
        "victim": victim,
        "fenced": fenced,
        "cut": cut,
        "unchanged": first == last,
        "to": to,
        "booting_s": first_elsewhere(spans, at, victim, epoch),
        "answers": answers,
        "epochs": (epoch, cluster.owner(WRITER).epoch),
        "old_qemu": None if began is None or ended is None else round(ended - began, 2),
        "records": asdict(formats.read_log(formats.outside(cluster, disk), disk, logged)),
    }
    if plain:
        owner = cluster.owner(PLAIN)
        found["plain_stays"] = owner.host == victim
        _return(cluster, loss, victim)
        found["cuts_left"] = _await_no_cut(cluster)
        found["left"] = [copy for copy in evidence.copies(cluster, WRITER) if copy.host == victim]
    return found


def _lose(cluster: Cluster, loss: Loss, victim: str) -> None:
    fault.kill_process(cluster.lab, victim, "bmc")
    if loss == "power":
        cluster.power_off(victim)
        return
    # Before the network: a guard that hangs keeps no deadline, an agent that hangs does not help.
    for daemon in ("guard", "agent"):
        fault.freeze_process(cluster.lab, victim, daemon, hold=True)
    for net in (MGMT, LAN):
        fault.cut_network(cluster.lab, victim, net.name)


def _return(cluster: Cluster, loss: Loss, victim: str) -> None:
    fault.restart_daemon(cluster.lab, victim, "bmc")
    if loss == "power":
        cluster.power_on(victim)
    else:
        for daemon in ("agent", "guard"):
            fault.thaw_process(cluster.lab, victim, daemon)
    cluster.heal()


def _await_fenced(cluster: Cluster, victim: str, since: float) -> str:
    """What is said when the storage server has confirmed it; empty when it never did."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        seen = cluster.store(lambda records: records.list(keys.EVENTS, Event))
        for record in seen.values():
            event = record.value
            mine = event.kind == "host.fenced" and event.subject == f"host/{victim}"
            if mine and event.time >= since:
                return event.message
        time.sleep(0.05)  # read past every cut; the event stream has its own tests
    return ""


def _await_elsewhere(cluster: Cluster, victim: str) -> str:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        owner = cluster.owner(WRITER)
        if owner.host != victim and owner.state.value == "running":
            return str(owner.host)
        time.sleep(0.05)
    return ""


def _answers(guest: Guest) -> bool:
    with suppress(Exception):
        guest.await_answer(PATIENCE_S)
        return True
    return False


def _digest(cluster: Cluster, disk: Disk) -> str:
    """All that the server has of the disk, at this moment."""
    with formats.outside(cluster, disk).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _computed(cluster: Cluster, victim: str) -> float | None:
    """Processor time of the old QEMU so far, in seconds; None when there is none."""
    for copy in evidence.copies(cluster, WRITER):
        if copy.host == victim:
            with suppress(OSError):
                return cpu_seconds(copy.pid)
    return None


def _cuts(cluster: Cluster) -> list[str]:
    """Whom the storage server's daemon keeps out, as its own file says."""
    path = Path(cluster.lab.layout.node_dir(STORAGE)) / "state" / "iofence" / FILE
    if not path.exists():
        return []
    return sorted({cut["host"] for cut in json.loads(path.read_text())["cuts"]})


def _await_no_cut(cluster: Cluster) -> list[str]:
    until = time.monotonic() + PATIENCE_S
    while (left := _cuts(cluster)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def _judge(section: Section, rounds: list[dict[str, Any]], *, plain: bool) -> None:
    what = section.name.partition(" ")[2]
    section.judge(
        f"{what}: with no watchdog and a dead BMC its storage server confirms that a lost host "
        "is cut off, and the VM starts elsewhere",
        all(one["fenced"] and one["cut"] == [one["victim"]] and one["to"] for one in rounds),
        [(one["fenced"], one["cut"], one["to"]) for one in rounds],
    )
    section.judge(
        f"{what}: it is booting there within {BOOTING_S:g} s, each time",
        all(one["booting_s"] is not None and one["booting_s"] <= BOOTING_S for one in rounds),
        [one["booting_s"] for one in rounds],
        timing=True,
    )
    section.judge(
        f"{what}: nothing reaches the disk after the confirmation",
        all(one["unchanged"] for one in rounds),
        [one["unchanged"] for one in rounds],
    )
    section.judge(
        f"{what}: an isolated host's QEMU was still there then",
        all(one["old_qemu"] is not None for one in rounds if one["loss"] == "isolated"),
        [one["old_qemu"] for one in rounds],
    )
    section.judge(
        f"{what}: every acknowledged record is on the disk, the guest answers, the epoch rose",
        all(
            one["records"]["acknowledged"] > 0
            and not one["records"]["lost"]
            and not one["records"]["torn"]
            and one["answers"]
            and one["epochs"][0] < one["epochs"][1]
            for one in rounds
        ),
        [(one["records"], one["answers"], one["epochs"]) for one in rounds],
    )
    if plain:
        section.judge(
            f"{what}: a VM without HA stays; the host that is back is let in, and has none left",
            all(one["plain_stays"] and not one["cuts_left"] and not one["left"] for one in rounds),
            [(one["plain_stays"], one["cuts_left"], one["left"]) for one in rounds],
        )
