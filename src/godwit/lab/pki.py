"""The lab's certificates: one CA, and for each daemon an identity that only its node sees."""

from __future__ import annotations

import grp
import os
import secrets
import shutil
import time
from pathlib import Path

from godwit.lab.configs import CA, ETC, IOFENCE_TLS, MANAGER_TLS, MIGRATION_TLS, STORE_TLS, TLS
from godwit.lab.layout import CONTROL, MGMT, MIG, OPERATOR, QEMU_USER, STORAGE, Layout
from godwit.manager.issuing import Issuer, describe
from godwit.qemu.tls import ensure_dh_params
from godwit.wire.ca import Issued, issue, write_identity, write_qemu_credentials
from godwit.wire.identity import HOST, MANAGER, MIGRATION, STORE
from godwit.wire.identity import STORAGE as STORAGE_ROLE
from godwit.wire.keeper import Place


def make(layout: Layout) -> None:
    """The CAs, the lab's own identity, the API's token, and every node's identities.

    QEMU's certificates come from a CA of their own: whoever takes over a QEMU cannot even shake
    hands with a daemon, not with etcd either, which asks for no role. Managers sign for hosts that
    join, so their nodes have the CAs' keys and the journal of what was signed.
    """
    layout.pki.mkdir(parents=True, exist_ok=True, mode=0o700)
    issuer = Issuer.create(layout.pki / "authority", cluster=layout.name)
    issuer.of(HOST).save(layout.pki)
    operator = issue(issuer.of(MANAGER), role=MANAGER, name=f"lab-{layout.name}")
    write_identity(layout.pki / OPERATOR, operator)
    for node in (CONTROL, *layout.host_names):
        _daemons(layout, node, issuer)
    if STORAGE in layout.nodes:
        address = layout.mgmt_address(STORAGE)
        fences = _issued(issuer, STORAGE_ROLE, STORAGE, ips=[address, "127.0.0.1"])
        write_identity(inside(layout.node_dir(STORAGE) / "etc", IOFENCE_TLS), fences)
    gid = grp.getgrnam(QEMU_USER).gr_gid
    for host in layout.host_names:
        etc = layout.node_dir(host) / "etc"
        addresses = [layout.address(host, MGMT), layout.address(host, MIG)]
        write_identity(inside(etc, TLS), _issued(issuer, HOST, host, ips=addresses))
        credentials = inside(etc, MIGRATION_TLS)
        stream = write_qemu_credentials(credentials, issuer.of(MIGRATION), host=host, gid=gid)
        _note(issuer, MIGRATION, host, stream)
        ensure_dh_params(credentials)
    for node in layout.manager_nodes:
        shutil.copytree(issuer.directory, inside(layout.node_dir(node) / "etc", CA))
    _write_token(layout)


def _daemons(layout: Layout, node: str, issuer: Issuer) -> None:
    """Who keeps the records and who manages, where this node has them."""
    etc, address = layout.node_dir(node) / "etc", layout.mgmt_address(node)
    members = [member.name for member in layout.store_members] or [CONTROL]
    if node in members:
        name = node if layout.store_members else "store"
        issued = _issued(issuer, STORE, name, ips=[address, "127.0.0.1"])
        write_identity(inside(etc, STORE_TLS), issued)
        Place(inside(etc, STORE_TLS)).take_list(issuer.last_list(STORE).pem)
    if node in layout.manager_nodes:
        name = "manager" if node == CONTROL else node
        issued = _issued(issuer, MANAGER, name, ips=["127.0.0.1", address])
        write_identity(inside(etc, MANAGER_TLS), issued)


def _issued(issuer: Issuer, role: str, name: str, *, ips: list[str]) -> Issued:
    dns = [] if role == HOST else ["localhost"]
    made = issue(issuer.of(role), role=role, name=name, dns=dns, ips=ips)
    _note(issuer, role, name, made)
    return made


def _note(issuer: Issuer, role: str, name: str, made: Issued) -> None:
    issuer.note([describe(made.cert, role=role, name=name, now=time.time())])


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
