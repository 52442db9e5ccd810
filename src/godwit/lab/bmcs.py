"""The BMCs of a lab: each host's own process, with an address of its own on the management network.

Its files lie in ``<state>/bmcs/<host>``: certificate and key, self-signed as a factory's are; who
is let in (0600); the process. Its control group is one of the lab's, so `lab down` ends it
whatever happened; nobody starts it again when it dies, except ``lab fault restart HOST bmc``.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import secrets
import socket
import ssl
import sys
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from godwit.host.files import load_json, save_json, write_durable
from godwit.host.netns import opened_netns, socket_in_netns
from godwit.host.process import Process, is_alive, spawn
from godwit.lab import groups
from godwit.lab.layout import Layout
from godwit.model.errors import NotFound
from godwit.model.power import PowerConfig
from godwit.power.choose import sealed
from godwit.power.vault import FILE as KEY_FILE
from godwit.power.vault import Vault

USER: Final = "admin"
UNIT: Final = "bmc"  # its name among the processes of its host
_DAYS: Final = 3650


def make_certificate(cert: Path, key: Path, *, name: str, address: str) -> None:
    """A self-signed certificate that carries its address, too, so that it is its own CA."""
    secret = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(address))]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), False)
        .sign(secret, hashes.SHA256())
    )
    key.touch(mode=0o600)
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))


def make(layout: Layout) -> None:
    """What the BMCs are to be: certificates, passwords; and the managers' key for secrets."""
    for host in layout.host_names:
        folder = layout.bmc_dir(host)
        folder.mkdir(parents=True, mode=0o700)
        address = layout.bmc_address(host)
        cert, key = folder / "cert.pem", folder / "key.pem"
        make_certificate(cert, key, name=layout.bmc(host), address=address)
        config = {
            "lab": layout.name,
            "root": str(layout.state_root),
            "host": host,
            "group": layout.cgroup(host),
            "user": USER,
            "password": secrets.token_urlsafe(15),
            "cert": str(cert),
            "key": str(key),
        }
        save_json(_config(layout, host), config)
    vault_of(layout).create()
    first, *others = key_files(layout)
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(path, first.read_bytes())


def key_files(layout: Layout) -> tuple[Path, ...]:
    """Where each of the lab's managers has the key for secrets: the same one."""
    folders = (layout.node_dir(node) / "state" / "manager" for node in layout.manager_nodes)
    return tuple(folder / KEY_FILE for folder in folders)


def vault_of(layout: Layout) -> Vault:
    """The key with which the lab's managers seal passwords."""
    return Vault(key_files(layout)[0])


def power_config(layout: Layout, host: str, *, at: float) -> PowerConfig:
    """The record of a host's power device, its password sealed."""
    config = _read(layout, host)
    der = ssl.PEM_cert_to_DER_cert((layout.bmc_dir(host) / "cert.pem").read_text())
    device = PowerConfig(
        type="redfish",
        address=url(layout, host),
        user=str(config["user"]),
        password="",
        fingerprint=hashlib.sha256(der).hexdigest(),
        set_at=at,
        set_by="lab",
    )
    return sealed(host, device, str(config["password"]), vault=vault_of(layout))


def url(layout: Layout, host: str) -> str:
    """Where a host's BMC is, for whoever is on the management network."""
    return f"https://{layout.bmc_address(host)}"


def start(layout: Layout, host: str) -> Process:
    """Start a host's BMC; it listens already when this returns."""
    entries = groups.create(layout.cgroup(layout.bmc(host)))
    with contextlib.ExitStack() as opened:
        space = opened.enter_context(opened_netns(layout.netns(layout.bmc(host))))
        sock = opened.enter_context(socket_in_netns(space, socket.AF_INET))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((layout.bmc_address(host), 443))
        sock.listen(16)
        log = layout.logs(host)
        log.mkdir(parents=True, exist_ok=True)
        given = [word for entry in entries for word in ("--group", entry)]
        process = spawn(
            [
                *(sys.executable, "-I", "-m", "godwit.lab.bmc", str(_config(layout, host))),
                *("--fd", str(sock.fileno()), *given),
            ],
            pass_fds=(sock.fileno(),),
            stdout=log / "bmc.log",
            stderr=log / "bmc.log",
        )
    save_json(_process(layout, host), {"pid": process.pid, "start_time": process.start_time})
    return process


def process(layout: Layout, host: str) -> Process:
    """A host's BMC as the real machine counts it; NotFound when it does not run."""
    found = load_json(_process(layout, host))
    if isinstance(found, dict):
        known = Process(int(found["pid"]), int(found["start_time"]))
        if is_alive(known):
            return known
    raise NotFound(
        f"the BMC of {host} does not run", hint=f"godwit lab fault restart {host} {UNIT}"
    )


def restart(layout: Layout, host: str) -> Process:
    """End a host's BMC, if it runs, and start it again."""
    groups.clear(layout.cgroup(layout.bmc(host)))
    return start(layout, host)


def _config(layout: Layout, host: str) -> Path:
    return layout.bmc_dir(host) / "bmc.json"


def _process(layout: Layout, host: str) -> Path:
    return layout.bmc_dir(host) / "process.json"


def _read(layout: Layout, host: str) -> dict[str, Any]:
    found = load_json(_config(layout, host))
    if not isinstance(found, dict):
        raise NotFound(f"{host} has no BMC", hint="this lab was raised without")
    return found
