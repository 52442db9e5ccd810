"""What is compared: Godwit by its command line, the bare QMP floor, and virsh.

Each peer has one guest at a time, of the same image, memory, machine and CPU, in the same two lab
hosts, with the same share of the processor, on the same bridge and the same link, and takes it
back and forth. All guests live all the time; only one of them moves, is probed, and is made to
write.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import floor
import link
import virsh
from ground import HOSTS, Ground
from measure import SETTLE_S, Machine, Trip, measured

GROUP = "peer"
VIRSH = "virsh"
"""libvirt as it comes."""
VIRSH_APART = "virsh, groups apart"
"""libvirt without control groups: two of one machine have none in common."""


class Godwit:
    """(a) `godwit vm migrate NAME --to HOST -o json`."""

    name = "godwit"

    def __init__(self, ground: Ground, address: str) -> None:
        self.address = address
        self._ground = ground
        self._booted = 0
        self._vm = ""
        self._there = False

    def boot(self, memory_mib: int) -> None:
        self.end()
        self._booted += 1
        self._vm = f"bench{self._booted}"
        append = f"godwit.ip={self.address}/22 godwit.host={self._vm}"
        self._ground.must(
            "vm", "create", self._vm, "--memory", f"{memory_mib}M", "--image", "demo",
            "--network", "lan", "--append", append,
        )  # fmt: skip
        self._there = True
        self._ground.must("vm", "start", self._vm, "--host", HOSTS[0])
        self._ground.wait_guest(self.address)

    def machine(self, memory_mib: int) -> Machine:
        """What the running VM's QEMU was started with."""
        host = self.where()
        path = f"run/godwit/vms/{self._vm}/runtime.json"
        argv = json.loads((self._ground.lab.root_of(host) / path).read_text())["argv"]

        def first(option: str) -> str:
            return str(argv[argv.index(option) + 1]).partition(",")[0]

        return Machine(
            machine=first("-machine"), cpu=first("-cpu"),
            accel=str(argv[argv.index("-accel") + 1]), memory_mib=memory_mib,
            devices=_devices(argv),
        )  # fmt: skip

    def where(self) -> str:
        """The host the VM runs on."""
        return str(self.show()["host"])

    def show(self) -> dict[str, Any]:
        """`vm show`."""
        return dict(self._ground.must("vm", "show", self._vm))

    def move(self, *options: str, timeout: float = 120.0) -> Trip:
        to = HOSTS[1 - HOSTS.index(self.where())]
        words = ("vm", "migrate", self._vm, "--to", to, *options, "-o", "json")
        started = time.monotonic()
        done = self._ground.godwit(*words, timeout=timeout)
        finished = time.monotonic()
        report = done.json()
        if not isinstance(report, dict) or report.get("outcome") is None:
            raise RuntimeError(f"godwit {shlex.join(words)}: {done.code}: {done.out}{done.err}")
        total_ms = report["total_ms"]
        return Trip(
            started=started, finished=finished,
            total_s=done.wall_s if total_ms is None else total_ms / 1e3,
            outcome=str(report["outcome"]), reason=str(report["reason"]), wall_s=done.wall_s,
            reported_blackout_ms=report["blackout_ms"],
            reported_bytes=report["bytes_transferred"], strategy=str(report["strategy"]),
            detail={"exit_code": done.code, "stderr": done.err[-500:],
                    **{key: report.get(key) for key in
                       ("id", "stages", "passes", "log", "clock_error_ms")}},
        )  # fmt: skip

    def end(self) -> None:
        if not self._there:
            return
        self._ground.godwit("vm", "stop", self._vm, "--force")
        self._ground.must("vm", "delete", self._vm)
        self._there = False


def _devices(argv: list[str]) -> tuple[str, ...]:
    """The options that make a guest's devices, its card (with its cable) and console left out."""
    found: list[str] = []
    for option, value in pairwise(argv):
        words = value.split(",")
        if option == "-object" and words[0].startswith("rng-"):
            found += [option, value]
        elif option == "-device" and words[0] not in ("virtio-net-pci", "isa-serial"):
            # The floor's card is at a slot of its own, as it has none behind a port.
            found += [option, value]
    return tuple(found)


class Floor:
    """(b) `floor.move` with one fixed downtime limit; the destination is spawned in its span."""

    def __init__(self, ground: Ground, address: str, machine: Machine, *, tls: bool) -> None:
        self.name = "floor, TLS" if tls else "floor"
        self.address = address
        self.base = floor.Tuning(tls=tls)
        self.tuning = self.base
        self._ground = ground
        self._vm: floor.Vm | None = None
        self._at = 0
        letter = "t" if tls else "p"
        self._roles = (f"{letter}a", f"{letter}b")
        self._guest = floor.Guest(
            ground.image.kernel_path, ground.image.initrd_path,
            ground.append(address, f"floor-{letter}"), machine=machine.machine, cpu=machine.cpu,
            accel=machine.accel, mac=f"52:54:00:be:{ord(letter):02x}:01",
            extra=machine.devices,
        )  # fmt: skip
        self._places = tuple(self._place(index, tls=tls) for index in (0, 1))

    def _place(self, index: int, *, tls: bool) -> link.Place:
        ground, host = self._ground, HOSTS[index]
        root = ground.scratch / f"floor-{self._roles[index][0]}"
        run_dir = root / host
        run_dir.mkdir(parents=True)
        address = ground.migration_address(host)
        ground.tap(host, f"fl-{self._roles[index]}")
        return link.Place(
            name=host, enter=("nsenter", f"--net=/run/netns/{ground.netns(host)}", "--"),
            migration_address=address, run_dir=run_dir,
            tls_dir=link.certificates(root, run_dir / "tls", address) if tls else None,
        )  # fmt: skip

    def boot(self, memory_mib: int) -> None:
        self.end()
        self._guest = replace(self._guest, memory_mib=memory_mib)
        self._at = 0
        with self._ground.share(HOSTS[0], GROUP):
            self._vm = floor.boot(self._guest, self._places[0], role=self._roles[0], ready="")
        self._ground.wait_guest(self.address)

    def move(self, *options: str, timeout: float = 120.0) -> Trip:
        if self._vm is None:
            raise RuntimeError("no guest was booted")
        to = 1 - self._at
        with self._ground.share(HOSTS[to], GROUP):
            self._vm, move = floor.move(
                self._vm, self._guest, self._places[to], role=self._roles[to], tuning=self.tuning
            )
        self._at = to
        return Trip(
            started=move.started, finished=move.finished, total_s=move.total, outcome="completed",
            reported_blackout_ms=move.stop_to_resume * 1e3, reported_bytes=move.transferred,
            strategy="precopy", detail={"tuning": asdict(self.tuning), **asdict(move)},
        )  # fmt: skip

    def end(self) -> None:
        if self._vm is not None:
            self._vm.stop()
            self._vm = None


class Swept(floor.Track):
    """Lets `floor.sweep` choose its best limit on our link, with our probe."""

    def __init__(self, ground: Ground, peer: Floor, writes: tuple[int, int] | None) -> None:
        self._ground, self._peer, self._writes = ground, peer, writes

    def go(self, tuning: floor.Tuning, *, settle: float = SETTLE_S) -> floor.Move:
        self._peer.tuning = tuning
        row = measured(self._ground, self._peer, writes=self._writes)
        detail = {key: value for key, value in row.trip.detail.items() if key != "tuning"}
        move = floor.Move(**detail)
        move.blackout = row.blackout_ms / 1e3
        return move


def choose_limit(
    ground: Ground, peer: Floor, *, rounds: int, writes: tuple[int, int] | None = None
) -> tuple[int, dict[str, list[floor.Move]]]:
    """Sweep the limits and keep the best; the floor uses it from now on."""
    best, results = floor.sweep(Swept(ground, peer, writes), peer.base, rounds=rounds)
    limit = int(best.partition(" ")[0])
    peer.tuning = replace(peer.base, downtime_limit_ms=limit)
    return limit, results


class Virsh:
    """(c) `virsh migrate --live --p2p`; its total is the command's, from start to end.

    `groups`: as libvirt comes, with what two libvirtd of one machine cost each other by it.
    """

    def __init__(
        self, ground: Ground, address: str, machine: Machine, *, groups: bool = True
    ) -> None:
        """Starts both libvirtd."""
        self.name = VIRSH if groups else VIRSH_APART
        self._mac = "52:54:00:be:76:01" if groups else "52:54:00:be:76:02"
        self._domain = "bench" if groups else "bench-apart"
        self.address = address
        self._ground = ground
        self._machine = machine
        self.pair = virsh.Pair()
        try:
            for host in HOSTS:
                name = f"virsh-{host}" if groups else f"apart-{host}"
                node = virsh.Node(
                    name, ground.netns(host), ground.migration_address(host),
                    ground.scratch / name, groups,
                )  # fmt: skip
                with ground.share(host, GROUP):
                    self.pair.add(node)
        except BaseException:
            self.pair.stop()
            raise

    def boot(self, memory_mib: int) -> None:
        machine = self._machine
        self.pair.boot(
            virsh.Domain(
                self._domain, self._ground.image.kernel_path, self._ground.image.initrd_path,
                self._ground.append(self.address, self._domain), memory_mib=memory_mib,
                mac=self._mac, machine=machine.machine,
                cpu=machine.cpu.partition("-v")[0],
                hypervisor="kvm" if machine.accel.startswith("kvm") else "qemu",
            )
        )  # fmt: skip
        self._ground.wait_guest(self.address)

    def move(self, *options: str, timeout: float = 120.0) -> Trip:
        line = self.pair.migrate_argv(*options)
        started = time.monotonic()
        reason = ""
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.pair.abort()
            out, err = process.communicate(timeout=60)
            reason = f"called off after {timeout:.0f} s; "
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        finished = time.monotonic()
        self.pair.settle()
        ended = process.returncode == 0
        job = self.pair.completed() if ended else {}
        return Trip(
            started=started, finished=finished, total_s=finished - started,
            outcome="completed" if ended else "failed",
            reason=reason + ("" if ended else (err or out).strip()), wall_s=finished - started,
            reported_blackout_ms=milliseconds(job.get("Total downtime", "")),
            strategy=" ".join(options), detail={"job": job},
        )  # fmt: skip

    def end(self) -> None:
        self.pair.destroy()

    def stop(self) -> None:
        """End both libvirtd with all they run."""
        self.pair.stop()


def milliseconds(text: str) -> float | None:
    """`100          ms` as a number."""
    words = text.split()
    return float(words[0]) if len(words) == 2 and words[1] == "ms" else None
