"""Where the files of a machine lie, below `/` or below a test's own root, and what they say."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.host.toml import toml
from godwit.model.base import check_name
from godwit.model.errors import InvalidRequest, OperationFailed, Refused
from godwit.wire.ca import write_whole

QEMU_GROUP = "godwit-qemu"
SERVICE_USER = "godwit"  # who the manager and the embedded store run as
AGENT_PORT, API_PORT, STORE_PORT = 7101, 7100, 7379

_NETWORK = re.compile(r"([a-z0-9-]{1,63})=([A-Za-z0-9_.-]{1,15})(?::([A-Za-z0-9_.-]{1,15}))?")


@dataclass(frozen=True, slots=True)
class Places:
    """The files of one machine. With another ``root`` everything lies below it, for tests."""

    root: Path = Path("/")

    @property
    def etc(self) -> Path:
        """Configuration and identities."""
        return self.root / "etc" / "godwit"

    @property
    def state(self) -> Path:
        """What the agent keeps."""
        return self.root / "var" / "lib" / "godwit"

    @property
    def ca(self) -> Path:
        """The CA's key, on a machine whose manager signs."""
        return self.etc / "ca"

    @property
    def tls(self) -> Path:
        """The host's identity: agent and guard."""
        return self.etc / "tls"

    @property
    def migration_tls(self) -> Path:
        """What QEMU shows to other hosts; it reads it as its own user."""
        return self.etc / "migration-tls"

    @property
    def manager_tls(self) -> Path:
        """The manager's identity."""
        return self.etc / "manager-tls"

    @property
    def store_tls(self) -> Path:
        """The identity of a store on this machine."""
        return self.etc / "store-tls"

    @property
    def tokens(self) -> Path:
        """Who may call the API."""
        return self.etc / "tokens"

    @property
    def admin_token(self) -> Path:
        """The first administrator's token, for the command line."""
        return self.etc / "admin-token"

    @property
    def contexts(self) -> Path | None:
        """The command line's contexts; None: where they always are."""
        return None if self.root == Path("/") else self.etc / "contexts.toml"

    def config(self, daemon: str) -> Path:
        """The file of ``host``, ``manager`` or ``store``."""
        return self.etc / f"{daemon}.toml"

    def must_be_fresh(self) -> None:
        """Refused when this machine belongs to a cluster already."""
        for path in (self.config("host"), self.ca):
            if path.exists():
                raise Refused(
                    f"this machine belongs to a cluster already: {path} is there",
                    hint=f"to begin anew, move {self.etc} away first",
                )
        if os.geteuid() != 0 and self.root == Path("/"):
            raise Refused("only root may do this", hint="run it with sudo")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a host is told about itself when it is made."""

    name: str
    address: str
    migration_address: str = ""
    migration_subnet: str = ""
    networks: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name: bridge, uplink

    def check(self) -> None:
        """InvalidRequest for what cannot be used."""
        check_name(self.name, what="host name")
        for value in (self.address, self.migration_address):
            try:
                ipaddress.ip_address(value or "::1")
            except ValueError:
                raise InvalidRequest(
                    f"{value!r} is not an address", hint="give the numbers: --address 10.0.0.11"
                ) from None


def read_networks(texts: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """``NAME=BRIDGE[:UPLINK]`` for each VM network of this host."""
    found = {}
    for text in texts:
        said = _NETWORK.fullmatch(text)
        if said is None:
            raise InvalidRequest(
                f"{text!r} is not a network", hint="write it like lan=br-lan or lan=br-lan:eth1"
            )
        found[said[1]] = (said[2], said[3] or "")
    return found


def host_config(places: Places, facts: HostFacts, endpoints: tuple[str, ...]) -> dict[str, Any]:
    """What agent and guard are told; pure."""
    networks = {
        name: {"bridge": bridge} | ({"uplink": uplink} if uplink else {})
        for name, (bridge, uplink) in facts.networks.items()
    }
    return {
        "host": facts.name,
        "paths": {
            "run": str(places.root / "run" / "godwit"),
            "state": str(places.state),
            "volumes": str(places.root / "clusterstorage"),
            "images": str(places.state / "images"),
        },
        "store": {"endpoints": list(endpoints)},
        "tls": {"dir": str(places.tls), "migration_dir": str(places.migration_tls)},
        "agent": {"address": facts.address, "port": AGENT_PORT},
        "migration": {
            "address": facts.migration_address or facts.address,
            "subnet": facts.migration_subnet,
        },
        **({"networks": networks} if networks else {}),
    }


def manager_config(
    places: Places, *, address: str, endpoints: tuple[str, ...], embedded: bool
) -> dict[str, Any]:
    """What the manager is told; pure. An ``embedded`` store's identity is in its care."""
    keeps = {"keeps": [str(places.store_tls)]} if embedded else {}
    return {
        "store": {"endpoints": list(endpoints)},
        "tls": {"dir": str(places.manager_tls), **keeps},
        "ca": {"dir": str(places.ca)},
        "api": {"tokens_file": str(places.tokens), "host": address, "port": API_PORT},
        "paths": {"state": str(places.root / "var" / "lib" / "godwit-manager")},
    }


def store_config(places: Places, *, address: str) -> dict[str, Any]:
    """What the embedded store is told; pure."""
    socket = places.root / "run" / "godwit-store" / "store.sock"
    return {
        "store": {
            "data": str(places.root / "var" / "lib" / "godwit-store"),
            "listen": [f"tcp:{address}:{STORE_PORT}", f"unix:{socket}"],
        },
        "tls": {"dir": str(places.store_tls)},
    }


def write_config(path: Path, tables: Mapping[str, Any]) -> None:
    """A configuration file, readable by all: no secret is in it."""
    write_whole(path, toml(tables).encode(), mode=0o644)


def qemu_gid(places: Places) -> int:
    """The group that may read what QEMU shows. OperationFailed when there is none."""
    try:
        return grp.getgrnam(QEMU_GROUP).gr_gid
    except KeyError:
        if places.root != Path("/"):
            return os.getegid()
        raise OperationFailed(
            f"there is no group {QEMU_GROUP}",
            hint="install packaging/sysusers.d/godwit.conf and run: systemd-sysusers",
        ) from None


def give_to_service(places: Places, *paths: Path) -> None:
    """Let the manager's and the store's user own these; fine below a test's root."""
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        if places.root != Path("/"):
            return
        raise OperationFailed(
            f"there is no user {SERVICE_USER}",
            hint="install packaging/sysusers.d/godwit.conf and run: systemd-sysusers",
        ) from None
    for path in paths:
        for each in (path, *(path.rglob("*") if path.is_dir() else ())):
            os.chown(each, user.pw_uid, user.pw_gid)
