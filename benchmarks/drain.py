"""Emptying a host: `godwit host drain` beside a loop of `virsh migrate`, with the same guests.

    godwit   host drain host1, then host return host1 --bring-back; one move at a time
    virsh    for each domain, largest first: virsh migrate --live --p2p, and the same way back

Each peer has so many guests of mixed sizes on the first of two lab hosts, its own ones, one peer
after the other, so that neither works beside the other's idle guests. What is timed is the command
from start to end, or the whole loop; the drain's own bound and time are kept beside it. libvirt
runs without control groups, as the fairer figure (`benchmarks/virsh.py`).

    .venv/bin/python benchmarks/drain.py [--vms 6] [--rounds 3] [--output build/bench-drain.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import facts
import virsh
from ground import HOSTS, Ground, raised
from measure import Machine
from peers import GROUP

SIZES_MIB = (128, 192, 256, 320)
FIRST_ADDRESS = 120


def say(line: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{line}\n")


def guests(count: int) -> list[tuple[str, int, str]]:
    """Name, memory in MiB and address of each, largest first."""
    found = [
        (f"d{number:02}", SIZES_MIB[number % len(SIZES_MIB)], f"10.91.0.{FIRST_ADDRESS + number}")
        for number in range(count)
    ]
    return sorted(found, key=lambda one: -one[1])


class Godwit:
    """The drain and the return, by the command line."""

    def __init__(self, ground: Ground, count: int) -> None:
        self._ground = ground
        self._guests = guests(count)

    def boot(self) -> Machine:
        """Every guest on the first host; what its QEMU is started with."""
        for name, memory, address in self._guests:
            append = f"godwit.ip={address}/22 godwit.host={name}"
            self._ground.must(
                "vm", "create", name, "--memory", f"{memory}M", "--image", "demo",
                "--network", "lan", "--append", append,
            )  # fmt: skip
            self._ground.must("vm", "start", name, "--host", HOSTS[0])
            self._ground.wait_guest(address)
        vm = self._ground.lab.root_of(HOSTS[0]) / f"run/godwit/vms/{self._guests[0][0]}"
        argv = json.loads((vm / "runtime.json").read_text())["argv"]

        def first(option: str) -> str:
            return str(argv[argv.index(option) + 1]).partition(",")[0]

        return Machine(
            machine=first("-machine"), cpu=first("-cpu"), accel=first("-accel"), memory_mib=0
        )

    def drain(self) -> dict[str, Any]:
        """There and back; seconds of the commands, and what the drain says of itself."""
        done = self._ground.godwit("host", "drain", HOSTS[0], "-o", "json", timeout=600.0)
        if done.code != 0:
            raise RuntimeError(f"the drain ended with {done.code}: {done.err}")
        result = done.json()["result"]
        back = self._ground.godwit("host", "return", HOSTS[0], "--bring-back", timeout=600.0)
        if back.code != 0:
            raise RuntimeError(f"the return ended with {back.code}: {back.err}")
        return {
            "there_s": done.wall_s,
            "back_s": back.wall_s,
            "took_s": result["took_s"],
            "bound_s": result["bound_s"],
        }

    def end(self) -> None:
        """Nothing of its guests stays."""
        for name, _, _ in self._guests:
            self._ground.godwit("vm", "stop", name, "--force")
            self._ground.must("vm", "delete", name)


class Virsh:
    """The loop that an administrator writes."""

    def __init__(self, ground: Ground, count: int, like: Machine) -> None:
        self._ground = ground
        self._guests = guests(count)
        self._like = like
        self._daemons: list[virsh.Daemon] = []
        try:
            for host in HOSTS:
                node = virsh.Node(
                    f"drain-{host}", ground.netns(host), ground.migration_address(host),
                    ground.scratch / f"drain-{host}", groups=False,
                )  # fmt: skip
                with ground.share(host, GROUP):
                    self._daemons.append(virsh.Daemon(node))
        except BaseException:
            self.end()
            raise

    def boot(self) -> None:
        """Every domain on the first host, of the same machine and processor."""
        for number, (name, memory, address) in enumerate(self._guests):
            domain = virsh.Domain(
                name, self._ground.image.kernel_path, self._ground.image.initrd_path,
                self._ground.append(address, name), memory_mib=memory,
                mac=f"52:54:00:be:77:{number:02x}", machine=self._like.machine,
                cpu=self._like.cpu.partition("-v")[0],
                hypervisor="kvm" if self._like.accel.startswith("kvm") else "qemu",
            )  # fmt: skip
            file = self._daemons[0].node.root / f"{name}.xml"
            file.write_text(domain.xml())
            self._daemons[0].virsh("create", str(file))
            self._ground.wait_guest(address)

    def drain(self) -> dict[str, Any]:
        """There and back, one domain after the other."""
        return {"there_s": self._loop(0, 1), "back_s": self._loop(1, 0)}

    def _loop(self, here: int, there: int) -> float:
        to = self._daemons[there].node
        started = time.monotonic()
        for name, _, _ in self._guests:
            self._daemons[here].virsh(
                "migrate", "--live", "--p2p", name, f"qemu+tcp://{to.address}:{to.port}/system",
                "--migrateuri", f"tcp://{to.address}", timeout=300.0,
            )  # fmt: skip
        return time.monotonic() - started

    def end(self) -> None:
        """End both libvirtd with all they run."""
        for daemon in self._daemons:
            daemon.stop()


def measure(ground: Ground, count: int, rounds: int) -> dict[str, Any]:
    """Both peers, one after the other; virsh is left out where libvirt is missing."""
    figures: dict[str, Any] = {}
    godwit = Godwit(ground, count)
    like = godwit.boot()
    say(f"{count} guests on {HOSTS[0]}: {like}")
    try:
        figures["godwit"] = _rounds("godwit", godwit, rounds)
    finally:
        godwit.end()
    if why := virsh.missing():
        say(f"without virsh: {why}")
        return figures
    loop = Virsh(ground, count, like)
    try:
        loop.boot()
        figures["virsh"] = _rounds("virsh", loop, rounds)
    finally:
        loop.end()
    return figures


def _rounds(name: str, peer: Godwit | Virsh, rounds: int) -> list[dict[str, Any]]:
    found = []
    for number in range(rounds):
        row = peer.drain()
        found.append({key: round(value, 3) for key, value in row.items()})
        say(f"{name} {number + 1}: {found[-1]}")
    return found


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Medians, and what they are to each other."""
    middle = {
        name: statistics.median(row["there_s"] for row in rows) for name, rows in figures.items()
    }
    found: dict[str, Any] = {f"{name}_s": round(value, 3) for name, value in middle.items()}
    found["over_bound"] = round(
        statistics.median(row["took_s"] / row["bound_s"] for row in figures["godwit"]), 3
    )
    if "virsh" in middle:
        found["of_virsh"] = round(middle["godwit"] / middle["virsh"], 3)
    return found


def main() -> int:
    """0 when everything was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vms", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--output", type=Path, default=Path("build/bench-drain.json"))
    given = parser.parse_args()
    with raised(say, rate=given.rate) as ground:
        figures = measure(ground, given.vms, given.rounds)
    result = {
        "commit": facts.commit(),
        "cpus": os.cpu_count(),
        "qemu": facts.said("qemu-system-x86_64", "--version"),
        "libvirt": facts.said("virsh", "--version"),
        "load_at_end": os.getloadavg()[0],
        "vms": given.vms,
        "sizes_mib": SIZES_MIB,
        "rounds": figures,
        "summary": summary(figures),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1, default=str) + "\n")
    print(json.dumps(result["summary"], indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd} ended with {error.returncode}: {error.stderr!r}")
