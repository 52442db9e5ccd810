"""A host's path to the volume is taken away under a guest that writes through the VM's broker.

Where the volume is served over the storage network, the host's link to it is cut. A directory is
moved out of the host's sight, as if it had been unmounted: an empty one lies at its place, and the
daemon that has the image open goes on until it is redirected. The guest's log tells the longest
time between two acknowledged records.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from godwit.host.namespaces import enter
from godwit.lab import fault, serving
from godwit.lab.layout import STOR
from godwit.model.migration import Outcome

from . import formats
from .cluster import Cluster
from .guest import Guest
from .report import Say, Section, tell

VM = "redirected"
DISK = "shared:128M:vhdx"
RECORDS_PER_S = 100
AWAY_MS, BACK_MS, FROZEN_MS = 2000.0, 50.0, 8000.0
HEALING_MS = 1000.0
SEEN, HIDDEN = "/clusterstorage/shared", "/run/godwit-hidden"
PATIENCE_S = 60.0
QUIET_S = 1.0


def run(cluster: Cluster, *, repeats: int = 1, strikes: int = 0, say: Say = tell) -> Section:
    """Path lost, redirected, moved, back; so many times. What was acknowledged is in the image.

    On a lab that serves LUNs the disk is one of them. ``strikes``: how often each daemon is killed
    and frozen.
    """
    cluster.heal()
    for row in cluster.client.vms.list():  # one with a disk that QEMU has open forbids it
        cluster.remove(row.name)
    for host in cluster.hosts:  # a path that was cut before has to hold for a while
        assert until(cluster, host, "direct"), f"{host} has no path to begin with"
    section = Section("redirect")
    guest = _make(cluster)
    try:
        guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
        with _Watch(guest) as quiet:
            time.sleep(QUIET_S)  # nothing happens: what is seen is the machine's own noise
        rounds = []
        for number in range(repeats):
            rounds.append(_round(cluster, guest))
            say(f"redirect {number + 1}/{repeats}: {rounds[-1]}")
        struck = [_struck(cluster, guest) for _ in range(strikes)]
        for one in struck:
            say(f"daemons struck: {one}")
        planned = _planned(cluster, guest)
        say(f"planned: {planned}")
        found = _read(cluster, guest)
    finally:
        for host in cluster.hosts:
            _show(cluster, host)
    section.figures = {"storage": cluster.lab.layout.storage, "rounds": rounds}
    section.figures["quiet_ms"] = quiet.longest_ms
    section.figures |= {"struck": struck, "planned": planned, **found}
    _judge(section)
    if struck:
        _judge_struck(section)
    cluster.client.wait(cluster.client.vms.delete(VM))
    return section


def _volume(cluster: Cluster) -> str:
    return serving.LUNS if cluster.lab.layout.storage == "iscsi" else "shared"


def _make(cluster: Cluster) -> Guest:
    volume = _volume(cluster)
    if volume != serving.LUNS:
        return cluster.make(VM, host="host1", disks=[DISK])
    cluster.define(VM)
    added = cluster.client.vms.add_disk(VM, volume=volume, lun=1, tier="brokered")
    cluster.client.wait(added)
    return cluster.boot(VM, host="host1")


def _round(cluster: Cluster, guest: Guest) -> dict[str, Any]:
    here = str(cluster.owner(VM).host)
    found: dict[str, Any] = {"host": here}
    with _Watch(guest) as away:
        _hide(cluster, here)
        found["redirected"] = until(cluster, here, "redirected")
    found["away_ms"], found["away_steps_ms"] = away.longest_ms, _steps(cluster)
    with _Watch(guest) as back:
        _show(cluster, here)
        found["direct"] = until(cluster, here, "direct", meanwhile=back.step)
    found["back_ms"], found["back_steps_ms"] = back.longest_ms, _steps(cluster)
    found["healing_ms"] = back.before_ms
    _hide(cluster, here)
    until(cluster, here, "redirected")
    move = cluster.move(VM, cluster.other(here))
    found["move"] = move.outcome is Outcome.COMPLETED
    found["move_reason"], found["blackout_ms"] = move.reason, move.blackout_ms
    into = cluster.cli("vm", "migrate", VM, "--to", here)
    found["into"] = {"code": into.code, "said": into.err[-300:]}
    _show(cluster, here)
    until(cluster, here, "direct")
    found["errors"] = guest.stats()["log"]["errors"]
    return found


def _struck(cluster: Cluster, guest: Guest) -> dict[str, float]:
    """The VM's own daemon and, while it goes through a peer, the peer's are killed and frozen."""
    here = str(cluster.owner(VM).host)
    waited = {
        "killed": _strike(cluster, guest, here, "broker", signal.SIGKILL),
        "frozen": _strike(cluster, guest, here, "broker", signal.SIGSTOP),
    }
    _hide(cluster, here)
    until(cluster, here, "redirected")
    for what, number in (("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
        waited[f"peer's {what}"] = _strike(cluster, guest, cluster.other(here), "lent", number)
        until(cluster, here, "redirected")
    _show(cluster, here)
    until(cluster, here, "direct")
    return waited


def _strike(cluster: Cluster, guest: Guest, host: str, what: str, number: signal.Signals) -> float:
    """How long the guest waited for its disk, in ms."""
    with _Watch(guest) as watch:
        os.kill(cluster.lab.process(host, f"{what}:{VM}").pid, number)
    return watch.longest_ms


def _steps(cluster: Cluster) -> dict[str, float]:
    """What the last change of the way took, as its event tells."""
    ways = [one for one in cluster.events(VM) if one.kind in ("vm.redirected", "vm.direct")]
    return dict(ways[-1].data.get("steps_ms", {})) if ways else {}


def _planned(cluster: Cluster, guest: Guest) -> dict[str, Any]:
    """For maintenance: away and back by request."""
    here, volume = str(cluster.owner(VM).host), _volume(cluster)
    with _Watch(guest) as away:
        done = cluster.cli("volume", "redirect", volume, "--host", here)
    state, away_steps = _state(cluster, here), _steps(cluster)
    with _Watch(guest) as back:
        undone = cluster.cli("volume", "restore", volume, "--host", here)
    return {
        "codes": (done.code, undone.code),
        "said": (done.err + done.out)[-300:] + (undone.err + undone.out)[-300:],
        "states": (state, _state(cluster, here)),
        "away_ms": away.longest_ms,
        "back_ms": back.longest_ms,
        "away_steps_ms": away_steps,
        "back_steps_ms": _steps(cluster),
    }


class _Watch:
    """The longest that the guest waited for its disk within a while, by its own clock.

    A path that is back has to hold for up to a minute before it is taken. What the guest saw
    meanwhile is not the way back: `step` sets it apart (``before_ms``), all but its last step, as
    the host may tell of the change only after the guest has seen it.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._last_ms = 0.0
        self.before_ms = 0.0
        self.longest_ms = 0.0

    def step(self) -> None:
        """Nothing has changed up to now. A wait that is under way counts whole, later."""
        self.before_ms = max(self.before_ms, self._last_ms)
        self._last_ms = self._gap_ms()
        self._guest.ask("reset", timeout=20.0)

    def _gap_ms(self) -> float:
        gap: float = self._guest.stats()["log"]["largest_gap_ms"]
        return round(gap - 1e3 / RECORDS_PER_S, 1)

    def __enter__(self) -> _Watch:
        self._await(20)
        self._guest.ask("reset", timeout=20.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._await(20)
        self.longest_ms = max(self._gap_ms(), self._last_ms)

    def _await(self, records: int) -> None:
        """So many more records."""
        wanted = self._guest.stats()["log"]["acknowledged"] + records
        until = time.monotonic() + PATIENCE_S
        while self._guest.stats()["log"]["acknowledged"] < wanted and time.monotonic() < until:
            time.sleep(0.02)  # the guest has no event for an acknowledged record


def until(
    cluster: Cluster,
    host: str,
    state: str,
    *,
    volume: str = "",
    meanwhile: Callable[[], None] = lambda: None,
) -> bool:
    """Whether the host tells of this state of a volume (of the one that is served) in time."""
    given_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < given_up:
        if _state(cluster, host, volume) == state:
            return True
        meanwhile()
        time.sleep(0.1)  # asked for as people do; the event stream has its own tests
    return False


def _state(cluster: Cluster, host: str, volume: str = "") -> str:
    return cluster.client.volumes.get(volume or _volume(cluster)).hosts[host].state.value


def _served(cluster: Cluster) -> bool:
    return cluster.lab.layout.storage != "dir"


def _hide(cluster: Cluster, host: str) -> None:
    if _served(cluster):
        fault.cut_network(cluster.lab, host, STOR.name)
        return
    _inside(cluster, host, f"mkdir -p {HIDDEN} && mount --move {SEEN} {HIDDEN}")


def _show(cluster: Cluster, host: str) -> None:
    if _served(cluster):
        fault.restore_network(cluster.lab, host, STOR.name)
        return
    _inside(cluster, host, f"! mountpoint -q {HIDDEN} || mount --move {HIDDEN} {SEEN}")


def _inside(cluster: Cluster, host: str, line: str) -> None:
    enter(cluster.lab.init(host), ["sh", "-c", line], timeout=10.0)


def _read(cluster: Cluster, guest: Guest) -> dict[str, Any]:
    """The image from outside, once the VM has stopped."""
    logged = formats.log_end(guest)
    cluster.client.wait(cluster.client.vms.stop(VM, timeout_s=30.0))
    (disk,) = cluster.client.vms.get(VM).disks
    path = formats.outside(cluster, disk)
    offline = asdict(formats.read_log(path, disk, logged))
    return {"log": logged, "offline": offline, "check": formats.image_check(path, disk)}


def _judge_struck(section: Section) -> None:
    struck = section.figures["struck"]
    for what, bound in (("killed", AWAY_MS), ("frozen", FROZEN_MS)):
        seen = [ms for one in struck for name, ms in one.items() if name.endswith(what)]
        section.judge(
            f"redirect: with a daemon {what} the guest waits at most {bound:g} ms",
            max(seen) <= bound,
            struck,
            timing=True,
        )


def _judge(section: Section) -> None:
    rounds, planned = section.figures["rounds"], section.figures["planned"]
    check = section.figures["offline"]
    section.judge(
        "redirect: a lost path is redirected, and direct again when it is back",
        all(one["redirected"] and one["direct"] for one in rounds),
        rounds,
    )
    section.judge(
        "redirect: the guest sees no error",
        not section.figures["log"]["errors"] and not any(one["errors"] for one in rounds),
        section.figures["log"],
    )
    section.judge(
        "redirect: the VM moves live while redirected", all(one["move"] for one in rounds), rounds
    )
    into = [one["into"] for one in rounds]
    section.judge(
        "redirect: a move to a host without a path is refused with the reason",
        all(one["code"] == 4 and "lost" in one["said"] for one in into),
        into,
    )
    section.judge(
        "redirect: by request there and back",
        planned["codes"] == (0, 0) and planned["states"] == ("redirected", "direct"),
        planned,
    )
    section.judge(
        "redirect: 0 lost, 0 torn acknowledged records, image check clean",
        not check["lost"]
        and not check["torn"]
        and check["acknowledged"] > 0
        and section.figures["check"] in ("clean", "none"),
        {"offline": check, "check": section.figures["check"]},
    )
    healing = [one["healing_ms"] for one in rounds]
    section.judge(
        f"redirect: while its path heals the guest waits at most {HEALING_MS:g} ms",
        max(healing) <= HEALING_MS,
        healing,
        timing=True,
    )
    for way, bound in (("away", AWAY_MS), ("back", BACK_MS)):
        seen = [one[f"{way}_ms"] for one in (*rounds, planned)]
        section.judge(
            f"redirect: the guest waits at most {bound:g} ms on the way {way}",
            max(seen) <= bound,
            {"seen_ms": seen, "quiet_ms": section.figures["quiet_ms"]},
            timing=True,
        )
