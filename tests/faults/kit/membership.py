"""A host is taken out of the cluster and joins again by token, while a VM runs on the other."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from godwit.host.errors import ProgramFailed
from godwit.lab import bmcs
from godwit.lab.agentcall import call
from godwit.lab.configs import ETC
from godwit.lab.layout import API_PORT, CONTROL_NUMBER, MGMT, MIG
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.join import parse_token
from godwit.store.records import encode

from .cells import VM
from .cluster import Cluster
from .report import Say, Section, tell
from .watching import watching

GODWIT = str(Path(sys.executable).with_name("godwit"))
KNOCK_S = 15.0
URL = f"https://{MGMT.address(CONTROL_NUMBER)}:{API_PORT}"


def run(cluster: Cluster, *, say: Say = tell) -> Section:
    """Out by command, in by token; the guest that runs meanwhile is watched throughout."""
    section = Section("membership")
    stays = str(cluster.owner(VM).host)
    goes = cluster.other(stays)
    guest = cluster.guest(VM)
    uptime = guest.stats()["uptime_s"]
    with watching(cluster.netns, guest.address) as probe:
        needed = cluster.cli("cluster", "remove", stays)
        section.judge(
            "a host on which a VM runs is not removed, and the VM is named",
            needed.code == 4 and f"{VM} runs there" in needed.err,
            needed.err.strip(),
        )
        removed_s = _out(cluster, section, goes=goes, stays=stays)
        joined_s = _in(cluster, section, goes=goes)
    _tell_its_power(cluster, goes)
    longest_ms = probe.report.blackout_ms
    say(
        f"membership: out in {removed_s:.1f} s, in in {joined_s:.1f} s, silence {longest_ms:.0f} ms"
    )
    section.figures |= {"removed_s": removed_s, "joined_s": joined_s, "silence_ms": longest_ms}
    section.judge(
        "the VM on the other host went on meanwhile",
        cluster.guest(VM).stats()["uptime_s"] > uptime,
        longest_ms,
    )
    move = cluster.move(VM, goes)
    section.judge(
        "with the new certificates the VM moves to the host that joined",
        move.state.value == "completed",
        move.reason,
    )
    return section


def _tell_its_power(cluster: Cluster, host: str) -> None:
    """What the cluster knew of its power device was forgotten with it: others count on it."""
    device = bmcs.power_config(cluster.lab.layout, host, at=time.time())
    cluster.store(lambda records: records.store.put(keys.host_power(host), encode(device)))


def _out(cluster: Cluster, section: Section, *, goes: str, stays: str) -> float:
    layout = cluster.lab.layout
    identity = layout.node_dir(goes) / "etc" / "tls"
    url = layout.agent_url(stays)

    def knock() -> str:
        """What the other agent says; one that is just being started anew is asked again."""
        until = time.monotonic() + KNOCK_S
        while True:
            try:
                call(
                    *(url, "GET", "/v1/clock"),
                    host=stays,
                    netns=layout.netns(goes),
                    identity=identity,
                )
            except GodwitError as error:
                if "Connection refused" not in error.message or time.monotonic() > until:
                    return error.message
            else:
                return ""
            time.sleep(0.2)

    before = knock()
    start = time.monotonic()
    out = cluster.cli("cluster", "remove", goes, "-o", "json")
    removed_s = time.monotonic() - start
    section.judge(
        "a host without VMs is removed",
        out.code == 0 and "out of the cluster" in out.out,
        {"out": out.out[-400:], "err": out.err},
    )
    refused = knock()
    section.judge(
        "its certificate, good before, is refused by the other agent",
        before == "" and "revoked" in refused,
        {"before": before, "after": refused},
    )
    left = cluster.dump(f"{keys.HOSTS}{goes}/")
    section.judge("nothing of it is left in the store", left == {}, sorted(left))
    logs = (layout.logs("control") / "store.log").read_text()
    section.judge(
        "the store has hung up on it, and says so",
        f"godwit://host/{goes}: its certificate was revoked" in logs,
        logs[-300:],
    )
    return removed_s


def _in(cluster: Cluster, section: Section, *, goes: str) -> float:
    layout, lab = cluster.lab.layout, cluster.lab
    etc = layout.node_dir(goes) / "etc"
    start = time.monotonic()
    token = cluster.cli("cluster", "token", "create", "--host", goes).out.strip()
    told = (etc / "host.toml").read_bytes()
    shutil.rmtree(etc / "tls")
    (etc / "host.toml").unlink()
    words = ["--url", URL, "--host", goes, "--address", layout.address(goes, MGMT)]
    words += ["--migration-address", layout.address(goes, MIG)]
    argv, stdin = [GODWIT, "cluster", "join", *words], token.encode()
    said = lab.run(goes, argv, timeout=60.0, stdin=stdin).decode()
    section.judge("it joins again by a token", "has joined the cluster" in said, said)
    (etc / "host.toml").write_bytes(told)  # which says that it belongs to a lab
    for unit in ("guard", "agent"):
        lab.tell(goes, "restart", unit=unit)
    cluster.heal()
    joined_s = time.monotonic() - start
    again = f"{ETC}/again"
    replayed = _refusal(lambda: lab.run(goes, [*argv, "--root", again], timeout=60.0, stdin=stdin))
    section.judge(
        "its token does not work twice", "the join token has been used" in replayed, replayed
    )
    shutil.rmtree(etc / "again", ignore_errors=True)
    secret = parse_token(token).secret
    logs = [*layout.logs("control").glob("*.log"), *layout.logs(goes).glob("*.log")]
    told_it = [path.name for path in logs if secret in path.read_text(errors="replace")]
    section.judge("no log has the token", told_it == [] and secret not in replayed, told_it)
    return joined_s


def _refusal(work: Any) -> str:
    try:
        work()
    except ProgramFailed as error:
        return error.stderr
    return "it was not refused"
