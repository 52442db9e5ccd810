"""`virsh migrate --live --p2p` between two libvirtd, as a peer of the benchmark.

Each libvirtd runs in the network of a lab host, in mount, UTS and PID namespaces of its own, with
its own configuration, state, host name and host UUID; nothing of the machine's libvirt is read or
written. Its first process is this file as `virsh.py node DIR`; killing it ends libvirtd and
every QEMU it started, and its mounts vanish with it.

Everything that could make libvirt slower and is no part of a move is off: no security driver, no
namespaces per QEMU, no log daemon, and no TLS (neither for the call nor for the stream). Calls from
libvirtd to libvirtd and the stream go over the migration network.

Control groups are on as libvirt comes (`Node.groups`), or off. Two libvirtd of one machine share a
tree and give both copies of a domain one group: the source then waits a second for the group of the
destination's running QEMU to go away before the move counts as done. Two real hosts never do, so
the benchmark measures both and says which is which.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

DAEMON = "/usr/sbin/libvirtd"
PORT, PORT_WITHOUT_GROUPS = 16509, 16510
READY_S = 60.0
_PRIVATE = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
_RUN = "/run"
_MS_BIND = 4096
_QEMU_DRIVER = "libvirt/connection-driver/libvirt_driver_qemu.so"


class VirshError(Exception):
    """libvirt did not do what it was asked; the text is its own."""


def missing() -> str:
    """Empty when libvirt can be compared with, else what is missing and how to install it."""
    lacks = [name for name in ("virsh",) if shutil.which(name) is None]
    if not Path(DAEMON).exists():
        lacks.append("libvirtd")
    if not any(folder.joinpath(_QEMU_DRIVER).exists() for folder in _library_folders()):
        lacks.append("libvirt's QEMU driver")
    return f"{', '.join(lacks)} missing; {install_hint()}" if lacks else ""


def _library_folders() -> list[Path]:
    return [Path("/usr/lib"), Path("/usr/lib64"), *Path("/usr/lib").glob("*-linux-gnu")]


def install_hint() -> str:
    """The command that installs it, from the same suite as QEMU: an older libvirt may not know a
    newer QEMU."""
    names = ["libvirt-daemon-driver-qemu", "libvirt-daemon", "libvirt-clients"]
    policy = subprocess.run(
        ["apt-cache", "policy", "libvirt0"], capture_output=True, text=True, check=False
    ).stdout
    suite = re.search(r"[a-z]+-backports", policy)
    if suite and _qemu_from_backports():
        more = ("libvirt-common", "libvirt0", "libvirt-daemon-common", "libvirt-daemon-log")
        names = [f"{name}/{suite.group()}" for name in (*names, *more)]
    return "install it: apt-get install --no-install-recommends " + " ".join(names)


def _qemu_from_backports() -> bool:
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "qemu-system-x86"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "~bpo" in shown.stdout


@dataclass(frozen=True)
class Node:
    """One libvirtd: in which network, under which name and address. `root` holds its files.

    `groups`: it puts its QEMUs into control groups, as it does when nobody says otherwise.
    """

    name: str
    netns: str
    address: str
    root: Path
    groups: bool = True

    @property
    def port(self) -> int:
        """Where it takes calls from the other one."""
        return PORT if self.groups else PORT_WITHOUT_GROUPS


@dataclass(frozen=True)
class Domain:
    """The guest, as both libvirtd know it."""

    name: str
    kernel: Path
    initrd: Path
    append: str
    memory_mib: int
    mac: str
    bridge: str = "br-lan"
    machine: str = "pc-q35-10.0"
    cpu: str = "qemu64"
    hypervisor: str = "qemu"
    emulator: str = "/usr/bin/qemu-system-x86_64"

    def xml(self) -> str:
        """Its definition."""
        return f"""<domain type='{self.hypervisor}'>
  <name>{self.name}</name>
  <uuid>{uuid.uuid5(uuid.NAMESPACE_DNS, self.mac)}</uuid>
  <memory unit='MiB'>{self.memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{self.machine}'>hvm</type>
    <kernel>{escape(str(self.kernel))}</kernel>
    <initrd>{escape(str(self.initrd))}</initrd>
    <cmdline>{escape(self.append)}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>{self.cpu}</model></cpu>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>{self.emulator}</emulator>
    <controller type='usb' model='none'/>
    <controller type='scsi' model='virtio-scsi'/>
    <interface type='bridge'>
      <source bridge='{self.bridge}'/>
      <mac address='{self.mac}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
    <serial type='null'/>
    <video><model type='none'/></video>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='builtin'/></rng>
  </devices>
</domain>
"""


class Daemon:
    """A running libvirtd. `pid` is its namespaces' first process, as this machine counts."""

    def __init__(self, node: Node) -> None:
        """Starts it and returns when it answers; VirshError with its log when it does not."""
        self.node = node
        self._log = node.root / "daemon.log"
        node.root.mkdir(parents=True)
        plan = {
            **asdict(node), "root": str(node.root), "uuid": str(uuid.uuid4()), "port": node.port,
        }  # fmt: skip
        (node.root / "plan.json").write_text(json.dumps(plan))
        line = [
            "nsenter", f"--net=/run/netns/{node.netns}", "--",
            "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
            "--", sys.executable, "-I", str(Path(__file__).resolve()), "node", str(node.root),
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self.pid = self._first_process()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def virsh(self, *words: str, timeout: float = 60.0) -> str:
        """Run virsh there; what it printed. VirshError when it failed."""
        line = [*self.enter(), "virsh", "--quiet", "--connect", "qemu:///system", *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 0:
            raise VirshError(f"virsh {words[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def enter(self) -> list[str]:
        """The words that run a program beside libvirtd."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid", "--"]

    def stop(self) -> None:
        """End it with all it started."""
        self._process.kill()
        self._process.wait()

    def _first_process(self) -> int:
        """`unshare` forks: its child is the first process of the new PID namespace."""
        deadline = time.monotonic() + 10
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while True:
            words = path.read_text().split() if path.exists() else []
            if words:
                return int(words[0])
            self._check(deadline)
            time.sleep(0.01)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                self.virsh("version")
            except VirshError:
                self._check(deadline)
                time.sleep(0.1)
            else:
                return

    def _check(self, deadline: float) -> None:
        if self._process.poll() is not None or time.monotonic() > deadline:
            words = self._log.read_text(errors="replace")[-2000:]
            raise VirshError(f"libvirtd of {self.node.name} does not start: {words}")


class Pair:
    """Two libvirtd and one domain that goes back and forth between them."""

    def __init__(self) -> None:
        self.daemons: list[Daemon] = []
        self.at = 0
        self._domain: Domain | None = None

    def add(self, node: Node) -> None:
        """Start one of the two libvirtd."""
        self.daemons.append(Daemon(node))

    def version(self) -> str:
        """libvirt's and QEMU's versions, in its own words."""
        return " / ".join(self.daemons[0].virsh("version").splitlines()[-2:])

    def boot(self, domain: Domain) -> None:
        """Start a domain on the first host, instead of the one before it."""
        self.destroy()
        here = self.daemons[0]
        definition = here.node.root / f"{domain.name}.xml"
        definition.write_text(domain.xml())
        here.virsh("create", str(definition))
        self.at, self._domain = 0, domain

    def destroy(self) -> None:
        """End the domain, wherever it is."""
        if self._domain is None:
            return
        for daemon in self.daemons:
            with contextlib.suppress(VirshError):
                daemon.virsh("destroy", self._domain.name)
        self._domain = None

    def migrate_argv(self, *options: str) -> list[str]:
        """The command that moves the domain to the other host, ready to be run."""
        if self._domain is None:
            raise VirshError("no domain was booted")
        to = self.daemons[1 - self.at].node
        return [
            *self.daemons[self.at].enter(), "virsh", "--quiet", "--connect", "qemu:///system",
            "migrate", "--live", "--p2p", *options, self._domain.name,
            f"qemu+tcp://{to.address}:{to.port}/system", "--migrateuri", f"tcp://{to.address}",
        ]  # fmt: skip

    def settle(self) -> str:
        """After a move: find out where the domain is; its state there, empty when nowhere."""
        if self._domain is None:
            return ""
        found = ""
        for index, daemon in enumerate(self.daemons):
            with contextlib.suppress(VirshError):
                state = daemon.virsh("domstate", self._domain.name)
                if state and (not found or state == "running"):
                    self.at, found = index, state
        return found

    def abort(self) -> None:
        """Call off a move under way."""
        if self._domain is not None:
            with contextlib.suppress(VirshError):
                self.daemons[self.at].virsh("domjobabort", self._domain.name)

    def completed(self) -> dict[str, str]:
        """libvirt's own report of the last move, from where the domain is now."""
        if self._domain is None:
            return {}
        with contextlib.suppress(VirshError):
            lines = self.daemons[self.at].virsh(
                "domjobinfo", self._domain.name, "--completed", "--keep-completed"
            )
            rows = (line.partition(":") for line in lines.splitlines())
            return {name.strip(): value.strip() for name, _, value in rows if value.strip()}
        return {}

    def stop(self) -> None:
        """End everything."""
        for daemon in self.daemons:
            daemon.stop()
        self.daemons.clear()


# Inside: the first process of a libvirtd's namespaces


def node_main(root: Path) -> int:
    """Lay out private directories, start libvirtd, and reap what it leaves, as a first process."""
    plan = json.loads((root / "plan.json").read_text())
    socket.sethostname(plan["name"])
    _hide(plan["name"])
    for path in _PRIVATE:
        private = root / "private" / path.strip("/")
        private.mkdir(parents=True)
        _mount(str(private), path)
    run_dir = root / "private/run"
    run_dir.mkdir()
    (run_dir / "netns").mkdir()
    _mount(str(run_dir), _RUN)
    configuration = Path("/etc/libvirt")
    daemon = {
        "listen_tls": 0, "listen_tcp": 1, "listen_addr": plan["address"],
        "tcp_port": str(plan["port"]), "auth_tcp": "none", "auth_unix_rw": "none",
        "host_uuid": plan["uuid"],
    }  # fmt: skip
    driver: dict[str, object] = {
        "user": "root", "group": "root", "security_driver": "none", "dynamic_ownership": 0,
        "remember_owner": 0, "namespaces": [], "stdio_handler": "file",
        "migration_address": plan["address"], "migration_host": plan["address"],
    }  # fmt: skip
    if not plan["groups"]:
        driver["cgroup_controllers"] = []
    for name, values in (("libvirtd.conf", daemon), ("qemu.conf", driver)):
        # JSON's numbers, texts and lists are libvirt's too.
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        (configuration / name).write_text("".join(lines))
    process = subprocess.Popen(
        [DAEMON, "--config", str(configuration / "libvirtd.conf"), "--listen"]
    )
    while True:
        # QEMUs are orphans of libvirtd: one that is not reaped looks alive to it.
        pid, status = os.wait()
        if pid == process.pid:
            return os.waitstatus_to_exitcode(status) & 255


def _hide(name: str) -> None:
    """What libvirt looks up about its host's name must not leave this machine."""
    hosts = Path(f"/tmp/hosts-{os.getpid()}")
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    _mount(str(hosts), "/etc/hosts")
    hosts.unlink()


def _mount(source: str, target: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), None, _MS_BIND, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "node":
        sys.exit("usage: virsh.py node DIR (started by the benchmark)")
    sys.exit(node_main(Path(sys.argv[2])))
