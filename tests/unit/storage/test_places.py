"""Where a path below /clusterstorage really lies."""

from __future__ import annotations

import pytest

from godwit.model.errors import Refused
from godwit.model.volume import Volume
from godwit.storage.nodes import BrokerDisk, image_node
from godwit.storage.places import (
    Access,
    image_word,
    initiator_name,
    lun_of,
    portal,
    served_node,
    within,
)

FAR = Volume(name="far", kind="nfs", server="10.94.0.1", export="/srv/far/")
LUNS = Volume(name="luns", kind="iscsi", portal="10.94.0.1", target="iqn.2026-11.example:a")
POOL = Volume(name="ceph", kind="rbd", pool="vms", client="godwit")
ACCESS = Access(user=(999, 995), initiator=initiator_name("abc", "host1"))


def test_an_nfs_path_is_one_of_the_server() -> None:
    path = "/clusterstorage/far/web/disk 1.qcow2"
    assert served_node(FAR, path, ACCESS) == {
        "driver": "nfs",
        "server": {"type": "inet", "host": "10.94.0.1"},
        "path": "/srv/far/web/disk 1.qcow2",
        "user": 999,
        "group": 995,
    }
    assert image_word(FAR, path, ACCESS) == (
        "nfs://10.94.0.1/srv/far/web/disk%201.qcow2?uid=999&gid=995"
    )
    six = FAR.but(server="fd00::1")
    assert image_word(six, path, Access()).startswith("nfs://[fd00::1]/srv/far/")


def test_a_lun_is_named_by_its_number() -> None:
    node = served_node(LUNS, "/clusterstorage/luns/lun-12", ACCESS)
    assert node == {
        "driver": "iscsi",
        "transport": "tcp",
        "portal": "10.94.0.1:3260",
        "target": "iqn.2026-11.example:a",
        "lun": 12,
        "initiator-name": "iqn.2026-11.io.godwit:abc:host1",
    }
    for wrong in ("lun-", "lun-01", "lun--1", "lun-1x", "web/lun-1", "lun-100000"):
        with pytest.raises(Refused, match="holds LUNs"):
            lun_of(LUNS, f"/clusterstorage/luns/{wrong}")
    with pytest.raises(Refused):
        image_word(LUNS, "/clusterstorage/luns/lun-1", ACCESS)
    assert portal(LUNS.but(portal="[fd00::1]")) == "[fd00::1]:3260"
    assert portal(LUNS.but(portal="h:1")) == "h:1"


def test_an_rbd_image_is_named_and_its_key_is_not() -> None:
    access = Access(ceph_conf="/etc/godwit/ceph.conf")
    assert served_node(POOL, "/clusterstorage/ceph/web.0", access) == {
        "driver": "rbd",
        "pool": "vms",
        "image": "web.0",
        "conf": "/etc/godwit/ceph.conf",
        "user": "godwit",
    }
    inside = served_node(POOL.but(pool="vms/mine"), "/clusterstorage/ceph/web.0", access)
    assert inside is not None
    assert (inside["pool"], inside["namespace"]) == ("vms", "mine")
    for wrong in ("", "web/disk0", "a@b", "a:b", "-x", ".x", "a" * 96):
        with pytest.raises(Refused, match="names no image of the Ceph pool vms"):
            served_node(POOL, f"/clusterstorage/ceph/{wrong}", access)
    with pytest.raises(Refused, match="holds no files"):
        image_word(POOL, "/clusterstorage/ceph/web.0", access)


@pytest.mark.parametrize(
    "path",
    [
        "/clusterstorage/other/x",
        "/clusterstorage/farther/x",
        "/clusterstorage/far/../x",
        "/clusterstorage/far/a/./b",
        "/etc/passwd",
    ],
)
def test_nothing_leads_out_of_the_volume(path: str) -> None:
    with pytest.raises(Refused, match="outside of volume far"):
        served_node(FAR, path, ACCESS)


def test_a_directory_has_no_node_of_its_own() -> None:
    assert served_node(Volume(name="d"), "/clusterstorage/d/x", ACCESS) is None
    assert within(FAR, "/clusterstorage/far") == "/"


def test_hosts_never_share_an_initiator() -> None:
    assert initiator_name("abc", "host1") != initiator_name("abc", "host2")


def test_a_broker_serves_what_is_served() -> None:
    served = served_node(FAR, "/clusterstorage/far/web/a.vhdx", ACCESS)
    disk = BrokerDisk(id="a", path="x", format="vhdx", size_bytes=512, served=served)
    for locking in (True, False):
        node = image_node(disk, locking=locking)["file"]
        assert node["driver"] == "nfs"
        assert node["node-name"] == "file-a"
        assert not {"aio", "filename", "locking"} & set(node)
