"""Two hosts and a client in network namespaces, with a shaped link between the hosts.

For benchmarks that do not run inside a lab. Needs root; leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A host to run QEMU in. `enter` is the argv prefix that gets there (and execs)."""

    name: str
    enter: tuple[str, ...]
    migration_address: str
    run_dir: Path
    bridge: str = "br-lan"
    tls_dir: Path | None = None


def run(*line: str) -> None:
    subprocess.run(line, check=True, capture_output=True)


@contextlib.contextmanager
def own_link(root: Path, *, rate: str = "1gbit", tls: bool) -> Iterator[list[Place]]:
    """Two hosts and a client in namespaces of our own; all gone afterwards."""
    spaces = [f"fl-{os.getpid()}-{letter}" for letter in "abc"]
    a, b, client = spaces
    try:
        for space in spaces:
            run("ip", "netns", "add", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
        veth(a, "mig0", b, "mig0")
        for index, space in enumerate((a, b)):
            run("ip", "-n", space, "addr", "add", f"10.93.0.{11 + index}/24", "dev", "mig0")
            run("tc", "-n", space, "qdisc", "add", "dev", "mig0", "root", "tbf",
                "rate", rate, "burst", "256k", "limit", "1M")  # fmt: skip
            run("ip", "-n", space, "link", "add", "br-lan", "type", "bridge", "stp_state", "0")
            run("ip", "-n", space, "link", "set", "br-lan", "up")
        run("ip", "-n", client, "link", "add", "br-lan", "type", "bridge", "stp_state", "0")
        run("ip", "-n", client, "addr", "add", "10.91.0.1/22", "dev", "br-lan")
        run("ip", "-n", client, "link", "set", "br-lan", "up")
        for space, letter in ((a, "a"), (b, "b")):
            veth(space, "lan0", client, f"port-{letter}")
            run("ip", "-n", space, "link", "set", "lan0", "master", "br-lan")
            run("ip", "-n", client, "link", "set", f"port-{letter}", "master", "br-lan")
            run("ip", "-n", space, "tuntap", "add", f"fl-{letter}", "mode", "tap")
            run("ip", "-n", space, "link", "set", f"fl-{letter}", "master", "br-lan", "up")
        places = []
        for index, space in enumerate((a, b)):
            directory = root / "ab"[index]
            directory.mkdir()
            address = f"10.93.0.{11 + index}"
            folder = certificates(root, directory / "tls", address) if tls else None
            enter = ("ip", "netns", "exec", space)
            places.append(Place(space, enter, address, directory, tls_dir=folder))
        yield places
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def veth(space: str, name: str, other: str, other_name: str) -> None:
    run("ip", "-n", space, "link", "add", name, "type", "veth",
        "peer", "name", other_name, "netns", other)  # fmt: skip
    run("ip", "-n", space, "link", "set", name, "up")
    run("ip", "-n", other, "link", "set", other_name, "up")


def certificates(root: Path, folder: Path, address: str) -> Path:
    """x509 files as QEMU wants them, from a throw-away authority (needs `openssl`)."""
    folder.mkdir()
    ca, ca_key = root / "ca.pem", root / "ca.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    if not ca.exists():
        run("openssl", "req", "-x509", *curve, "-keyout", str(ca_key), "-out", str(ca),
            "-subj", "/CN=floor", "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    for role in ("client", "server"):
        key, cert = folder / f"{role}-key.pem", folder / f"{role}-cert.pem"
        run("openssl", "req", "-x509", *curve, "-CA", str(ca), "-CAkey", str(ca_key),
            "-keyout", str(key), "-out", str(cert), "-subj", f"/CN={address}",
            "-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=CA:FALSE",
            "-addext", f"extendedKeyUsage={role}Auth",
            "-addext", "keyUsage=critical,digitalSignature,keyEncipherment")  # fmt: skip
    # Without this file QEMU looks for a fresh prime at every start: 0.1 to 0.7 s.
    run("openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:ffdhe2048",
        "-out", str(folder / "dh-params.pem"))  # fmt: skip
    (folder / "ca-cert.pem").write_bytes(ca.read_bytes())
    return folder
