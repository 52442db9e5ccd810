"""The validation of a real cluster: each fault is planted on a host, found by name, and undone.

A fault is what an administrator would meet: another CPU in /proc/cpuinfo, a smaller MTU, a wrong
netmask, a limited link, a volume that is not mounted, a clock that is off, an old QEMU. Several are
planted at once where they do not touch the same check.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from godwit.host.namespaces import enter_argv
from godwit.host.shaping import shape
from godwit.lab import fault
from godwit.lab.bmcs import UNIT
from godwit.lab.layout import CONTROL, MIG
from godwit.model.errors import GodwitError

from .cluster import Cluster
from .report import Say, Section, tell

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
CPUINFO = "/proc/cpuinfo"
SLOW_BITS = 20_000_000
CLOCK_OFF_S = 5.0
SMALL_MTU = 1400
VOLUME = "other"
OWN = re.compile(r"\bvolume local\b|under the name local\b")
READY_S = 30.0
RESTART_S = 20.0
Plant = Callable[[Cluster, str], contextlib.AbstractContextManager[None]]


def run(cluster: Cluster, *, say: Say = tell) -> Section:
    """Every fault at once, on a lab of two hosts, and none of them any more afterwards."""
    section = Section("validation")
    faults = {name: one for name, one in FAULTS.items() if _can(name)}
    with contextlib.ExitStack() as planted:
        for name, (plant, _, _) in faults.items():
            planted.enter_context(plant(cluster, _host(cluster, name)))
        found = _validate(cluster, say, ", ".join(faults))
    for name in faults:
        _judge(section, name, found, _host(cluster, name))
    _judge_witness(cluster, section, found)
    section.figures["all at once"] = found
    _judge_good(section, _validate(cluster, say, "nothing any more"))
    return section


def each(cluster: Cluster, old: Path | None, say: Say = tell) -> Section:
    """Every fault alone: nothing else fails for it. ``old``: a QEMU 7.2 for one host, too."""
    section = Section("validation")
    good = _validate(cluster, say, "nothing")
    _judge_good(section, good)
    for name, (plant, _, _) in FAULTS.items():
        if not _can(name):
            section.judge(f"{name}: libfaketime is installed", False, str(FAKETIME))
            continue
        host = _host(cluster, name)
        with plant(cluster, host):
            found = _validate(cluster, say, name)
        _judge(section, name, found, host, alone=True)
        section.figures[name] = found
    if old is not None:
        _judge_old(cluster, section, old, say)
    _judge_good(section, _validate(cluster, say, "nothing any more"))
    return section


def witness(cluster: Cluster, say: Say = tell) -> Section:
    """Two hosts, and nobody else who has a vote."""
    section = Section("witness")
    _judge_witness(cluster, section, _validate(cluster, say, "no witness"))
    return section


def on_etcd(cluster: Cluster, say: Say = tell) -> Section:
    """Two hosts and a witness: it is good, and the witness is missed when it is away."""
    section = Section("etcd")
    good = _validate(cluster, say, "nothing, on etcd")
    section.judge(
        "two hosts with a witness on etcd: nothing fails, witness and fencing pass",
        good["failed"] == [] and not {"witness", "fencing"} & {c["name"] for c in good["warned"]},
        good,
    )
    fault.kill_process(cluster.lab, CONTROL, "etcd", hold=True)
    _await_leader(cluster)
    found = _validate(cluster, say, "the witness is away")
    fault.thaw_process(cluster.lab, CONTROL, "etcd")
    rows = [row for row in found["failed"] if row["name"] == "store"]
    section.judge("a store member that is away: store fails and says so", bool(rows), rows)
    section.figures |= {"good": good, "away": found}
    return section


def _await_leader(cluster: Cluster) -> None:
    """Until the members that are left have a leader: the lost one may have been it."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        members = cluster.client.cluster.status().store.members
        states = {one.state for one in members}
        if {"leader", "silent"} <= states:
            return
        time.sleep(0.2)  # a store without a leader has no events
    raise AssertionError(f"no leader: {members}")


def _can(name: str) -> bool:
    return FAULTS[name][0] is not clock or FAKETIME.exists()


def _host(cluster: Cluster, name: str) -> str:
    """Where a fault is planted: one /proc/cpuinfo can be wrong in one way at a time."""
    return cluster.hosts[0 if FAULTS[name][0] is feature else -1]


def _judge_good(section: Section, found: dict[str, Any]) -> None:
    section.judge(
        "a good cluster: nothing fails, and the exit code says so",
        found["exits"] and found["failed"] == [],
        found,
    )
    section.judge(
        "the report is a page, too, that holds every check",
        found["page"] > 4000 and found["missing"] == [],
        {"bytes": found["page"], "missing": found["missing"]},
    )


def live(cluster: Cluster, say: Say = tell) -> Section:
    """A canary's whole life, by the command line."""
    section = Section("live validation")
    said = cluster.cli("cluster", "validate", "--live", "-o", "json", timeout=180.0)
    report = json.loads(said.out)
    canary = report["canary"]
    say(f"live validation: exit {said.code}, {said.wall_s:.1f} s: {canary}")
    section.figures["canary"] = canary
    section.judge(
        "--live: a small VM is made, started, moved live and removed",
        not canary["failure"] and bool(canary["migration"]) and len(canary["steps"]) in (3, 4),
        {"exit": said.code, "canary": canary},
    )
    # On a machine that is busy an agent may be restarted in the middle: nobody measured it then.
    blackout = canary["blackout_ms"]
    section.judge("its blackout is measured", (blackout or 0) > 0, blackout, timing=True)
    left = [row["name"] for row in cluster.client.rows("vms") if row["name"] == canary["vm"]]
    section.judge("nothing of the canary is left", left == [], left)
    return section


def failover(cluster: Cluster, say: Say = tell) -> Section:
    """The canary's host loses its power, by the command line; nothing else runs in the lab."""
    section, host = Section("live failover"), cluster.hosts[-1]
    refused = cluster.cli("cluster", "validate", "--failover", host)
    section.judge(
        "a failover without --live is refused, with what to do",
        refused.code == 2 and "--live" in refused.err,
        {"exit": refused.code, "said": refused.err},
    )
    words = ("cluster", "validate", "--live", "--failover", host, "-o", "json")
    said = cluster.cli(*words, timeout=300.0)
    canary = json.loads(said.out)["canary"]
    say(f"live failover: exit {said.code}, {said.wall_s:.1f} s: {canary}")
    section.figures["canary"] = canary
    section.judge(
        "--failover: the host's power is cut, the cluster notices, the VM starts elsewhere",
        not canary["failure"] and bool(canary["detection_s"]) and bool(canary["restart_s"]),
        {"exit": said.code, "canary": canary},
    )
    section.judge(
        f"in at most {RESTART_S:g} s",
        (canary["restart_s"] or RESTART_S + 1) <= RESTART_S,
        {name: canary[name] for name in ("detection_s", "restart_s")},
        timing=True,
    )
    cluster.refresh()
    state = cluster.client.hosts.get(host).state.value
    section.judge("the host has its power back and is up", state == "up", state)
    left = [row["name"] for row in cluster.client.rows("vms") if row["name"] == canary["vm"]]
    section.judge("nothing of the canary is left", left == [], left)
    return section


def _validate(cluster: Cluster, say: Say, planted: str) -> dict[str, Any]:
    page = cluster.home / "report.html"
    said = cluster.cli("cluster", "validate", "-o", "json", "--html", str(page), timeout=180.0)
    try:
        checks = json.loads(said.out)["checks"]
    except ValueError:
        raise AssertionError(f"no report: exit {said.code}: {said.err}") from None
    html = page.read_text()
    exits = said.code == (4 if any(check["result"] == "fail" for check in checks) else 0)
    # A lab may have a directory of which each host has its own, and which nobody has defined yet.
    checks = [check for check in checks if not OWN.search(check["message"])]
    wrong = [check for check in checks if check["result"] != "pass"]
    say(f"planted {planted}: exit {said.code} in {said.wall_s:.1f} s; not passed: "
        + ", ".join(sorted({f"{c['name']} ({c['result']})" for c in wrong})))  # fmt: skip
    return {
        "code": said.code,
        "exits": exits,
        "seconds": round(said.wall_s, 1),
        "failed": [check for check in checks if check["result"] == "fail"],
        "warned": [check for check in checks if check["result"] == "warn"],
        "page": len(html),
        "missing": [check["name"] for check in checks if check["name"] not in html],
    }


def _judge(
    section: Section, name: str, found: dict[str, Any], host: str, *, alone: bool = False
) -> None:
    _, checks, result = FAULTS[name]
    rows = [row for row in found[f"{result}ed"] if row["name"] in re.split(r"[|&]", checks)]
    named = all(
        any(host in row["hosts"] for row in rows if row["name"] in wanted.split("|"))
        for wanted in checks.split("&")
    )
    fixed = all(row["hint"] for row in rows)
    more = {row["name"] for row in found["failed"]} - {*re.split(r"[|&]", checks)}
    section.judge(
        f"{name}: {checks} {result}s, names {host}, says what to do"
        + ("; nothing else fails" if alone else ""),
        bool(rows) and named and fixed and found["exits"] and not (alone and more),
        {"rows": rows, "exit": found["code"], "more": sorted(more)},
    )


def _judge_witness(cluster: Cluster, section: Section, found: dict[str, Any]) -> None:
    rows = [row for row in found["warned"] if row["name"] == "witness"]
    section.judge(
        "two hosts without a witness: said so",
        len(cluster.hosts) == 2 and bool(rows) and "no witness" in rows[0]["message"],
        rows,
    )


def _judge_old(cluster: Cluster, section: Section, old: Path, say: Say) -> None:
    host = cluster.hosts[-1]
    with old_qemu_on(cluster, host, old):
        found = _validate(cluster, say, "an old QEMU")
    rows = [row for row in found["failed"] if row["name"] == "qemu-live"]
    section.figures["old QEMU"] = found
    section.judge(
        f"QEMU 7.2 under emulation on {host}: qemu-live fails, names it, says why",
        bool(rows) and rows[0]["hosts"] == [host] and "7.2" in rows[0]["message"],
        rows,
    )


# Faults


@contextmanager
def cpuinfo(cluster: Cluster, host: str, change: Callable[[str], str]) -> Iterator[None]:
    """Another /proc/cpuinfo on one host, in its own mount namespace."""
    lab = cluster.lab
    text = change(Path(CPUINFO).read_text())
    lab.run(host, ["tee", "/tmp/cpuinfo"], stdin=text.encode())
    lab.run(host, ["mount", "--bind", "/tmp/cpuinfo", CPUINFO])
    try:
        yield
    finally:
        lab.run(host, ["umount", CPUINFO])


def vendor(cluster: Cluster, host: str) -> contextlib.AbstractContextManager[None]:
    """A CPU of another manufacturer."""
    return cpuinfo(cluster, host, lambda text: _each(text, "vendor_id", lambda _: "HygonGenuine"))


def feature(cluster: Cluster, host: str) -> contextlib.AbstractContextManager[None]:
    """A CPU that lacks a feature which the others have."""

    def without(flags: str) -> str:
        return " ".join(flag for flag in flags.split() if flag != "sse4_2")

    return cpuinfo(cluster, host, lambda text: _each(text, "flags", without))


def _each(text: str, key: str, change: Callable[[str], str]) -> str:
    lines = []
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            line = f"{name}: {change(value.strip())}"
        lines.append(line)
    return "\n".join(lines) + "\n"


@contextmanager
def mtu(cluster: Cluster, host: str) -> Iterator[None]:
    """A smaller MTU on the migration network."""
    cluster.lab.run(host, ["ip", "link", "set", "dev", MIG.port, "mtu", str(SMALL_MTU)])
    try:
        yield
    finally:
        cluster.lab.run(host, ["ip", "link", "set", "dev", MIG.port, "mtu", "1500"])


@contextmanager
def subnet(cluster: Cluster, host: str) -> Iterator[None]:
    """The right address with the wrong netmask."""
    address = cluster.lab.layout.address(host, MIG)
    prefix = MIG.subnet.partition("/")[2]
    _readdress(cluster, host, f"{address}/{prefix}", f"{address}/{int(prefix) + 3}")
    try:
        yield
    finally:
        _readdress(cluster, host, f"{address}/{int(prefix) + 3}", f"{address}/{prefix}")


def _readdress(cluster: Cluster, host: str, old: str, new: str) -> None:
    for words in (("del", old), ("add", new)):
        cluster.lab.run(host, ["ip", "address", *words, "dev", MIG.port])


@contextmanager
def slow(cluster: Cluster, host: str) -> Iterator[None]:
    """A migration link that came up far slower than it can."""
    layout = cluster.lab.layout
    netns = layout.netns(host)
    shape(MIG.port, SLOW_BITS, netns=netns)
    try:
        yield
    finally:
        shape(MIG.port, 1_000_000_000, netns=netns)


@contextmanager
def unmounted(cluster: Cluster, host: str) -> Iterator[None]:
    """A volume that is not mounted on one host: its directory is there, and empty."""
    where = f"/clusterstorage/{VOLUME}"
    cluster.lab.run(host, ["mount", "-t", "tmpfs", "none", where])
    try:
        yield
    finally:
        cluster.lab.run(host, ["umount", where])


@contextmanager
def bmc(cluster: Cluster, host: str) -> Iterator[None]:
    """A host's power device that nobody reaches."""
    fault.kill_process(cluster.lab, host, UNIT)
    try:
        yield
    finally:
        fault.restart_daemon(cluster.lab, host, UNIT)


@contextmanager
def clock(cluster: Cluster, host: str) -> Iterator[None]:
    """The host's agent sees a clock that is off: libfaketime in place of its own."""
    lab = cluster.lab
    units = json.loads((lab.layout.node_dir(host) / "etc" / "units.json").read_text())["units"]
    argv = next(unit["argv"] for unit in units if unit["name"] == "agent")
    fault.kill_process(lab, host, "agent", hold=True)
    faked = [
        *("setpriv", "--pdeathsig", "TERM", "env", f"LD_PRELOAD={FAKETIME}"),
        *(f"FAKETIME=+{CLOCK_OFF_S:g}s", "DONT_FAKE_MONOTONIC=1", *argv),
    ]
    log = (cluster.home / "faked-agent.log").open("wb")
    daemon = subprocess.Popen(
        enter_argv(lab.init(host).pid, faked), stdout=log, stderr=log, start_new_session=True
    )
    try:
        _await_agent(cluster, host)
        yield
    finally:
        daemon.terminate()
        daemon.wait(10.0)
        log.close()
        fault.thaw_process(lab, host, "agent")
        lab.tell(host, "wait-ready", timeout=READY_S)
        _await_agent(cluster, host)


def _await_agent(cluster: Cluster, host: str) -> None:
    until = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(GodwitError, OSError):
            cluster.lab.agent(host, "GET", "/v1/clock", deadline_s=1.0)
            if cluster.client.hosts.get(host).state.value == "up":
                return
        assert time.monotonic() < until, f"the agent of {host} did not come up"
        time.sleep(0.05)


@contextmanager
def old_qemu_on(cluster: Cluster, host: str, program: Path) -> Iterator[None]:
    """One host's configuration names an old QEMU, which lies in its state directory."""
    lab = cluster.lab
    folder = lab.layout.node_dir(host)
    copy, config = folder / "state" / "qemu-7.2", folder / "etc" / "host.toml"
    root = program.parents[2]
    shutil.copytree(root, copy, symlinks=True)
    kept = config.read_text()
    inside = Path("/var/lib/godwit/qemu-7.2") / program.relative_to(root)
    config.write_text(f'{kept}\n[qemu]\nbinary = "{inside}"\n')
    try:
        fault.restart_daemon(lab, host, "agent")
        _await_agent(cluster, host)
        yield
    finally:
        config.write_text(kept)
        fault.restart_daemon(lab, host, "agent")
        _await_agent(cluster, host)
        shutil.rmtree(copy)


# name -> (how it is planted, the checks that find it, how they come out)
FAULTS: dict[str, tuple[Plant, str, str]] = {
    # First planted, last undone: the agent that comes back afterwards finds all as it was.
    "a clock that is off": (clock, "clock", "fail"),
    "another CPU vendor": (vendor, "cpu-vendor", "fail"),
    "a missing CPU feature": (feature, "cpu-features", "warn"),
    "a smaller MTU": (mtu, "mtu&full-packets", "fail"),
    "a wrong subnet": (subnet, "subnet", "fail"),
    "a BMC that is out of reach": (bmc, "fencing", "fail"),
    "a slow migration network": (slow, "bandwidth", "fail"),
    "a volume that is not mounted": (unmounted, "volumes|written-and-read", "fail"),
}
