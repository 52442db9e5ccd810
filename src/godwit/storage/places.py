"""Where a path below /clusterstorage really lies: the one place that knows. Pure.

``/clusterstorage/<volume>/<vm>/<disk>`` is what people, records and hosts say. For a volume that
hosts have as a directory it is a path; for one that is served over the storage network it is only
a name, and here it becomes what QEMU, qemu-img and our own client take:

    nfs    <export>/<vm>/<disk> of the server
    iscsi  /clusterstorage/<volume>/lun-<n>: that LUN of the target
    rbd    /clusterstorage/<volume>/<image>: that image of the Ceph pool
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from godwit.model.disks import CLUSTER_STORAGE
from godwit.model.errors import Refused
from godwit.model.volume import Volume

Node = dict[str, Any]

ISCSI_PORT: Final = 3260
CEPH_CONF: Final = "/etc/ceph/ceph.conf"
_RBD_IMAGE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,94}")
_LUN: Final = re.compile(r"lun-(0|[1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True)
class Access:
    """Who this host is towards storage servers: QEMU's (uid, gid), and its iSCSI initiator.

    ``ceph_conf`` names the cluster, and the keyring with what opens it: QEMU reads both itself.
    """

    user: tuple[int, int] | None = None
    initiator: str = ""
    ceph_conf: str = CEPH_CONF


def initiator_name(cluster: str, host: str) -> str:
    """The host's initiator, the same for all its VMs; never that of another host.

    A target ends the sessions of an initiator that logs in anew, so two hosts must not share one.
    """
    return f"iqn.2026-11.io.godwit:{cluster}:{host}" if cluster else f"iqn.2026-11.io.godwit:{host}"


def within(volume: Volume, path: str) -> str:
    """The path below the volume, with a slash at its start; Refused when it lies elsewhere."""
    root = f"{CLUSTER_STORAGE}/{volume.name}"
    rest = path.removeprefix(root)
    if path == root:
        return "/"
    if rest == path or not rest.startswith("/") or {".", ".."} & set(rest.split("/")):
        raise Refused(f"{path} is outside of volume {volume.name}", hint="correct the record")
    return "/" + "/".join(part for part in rest.split("/") if part)


def lun_of(volume: Volume, path: str) -> int:
    """The number of the LUN that a path of an iscsi volume names."""
    found = _LUN.fullmatch(within(volume, path).removeprefix("/"))
    if found is None:
        raise Refused(
            f"{volume.name} holds LUNs and no files: {path} is none",
            hint=f"a LUN is called {CLUSTER_STORAGE}/{volume.name}/lun-N",
        )
    return int(found[1])


def lun_path(volume: str, lun: int) -> str:
    """What a LUN is called on every host."""
    return f"{CLUSTER_STORAGE}/{volume}/lun-{lun}"


def rbd_image(volume: Volume, path: str) -> str:
    """The image that a path of an rbd volume names."""
    name = within(volume, path).removeprefix("/")
    if _RBD_IMAGE.fullmatch(name) is None:
        raise Refused(
            f"{path} names no image of the Ceph pool {volume.pool}",
            hint=f"an image is called {CLUSTER_STORAGE}/{volume.name}/IMAGE",
        )
    return name


def rbd_pool(volume: Volume) -> tuple[str, str]:
    """The pool of an rbd volume and the namespace in it, which is empty for the usual one."""
    pool, _, namespace = volume.pool.partition("/")
    return pool, namespace


def export_path(volume: Volume, path: str) -> str:
    """The path on the NFS server."""
    return volume.export.rstrip("/") + within(volume, path)


def served_node(volume: Volume, path: str, access: Access) -> Node | None:
    """QEMU's node of the bytes at ``path``, without a name; None when it is a file of this host."""
    if volume.kind == "nfs":
        node: Node = {
            "driver": "nfs",
            "server": {"type": "inet", "host": volume.server},
            "path": export_path(volume, path),
        }
        if access.user is not None:
            node |= {"user": access.user[0], "group": access.user[1]}
        return node
    if volume.kind == "iscsi":
        return {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": portal(volume),
            "target": volume.target,
            "lun": lun_of(volume, path),
            "initiator-name": access.initiator,
        }
    if volume.kind == "rbd":
        pool, namespace = rbd_pool(volume)
        named = {"namespace": namespace} if namespace else {}
        return {
            "driver": "rbd",
            "pool": pool,
            **named,
            "image": rbd_image(volume, path),
            "conf": access.ceph_conf,
            "user": volume.client,
        }
    return None


def image_word(volume: Volume, path: str, access: Access) -> str:
    """The word by which ``qemu-img create`` and ``convert`` make the file at ``path``."""
    if volume.kind != "nfs":
        raise Refused(f"{volume.name} holds no files", hint="make it on another volume")
    host = f"[{volume.server}]" if ":" in volume.server else volume.server
    who = "" if access.user is None else f"?uid={access.user[0]}&gid={access.user[1]}"
    return f"nfs://{host}{quote(export_path(volume, path))}{who}"


def portal(volume: Volume) -> str:
    """Address and port of an iscsi volume's target."""
    text = volume.portal
    bare = text.startswith("[") and text.endswith("]")
    if bare or ":" not in text:
        return f"{text}:{ISCSI_PORT}"
    return text
