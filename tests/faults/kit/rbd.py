"""Disks that are images of a Ceph pool: moved live under a writer, brokered and not.

The lab's storage node gets a Ceph of one node beside its own server. Hosts get its address and a
keyring of a client that may use one pool.
"""

from __future__ import annotations

import os
import pwd
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from godwit.lab import fault
from godwit.lab.configs import ETC
from godwit.lab.layout import QEMU_USER, STOR, STORAGE, STORAGE_NUMBER
from godwit.lab.logcheck import check_log

from . import ceph as ceph_of_one_node
from .ceph import CLIENT, POOL, Ceph
from .cluster import Cluster
from .formats import RECORDS_PER_S, log_end
from .report import Say, Section, tell

VOLUME = "ceph"
SIZE_MIB = 256
KEYRING = "ceph.keyring"


def run(cluster: Cluster, *, moves: int = 20, say: Say = tell) -> Section:
    """On a lab that has a storage node."""
    section = Section("rbd")
    if gone := ceph_of_one_node.missing():
        section.judge("a Ceph can be had", False, gone)
        return section
    layout = cluster.lab.layout
    where = layout.netns(STORAGE), STOR.address(STORAGE_NUMBER)
    with ceph_of_one_node.one_node(*where) as ceph:
        _let_in(cluster, ceph)
        words = ("volume", "create", VOLUME, "--kind", "rbd", "--pool", POOL, "--client", CLIENT)
        made = cluster.cli(*words)
        section.judge("a volume of a Ceph pool is defined", made.code == 0, made.err[-300:])
        refused = cluster.cli("vm", "create", "no", "--memory", "64M", "--disk", f"{VOLUME}:1G")
        section.judge("no image is made there", refused.code == 4, refused.err[-300:])
        _locked(cluster, ceph, section)
        for tier in ("direct", "brokered"):
            section.figures[tier] = _moved(cluster, ceph, tier, moves, say)
            _judge(section, tier, section.figures[tier], moves)
        _no_secret(cluster, ceph, section)
        _frozen(cluster, ceph, section)
        cluster.client.wait(cluster.client.volumes.delete(VOLUME))
    return section


def _let_in(cluster: Cluster, ceph: Ceph) -> None:
    """What an administrator puts on each host: Ceph's configuration, and a keyring for QEMU."""
    account = pwd.getpwnam(QEMU_USER)
    for host in cluster.hosts:
        folder = cluster.lab.layout.node_dir(host) / "etc"
        (folder / "ceph.conf").write_text(ceph.config(str(ETC / KEYRING)))
        secret = folder / KEYRING
        secret.touch(0o400)
        os.chown(secret, account.pw_uid, account.pw_gid)
        secret.write_bytes(ceph.keyring())
        config = folder / "host.toml"
        config.write_text(f'{config.read_text()}\n[storage]\nceph_conf = "{ETC / "ceph.conf"}"\n')
        fault.restart_daemon(cluster.lab, host, "agent")
    cluster.heal()


def _locked(cluster: Cluster, ceph: Ceph, section: Section) -> None:
    """What rbd create makes unless told otherwise."""
    ceph.do("rbd", "create", f"{POOL}/locked", "--size", "16M")
    cluster.define("rbd-locked")
    words = ("vm", "disk", "add", "rbd-locked", VOLUME, "--existing", "locked", "--format", "raw")
    refused = cluster.cli(*words)
    good = refused.code != 0 and "exclusive-lock" in refused.err
    section.judge("an image with an exclusive lock is refused", good, refused.err[-300:])
    missing = cluster.cli(*("nowhere" if word == "locked" else word for word in words))
    good = missing.code != 0 and "nowhere cannot be opened" in missing.err
    section.judge("one that is not there is refused", good, missing.err[-300:])
    cluster.remove("rbd-locked")


def _moved(cluster: Cluster, ceph: Ceph, tier: str, moves: int, say: Say) -> dict[str, Any]:
    vm, image, client = f"rbd-{tier}", f"image-{tier}", cluster.client
    size = ("--size", f"{SIZE_MIB}M")
    ceph.do("rbd", "create", f"{POOL}/{image}", *size, "--image-feature", "layering")
    cluster.define(vm)
    client.wait(client.vms.add_disk(vm, volume=VOLUME, path=image, format="raw", tier=tier))  # type: ignore[arg-type]
    (disk,) = client.vms.get(vm).disks
    guest = cluster.boot(vm, host="host1")
    guest.ask(f"log dev=sda rate={RECORDS_PER_S} fresh=1", timeout=20.0)
    done = []
    for number in range(moves):
        before = guest.stats()["log"]["acknowledged"]
        move = cluster.move(vm, cluster.other(str(cluster.owner(vm).host)), method="live")
        written = guest.stats()["log"]["acknowledged"] - before
        done.append([move.state.value, move.blackout_ms, written, move.reason])
        say(f"rbd {tier} {number + 1}/{moves}: {move.state.value}, dark {move.blackout_ms} ms")
    logged = log_end(guest)
    client.wait(client.vms.stop(vm, timeout_s=30.0))
    with tempfile.TemporaryDirectory(prefix="godwit-rbd-") as folder:
        raw = Path(folder) / "raw"
        ceph.do("rbd", "export", f"{POOL}/{image}", str(raw))
        with raw.open("rb") as stream:
            kept = check_log(stream, acknowledged=logged["acknowledged"], log_id=logged["log_id"])
    client.wait(client.vms.delete(vm))
    there = image in ceph.do("rbd", "ls", POOL).split()
    return {
        "size_bytes": disk.size_bytes,
        "moves": done,
        "lost": kept.lost,
        "torn": kept.torn,
        "acknowledged": kept.acknowledged,
        "image_stays": there,
    }


def _judge(section: Section, tier: str, found: dict[str, Any], moves: int) -> None:
    measured = found["size_bytes"] == SIZE_MIB << 20
    section.judge(f"{tier}: its size is what Ceph says", measured, found["size_bytes"])
    good = [one for one in found["moves"] if one[0] == "completed" and one[2] > 0]
    section.judge(f"{tier}: {moves} live moves under a writer", len(good) == moves, found["moves"])
    whole = not found["lost"] and not found["torn"] and found["acknowledged"] > 0
    figures = {word: found[word] for word in ("lost", "torn", "acknowledged")}
    section.judge(f"{tier}: 0 lost, 0 torn acknowledged records", whole, figures)
    section.judge(f"{tier}: the image stays", found["image_stays"], found["image_stays"])


def _frozen(cluster: Cluster, ceph: Ceph, section: Section) -> None:
    """An OSD that stands still, while the monitor answers."""
    ceph.signal_osd(signal.SIGSTOP)
    try:
        seen = _await_state(cluster, "unavailable")
    finally:
        ceph.signal_osd(signal.SIGCONT)
    section.judge("an OSD that does not answer is noticed", "unavailable" in seen, seen)
    seen = _await_state(cluster, "direct")
    section.judge("and that it is back", "direct" in seen, seen)


def _await_state(cluster: Cluster, wanted: str) -> str:
    """What a host says of the volume, once it is that; the last word after a minute."""
    until = time.monotonic() + 60.0
    while True:
        one = cluster.client.volumes.get(VOLUME).hosts["host1"]
        if one.state.value == wanted or time.monotonic() > until:
            return f"{one.state.value}: {one.reason}"
        time.sleep(0.2)  # the list of volumes tells nobody that it changed


def _no_secret(cluster: Cluster, ceph: Ceph, section: Section) -> None:
    """The key is in the hosts' keyrings and nowhere else of ours."""
    key = ceph.keyring().split(b"key = ")[1].split()[0]
    logs = [path for path in cluster.lab.layout.state.rglob("*.log") if path.is_file()]
    found = [str(path) for path in logs if key in path.read_bytes()]
    found += [name for name, value in cluster.dump("").items() if key in value]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [str(path)] if key in path.read_bytes() else []
        except OSError:
            continue  # it has ended
    section.judge(
        "Ceph's key is in no log, record or command line", not found and bool(logs), found
    )
