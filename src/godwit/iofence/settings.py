"""The configuration file of the fencing daemon: places, and the addresses each host comes from.

TOML. A key that nobody knows is an error, because a misspelt key would silently mean its default;
so is an address of two hosts, because then neither could be shut out alone.

    [fence]
    name = "storage"            # who it is: godwit://storage/NAME in its certificate
    address = "10.92.0.2"       # where managers reach it
    [hosts]
    host1 = ["10.94.0.11"]      # every address from which it may reach the places
    [iscsi."iqn.2026-11.org.example:luns"]
    [nfs."/shared"]             # as hosts mount it
    file = "/etc/ganesha/godwit-shared.conf"    # written by us, included by ganesha.conf
    block = '''Export_Id = 1; ...'''            # of its EXPORT, without access and clients
    supervised = true           # something starts its server again at once when it ends
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from godwit.model.base import check_name
from godwit.model.errors import GodwitError, InvalidRequest
from godwit.model.fencing import PORT, place_of
from godwit.model.volume import Beneath

Kind = Literal["iscsi", "nfs"]
ISCSI_PORT, NFS_PORT, MOUNT_PORT = 3260, 2049, 20048
LOOPBACK = frozenset({"127.0.0.1", "::1"})
"""Entries that let nobody in from elsewhere: a target that opens itself to all is told of one."""


@dataclass(frozen=True, kw_only=True)
class PlaceSettings:
    """A target or an export. ``also``: addresses that may reach it and belong to no host.

    ``port``: where its server listens; ``mount_port``: where its mount daemon does (nfs).
    ``file`` and ``block``: the server's configuration of the export, and what is the
    administrator's in it (nfs). ``supervised``: the server may be ended when nothing else helps,
    for it is started again at once (nfs).
    """

    kind: Kind
    name: str
    port: int
    also: tuple[str, ...] = ()
    mount_port: int = MOUNT_PORT
    file: Path = Path()
    block: str = ""
    supervised: bool = False

    @property
    def shown(self) -> frozenset[str]:
        """What the server may call it (nfs): as it is mounted, or by its path there."""
        path = re.search(r"^\s*Path\s*=\s*([^;]+?)\s*;", self.block, re.MULTILINE | re.IGNORECASE)
        return frozenset([self.name, *([path[1].strip('"')] if path else [])])

    @property
    def place(self) -> str:
        """As managers call it."""
        if self.kind == "iscsi":
            return place_of(Beneath(kind="iscsi", target=self.name))
        return place_of(Beneath(kind="nfs", export=self.name))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it. ``hosts``: host -> its addresses."""

    name: str
    address: str
    port: int = PORT
    state: Path = Path("/var/lib/godwit-iofence")
    tls_dir: Path = Path("/etc/godwit/iofence-tls")
    hosts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    places: tuple[PlaceSettings, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Errors: InvalidRequest, with the file and what is wrong in it."""
        try:
            return read(tomllib.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidRequest(f"{path} cannot be used: {error}", hint="correct it") from error
        except GodwitError as error:
            raise InvalidRequest(f"{path}: {error.message}", hint=error.hint) from error


def read(tables: Mapping[str, Any]) -> Settings:
    """The settings in a parsed file. InvalidRequest, ValueError."""
    _known(tables, {"fence", "tls", "hosts", "iscsi", "nfs"}, "the file")
    fence, tls = _table(tables, "fence"), _table(tables, "tls")
    _known(fence, {"name", "address", "port", "state"}, "[fence]")
    _known(tls, {"dir"}, "[tls]")
    for needed in ("name", "address"):
        if needed not in fence:
            raise InvalidRequest(f"[fence] has no {needed}", hint="say it")
    hosts = {
        check_name(name, what="host"): _addresses(given, f"the host {name}")
        for name, given in _table(tables, "hosts").items()
    }
    _each_is_one_hosts(hosts)
    return Settings(
        name=check_name(str(fence["name"])),
        address=str(ipaddress.ip_address(fence["address"])),
        port=int(fence.get("port", PORT)),
        state=Path(fence.get("state", Settings.state)),
        tls_dir=Path(tls.get("dir", Settings.tls_dir)),
        hosts=hosts,
        places=(
            *(_iscsi(name, given) for name, given in _table(tables, "iscsi").items()),
            *(_nfs(name, given) for name, given in _table(tables, "nfs").items()),
        ),
    )


def _iscsi(name: str, given: Mapping[str, Any]) -> PlaceSettings:
    _known(given, {"port", "also"}, f"the target {name}")
    also = _addresses(given.get("also", []), f"the target {name}")
    return PlaceSettings(
        kind="iscsi", name=name, port=int(given.get("port", ISCSI_PORT)), also=also
    )


def _nfs(name: str, given: Mapping[str, Any]) -> PlaceSettings:
    known = {"port", "mount_port", "also", "file", "block", "supervised"}
    _known(given, known, f"the export {name}")
    for needed in ("file", "block"):
        if needed not in given:
            raise InvalidRequest(f"the export {name} has no {needed}", hint="say it")
    return PlaceSettings(
        kind="nfs",
        name=name.rstrip("/") or "/",
        port=int(given.get("port", NFS_PORT)),
        also=_addresses(given.get("also", []), f"the export {name}"),
        mount_port=int(given.get("mount_port", MOUNT_PORT)),
        file=Path(given["file"]),
        block=str(given["block"]),
        supervised=_flag(given.get("supervised", False), f"supervised of the export {name}"),
    )


def _flag(given: Any, what: str) -> bool:
    if not isinstance(given, bool):
        raise InvalidRequest(f"{what} is neither true nor false", hint="without quotes")
    return given


def _table(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tables.get(name, {})
    if not isinstance(found, Mapping):
        raise InvalidRequest(f"{name} is no table", hint=f"write [{name}]")
    return found


def _known(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    if unknown := sorted(set(table) - set(known)):
        hint = f"known are: {', '.join(sorted(known))}"
        raise InvalidRequest(f"nobody knows {unknown[0]!r} in {where}", hint=hint)


def _addresses(given: Any, whose: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise InvalidRequest(f"the addresses of {whose} are no list", hint='like ["10.0.0.11"]')
    found = tuple(str(ipaddress.ip_address(one)) for one in given)
    if LOOPBACK & set(found):
        raise InvalidRequest(f"{whose} cannot come from this machine", hint="leave it out")
    return found


def _each_is_one_hosts(hosts: Mapping[str, tuple[str, ...]]) -> None:
    owners: dict[str, str] = {}
    for host, addresses in hosts.items():
        if not addresses:
            raise InvalidRequest(f"the host {host} has no address", hint="say where it comes from")
        for address in addresses:
            if other := owners.get(address):
                raise InvalidRequest(
                    f"{address} is said of {other} and of {host}",
                    hint="one that two hosts share shuts out both or none",
                )
            owners[address] = host
