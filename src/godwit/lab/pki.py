"""The lab's certificates: one CA, and for each daemon an identity that only its node sees."""

from __future__ import annotations

import grp
import os
import secrets
import shutil
from pathlib import Path

from godwit.lab.configs import ETC, MANAGER_TLS, MIGRATION_TLS, STORE_TLS, TLS
from godwit.lab.layout import CONTROL, MGMT, MIG, OPERATOR, QEMU_USER, Layout
from godwit.qemu.tls import ensure_dh_params
from godwit.wire.ca import ClusterCa, issue, write_identity, write_qemu_credentials
from godwit.wire.identity import HOST, MANAGER, STORE


def make(layout: Layout) -> None:
    """The CA, the lab's own identity, the API's token, and every node's identities.

    QEMU's certificates come from a CA of their own: whoever takes over a QEMU cannot even shake
    hands with a daemon, not with etcd either, which asks for no role.
    """
    layout.pki.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca = ClusterCa.create(cluster=layout.name)
    ca.save(layout.pki)
    streams = ClusterCa.create(cluster=f"{layout.name} migration")
    write_identity(layout.pki / OPERATOR, issue(ca, role=MANAGER, name=f"lab-{layout.name}"))
    for node in (CONTROL, *layout.host_names):
        _daemons(layout, node, ca)
    gid = grp.getgrnam(QEMU_USER).gr_gid
    for host in layout.host_names:
        etc = layout.node_dir(host) / "etc"
        addresses = [layout.address(host, MGMT), layout.address(host, MIG)]
        write_identity(inside(etc, TLS), issue(ca, role=HOST, name=host, ips=addresses))
        credentials = inside(etc, MIGRATION_TLS)
        write_qemu_credentials(credentials, streams, host=host, gid=gid)
        ensure_dh_params(credentials)
    _write_token(layout)


def _daemons(layout: Layout, node: str, ca: ClusterCa) -> None:
    """Who keeps the records and who manages, where this node has them."""
    etc, address = layout.node_dir(node) / "etc", layout.mgmt_address(node)
    members = [member.name for member in layout.store_members] or [CONTROL]
    if node in members:
        name = node if layout.store_members else "store"
        issued = issue(ca, role=STORE, name=name, dns=["localhost"], ips=[address, "127.0.0.1"])
        write_identity(inside(etc, STORE_TLS), issued)
    if node in layout.manager_nodes:
        name = "manager" if node == CONTROL else node
        issued = issue(ca, role=MANAGER, name=name, dns=["localhost"], ips=["127.0.0.1", address])
        write_identity(inside(etc, MANAGER_TLS), issued)


def _write_token(layout: Layout) -> None:
    token = secrets.token_urlsafe(32)
    write_secret(layout.token, f"{token}\n")
    for node in layout.manager_nodes:
        write_secret(layout.node_dir(node) / "etc" / "tokens", f"lab:{token}\n")
    # For people who call the API with other tools; the key of the CA stays where it is.
    shutil.copyfile(layout.pki / "ca.pem", layout.state / "ca.pem")


def write_secret(path: Path, text: str) -> None:
    """A file only its owner may read, from its first moment."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def inside(etc: Path, path: Path) -> Path:
    """Where a path below a node's /etc/godwit lies on the real machine."""
    return etc / path.relative_to(ETC)
