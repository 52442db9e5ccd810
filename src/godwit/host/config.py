"""The configuration file of a host's daemons, read by agent and guard alike.

TOML; each daemon ignores what it does not need, but a key that nobody knows is an error, because
a misspelt key would silently mean its default.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from godwit.host.errors import HostError

T = TypeVar("T")

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)bit", re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class ConfigError(HostError):
    """The configuration file says something that cannot be used."""


@dataclass(frozen=True, slots=True)
class PathsConfig:
    """Where things lie on this host."""

    run: Path = Path("/run/godwit")
    state: Path = Path("/var/lib/godwit")
    volumes: Path = Path("/clusterstorage")
    images: Path = Path("/var/lib/godwit/images")

    def vm_run(self, vm: str) -> Path:
        """Sockets and ``runtime.json`` of a running VM."""
        return self.run / "vms" / vm

    def vm_state(self, vm: str) -> Path:
        """Durable notes, console log and evidence of a VM on this host."""
        return self.state / "vms" / vm

    @property
    def guard_socket(self) -> Path:
        """Where the guard listens."""
        return self.run / "guard.sock"


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """How the store is reached."""

    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Where the identities of this host lie. ``keeps``: directories of other daemons' identities
    on this machine (a store's), which the agent keeps renewed along with its own."""

    dir: Path = Path("/etc/godwit/tls")
    migration_dir: Path = Path("/etc/godwit/tls/migration")
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Where the agent listens on the management network."""

    address: str = "127.0.0.1"
    port: int = 7101


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """The migration network; ``rate`` like ``1gbit`` (0 bits when not stated)."""

    address: str = ""
    subnet: str = ""
    rate: str = ""
    tls: bool = True

    @property
    def rate_bits(self) -> int:
        """The stated rate in bits per second, 0 when none is stated."""
        return parse_rate(self.rate) if self.rate else 0


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """One VM network on this host."""

    bridge: str
    uplink: str = ""
    mtu: int = 1500


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """Which QEMU runs the VMs, and as whom."""

    user: str = "godwit-qemu"
    binary: str = "qemu-system-x86_64"
    data_dir: str = ""
    library_path: str = ""
    accelerator: str = "auto"
    allow_tcg_migration_on_old_qemu: bool = False
    image_locks: bool = True


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """What this host's QEMUs need to reach storage. The Ceph configuration names the keyring, which
    QEMU's user has to be able to read and nobody else. ``longest_heal_s``: seconds that a path has
    to hold at most before it is used again, however often it broke."""

    ceph_conf: Path = Path("/etc/ceph/ceph.conf")
    longest_heal_s: int = 30


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """``watchdog``: what resets this machine when its guard fails; used if it is there."""

    watchdog: Path = Path("/dev/watchdog")


@dataclass(frozen=True, slots=True)
class LabConfig:
    """``enabled`` arms fault injection; it is refused otherwise."""

    enabled: bool = False


@dataclass(frozen=True, slots=True)
class CgroupConfig:
    """The control group below which each VM has its own."""

    root: str = "godwit"


@dataclass(frozen=True, slots=True)
class MaintenanceConfig:
    """Commands, each as one line of words, that the manager may have this host run as root."""

    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Everything a host's daemons are told."""

    host: str
    paths: PathsConfig = field(default_factory=PathsConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    agent: ListenConfig = field(default_factory=ListenConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    networks: Mapping[str, NetworkConfig] = field(default_factory=dict)
    qemu: QemuConfig = field(default_factory=QemuConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    lab: LabConfig = field(default_factory=LabConfig)
    cgroup: CgroupConfig = field(default_factory=CgroupConfig)
    maintenance: MaintenanceConfig = field(default_factory=MaintenanceConfig)

    @classmethod
    def load(cls, path: Path) -> AgentConfig:
        """Read a file.  Raises ConfigError that names the file and the key."""
        try:
            table = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        try:
            return cls.parse(table)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> AgentConfig:
        """Build the configuration from a parsed file; pure."""
        rest = dict(table)
        networks = rest.pop("networks", {})
        if not isinstance(networks, dict):
            raise ConfigError("networks: a table of tables is expected")
        config = _section(cls, "", rest)
        made = {
            name: _section(NetworkConfig, f"networks.{name}", t) for name, t in networks.items()
        }
        _check(config)
        return dataclasses.replace(config, networks=made)


def _check(config: AgentConfig) -> None:
    move = config.migration
    try:
        if move.subnet:
            network = ipaddress.ip_network(move.subnet)
            if move.address and ipaddress.ip_address(move.address) not in network:
                raise ConfigError(f"migration.address {move.address} is not in {network}")
    except ValueError as error:
        raise ConfigError(f"migration: {error}") from error
    if move.rate:
        parse_rate(move.rate)
    for command in config.maintenance.commands:
        if not _is_command(command):
            raise ConfigError(
                f"maintenance.commands: {command!r} is not a command",
                hint="write the program's whole path and its words, quoted as in a shell",
            )
    if config.storage.longest_heal_s < 3:
        raise ConfigError("storage.longest_heal_s: at least 3 s, which any lost path has to hold")
    if config.qemu.accelerator not in ("auto", "kvm", "tcg"):
        raise ConfigError("qemu.accelerator: one of auto, kvm, tcg is expected")


def _is_command(text: str) -> bool:
    try:
        words = shlex.split(text)
    except ValueError:
        return False
    return bool(words) and words[0].startswith("/")


def _section(kind: type[T], where: str, table: Any) -> T:
    """A dataclass from a table; every wrong key or type is named with its place."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: a table is expected")
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            known = ", ".join(sorted(hints))
            raise ConfigError(f"{prefix}{key}: no such key", hint=f"known keys: {known}")
        values[key] = _value(hints[key], f"{prefix}{key}", value)
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where or 'file'}: {str(error).partition(') ')[2]}") from error


def _value(wanted: Any, where: str, value: Any) -> Any:
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _section(wanted, where, value)
    if wanted is Path and isinstance(value, str):
        if not value.startswith("/"):
            raise ConfigError(f"{where}: an absolute path is expected")
        return Path(value)
    if wanted == tuple[str, ...] and isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            return tuple(value)
    elif wanted in (str, int, bool) and type(value) is wanted:
        return value
    name = {str: "text", int: "a whole number", bool: "true or false", Path: "a path"}
    raise ConfigError(f"{where}: {name.get(wanted, 'a list of texts')} is expected")


def parse_rate(text: str) -> int:
    """Bits per second of a rate like ``1gbit``, ``200mbit`` or ``64000bit``."""
    found = _RATE.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{text!r} is not a rate", hint="write it like 1gbit or 200mbit")
    return round(float(found[1]) * _FACTORS[found[2].lower()])
