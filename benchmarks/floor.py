"""The floor: how dark and how long a live migration is with nothing but QEMU and QMP.

A bare script on the standard library: its own blocking QMP, no room of Godwit. What it reaches
is what Godwit is measured against, and what its engine's parameters were chosen from
(docs/design/0003-blackout-floor.md). `benchmarks/migration.py` imports `Place`, `Guest`,
`Tuning`, `boot`, `move`, `Probe` and `sweep` and runs them inside lab hosts; alone it makes its
own two namespaces and needs root, QEMU, a kernel and an initrd.

    floor.py sweep --kernel K --initrd I [--rounds N] [--tls]     the floor itself
    floor.py compare CASE.. --kernel K --initrd I [--rounds N]    settings, interleaved by round
      CASE: "name:field=value,field=value" over the fields of Tuning, "low:downtime_limit_ms=5"

A move's span starts before the destination is spawned and ends when it runs and the source has
quit. Blackout is the longest time between two answers to a 1 kHz echo probe around the move.
Seconds and bytes unless a name says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from link import Place, own_link, run
from probe import Probe

SWEEP_LIMITS_MS = (5, 10, 15, 20, 30, 40, 50)
TCP_NOTSENT_LOWAT = 25
SO_MAX_PACING_RATE = 47
"""From linux/tcp.h and asm/socket.h; Python does not name them everywhere."""
CAPABILITIES = (
    "auto-converge", "events", "multifd", "pause-before-switchover", "postcopy-ram",
    "return-path", "switchover-ack", "validate-uuid", "xbzrle",
)  # fmt: skip


@dataclass(frozen=True)
class Guest:
    """What is moved. Both ends are started from the same values."""

    kernel: Path
    initrd: Path
    append: str
    memory_mib: int = 256
    mac: str = "52:54:00:12:34:56"
    machine: str = "pc-q35-10.0"
    cpu: str = "qemu64"
    accel: str = "tcg"
    extra: tuple[str, ...] = ()
    binary: str = "qemu-system-x86_64"


@dataclass(frozen=True)
class Tuning:
    """One way to move. Values are QEMU's own; bandwidths in bytes per second, 0 = no limit."""

    downtime_limit_ms: int = 20
    max_bandwidth: int = 0
    avail_switchover_bandwidth: int = 0
    multifd_channels: int = 0
    return_path: bool = True
    switchover_ack: bool = False
    pause_before_switchover: bool = False
    hold: bool = True
    """-S on the destination and an explicit `cont`, as whoever owns VMs must."""
    cont_delay_ms: float = 0.0
    """Time between the source's `completed` and `cont`: what a store transaction costs."""
    announce: str = "qemu"
    """`qemu`: by itself at load; `self`: none at load, announce-self after RESUME; `none`."""
    tls: bool = False
    extra: tuple[str, ...] = ()
    """More arguments for the destination only."""
    accel: str = ""
    """Another accelerator string for the destination."""
    nice: int = 0
    """Scheduling priority the destination is started with."""
    notsent_lowat: int = 0
    """Connect the stream ourselves with this TCP_NOTSENT_LOWAT and hand it over as `fd:`."""
    pacing: int = 0
    """SO_MAX_PACING_RATE of that stream: keeps the queue on the link short."""
    lowat_late: bool = False
    """Set it only when the second pass begins: the first one keeps its deep buffer."""
    sysctl: str = ""
    """`name=value name=value` set in the source's network namespace before the span."""
    quit_delay_ms: float = 0.0
    """Time between RESUME and quitting the source: its exit costs CPU time."""


@dataclass
class Move:
    """What one move took."""

    total: float
    greeting: float
    started: float
    finished: float
    stop_to_resume: float
    stop_to_completed: float
    completed_to_resume: float
    passes: int
    transferred: int
    dark_bytes: int
    setup_ms: int
    qemu_downtime_ms: int
    stopped: float = 0.0
    resumed: float = 0.0
    blackout: float = 0.0
    dark_before_stop: float = 0.0
    dark_after_resume: float = 0.0
    lost: int = 0
    steps: dict[str, float] = field(default_factory=dict)


class Qmp:
    """A blocking QMP client: one command at a time, events kept in order."""

    def __init__(self, path: Path, *, deadline: float = 10.0) -> None:
        give_up = time.monotonic() + deadline
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.001)
        self._socket.settimeout(60)
        self._lines = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        json.loads(self._lines.readline())
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> Any:
        self.post(command, **arguments)
        return self.answer()

    def post(self, command: str, **arguments: Any) -> None:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "arguments": named}
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def answer(self) -> Any:
        while "event" in (message := self._read()):
            self.events.append(message)
        if "error" in message:
            raise RuntimeError(message["error"]["desc"])
        return message["return"]

    def wait(self, name: str, *, status: str | None = None) -> dict[str, Any]:
        """The next event of that name (and status); those before it are dropped."""
        while True:
            event = self.events.pop(0) if self.events else self._read()
            if event.get("event") == name and status in (
                None,
                event.get("data", {}).get("status"),
            ):
                return event
            if event.get("data", {}).get("status") in {"failed", "cancelled"}:
                raise RuntimeError(f"the move ended: {self.run('query-migrate')}")

    def pass_fd(self, fd: int, fdname: str) -> None:
        socket.send_fds(self._socket, [b" "], [fd])
        self.run("getfd", fdname=fdname)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise EOFError("QEMU closed the monitor")
        message: dict[str, Any] = json.loads(line)
        return message


@dataclass
class Vm:
    """A running QEMU. `greeting` is the time from spawn to a negotiated monitor."""

    place: Place
    process: subprocess.Popen[bytes]
    qmp: Qmp
    greeting: float

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.qmp.close()


def argv(guest: Guest, place: Place, *, role: str, incoming: bool, tuning: Tuning) -> list[str]:
    """QEMU's command line in `place`; the tap `fl-ROLE` must exist there."""
    accel = (incoming and tuning.accel) or guest.accel
    more = list(guest.extra)
    if incoming:
        more += [*tuning.extra, "-incoming", "defer", *(["-S"] if tuning.hold else [])]
    if place.tls_dir is not None:
        for endpoint in ("client", "server"):
            credentials = f"tls-creds-x509,id=tls-{endpoint},dir={place.tls_dir}"
            more += ["-object", f"{credentials},endpoint={endpoint},verify-peer=yes"]
    priority = ["nice", "-n", str(tuning.nice)] if incoming and tuning.nice else []
    return [
        *place.enter, *priority, guest.binary,
        "-machine", f"{guest.machine},vmport=off,graphics=off", "-accel", accel,
        "-cpu", guest.cpu, "-m", f"{guest.memory_mib}M", "-smp", "1",
        "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
        "-qmp", f"unix:{place.run_dir}/{role}.qmp,server=on,wait=off",
        "-serial", f"file:{place.run_dir}/{role}.console",
        "-netdev", f"tap,id=n0,ifname=fl-{role},script=no,downscript=no",
        "-device", f"virtio-net-pci,netdev=n0,mac={guest.mac},romfile=,addr=8",
        "-kernel", str(guest.kernel), "-initrd", str(guest.initrd),
        "-append", guest.append, *more,
    ]  # fmt: skip


def spawn(guest: Guest, place: Place, *, role: str, incoming: bool, tuning: Tuning) -> Vm:
    path = place.run_dir / f"{role}.qmp"
    path.unlink(missing_ok=True)
    started = time.monotonic()
    line = argv(guest, place, role=role, incoming=incoming, tuning=tuning)
    process = subprocess.Popen(line)
    qmp = Qmp(path)
    return Vm(place, process, qmp, time.monotonic() - started)


def boot(guest: Guest, place: Place, *, role: str, ready: str = "READY") -> Vm:
    """Cold start; returns once `ready` stands on the console."""
    vm = spawn(guest, place, role=role, incoming=False, tuning=Tuning())
    console = place.run_dir / f"{role}.console"
    deadline = time.monotonic() + 90
    while ready not in console.read_text(errors="replace"):
        if time.monotonic() > deadline or vm.process.poll() is not None:
            vm.stop()
            raise RuntimeError("the guest did not boot:\n" + console.read_text()[-2000:])
        time.sleep(0.1)
    return vm


def move(source: Vm, guest: Guest, to: Place, *, role: str, tuning: Tuning) -> tuple[Vm, Move]:
    """Move `source` to place `to`; returns the VM there and what the move took."""
    started = time.monotonic()
    steps: dict[str, float] = {}

    def mark(name: str) -> None:
        steps[name] = time.monotonic() - started

    target = spawn(guest, to, role=role, incoming=True, tuning=tuning)
    mark("greeting")
    try:
        uri = _prepare(source.qmp, target.qmp, to, tuning)
        stream = connect_stream(source, uri, tuning=tuning) if tuning.notsent_lowat else None
        if stream is not None:
            source.qmp.pass_fd(stream.fileno(), "stream")
            uri = "fd:stream"
        mark("prepared")
        source.qmp.events.clear()
        source.qmp.run("migrate", uri=uri)
        if stream is not None:
            limit_backlog(stream, source.qmp, tuning)
        stop = _stamp(source.qmp.wait("STOP"))
        if tuning.pause_before_switchover:
            source.qmp.wait("MIGRATION", status="pre-switchover")
            source.qmp.run("migrate-continue", state="pre-switchover")
        completed = _stamp(source.qmp.wait("MIGRATION", status="completed"))
        mark("completed")
        if tuning.cont_delay_ms:
            time.sleep(tuning.cont_delay_ms / 1e3)
        if tuning.hold:
            _cont(target.qmp)
        resume = _stamp(target.qmp.wait("RESUME"))
        mark("resume seen")
        if tuning.announce == "self":
            target.qmp.run("announce-self", initial=50, max=550, rounds=5, step=100)
        if tuning.quit_delay_ms:
            time.sleep(tuning.quit_delay_ms / 1e3)
        facts = source.qmp.run("query-migrate")
        source.qmp.post("quit")
        source.process.wait()
        source.qmp.close()
        mark("quit")
    except BaseException:
        target.stop()
        raise
    finished = time.monotonic()
    to_wall = time.time() - time.monotonic()
    ram = facts.get("ram", {})
    result = Move(
        total=finished - started, greeting=target.greeting, started=started, finished=finished,
        stop_to_resume=resume - stop, stop_to_completed=completed - stop,
        completed_to_resume=resume - completed, passes=ram.get("dirty-sync-count", 0),
        transferred=ram.get("transferred", 0), dark_bytes=ram.get("downtime-bytes", 0),
        setup_ms=facts.get("setup-time", 0), qemu_downtime_ms=facts.get("downtime", 0),
        stopped=stop - to_wall, resumed=resume - to_wall, steps=steps,
    )  # fmt: skip
    return target, result


def limit_backlog(stream: socket.socket, source: Qmp, tuning: Tuning) -> None:
    if tuning.lowat_late:
        while source.wait("MIGRATION_PASS")["data"]["pass"] < 2:
            pass
        stream.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, tuning.notsent_lowat)
    stream.close()


def connect_stream(source: Vm, uri: str, *, tuning: Tuning) -> socket.socket:
    """A socket connected to `uri` from the source's network."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = [sys.executable, str(Path(__file__).resolve()), "connect", uri]
        line.append(str(theirs.fileno()))
        subprocess.run([*source.place.enter, *line], check=True, pass_fds=[theirs.fileno()])
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    stream = socket.socket(fileno=fds[0])
    if tuning.pacing:
        stream.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", tuning.pacing))
    if not tuning.lowat_late:
        stream.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, tuning.notsent_lowat)
    return stream


def connect(uri: str, channel: int) -> None:
    """The helper behind `connect_stream`, inside the source's network."""
    _, host, port = uri.split(":")
    with (
        socket.create_connection((host, int(port))) as stream,
        socket.socket(fileno=channel) as out,
    ):
        socket.send_fds(out, [b" "], [stream.fileno()])


def _cont(qmp: Qmp) -> None:
    # The source's `completed` proves that the load is done, but the target's own state may
    # still be `inmigrate` for an instant; `cont` then means "run when done", which is fine here.
    qmp.run("cont")


def _prepare(source: Qmp, target: Qmp, to: Place, tuning: Tuning) -> str:
    wanted = {
        "events": True,
        "return-path": tuning.return_path,
        "multifd": tuning.multifd_channels > 0,
        "switchover-ack": tuning.switchover_ack,
        "pause-before-switchover": tuning.pause_before_switchover,
    }
    parameters: dict[str, Any] = {
        "downtime-limit": tuning.downtime_limit_ms,
        "max-bandwidth": tuning.max_bandwidth,
        "avail-switchover-bandwidth": tuning.avail_switchover_bandwidth,
        "multifd-channels": max(1, tuning.multifd_channels),
        "announce-rounds": 5 if tuning.announce == "qemu" else 0,
    }
    for qmp, side in ((target, "server"), (source, "client")):
        capabilities = [
            {"capability": name, "state": wanted.get(name, False)} for name in CAPABILITIES
        ]
        qmp.run("migrate-set-capabilities", capabilities=capabilities)
        creds = {"tls-creds": f"tls-{side}" if tuning.tls else "", "tls-hostname": ""}
        if tuning.tls and side == "client":
            creds["tls-hostname"] = to.migration_address
        qmp.run("migrate-set-parameters", **parameters, **creds)
    target.run("migrate-incoming", uri=f"tcp:{to.migration_address}:0")
    port = target.run("query-migrate")["socket-address"][0]["port"]
    return f"tcp:{to.migration_address}:{port}"


def _stamp(event: dict[str, Any]) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def darkness(answers: list[float], lost: list[float], move: Move) -> None:
    """Fill in the move's blackout from what the probe saw around it."""
    begin, end = move.started - 0.1, move.finished + 0.5
    inside = [t for t in answers if begin <= t <= end]
    gaps = [(b - a, a, b) for a, b in itertools.pairwise(inside)]
    move.blackout, last, first = max(gaps, default=(end - begin, begin, end))
    move.dark_before_stop, move.dark_after_resume = move.stopped - last, first - move.resumed
    move.lost = sum(1 for t in lost if begin <= t <= end)


@dataclass
class Track:
    """A guest that goes back and forth between two places while a probe watches."""

    guest: Guest
    vm: Vm
    places: tuple[Place, Place]
    client: tuple[str, ...]
    address: str
    probe_kind: str = "udp"
    at: int = 0

    def go(self, tuning: Tuning, *, settle: float = 0.3) -> Move:
        """One move to the other place, probed."""
        if tuning.sysctl:
            run(*self.places[self.at].enter, "sysctl", "-qw", *tuning.sysctl.split())
        probe = Probe(self.client, self.address, kind=self.probe_kind)
        time.sleep(settle)
        try:
            self.at = 1 - self.at
            place = self.places[self.at]
            role = "ab"[self.at]
            self.vm, result = move(self.vm, self.guest, place, role=role, tuning=tuning)
            time.sleep(0.5)
        finally:
            lost, answers = probe.stop()
        darkness(answers, lost, result)
        return result


def compare(track: Track, cases: dict[str, Tuning], *, rounds: int) -> dict[str, list[Move]]:
    """Run all cases, interleaved round by round so that a noisy minute hits all alike."""
    results: dict[str, list[Move]] = {name: [] for name in cases}
    for number in range(rounds):
        names = list(cases)
        for name in names if number % 2 else names[::-1]:
            results[name].append(track.go(cases[name]))
    return results


def sweep(track: Track, base: Tuning, *, rounds: int) -> tuple[str, dict[str, list[Move]]]:
    """The floor: the limit with the smallest median blackout among those near the best total."""
    cases = {f"{limit} ms": replace(base, downtime_limit_ms=limit) for limit in SWEEP_LIMITS_MS}
    results = compare(track, cases, rounds=rounds)
    totals = {name: statistics.median(m.total for m in moves) for name, moves in results.items()}
    fair = [name for name in cases if totals[name] <= 1.15 * min(totals.values())]
    best = min(fair, key=lambda name: statistics.median(m.blackout for m in results[name]))
    return best, results


def show(results: dict[str, list[Move]]) -> None:
    """Medians, one line per case."""
    head = (
        "case",
        "n",
        "total",
        "dark",
        "worst",
        "before",
        "after",
        "lost",
        "stop>res",
        "stop>compl",
        "compl>res",
    )
    print(("{:>26}{:>4}" + "{:>11}" * 14).format(
        *head, "greeting", "setup", "passes", "MB", "dark kB"))  # fmt: skip
    for name, moves in results.items():

        def mid(key: str, rows: list[Move] = moves, scale: float = 1e3) -> float:
            return float(statistics.median(getattr(row, key) for row in rows)) * scale

        print(
            f"{name:>26}{len(moves):>4}{mid('total'):>9.0f}ms{mid('blackout'):>9.1f}ms"
            f"{max(m.blackout for m in moves) * 1e3:>9.1f}ms{mid('dark_before_stop'):>9.1f}ms"
            f"{mid('dark_after_resume'):>9.1f}ms{mid('lost', scale=1):>11.0f}"
            f"{mid('stop_to_resume'):>9.1f}ms{mid('stop_to_completed'):>9.1f}ms"
            f"{mid('completed_to_resume'):>9.1f}ms{mid('greeting'):>9.0f}ms"
            f"{mid('setup_ms', scale=1):>9.0f}ms{mid('passes', scale=1):>11.0f}"
            f"{mid('transferred', scale=1e-6):>11.1f}{mid('dark_bytes', scale=1e-3):>11.0f}"
        )


@contextlib.contextmanager
def own_track(options: argparse.Namespace, *, tls: bool) -> Iterator[Track]:
    with tempfile.TemporaryDirectory(prefix="floor") as name, contextlib.ExitStack() as stack:
        places = stack.enter_context(own_link(Path(name), tls=tls))
        append = options.append.format(address="10.91.0.100")
        guest = Guest(
            options.kernel, options.initrd, append, memory_mib=options.memory,
            extra=tuple(options.qemu.split()), machine=options.machine, cpu=options.cpu,
        )  # fmt: skip
        vm = boot(guest, places[0], role="a", ready=options.ready)
        client = ("ip", "netns", "exec", places[0].name[:-1] + "c")
        track = Track(guest, vm, (places[0], places[1]), client, "10.91.0.100", options.probe)
        stack.callback(lambda: track.vm.stop())
        time.sleep(1.0)
        yield track


def parse_case(text: str) -> tuple[str, Tuning]:
    """`name:field=value,...` over Tuning's fields."""
    name, _, rest = text.partition(":")
    kinds = {f.name: f.type for f in fields(Tuning)}
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        value = value.replace("~", "=")
        if kinds[key] == "str":
            values[key] = value.replace("+", ",")
        elif kinds[key] == "tuple[str, ...]":
            values[key] = tuple(value.replace("+", ",").split())
        elif kinds[key] == "bool":
            values[key] = value in {"1", "true", "yes"}
        else:
            values[key] = float(value) if kinds[key] == "float" else int(float(value))
    return name, Tuning(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["sweep", "compare", "connect"])
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--kernel", type=Path)
    parser.add_argument("--initrd", type=Path)
    parser.add_argument("--append", default="console=ttyS0 quiet addr={address}/22")
    parser.add_argument("--ready", default="READY")
    parser.add_argument("--machine", default="pc-q35-10.0")
    parser.add_argument("--cpu", default="qemu64")
    parser.add_argument("--memory", type=int, default=256, help="MiB")
    parser.add_argument("--qemu", default="", help="more arguments for both QEMUs")
    parser.add_argument("--probe", choices=["udp", "icmp"], default="udp")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    options = parser.parse_args()
    if options.what == "connect":
        connect(options.cases[0], int(options.cases[1]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    cases = dict(parse_case(text) for text in options.cases)
    tls = options.tls or any(case.tls for case in cases.values())
    with own_track(options, tls=tls) as track:
        if options.what == "sweep":
            base = Tuning(tls=options.tls)
            best, results = sweep(track, base, rounds=options.rounds)
            show(results)
            print(f"the floor: downtime-limit {best}")
        else:
            results = compare(track, cases, rounds=options.rounds)
            show(results)
    if options.json:
        raw = {name: [asdict(move) for move in moves] for name, moves in results.items()}
        options.json.write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
