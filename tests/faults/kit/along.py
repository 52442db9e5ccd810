"""A VM whose disk only one host has: it moves with its disk, there and back, and is called off."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.host.run import run as run_program
from godwit.lab import fault

from .cluster import Cluster
from .diskmoves import FILL_FROM
from .formats import image_check, log_end, read_log
from .guest import Guest
from .report import Say, Section, tell

VM = "homely"
VOLUME = "local"
FAULTS = (
    "cancelled",
    "link cut",
    "destination killed",
    "destination's agent killed",
    "source's agent killed",
)
CRASHES = (
    ("pre-switchover", "source", "destination", "qemu"),
    ("committing", "source", "destination", "qemu"),
    ("committing", "source", "source", "agent"),
    ("completed", "source", "destination", "qemu"),
    ("completed", "source", "source", "agent"),
    ("swapped", "source", "source", "agent"),
    ("started", "destination", "destination", "agent"),
    ("running", "source", "source", "agent"),
)
"""Hold point, whose, which host, what is killed there."""
GONE_S = 15.0


def run(
    cluster: Cluster,
    *,
    size_mib: int = 2048,
    rate: int = 200,
    faults: tuple[str, ...] = FAULTS,
    crashes: tuple[tuple[str, str, str, str], ...] = CRASHES,
    say: Say = tell,
) -> Section:
    """There and back under a writer, then each fault while the disk is copied."""
    cluster.heal()
    section = Section("shared-nothing")
    made = cluster.cli("volume", "create", VOLUME, "--kind", "local")
    section.judge("a volume is defined of which each host has its own", made.code == 0, made.err)
    guest = _begin(cluster, size_mib, rate)
    section.figures["plan"] = _plan(cluster)
    section.figures["moves"] = [_move(cluster, guest, say) for _ in range(2)]
    section.figures["faults"] = {what: _break(cluster, guest, what, say) for what in faults}
    section.figures["crashes"] = [_crash(cluster, guest, *one, say) for one in crashes]
    section.figures["after"] = _move(cluster, guest, say)
    logged = log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    elsewhere = cluster.cli("vm", "start", VM, "--host", cluster.other(_home(cluster)))
    section.judge("it does not start where its disk is not", elsewhere.code == 4, elsewhere.err)
    (disk,) = cluster.client.vms.get(VM).disks
    path = _image(cluster, _home(cluster))
    section.figures |= {
        "log": logged,
        "offline": asdict(read_log(path, disk, logged)),
        "check": image_check(path, disk),
    }
    cluster.client.wait(cluster.client.vms.delete(VM))
    section.figures["left"] = _files(cluster)
    said = cluster.cli("volume", "delete", VOLUME)
    section.judge("the volume is forgotten again", said.code == 0, said.err)
    _judge(section)
    return section


def _begin(cluster: Cluster, size_mib: int, rate: int) -> Guest:
    words = f"godwit.ip={cluster.address(VM)}/22 godwit.host={VM}"
    cluster.client.wait(
        cluster.client.vms.create(
            VM,
            memory_bytes=256 << 20,
            image="demo",
            append=words,
            networks=["lan"],
            disks=[f"{VOLUME}:{size_mib}M:qcow2"],
            host="host1",
        )
    )
    step = 64
    fill = [
        word
        for at in range(size_mib // FILL_FROM, size_mib, step)
        for word in ("-c", f"write -q -P {1 + at // step % 255} {at}M {min(step, size_mib - at)}M")
    ]
    run_program(["qemu-io", "-f", "qcow2", *fill, str(_image(cluster, "host1"))], timeout=300.0)
    guest = cluster.boot(VM, host="host1")
    guest.ask(f"log dev=sda rate={rate} fresh=1", timeout=20.0)
    return guest


def _plan(cluster: Cluster) -> dict[str, Any]:
    said = cluster.cli("vm", "migrate", VM, "--to", cluster.other(_home(cluster)), "--dry-run")
    return {"code": said.code, "said": said.out}


def _move(cluster: Cluster, guest: Guest, say: Say) -> dict[str, Any]:
    guest.ask("reset", timeout=5.0)
    before, source = guest.stats()["log"], _home(cluster)
    move = cluster.move(VM, cluster.other(source), method="live", timeout=400.0)
    after = guest.stats()["log"]
    found = {
        "outcome": move.state.value,
        "reason": move.reason,
        "total_ms": move.total_ms,
        "blackout_ms": move.blackout_ms,
        "written_on": after["acknowledged"] - before["acknowledged"],
        "errors": after["errors"] - before["errors"],
        "guest_gap_ms": after["largest_gap_ms"],
        "source_gone": _await(lambda: not _image(cluster, source).exists()),
        "files": _files(cluster),
        "goes_on": _goes_on(guest),
    }
    say(f"moved with its disk: {found['outcome']}, {move.total_ms} ms, dark {move.blackout_ms} ms")
    return found


def _break(cluster: Cluster, guest: Guest, what: str, say: Say) -> dict[str, Any]:
    """While the disk is copied, over a network that is slow enough to hit it."""
    source = _home(cluster)
    other = cluster.other(source)
    before = guest.stats()["log"]
    identifier = cluster.begin(VM, other, method="live")
    _await(lambda: _copying(cluster, identifier))
    if what == "cancelled":
        cluster.cli("migration", "cancel", identifier)
    elif what == "link cut":
        fault.cut_network(cluster.lab, other, "mig")
    elif what == "destination killed":
        os.kill(cluster.lab.process(other, f"qemu:{VM}").pid, signal.SIGKILL)
    else:
        where = source if what.startswith("source") else other
        os.kill(cluster.lab.process(where, "agent").pid, signal.SIGKILL)
    move = cluster.await_end(identifier, timeout=60.0)
    assert move is not None
    cluster.heal()
    after = guest.stats()["log"]
    found = {
        "outcome": move.state.value,
        "reason": move.reason,
        "percent": move.progress.percent,
        "home": _home(cluster) == source,
        "there_gone": _await(lambda: not _image(cluster, other).exists()),
        "here": _image(cluster, source).exists(),
        "errors": after["errors"] - before["errors"],
        "goes_on": _goes_on(guest),
    }
    say(f"{what}: {found['outcome']} ({found['reason']})")
    return found


def _crash(
    cluster: Cluster, guest: Guest, point: str, role: str, where: str, what: str, say: Say
) -> dict[str, Any]:
    """Something dies at a hold point of the hand-over; whoever owns the VM has the one image."""
    source = _home(cluster)
    hosts = {"source": source, "destination": cluster.other(source)}
    before = guest.stats()["log"]
    cluster.hold(hosts[role], point, role)
    identifier = cluster.begin(VM, hosts["destination"], method="live")
    cluster.await_held(hosts[role], point, role, timeout=60.0)
    process = f"qemu:{VM}" if what == "qemu" else what
    os.kill(cluster.lab.process(hosts[where], process).pid, signal.SIGKILL)
    for host in hosts.values():
        cluster.release(host)
    cluster.heal()
    _await(lambda: cluster.owner(VM).migration is None, timeout=60.0)
    move = cluster.await_end(identifier, timeout=60.0)
    goes_on = _goes_on(guest)
    home = _home(cluster)
    one = [f"{home}/volumes/{VOLUME}/{VM}/disk0.qcow2"]
    after = guest.stats()["log"]
    found = {
        "at": f"{point} ({role}): {where}'s {what} killed",
        "outcome": move.state.value if move else None,
        "reason": move.reason if move else "",
        "home": home,
        "one_image": _await(lambda: _files(cluster) == one),
        "files": _files(cluster),
        "goes_on": goes_on,
        "errors": after["errors"] - before["errors"],
    }
    say(f"{found['at']}: {found['outcome']}, at {home} ({found['reason']})")
    return found


def _copying(cluster: Cluster, identifier: str) -> bool:
    move = cluster.migration(identifier)
    assert move is not None
    assert not move.state.final, f"too quick, or it failed: {move.reason}"
    return move.progress.percent > 0


def _await(true: Any, *, timeout: float = GONE_S) -> bool:
    """Whether it becomes true in time; a file that goes and a record that changes tell nobody
    on this side of the lab."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.05)
    return False


def _goes_on(guest: Guest) -> bool:
    before = guest.stats()["log"]["acknowledged"]
    return _await(lambda: guest.stats()["log"]["acknowledged"] > before + 20)


def _home(cluster: Cluster) -> str:
    return str(cluster.owner(VM).host)


def _image(cluster: Cluster, host: str) -> Path:
    """The disk's image as that host has it, or would."""
    folder = cluster.lab.layout.node_dir(host) / "volumes" / VOLUME / VM
    return folder / "disk0.qcow2"


def _files(cluster: Cluster) -> list[str]:
    root = cluster.lab.layout.state / "nodes"
    return sorted(str(path.relative_to(root)) for path in root.glob(f"*/volumes/{VOLUME}/{VM}/*"))


def _judge(section: Section) -> None:
    figures = section.figures
    plan = figures["plan"]
    section.judge(
        "the plan says that the disk goes along",
        plan["code"] == 0 and "goes along" in plan["said"],
        plan,
    )
    for number, one in enumerate([*figures["moves"], figures["after"]], start=1):
        good = one["outcome"] == "completed" and one["source_gone"] and len(one["files"]) == 1
        section.judge(f"move {number}: the VM is there with its disk, nothing left", good, one)
        section.judge(
            f"move {number}: the guest writes on and sees no error",
            one["goes_on"] and one["written_on"] > 0 and not one["errors"],
            one,
        )
    for what, one in figures["faults"].items():
        wanted = "cancelled" if what == "cancelled" else "failed"
        as_it_was = one["home"] and one["here"] and one["there_gone"]
        section.judge(
            f"{what} while the disk is copied: all is as it was",
            as_it_was and one["outcome"] == wanted,
            one,
        )
        section.judge(f"{what}: the guest writes on", one["goes_on"] and not one["errors"], one)
    for one in figures["crashes"]:
        good = one["one_image"] and one["goes_on"] and not one["errors"]
        section.judge(f"{one['at']}: it runs, with one image, at its owner", good, one)
    check = figures["offline"]
    good = not check["lost"] and not check["torn"] and check["acknowledged"] > 0
    section.judge("0 lost, 0 torn acknowledged records", good, check)
    section.judge("image check clean", figures["check"] == "clean", figures["check"])
    section.judge("nothing is left after the VM is deleted", not figures["left"], figures["left"])
