"""The ground of the benchmarks: a lab of two hosts or more, its guests, its wires, and the probe.

What is measured is read here and nowhere else: bytes from the switch's own counters, darkness
from the 1 kHz probe in the client's namespace, times from this process's monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from godwit.host.cgroup import CGROUP_ROOT
from godwit.host.config import parse_rate
from godwit.host.netns import in_netns, opened_netns, socket_in_netns
from godwit.lab import groups, record
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.image import DemoImage, cache_root, find_demo_image
from godwit.lab.layout import CLIENT, MIG, NETS, SWITCH
from godwit.lab.options import with_defaults
from godwit.lab.probe import ProbeReport, Samples, analyse
from godwit.lab.up import up
from godwit.model.errors import Refused

LAB = "bench"
HOSTS = ("host1", "host2")
CONTROL_PORT = 7777
BOOT_S = 90.0
BEFORE_S = 0.1
AFTER_S = 0.5
_SCRATCH = "godwit-bench-"
GODWIT = Path(sys.executable).parent / "godwit"


@dataclass(frozen=True)
class Done:
    """What a command line of Godwit came to."""

    code: int
    wall_s: float
    out: str
    err: str

    def json(self) -> Any:
        """What it printed; None when that is no JSON."""
        try:
            return json.loads(self.out)
        except ValueError:
            return None


class Watch:
    """The probe, running until it is stopped."""

    def __init__(self, netns: str, address: str, file: Path) -> None:
        # It must not outlive a benchmark that is killed.
        line = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-I", "-m", "godwit.lab.probe"]
        line.append(address)
        line += ["--netns", netns, "--save", str(file)]
        self._file = file
        self._process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        if self._process.stderr is None or not self._process.stderr.readline():
            self.kill()
            raise RuntimeError("the probe does not start")

    def stop(self) -> Samples:
        """Everything it saw."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)
        self._close()
        try:
            return Samples.load(self._file)
        finally:
            self._file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it for nothing."""
        self._process.kill()
        self._process.wait()
        self._close()
        self._file.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._process.stderr is not None:
            self._process.stderr.close()


def around(samples: Samples, started: float, finished: float) -> ProbeReport:
    """What the probe saw of a span and its edges (monotonic seconds)."""
    begin, end = (started - BEFORE_S) * 1e9, (finished + AFTER_S) * 1e9
    ticks = zip(samples.sent, samples.arrived, strict=True)
    kept = [(sent, arrived) for sent, arrived in ticks if begin <= sent <= end]
    return analyse(replace(samples, sent=[s for s, _ in kept], arrived=[a for _, a in kept]))


class Ground:
    """A raised lab and the ways to ask it. `scratch` is a directory of our own, `environ` that in
    which the command line finds the lab."""

    def __init__(self, lab: Lab, image: DemoImage, scratch: Path) -> None:
        self.lab = lab
        self.image = image
        self.scratch = scratch
        self.link_bits = parse_rate(lab.record.rate)
        status = lab.status()
        self.environ = {
            **{name: value for name, value in os.environ.items() if name != "GODWIT_CONTEXT"},
            "GODWIT_URL": status["manager_url"],
            "GODWIT_TOKEN_FILE": status["token_file"],
            "GODWIT_CA_FILE": status["ca_file"],
        }
        self._switch_ports = {
            cable.switch_port: cable.net.name for cable in lab.layout.all_cables()
        }
        self._asked = 0

    def netns(self, place: str) -> str:
        """The name of a place's network namespace."""
        return self.lab.layout.netns(place)

    def migration_address(self, host: str) -> str:
        """A host's address on the migration network."""
        return self.lab.layout.address(host, MIG)

    def append(self, address: str, name: str) -> str:
        """The kernel command line of a guest that is not Godwit's."""
        return f"{self.image.append} godwit.ip={address}/22 godwit.host={name}"

    # Godwit's command line

    def godwit(self, *words: str, timeout: float = 120.0) -> Done:
        """Run the real program as a person would; the wall time includes its start."""
        started = time.monotonic()
        done = subprocess.run(
            [str(GODWIT), *words], env=self.environ, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return Done(done.returncode, time.monotonic() - started, done.stdout, done.stderr)

    def must(self, *words: str, timeout: float = 120.0) -> Any:
        """Run it with `-o json` and return what it printed; RuntimeError when it fails."""
        done = self.godwit(*words, "-o", "json", timeout=timeout)
        if done.code != 0:
            raise RuntimeError(f"godwit {' '.join(words)} ended with {done.code}: {done.err}")
        return done.json()

    # Wires

    def sent(self) -> dict[str, int]:
        """Bytes that all nodes have sent into each network so far: each byte counted once."""
        totals = {net.name: 0 for net in NETS}
        for port, received in self._received().items():
            if port in self._switch_ports:
                totals[self._switch_ports[port]] += received
        return totals

    def _received(self) -> dict[str, int]:
        with opened_netns(self.netns(SWITCH)) as descriptor:
            text = in_netns(descriptor, lambda: Path("/proc/thread-self/net/dev").read_text())
        rows = (line.partition(":") for line in text.splitlines()[2:])
        return {name.strip(): int(counts.split()[0]) for name, _, counts in rows}

    def tap(self, host: str, name: str) -> None:
        """A tap for a QEMU that is not Godwit's, in the host's bridge; gone with the lab."""
        netns = ("ip", "-n", self.netns(host))
        for words in (
            ("tuntap", "add", "dev", name, "mode", "tap"),
            ("link", "set", name, "master", "br-lan", "up"),
        ):
            subprocess.run([*netns, *words], check=True, capture_output=True)

    @contextlib.contextmanager
    def share(self, host: str, peer: str) -> Iterator[None]:
        """For a while, be in a control group of the host's, beside those of Godwit's VMs.

        What is started meanwhile stays there: it gets the processor time that a VM of Godwit
        gets, no more and no less, and it goes when the lab goes.
        """
        home = _own_groups()
        wanted = groups.create(f"{self.lab.layout.cgroup(host)}/{peer}")
        try:
            _enter(wanted)
            yield
        finally:
            _enter(home)

    # Guests

    def watch(self, address: str) -> Watch:
        """Start probing a guest from the client."""
        return Watch(self.netns(CLIENT), address, self.scratch / "probe.samples")

    def ask(self, address: str, command: str, *, patience: float = 5.0) -> dict[str, Any]:
        """One command to the demo guest's control port; TimeoutError when it stays silent."""
        self._asked += 1
        mark = f"b{os.getpid()}-{self._asked}"
        with opened_netns(self.netns(CLIENT)) as descriptor:
            channel = socket_in_netns(descriptor, kind=socket.SOCK_DGRAM)
        deadline = time.monotonic() + patience
        with channel:
            channel.settimeout(0.3)
            channel.connect((address, CONTROL_PORT))
            while time.monotonic() < deadline:
                try:
                    channel.send(f"{command} id={mark}".encode())
                    answer = json.loads(channel.recv(8192))
                except OSError:
                    time.sleep(0.02)  # an unreachable guest refuses at once
                    continue
                if answer.get("id") == mark:
                    if not answer.get("ok"):
                        raise RuntimeError(f"the guest refuses {command!r}: {answer}")
                    return dict(answer)
        raise TimeoutError(f"the guest at {address} does not answer")

    def stats(self, address: str, *, patience: float = 5.0) -> dict[str, Any]:
        """What the guest says of itself."""
        return dict(self.ask(address, "stats", patience=patience)["stats"])

    def wait_guest(self, address: str) -> None:
        """Return once a guest that was just started answers."""
        self.stats(address, patience=BOOT_S)


@contextlib.contextmanager
def raised(
    say: Any,
    *,
    rate: str,
    volumes: tuple[str, ...] = (),
    hosts: int = len(HOSTS),
    watchdog: bool = True,
) -> Iterator[Ground]:
    """A lab for the time of the run; nothing of it is left afterwards."""
    image = find_demo_image(cache_root())
    if image is None:
        raise Refused("there is no demo image", hint="run scripts/setup")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone())
        _forget_leftovers(say)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH)))
        options = replace(
            # Saved memory is written to files, and the floor is measured on files.
            with_defaults(LAB, hosts, rate=rate, storage="dir", volumes=volumes),
            # Whoever runs this keeps their own current cluster.
            contexts_file=scratch / "config/godwit/contexts.toml",
            watchdog=watchdog,
        )
        up(options, say=say)
        try:
            yield Ground(Lab.load(LAB), image, scratch)
        finally:
            down(LAB, say=lambda line: say(f"  {line}"))


def _own_groups() -> list[str]:
    """The files through which this process gets back to where it is now."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        entry = CGROUP_ROOT / controllers / path.lstrip("/") / "cgroup.procs"
        if entry.exists() and not controllers.startswith("name="):
            found.append(str(entry))
    return found


def _enter(entries: Sequence[str]) -> None:
    for entry in entries:
        Path(entry).write_text(str(os.getpid()))


def _forget_leftovers(say: Any) -> None:
    """What a killed run could not take away itself; nobody else uses these names."""
    if LAB in record.names():
        say("taking away what a killed run left")
        down(LAB)
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Two benchmarks at once measure each other."""
    with socket.socket(socket.AF_UNIX) as holder:
        try:
            holder.bind("\0godwit-benchmark")
        except OSError:
            raise Refused("another benchmark runs", hint="wait for its end") from None
        yield
