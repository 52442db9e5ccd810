"""A real Debian, built with the distribution's tools, on a disk of each format.

GRUB starts it from its disk, by BIOS or UEFI; cloud-init reads its user data and says a word of it
on the serial port; a service counts there, and says a number when it is on the disk. It moves live,
answers at its login prompt, is powered off by ACPI, and its file system is read from outside.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.host.errors import HostError
from godwit.host.run import run as run_program
from godwit.model.vm import Disk
from godwit.storage.formats import FORMATS

from .cluster import Cluster
from .formats import FORMATS as KINDS
from .formats import image_check, outside
from .report import Say, Section, tell
from .serial import await_said, length, said

BUILDER = Path(__file__).resolve().parents[3] / "scripts/build-debian-guest"
SOURCE = "debian.raw"
BUILD_S, BOOT_S, STOP_S = 1500.0, 600.0, 180.0
ROOT_AT = 17 << 20  # where the builder puts the root file system
FIRMWARE = {"qcow2": "uefi", "vhdx": "uefi"}  # the others: BIOS


def run(cluster: Cluster, *, only: tuple[str, ...] = KINDS, say: Say = tell) -> Section:
    """One VM for each format; two boot side by side, on one processor each."""
    section = Section("debian")
    began = time.monotonic()
    done = subprocess.run([BUILDER], capture_output=True, text=True, timeout=BUILD_S)
    section.figures["build_s"] = round(time.monotonic() - began, 1)
    section.judge("a Debian is built, or was", done.returncode == 0, done.stderr[-300:])
    if done.returncode:
        return section
    shared = cluster.lab.layout.volume / SOURCE
    run_program(["cp", "--sparse=always", done.stdout.strip(), str(shared)], timeout=120.0)
    for first in range(0, len(only), 2):
        begun = [_begin(cluster, section, kind) for kind in only[first : first + 2]]
        for guest in begun:
            section.figures[guest.kind] = found = {}
            try:
                _follow(cluster, section, guest, found)
            finally:
                say(f"debian on {guest.kind}: {found}")
    shared.unlink()
    return section


@dataclass(frozen=True)
class _Guest:
    """One that boots; ``word`` is what its user data has it say, ``began`` monotonic seconds.

    The second of a pair is looked at once the first is done: its times are at most what is said.
    """

    kind: str
    vm: str
    word: str
    began: float


def _begin(cluster: Cluster, section: Section, kind: str) -> _Guest:
    vm, word, client = f"debian-{kind}", secrets.token_hex(4), cluster.client
    _define(cluster, section, vm, kind, word)
    guest = _Guest(kind, vm, word, time.monotonic())
    client.wait(client.vms.start(vm, host="host1"))
    return guest


def _follow(cluster: Cluster, section: Section, guest: _Guest, found: dict[str, Any]) -> None:
    kind, vm, word, began, client = *dataclasses.astuple(guest), cluster.client
    found["firmware"] = FIRMWARE.get(kind, "bios")
    _says(
        cluster, section, f"{kind}: GRUB starts from the disk", vm, "host1", r"GRUB on \w+ starts"
    )
    _says(cluster, section, f"{kind}: it asks who is there", vm, "host1", "login: ")
    found["login_s"] = round(time.monotonic() - began, 1)
    seeded = f"cloud-init gave {vm} {word}"
    _says(cluster, section, f"{kind}: cloud-init has the user data", vm, "host1", seeded)
    found["cloud_init_s"] = round(time.monotonic() - began, 1)
    move = cluster.move(vm, "host2", method="live")
    cluster.await_task(vm)
    found |= {"blackout_ms": move.blackout_ms, "total_ms": move.total_ms}
    good = move.state.value == "completed"
    section.judge(f"{kind}: it moves live", good, move.reason)
    before = _beats(said(cluster, vm, "host1"))
    _says(cluster, section, f"{kind}: it counts on there", vm, "host2", rf"beat {before + 2}\b")
    asked = length(cluster, vm, "host2")
    with client.vms.console(vm) as console:
        console.send(b"\r")
        answer = await_said(cluster, vm, "host2", "login: ", after=asked)
    section.judge(f"{kind}: it answers at its serial port", *answer)
    began = time.monotonic()
    client.wait(client.vms.stop(vm, timeout_s=STOP_S))
    found["stop_s"] = round(time.monotonic() - began, 1)
    section.judge(
        f"{kind}: it is powered off by ACPI",
        "Power down" in said(cluster, vm, "host2"),
        said(cluster, vm, "host2")[-160:],
    )
    _read(cluster, section, vm, kind, _beats(said(cluster, vm, "host2")))
    cluster.remove(vm)


def _define(cluster: Cluster, section: Section, vm: str, kind: str, word: str) -> None:
    client = cluster.client
    data = cluster.home / "user-data"
    # The host's name comes from the CD as well.
    line = f'echo "cloud-init gave $(hostname) {word}" >/dev/ttyS0'
    data.write_text(f"#cloud-config\nruncmd:\n- [sh, -c, '{line}']\n")
    words = ("vm", "create", vm, "--memory", "512M", "--disk", "shared:16M")
    firmware = ("--firmware", FIRMWARE.get(kind, "bios"))
    made = cluster.cli(*words, *firmware, "--cloud-init", str(data))
    section.judge(f"{kind}: a VM is made", made.code == 0, made.err[-300:])
    brought = cluster.cli(
        *("volume", "disk", "import", "shared", vm, f"/clusterstorage/shared/{SOURCE}"),
        *("--format", "raw", "--target-format", kind),
        timeout=600.0,
    )
    section.judge(f"{kind}: its disk is imported", brought.code == 0, brought.err[-300:])
    suffix = "vhd" if kind == "vhd-fixed" else kind
    client.wait(client.vms.remove_disk(vm, "disk0"))
    client.wait(
        client.vms.add_disk(vm, volume="shared", path=f".godwit/images/{vm}.{suffix}", format=kind)
    )


def _says(cluster: Cluster, section: Section, text: str, vm: str, host: str, wanted: str) -> None:
    section.judge(text, *await_said(cluster, vm, host, wanted, timeout=BOOT_S))


def _beats(text: str) -> int:
    """The last number that was said whole."""
    numbers = re.findall(r"beat (\d+)\r?\n", text)
    return int(numbers[-1]) if numbers else 0


def _read(cluster: Cluster, section: Section, vm: str, kind: str, beats: int) -> None:
    """The closed image: sound, its file system clean, and what was said is in it."""
    (disk,) = cluster.client.vms.get(vm).disks
    path = outside(cluster, disk)
    checked = image_check(path, disk)
    section.judge(f"{kind}: image check clean", checked in ("clean", "none"), checked)
    with tempfile.TemporaryDirectory(prefix="godwit-debian-") as folder:
        root = Path(folder) / "root"
        _root_of(path, disk, root)
        clean, words = _ran("e2fsck", "-fn", str(root))
        section.judge(f"{kind}: its file system is clean", clean, words)
        _, number = _ran("debugfs", "-R", "cat /var/lib/godwit-beat", str(root))
        kept = int(re.search(r"^\d+", number, re.MULTILINE)[0]) if number.strip() else 0  # type: ignore[index]
        section.judge(f"{kind}: what it said is on its disk", kept >= beats > 0, [kept, beats])


def _root_of(path: Path, disk: Disk, root: Path) -> None:
    """The root file system alone, out of an image of any format."""
    whole = root.with_name("whole")
    driver = FORMATS[disk.format].driver
    words = ["qemu-img", "convert", "-f", driver, "-O", "raw", str(path), str(whole)]
    run_program(words, timeout=300.0)
    with whole.open("rb") as source, root.open("wb") as target:
        source.seek(ROOT_AT)
        shutil.copyfileobj(source, target, 1 << 20)
    whole.unlink()


def _ran(*words: str) -> tuple[bool, str]:
    try:
        return True, run_program(list(words), timeout=300.0).decode(errors="replace")[-200:]
    except HostError as error:
        return False, str(error)[-300:]
