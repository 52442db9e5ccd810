"""A Ceph of one node in memory, from the distribution's packages: one monitor, one OSD, one pool.

It listens in the network namespace of a lab's node. Its data is in the OSD's memory: what is proven
with it is who writes when, and not what a medium keeps.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from godwit.host.process import Process, kill, spawn
from godwit.host.run import run

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph", "rbd", "ceph-authtool", "monmaptool")
POOL, CLIENT = "vms", "godwit"
MONITOR_PORT = 6789
_TIMEOUT = 60.0


def missing() -> str:
    """What would have to be installed; empty when nothing is missing."""
    gone = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(gone)} (packages ceph-mon, ceph-osd, ceph-common)" if gone else ""


@dataclass(frozen=True)
class Ceph:
    """A running one; ``address`` is its monitor's, ``netns`` where it listens."""

    home: Path
    netns: str
    address: str
    daemons: list[Process] = field(default_factory=list)

    def signal_osd(self, number: int) -> None:
        """Stop the OSD, or let it go on."""
        os.kill(self.daemons[-1].pid, number)

    def config(self, keyring: str) -> str:
        """What a client has to know."""
        return (
            f"[global]\nmon host = v1:{self.address}:{MONITOR_PORT}\nkeyring = {keyring}\n"
            "auth cluster required = cephx\nauth service required = cephx\n"
            "auth client required = cephx\n"
        )

    def do(self, program: str, *words: str) -> str:
        """One of Ceph's own tools, as its administrator."""
        argv = [program, "-c", str(self.home / "ceph.conf"), *words]
        return run(argv, timeout=_TIMEOUT, netns=self.netns).decode()

    def keyring(self) -> bytes:
        """The secret of the client that hosts are."""
        caps = ("mon", "profile rbd", "osd", f"profile rbd pool={POOL}")
        return self.do("ceph", "auth", "get-or-create", f"client.{CLIENT}", *caps).encode()


@contextlib.contextmanager
def one_node(netns: str, address: str) -> Iterator[Ceph]:
    """Raise it, with an empty pool; ended with all it had at the end."""
    home = Path(tempfile.mkdtemp(prefix="godwit-ceph-"))
    ceph = Ceph(home, netns, address)
    try:
        _monitor(ceph)
        _osd(ceph)
        ceph.do("ceph", "osd", "pool", "create", POOL, "8")
        ceph.do("ceph", "osd", "pool", "application", "enable", POOL, "rbd")
        yield ceph
    finally:
        for process in reversed(ceph.daemons):
            kill(process)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
        shutil.rmtree(home, ignore_errors=True)


def _monitor(ceph: Ceph) -> None:
    home, fsid = ceph.home, str(uuid4())
    for folder in ("mon", "osd", "run"):
        (home / folder).mkdir()
    (home / "ceph.conf").write_text(
        ceph.config(str(home / "keyring"))
        + f"fsid = {fsid}\npublic addr = {ceph.address}\ncluster addr = {ceph.address}\n"
        "osd pool default size = 1\nosd pool default min size = 1\nosd crush chooseleaf type = 0\n"
        "mon allow pool size one = true\nosd objectstore = memstore\n"
        "memstore device bytes = 1073741824\nms bind msgr2 = false\n"
        f"run dir = {home}/run\nadmin socket = {home}/run/$name.asok\n"
        f"log file = {home}/$name.log\nmon data = {home}/mon\nosd data = {home}/osd\n"
        f"[osd]\nkeyring = {home}/osd/keyring\n"
    )
    keyring, monmap = str(home / "keyring"), str(home / "monmap")
    everything = ("--cap", "mon", "allow *")
    tool = ["ceph-authtool", "--gen-key"]
    run([*tool, "--create-keyring", keyring, "-n", "mon.", *everything], timeout=_TIMEOUT)
    more = ("--cap", "osd", "allow *", "--cap", "mgr", "allow *")
    run([*tool, keyring, "-n", "client.admin", *everything, *more], timeout=_TIMEOUT)
    where = f"[v1:{ceph.address}:{MONITOR_PORT}]"
    make = ["monmaptool", "--create", "--addv", "a", where, "--fsid", fsid, monmap]
    run(make, timeout=_TIMEOUT)
    ceph.do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    ceph.daemons.append(_daemon(ceph, "ceph-mon", "a"))


def _osd(ceph: Ceph) -> None:
    home, uuid = ceph.home, str(uuid4())
    ceph.do("ceph", "osd", "new", uuid)  # waits until the monitor answers
    caps = ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd")
    key = ceph.do("ceph", "auth", "get-or-create", "osd.0", *caps)
    (home / "osd" / "keyring").write_text(key)
    ceph.do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", uuid)
    ceph.daemons.append(_daemon(ceph, "ceph-osd", "0"))


def _daemon(ceph: Ceph, program: str, name: str) -> Process:
    """In the foreground, so that it is ours to end."""
    log = ceph.home / f"{program}.out"
    inside = ["ip", "netns", "exec", ceph.netns, program, "-f"]
    return spawn([*inside, "-c", str(ceph.home / "ceph.conf"), "-i", name], stdout=log, stderr=log)
