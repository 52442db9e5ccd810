"""``godwit cluster init``: the first host of a new cluster, with its CA.

The CA's key is made here and stays here; every other host makes its own key and brings only a
signing request. What was written is taken away again when a step fails.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from godwit.client.settings import Target, save_context
from godwit.form.places import (
    API_PORT,
    STORE_PORT,
    HostFacts,
    Places,
    give_to_service,
    host_config,
    manager_config,
    qemu_gid,
    store_config,
    write_config,
)
from godwit.manager.issuing import VALID_DAYS, Issuer, describe
from godwit.model.base import check_name
from godwit.model.errors import InvalidRequest, Refused
from godwit.qemu.tls import ensure_dh_params
from godwit.wire.ca import Issued, issue, write_identity, write_qemu_files, write_whole
from godwit.wire.identity import HOST, MANAGER, MIGRATION, STORAGE, STORE, migration_dns
from godwit.wire.keeper import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    """What was made. ``units`` are to be started in this order."""

    cluster: str
    url: str
    fingerprint: str
    units: tuple[str, ...]


def init(
    places: Places, facts: HostFacts, *, cluster: str, endpoints: tuple[str, ...] = ()
) -> Formed:
    """Make the cluster. ``endpoints`` are an etcd's; without, this host gets the embedded store.

    Errors: Refused (this machine belongs to a cluster already), InvalidRequest.
    """
    check_name(cluster, what="cluster name")
    facts.check()
    embedded = not endpoints
    if any(not one.startswith("https://") for one in endpoints):
        raise InvalidRequest(
            "the store's endpoints have to be https:// addresses",
            hint="like: --endpoints https://10.0.0.1:2379,https://10.0.0.2:2379",
        )
    places.must_be_fresh()
    reached = endpoints or (f"https://{facts.address}:{STORE_PORT}",)
    with _undone_on_failure(places):
        places.etc.mkdir(parents=True, exist_ok=True)
        issuer = Issuer.create(places.ca, cluster=cluster)
        _identities(places, facts, issuer, embedded=embedded)
        write_config(
            places.config("manager"),
            manager_config(places, address=facts.address, endpoints=reached, embedded=embedded),
        )
        told = host_config(places, facts, reached)
        if embedded:
            write_config(places.config("store"), store_config(places, address=facts.address))
        token = secrets.token_urlsafe(32)
        write_whole(places.tokens, f"admin:{token}\n".encode(), mode=0o600)
        write_whole(places.admin_token, f"{token}\n".encode(), mode=0o600)
        owned = [places.ca, places.manager_tls, places.tokens]
        give_to_service(places, *owned, *([places.store_tls] if embedded else []))
        url = f"https://{_in_url(facts.address)}:{API_PORT}"
        target = Target(url=url, token_file=places.admin_token, ca_file=places.tls / "ca.pem")
        save_context(cluster, target, file=places.contexts)
        # The last file: it says that this machine belongs to a cluster.
        write_config(places.config("host"), told)
    units = ("godwit-manager", "godwit-guard", "godwit-agent")
    return Formed(
        cluster=cluster,
        url=url,
        fingerprint=issuer.fingerprint,
        units=("godwit-store", *units) if embedded else units,
    )


def issue_identity(
    places: Places, *, role: str, name: str, addresses: tuple[str, ...], into: Path
) -> None:
    """``godwit cluster issue``: for an etcd member, a second manager, or a storage server.

    Only where the CA's key is. Errors: IdentityUnusable, InvalidRequest, Refused.
    """
    check_name(name)
    if role not in (STORE, MANAGER, STORAGE):
        raise InvalidRequest(
            f"{role} is not issued like this", hint="a host joins: godwit cluster token create"
        )
    if into.exists() and any(into.iterdir()):
        raise Refused(f"{into} is not empty", hint="name a new directory")
    issuer = Issuer(places.ca)
    dns = ["localhost"] if role == STORE else []
    made = issue(issuer.of(role), role=role, name=name, dns=dns, ips=addresses, days=VALID_DAYS)
    issuer.note([describe(made.cert, role=role, name=name, now=time.time())])
    write_identity(into, made)
    Place(into).take_list(issuer.last_list(role).pem)


def _identities(places: Places, facts: HostFacts, issuer: Issuer, *, embedded: bool) -> None:
    name = facts.name
    ips = list(dict.fromkeys(filter(None, (facts.address, facts.migration_address))))
    local = [*ips, "127.0.0.1"]
    made: list[tuple[str, Issued]] = []

    def make(role: str, *, dns: list[str], addresses: list[str]) -> Issued:
        ca = issuer.of(role)
        one = issue(ca, role=role, name=name, dns=dns, ips=addresses, days=VALID_DAYS)
        made.append((role, one))
        return one

    write_identity(places.tls, make(HOST, dns=[], addresses=ips))
    write_identity(places.manager_tls, make(MANAGER, dns=["localhost"], addresses=local))
    if embedded:
        write_identity(places.store_tls, make(STORE, dns=["localhost"], addresses=local))
    stream = make(MIGRATION, dns=[migration_dns(name)], addresses=[])
    write_qemu_files(places.migration_tls, stream, gid=qemu_gid(places))
    ensure_dh_params(places.migration_tls)
    now = time.time()
    issuer.note(describe(one.cert, role=role, name=name, now=now) for role, one in made)


@contextlib.contextmanager
def _undone_on_failure(places: Places) -> Iterator[None]:
    """Take away what was made when a step fails; what was there before stays."""
    before = set(places.etc.iterdir()) if places.etc.is_dir() else set()
    try:
        yield
    except BaseException:
        for path in set(places.etc.iterdir() if places.etc.is_dir() else ()) - before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        raise


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
