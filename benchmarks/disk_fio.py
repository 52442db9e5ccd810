"""What a guest gets from its disk: opened by QEMU itself, through a broker, through a peer.

    direct      fio in the guest --> QEMU --> image
    brokered    fio in the guest --> QEMU --NBD--> the VM's broker --> image
    redirected  the same, the broker ==NBD, TLS, storage network==> the other host --> image

A lab of two hosts and two guests of the same kind, each with a disk of every format: one whose
disks QEMU opens by itself (none for VHD and VHDX, which it cannot migrate then), one whose disks
are brokered. The ways are measured in turn, round by round; what is printed are medians, and
ratios to direct (to brokered where there is no direct) of the same rounds. Guests are emulated
where there is no KVM: then most of what a request costs is the guest's own part of it, and
`disk_paths.py`, which leaves the guest out, says more of the ways themselves.

fio is the distribution's package (`apt-get install fio`), put into the guest beside the demo image.

    .venv/bin/python benchmarks/disk_fio.py [--rounds 3] [--output docs/proof/bench-fio.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import stat
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import facts
from ground import Ground, raised
from measure import Machine

from godwit.client import Client
from godwit.host.run import run
from godwit.lab.initramfs import Entry, newc_archive
from godwit.model.errors import GodwitError, Refused

FORMATS = ("raw", "qcow2", "vhdx")
DIRECT, BROKERED, REDIRECTED = "direct", "brokered", "redirected"
SIZE, REGION = "256M", "128M"
MEMORY = "1GiB"
PROGRAM = Path("/usr/bin/fio")
END = "fio-has-ended"


@dataclass(frozen=True)
class Load:
    """A kind of I/O, in fio's words."""

    name: str
    rw: str
    size: str
    depth: int


LOADS = (
    Load("4k writes, 1 at a time", "randwrite", "4k", 1),
    Load("4k writes, 16 at a time", "randwrite", "4k", 16),
    Load("4k reads, 16 at a time", "randread", "4k", 16),
    Load("64k writes, 8 at a time", "write", "64k", 8),
)


def overlay(program: Path) -> bytes:
    """A program and the libraries it needs, as an archive to append to an initrd."""
    printed = run(["ldd", str(program)], timeout=20.0).decode()
    needed = sorted({program, *map(Path, re.findall(r"(/\S+) \(0x", printed))})
    return newc_archive(_entries(needed))


def _entries(files: list[Path]) -> Iterator[Entry]:
    there = {Path()}
    for path in files:
        inside = path.relative_to("/")
        for folder in reversed(inside.parents):
            if folder not in there:
                there.add(folder)
                yield Entry(str(folder), stat.S_IFDIR | 0o755)
        yield Entry(str(inside), stat.S_IFREG | 0o755, path.read_bytes())


class Guest:
    """A guest with fio, asked over its serial port."""

    def __init__(self, client: Client, name: str) -> None:
        self.name = name
        self._console = client.vms.console(name)
        self.say("stty -echo")

    def say(self, command: str) -> str:
        """Run a command in the guest's shell; what it printed."""
        self._console.send(f"{command}; echo {END[:4]}''{END[4:]}\n".encode())
        heard = b""
        while END.encode() not in heard:
            part = self._console.receive()
            if part is None:
                raise RuntimeError(f"{self.name} has ended: {heard[-300:]!r}")
            heard += part
        return heard.partition(END.encode())[0].decode(errors="replace")

    def fio(self, device: str, load: Load, *, seconds: float) -> float:
        """Requests per second of one run."""
        line = (
            f"{PROGRAM} --name=w --filename=/dev/{device} --rw={load.rw} --bs={load.size}"
            f" --iodepth={load.depth} --size={REGION} --runtime={seconds:g} --time_based"
            " --direct=1 --ioengine=libaio --output-format=json"
        )
        printed = self.say(line)
        try:
            found = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
        except ValueError:
            raise RuntimeError(f"fio in {self.name} printed no figures: {printed[-500:]}") from None
        (job,) = found["jobs"]
        return float(job["read" if "read" in load.rw else "write"]["iops"])

    def fill(self, device: str) -> None:
        """Write the region once: allocation is not what is compared."""
        self.say(f"dd if=/dev/zero of=/dev/{device} bs=1M count={REGION[:-1]} conv=fsync 2>&1")

    def close(self) -> None:
        """Detach."""
        self._console.close()


class Bench:
    """The two guests and how each of their disks is reached."""

    def __init__(self, ground: Ground, client: Client, formats: tuple[str, ...]) -> None:
        self._ground = ground
        initrd = ground.scratch / "initrd"
        if not PROGRAM.exists():
            raise Refused("there is no fio", hint="run: apt-get install fio")
        initrd.write_bytes(ground.image.initrd_path.read_bytes() + overlay(PROGRAM))
        self.devices: dict[str, dict[str, str]] = {}
        self.guests = {}
        for way in (DIRECT, BROKERED):
            kinds = [kind for kind in formats if way == BROKERED or kind != "vhdx"]
            self._boot(way, kinds, initrd)
            self.devices[way] = {kind: f"sd{'abcdef'[at]}" for at, kind in enumerate(kinds)}
            self.guests[way] = Guest(client, way)
            for device in self.devices[way].values():
                self.guests[way].fill(device)

    def _boot(self, way: str, kinds: list[str], initrd: Path) -> None:
        must, image = self._ground.must, self._ground.image
        address = f"10.91.0.{110 if way == DIRECT else 111}"
        must(
            "vm", "create", way, "--memory", MEMORY, "--network", "lan", "--host", "host1",
            "--kernel", str(image.kernel_path), "--initrd", str(initrd),
            "--append", self._ground.append(address, way),
        )  # fmt: skip
        # A volume of its own for each: what is redirected must have no disk that QEMU opens.
        volume = "other" if way == DIRECT else "shared"
        for kind in kinds:
            must("vm", "disk", "add", way, f"{volume}:{SIZE}:{kind}", "--tier", way)
        must("vm", "start", way, timeout=240.0)
        self._ground.wait_guest(address)

    def run(self, rounds: int, seconds: float) -> dict[str, Any]:
        """Format -> load -> way -> requests per second, one value a round."""
        rows: dict[str, Any] = {
            kind: {load.name: {} for load in LOADS} for kind in self.devices[BROKERED]
        }
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            self._measure(rows, DIRECT, DIRECT, seconds)
            self._measure(rows, BROKERED, BROKERED, seconds)
            self._ground.must("volume", "redirect", "shared", "--host", "host1")
            try:
                self._measure(rows, BROKERED, REDIRECTED, seconds)
            finally:
                self._ground.must("volume", "restore", "shared", "--host", "host1")
        return rows

    def _measure(self, rows: dict[str, Any], guest: str, way: str, seconds: float) -> None:
        for kind, device in self.devices[guest].items():
            for load in LOADS:
                reached = self.guests[guest].fio(device, load, seconds=seconds)
                rows[kind][load.name].setdefault(way, []).append(reached)

    def close(self) -> None:
        """Detach from the guests."""
        for guest in self.guests.values():
            guest.close()


@contextlib.contextmanager
def _client(ground: Ground) -> Iterator[Client]:
    layout = ground.lab.layout
    with contextlib.closing(
        Client(ground.lab.record.url, token_file=layout.token, ca_file=layout.state / "ca.pem")
    ) as client:
        yield client


def show(rows: dict[str, Any]) -> None:
    """Medians, and ratios within the same round."""
    for kind, loads in rows.items():
        for load, ways in loads.items():
            base = ways.get(DIRECT) or ways[BROKERED]
            words = []
            for way, values in ways.items():
                ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
                words.append(f"{way} {statistics.median(values):7.0f}/s ({ratio:.2f})")
            sys.stdout.write(f"{kind:6} {load:24} {'   '.join(words)}\n")


def tell(line: str) -> None:
    """Progress, beside the result."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run of fio")
    parser.add_argument("--only", default=",".join(FORMATS), help="some formats: raw,vhdx")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - set(FORMATS):
        parser.error(f"no format {min(unknown)!r}; there are: {', '.join(FORMATS)}")
    try:
        with raised(tell, rate="1gbit", volumes=("other",)) as ground, _client(ground) as client:
            bench = Bench(ground, client, tuple(given.only.split(",")))
            with contextlib.closing(bench):
                rows = bench.run(given.rounds, given.seconds)
    except GodwitError as error:
        tell(f"{error.message}\n{error.hint}")
        return 4 if error.code == "refused" else 1
    show(rows)
    if given.output:
        found = {
            "commit": facts.commit(),
            "machine": facts.machine(Machine(machine="", cpu="", accel="", memory_mib=1024)),
            "requests_per_s": rows,
        }
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("root is needed: a lab is raised")
    sys.exit(main())
