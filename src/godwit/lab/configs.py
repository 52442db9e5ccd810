"""The configuration files and units of a lab's daemons, as text; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from godwit.host.toml import toml as toml
from godwit.lab.layout import AGENT_PORT, API_PORT, CONTROL, LAN, MGMT, MIG, STORE_PORT, Layout

ETC: Final = Path("/etc/godwit")
TLS: Final = ETC / "tls"
STORE_TLS: Final = ETC / "store-tls"
MANAGER_TLS: Final = ETC / "manager-tls"
CA: Final = ETC / "ca"  # where a manager is: it signs for hosts that join
IOFENCE_TLS: Final = ETC / "iofence-tls"
MIGRATION_TLS: Final = ETC / "migration-tls"  # QEMU's user must reach it; `tls` is root's alone
STATE: Final = Path("/var/lib/godwit")
LOGS: Final = Path("/var/log/godwit")
RUN: Final = Path("/run/godwit")
STORE_SOCKET: Final = RUN / "store.sock"
BRIDGE: Final = "br-lan"
API: Final = "api"  # the manager's listening socket, made on the real machine

COMMANDS: Final = ("/usr/bin/true", "/usr/bin/false")  # what `cluster update` may run in a lab

WATCHDOG_S: Final = 2.0
LONGEST_HEAL_S: Final = 6  # labs break the same path over and over


@dataclass(frozen=True, slots=True)
class Unit:
    """A daemon that a supervisor keeps running; the fields are those of its units file."""

    name: str
    argv: tuple[str, ...]
    log: str
    env: dict[str, str] = field(default_factory=dict)
    sockets: tuple[str, ...] = ()
    notify: bool = True
    watchdog_s: float | None = WATCHDOG_S
    start_s: float = 30.0
    stop_s: float = 5.0


def agent_config(
    layout: Layout,
    host: str,
    *,
    qemu: Mapping[str, str | bool] | None = None,
    earlier: bool = False,
) -> dict[str, Any]:
    """What a host's agent and guard are told; ``qemu`` goes into its section as it is.

    ``earlier``: they are of an earlier version, which refuses keys that came later.
    """
    migration: dict[str, Any] = {
        "address": layout.address(host, MIG),
        "subnet": MIG.subnet,
        "tls": True,
    }
    if layout.rate:
        migration["rate"] = layout.rate
    member = host in [one.name for one in layout.store_members]
    return {
        "host": host,
        "paths": {
            "run": str(RUN),
            "state": str(STATE),
            "volumes": "/clusterstorage",
            "images": str(STATE / "images"),
        },
        "store": {"endpoints": list(layout.store_urls(host))},
        "tls": {
            "dir": str(TLS),
            "migration_dir": str(MIGRATION_TLS),
            **({"keeps": [str(STORE_TLS)]} if member else {}),
        },
        "agent": {"address": layout.address(host, MGMT), "port": AGENT_PORT},
        "migration": migration,
        "networks": {LAN.name: {"bridge": BRIDGE, "uplink": LAN.port, "mtu": 1500}},
        **({"qemu": dict(qemu)} if qemu else {}),
        **({} if earlier else {"storage": {"longest_heal_s": LONGEST_HEAL_S}}),
        "lab": {"enabled": True},
        "maintenance": {"commands": list(COMMANDS)},
        "cgroup": {"root": f"godwit/{host}"},
    }


def store_config(layout: Layout) -> dict[str, Any]:
    """The store daemon; the unix socket is for whoever is root on the control node."""
    listen = [f"tcp:{layout.mgmt_address(CONTROL)}:{STORE_PORT}", f"unix:{STORE_SOCKET}"]
    return {
        "store": {"data": str(STATE / "store"), "listen": listen},
        "tls": {"dir": str(STORE_TLS)},
    }


def manager_config(layout: Layout, node: str) -> dict[str, Any]:
    """A node's manager; it serves the socket it inherits."""
    embedded = node == CONTROL and not layout.store_members
    return {
        "store": {"endpoints": list(layout.store_urls(node))},
        "tls": {"dir": str(MANAGER_TLS), **({"keeps": [str(STORE_TLS)]} if embedded else {})},
        "ca": {"dir": str(CA)},
        "api": {
            "tokens_file": str(ETC / "tokens"),
            "also": [f"{layout.mgmt_address(node)}:{API_PORT}"],  # for hosts that join
        },
        "paths": {"state": str(STATE / "manager")},
        "lab": {"enabled": True},
    }


def daemon(
    name: str, module: str, *, python: str, config: str, sockets: tuple[str, ...] = ()
) -> Unit:
    """A Godwit daemon as a unit."""
    return Unit(
        name=name,
        argv=(python, "-I", "-m", module, "--config", str(ETC / config)),
        log=str(LOGS / f"{name}.log"),
        sockets=sockets,
    )


def host_units(python: str) -> tuple[Unit, ...]:
    """What runs on every host; the guard first, for the agent looks for it."""
    return (
        daemon("guard", "godwit.guard.main", python=python, config="host.toml"),
        daemon("agent", "godwit.agent.main", python=python, config="host.toml"),
    )


def store_unit(python: str) -> Unit:
    """The embedded store."""
    return daemon("store", "godwit.store.daemon.main", python=python, config="store.toml")


def manager_unit(python: str) -> Unit:
    """A manager."""
    return daemon(
        "manager", "godwit.manager.main", python=python, config="manager.toml", sockets=(API,)
    )


def units_file(units: tuple[Unit, ...]) -> str:
    """The units as the supervisor reads them."""
    return json.dumps({"units": [asdict(unit) for unit in units]}, indent=1) + "\n"
