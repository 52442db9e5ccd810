"""What a person or a script does every day: traffic, scripts, an agent that is restarted."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from godwit.host import links
from godwit.lab import fault
from godwit.lab.layout import LAN, MGMT, MIG, STOR

from . import evidence
from .cells import VM
from .cluster import Cluster
from .report import Say, Section, tell
from .watching import watching

SHARE = 0.01
ADOPTION_MS = 50.0


def traffic(cluster: Cluster, *, moves: int = 4, say: Say = tell) -> Section:
    """Bytes on each network while a VM moves back and forth and nothing else happens."""
    _have_vm(cluster)
    before = _sent(cluster)
    for _ in range(moves):
        move = cluster.move(VM, cluster.other(str(cluster.owner(VM).host)))
        assert move.state.value == "completed", move.reason
    after = _sent(cluster)
    sent = {net: after[net] - before[net] for net in after}
    others = sum(sent.values()) - sent[MIG.name]
    share = others / max(1, sum(sent.values()))
    section = Section("traffic", {"moves": moves, "sent_bytes": sent, "others_share": share})
    say(f"traffic: {sent}, others {share:.2%}")
    section.judge(
        f"of all bytes moved the other networks carry less than {SHARE:.0%}",
        share < SHARE and sent[MIG.name] > 10 << 20,
        {"share": round(share, 5), **sent},
    )
    return section


def _sent(cluster: Cluster) -> dict[str, int]:
    """Bytes that all hosts sent into each network; what one sends another one receives."""
    total = {net.name: 0 for net in (LAN, MGMT, MIG, STOR)}
    for host in cluster.hosts:
        seen = links.show(cluster.lab.layout.netns(host))
        for net in (LAN, MGMT, MIG, STOR):
            total[net.name] += seen[net.port].tx_bytes
    return total


def scripting(cluster: Cluster, *, say: Say = tell) -> Section:
    """``--script python`` prints a program that, run as it is, does the same."""
    _have_vm(cluster)
    source = str(cluster.owner(VM).host)
    to = cluster.other(source)
    printed = cluster.cli("vm", "migrate", VM, "--to", to, "--script", "python")
    untouched = cluster.owner(VM).host == source
    with tempfile.TemporaryDirectory(prefix="godwit-script-") as folder:
        file = Path(folder) / "move.py"
        file.write_text(printed.out)
        ran = cluster.program([sys.executable, str(file)])
    host = cluster.owner(VM).host
    section = Section(
        "script",
        {"program": printed.out, "exit": ran.code, "stdout": ran.out, "stderr": ran.err},
    )
    say(f"script: exit {ran.code}, the VM is on {host}")
    section.judge(
        "vm migrate --script python prints a program that, run as it is, does the same",
        printed.code == 0 and untouched and ran.code == 0 and host == to,
        {"exit": ran.code, "from": source, "to": to, "now_on": host},
    )
    return section


def adoption(cluster: Cluster, *, say: Say = tell) -> Section:
    """An agent that is killed is back and has its VM, and the guest noticed nothing."""
    _have_vm(cluster)
    host = str(cluster.owner(VM).host)
    epoch = cluster.owner(VM).epoch
    before = evidence.copies(cluster, VM)
    guest = cluster.guest(VM)
    uptime, since = guest.stats()["uptime_s"], time.time()
    with watching(cluster.netns, guest.address) as probe:
        time.sleep(1.0)
        killed = time.monotonic_ns()
        fault.kill_process(cluster.lab, host, "agent")
        back = _adopted(cluster, host)
        time.sleep(1.0)
    after = evidence.copies(cluster, VM)
    calm = probe.between(0, killed)
    dark = probe.dark_after(killed)
    figures: dict[str, Any] = {
        "back_after_s": round(back, 2),
        "dark_ms": dark,
        "dark_before_ms": calm.blackout_ms,
        "probe_stalled_ms": probe.report.stalled_ms,
        "lost": probe.report.lost,
        "same_process": [c.pid for c in before] == [c.pid for c in after],
        "uptime_went_on": guest.stats()["uptime_s"] > uptime,
        "epoch": [epoch, cluster.owner(VM).epoch],
        "spans_since": len(evidence.spans(cluster, VM, since=since)),
    }
    say(f"adoption: back after {back:.1f} s, dark {dark:.1f} ms ({calm.blackout_ms:.1f} before)")
    section = Section("adoption", figures)
    section.judge(
        "an agent killed and restarted adopts its running VM, whose CPUs never stop",
        figures["same_process"]
        and figures["uptime_went_on"]
        and cluster.owner(VM).epoch == epoch
        and figures["spans_since"] == 1,
        figures,
    )
    section.judge(
        f"an agent killed and restarted: the guest is never silent for {ADOPTION_MS:g} ms",
        dark <= ADOPTION_MS,
        {key: figures[key] for key in ("dark_ms", "dark_before_ms", "lost")},
        timing=True,
    )
    return section


def _adopted(cluster: Cluster, host: str) -> float:
    """Seconds until the new agent has the VM."""
    from godwit.model.errors import GodwitError

    start = time.monotonic()
    cluster.lab.tell(host, "wait-ready", units=["agent"], timeout=30.0)
    while True:
        try:
            rows = cluster.lab.agent(host, "GET", "/v1/vms", deadline_s=1.0)
            if [row["state"] for row in rows if row["vm"] == VM] == ["running"]:
                return time.monotonic() - start
        except GodwitError:
            pass
        assert time.monotonic() - start < 30.0, f"{host} does not adopt {VM}"
        time.sleep(0.05)


def _have_vm(cluster: Cluster) -> None:
    if VM not in {vm.name for vm in cluster.client.vms.list()}:
        cluster.make(VM, host="host1")
    cluster.heal()
