"""What serves a lab's volumes over its storage network: a node of its own.

    nfs    rpcbind, nfs-ganesha: the directory of ``shared``, which no host has otherwise
    iscsi  tgtd, and who tells it of its LUNs: a volume ``luns``, beside ``shared`` as a directory

They are the distribution's servers, started again by the node's supervisor when they end; their
state and sockets lie in the node's own root, so that labs do not meet each other or a real server.
Beside them runs our fencing daemon (`godwit.iofence`), reached over the management network: it lets
the hosts in one by one, and shuts a lost one out.
"""

from __future__ import annotations

import socket
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from godwit.host.netns import opened_netns, socket_in_netns
from godwit.iofence.ganesha import export_block
from godwit.iofence.settings import read
from godwit.lab.configs import ETC, IOFENCE_TLS, LOGS, RUN, STATE, Unit, daemon, toml
from godwit.lab.layout import FENCE_PORT, STOR, STORAGE, Layout, StorageKind
from godwit.model.errors import OperationFailed
from godwit.model.volume import Volume

EXPORT: Final = "/shared"
TARGET: Final = "iqn.2026-11.io.godwit.lab:luns"
LUNS: Final = "luns"
LUN_COUNT: Final = 4
LUN_BYTES: Final = 256 << 20

NAMES: Final[Mapping[StorageKind, tuple[str, ...]]] = {
    "dir": (),
    "nfs": ("rpcbind", "nfs", "iofence"),
    "iscsi": ("tgtd", "luns", "iofence"),
}
PROGRAMS: Final[Mapping[StorageKind, tuple[tuple[str, str], ...]]] = {
    "dir": (),
    "nfs": (("rpcbind", "rpcbind"), ("ganesha.nfsd", "nfs-ganesha")),
    "iscsi": (("tgtd", "tgt"), ("tgtadm", "tgt")),
}
FILES: Final[Mapping[StorageKind, tuple[tuple[str, str], ...]]] = {
    "dir": (),
    "nfs": (
        ("usr/lib/*/ganesha/libfsalvfs.so", "nfs-ganesha-vfs"),
        ("usr/lib/*/qemu/block-nfs.so", "qemu-block-extra"),
        ("etc/services", "netbase"),  # rpcbind looks its own port up there
    ),
    "iscsi": (("usr/lib/*/qemu/block-iscsi.so", "qemu-block-extra"),),
}
"""With the package that brings it."""

DIRECTORIES: Final = ("/var/lib/nfs/ganesha", "/run/ganesha", "/run/tgtd", "/run/rpcbind")
"""Where the servers keep state and sockets, whether anybody asks them to or not."""

_PORTS: Final[Mapping[StorageKind, tuple[int, ...]]] = {
    "dir": (),
    "nfs": (111, 2049, 20048),
    "iscsi": (3260,),
}
_SHARED: Final = "/srv/shared"
_EXPORT_FILE: Final = STATE / "iofence" / "export.conf"
_CONFIG: Final = "ganesha.conf"
_NAMES: Final = "hosts"
_HOSTS: Final = Path("/etc/hosts")
_RETRY_S: Final = 0.05

# No Bind_addr: the node has one address. Graceless: no client of an earlier life to wait for.
# Where a container may not mark a process as an IO flusher, version 6 would not start at all; an
# older one does not know the word and says so in its log.
GANESHA: Final = f"""\
NFS_CORE_PARAM {{
    NFS_Port = 2049;
    MNT_Port = 20048;
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Protocols = 3, 4;
    mount_path_pseudo = true;
    allow_set_io_flusher_fail = true;
    Enable_UDP = false;
}}
NFSV4 {{
    Graceless = true;
    RecoveryBackend = fs;
}}
%include "{_EXPORT_FILE}"
"""
BLOCK: Final = f"""\
Export_Id = 1;
Path = {_SHARED};
Pseudo = {EXPORT};
Squash = Root_Squash;
Protocols = 3, 4;
SecType = sys;
Disable_ACL = true;
FSAL {{ Name = VFS; }}
"""


def units(storage: StorageKind, python: str) -> tuple[Unit, ...]:
    """The daemons of the node."""
    if storage == "nfs":
        log = f"{LOGS}/ganesha.log"
        # The server ends at once while no rpcbind answers, and is started again.
        words = ("-F", "-f", f"{ETC}/{_CONFIG}", "-L", log, "-p", f"{RUN}/nfs.pid", "-N", "EVENT")
        servers = (_plain("rpcbind", "rpcbind", "-w", "-f"), _plain("nfs", "ganesha.nfsd", *words))
        return (*servers, _fencing(python))
    luns = Unit(
        name="luns",
        argv=(python, "-I", "-m", "godwit.lab.luns"),
        log=f"{LOGS}/luns.log",
        watchdog_s=None,
    )
    return (_plain("tgtd", "tgtd", "-f"), luns, _fencing(python))


def _fencing(python: str) -> Unit:
    return daemon("iofence", "godwit.iofence.main", python=python, config="iofence.toml")


def _plain(name: str, *argv: str) -> Unit:
    return Unit(name=name, argv=argv, log=f"{LOGS}/{name}.log", notify=False, watchdog_s=None)


def write_files(layout: Layout) -> None:
    """The configuration that the node sees below /etc/godwit, and the names of who asks it.

    The servers look up every address they meet, and a name server that is far away would cost
    seconds for each.
    """
    etc = layout.node_dir(STORAGE) / "etc"
    (etc / _CONFIG).write_text(GANESHA)
    text = toml(fence_config(layout))
    (etc / "iofence.toml").write_text(text)
    # The server does not start without it, and starts closed.
    for place in (one for one in read(tomllib.loads(text)).places if one.kind == "nfs"):
        path = layout.node_dir(STORAGE) / "state" / _EXPORT_FILE.relative_to(STATE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(export_block(place, ()))
    names = {"127.0.0.1": "localhost", layout.storage_address: STORAGE}
    names |= {layout.address(host, STOR): host for host in layout.host_names}
    (etc / _NAMES).write_text("".join(f"{at} {name}\n" for at, name in names.items()))


def fence_config(layout: Layout) -> dict[str, Any]:
    """The settings of the node's fencing daemon: each host comes from one address."""
    places: dict[str, Any] = {"iscsi": {f'"{TARGET}"': {}}}
    if layout.storage == "nfs":
        export = {"file": str(_EXPORT_FILE), "block": BLOCK, "supervised": True}
        places = {"nfs": {f'"{EXPORT}"': export}}
    return {
        "fence": {
            "name": STORAGE,
            "address": layout.mgmt_address(STORAGE),
            "port": FENCE_PORT,
            "state": str(STATE / "iofence"),
        },
        "tls": {"dir": str(IOFENCE_TLS)},
        "hosts": {host: [layout.address(host, STOR)] for host in layout.host_names},
        **places,
    }


def hosts_file(layout: Layout) -> Path | None:
    """What the node sees as /etc/hosts; None where the machine has none to put it over."""
    return layout.node_dir(STORAGE) / "etc" / _NAMES if _HOSTS.exists() else None


def places(layout: Layout) -> dict[str, str]:
    """Where in the node the volume's directory is shown."""
    return {_SHARED: str(layout.volume)} if layout.storage == "nfs" else {}


def lun_file(lun: int) -> Path:
    """What a LUN is kept in, inside of the node."""
    return STATE / "luns" / f"lun{lun}"


def volumes(layout: Layout) -> tuple[Volume, ...]:
    """The volumes of the lab."""
    address, fence = layout.storage_address, layout.fence_url
    if layout.storage == "nfs":
        return (Volume(name="shared", kind="nfs", server=address, export=EXPORT, fence_url=fence),)
    shared = Volume(name="shared")
    if layout.storage == "iscsi":
        luns = Volume(name=LUNS, kind="iscsi", portal=address, target=TARGET, fence_url=fence)
        return (shared, luns)
    return (shared,)


def wait_open(layout: Layout, *, timeout: float) -> None:
    """Return when the servers accept connections; OperationFailed after ``timeout`` seconds."""
    until = time.monotonic() + timeout
    with opened_netns(layout.netns(STORAGE)) as space:
        for port in _PORTS[layout.storage]:
            while not _accepts(space, port):
                if time.monotonic() > until:
                    raise OperationFailed(
                        f"nothing serves storage at port {port} after {timeout:g} s",
                        hint="look: godwit lab up --retain, then godwit lab logs storage",
                    )
                time.sleep(_RETRY_S)  # these servers announce nothing


def _accepts(space: int, port: int) -> bool:
    with socket_in_netns(space, socket.AF_INET) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
