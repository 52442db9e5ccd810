"""The manager's configuration: one TOML file, read once."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.model.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class ManagerConfig:
    """Where the store is, who we are, and where people reach the API.

    An inherited listening socket goes before ``host``/``port``. ``api_tls_dir`` may hold another
    certificate of the cluster's CA for people; by default it is the one the daemons see.
    ``ca_dir``: where the CA's key is, on a manager that signs for hosts that join. ``keeps``: other
    identities of this machine that this manager keeps renewed, where no agent does. ``also``: more
    addresses to serve at, beside an inherited socket.
    """

    store_endpoints: tuple[str, ...]
    tls_dir: Path
    tokens_file: Path
    api_tls_dir: Path
    host: str = "127.0.0.1"
    port: int = 7100
    state: Path = Path("/var/lib/godwit")
    lab: bool = False
    ca_dir: Path | None = None
    keeps: tuple[Path, ...] = ()
    also: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def load(path: Path) -> ManagerConfig:
        """Read the file; InvalidRequest names what is missing or wrong."""
        try:
            return _build(tomllib.loads(path.read_text()))
        except KeyError as error:
            problem = f"{error} is missing"
        except (OSError, tomllib.TOMLDecodeError, TypeError, ValueError) as error:
            problem = str(error)
        raise InvalidRequest(f"{path}: {problem}", hint="see docs/reference/configuration.md")


def _build(data: dict[str, Any]) -> ManagerConfig:
    api, tls_dir = data["api"], Path(data["tls"]["dir"])
    paths, ca_dir = data.get("paths", {}), data.get("ca", {}).get("dir")
    return ManagerConfig(
        store_endpoints=tuple(data["store"]["endpoints"]),
        tls_dir=tls_dir,
        tokens_file=Path(api["tokens_file"]),
        api_tls_dir=Path(api.get("tls_dir", tls_dir)),
        host=str(api.get("host", "127.0.0.1")),
        port=int(api.get("port", 7100)),
        state=Path(paths.get("state", "/var/lib/godwit")),
        lab=bool(data.get("lab", {}).get("enabled", False)),
        ca_dir=Path(ca_dir) if ca_dir else None,
        also=tuple(_address(one) for one in api.get("also", ())),
        keeps=tuple(Path(one) for one in data["tls"].get("keeps", ())),
    )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
