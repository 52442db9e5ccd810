"""The daemon's settings, its durable list, and the words of the servers. Pure, or one file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from godwit.iofence import mountd, tgt
from godwit.iofence.cuts import FILE, CutBook
from godwit.iofence.ganesha import export_block
from godwit.iofence.servers import Entry, strangers
from godwit.iofence.settings import PlaceSettings, Settings, read
from godwit.iofence.tgt import Nexus, of_clients, targets
from godwit.model.errors import InvalidRequest, OperationFailed
from godwit.model.fencing import CutAsk, place_of
from godwit.model.volume import Volume

IQN = "iqn.2026-11.org.example:luns"
GIVEN: dict[str, Any] = {
    "fence": {"name": "storage", "address": "10.92.0.2"},
    "hosts": {"host1": ["10.94.0.11", "fd00::11"], "host2": ["10.94.0.12"]},
    "iscsi": {IQN: {"also": ["10.94.0.9"]}},
    "nfs": {"/shared/": {"file": "/etc/ganesha/x.conf", "block": "Path = /srv;", "port": 2050}},
}


def test_the_settings() -> None:
    found = read(GIVEN)
    assert found.hosts["host1"] == ("10.94.0.11", "fd00::11")
    luns, shared = found.places
    assert (luns.place, luns.port, luns.also) == (f"iscsi {IQN}", 3260, ("10.94.0.9",))
    assert (shared.place, shared.port, shared.mount_port) == ("nfs /shared", 2050, 20048)
    assert not shared.supervised
    assert place_of(Volume(name="a", kind="nfs", export="/shared/")) == shared.place
    assert place_of(Volume(name="a", kind="iscsi", target=IQN)) == luns.place
    assert place_of(Volume(name="a")) == ""


@pytest.mark.parametrize(
    ("table", "changes", "said"),
    [
        ("fence", {"adress": "x"}, "nobody knows 'adress' in [fence]"),
        ("fence", {"name": "Storage"}, "is not a usable name"),
        ("hosts", {"host3": []}, "the host host3 has no address"),
        ("hosts", {"host3": ["10.94.0.11"]}, "10.94.0.11 is said of host1 and of host3"),
        ("hosts", {"host3": "10.94.0.13"}, "are no list"),
        ("hosts", {"host3": ["127.0.0.1"]}, "cannot come from this machine"),
        ("nfs", {"/x": {"file": "/x"}}, "the export /x has no block"),
        ("iscsi", {IQN: {"file": "/x"}}, "nobody knows 'file'"),
        ("iscsi", {IQN: {"supervised": True}}, "nobody knows 'supervised'"),
        (
            "nfs",
            {"/x": {"file": "/x", "block": "", "supervised": "no"}},
            "is neither true nor false",
        ),
    ],
)
def test_what_is_wrong_is_said(
    table: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest) as error:
        read({**GIVEN, table: {**GIVEN[table], **changes}})
    assert said in error.value.message
    path = tmp_path / "iofence.toml"
    path.write_text('[fence]\nname = "a"\naddress = "x"\n')
    with pytest.raises(InvalidRequest, match=r"iofence\.toml cannot be used"):
        Settings.load(path)


def ask(vm: str = "web", **changes: Any) -> CutAsk:
    return CutAsk(**{"place": "nfs /shared", "host": "host1", "vm": vm, **changes})


def test_the_list_is_on_the_disk_and_its_numbers_never_come_again(tmp_path: Path) -> None:
    book = CutBook(tmp_path)
    first, other = book.add(ask(), by="m", at=1.0), book.add(ask("db"), by="m", at=2.0)
    again = book.add(ask(revision=9), by="m", at=3.0)
    assert [cut.id for cut in book.cuts] == [other.id, again.id] == [2, 3]
    assert book.find(first.id) is None
    assert book.hosts("nfs /shared") == {"host1"}
    assert book.hosts("nfs /other") == frozenset()
    book.remove(again.id)
    later = CutBook(tmp_path)
    assert later.cuts == (other,)
    assert later.add(ask(), by="m", at=4.0).id == 4
    (tmp_path / FILE).write_text("{")
    with pytest.raises(OperationFailed, match="the list of cuts cannot be read"):
        CutBook(tmp_path)


def test_whom_an_entry_lets_in() -> None:
    hosts = ["10.94.0.11"]
    for text in ("ALL", "*", "@netgroup", "10.94.0.0/24", "10.94.0.11", "10.94.0.11/32", "some"):
        assert Entry(text).covers(hosts), text
    for text in ("10.94.0.12", "10.95.0.0/16", "fd00::/8"):
        assert not Entry(text).covers(hosts), text
    assert [Entry(one).address for one in ("10.94.0.11/32", "10.94.0.0/24", "ALL")] == [
        "10.94.0.11", "", "",
    ]  # fmt: skip
    entries = [Entry(one) for one in ("ALL", "10.94.0.11/32", "127.0.0.1", "10.94.0.12")]
    assert strangers(entries, hosts) == ("10.94.0.12", "ALL")


# What tgtadm of tgt 1.0.85 prints.
SHOWN = """\
Target 1: iqn.2026-11.org.example:luns
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
        I_T nexus: 3
            Initiator: iqn.2026-11.io.godwit:abc:host1 alias: none
            Connection: 0
                IP Address: 10.94.0.11
        I_T nexus: 4
            Initiator: iqn.2026-11.io.godwit:abc:host2 alias: none
            Connection: 0
                IP Address: 10.94.0.12
            Connection: 1
                IP Address: 10.94.0.13
        I_T nexus: 5
            Initiator: iqn.2026-11.io.godwit:abc:host3 alias: none
            Connection: 0
                \n\
    LUN information:
        LUN: 0
            Type: controller
            SCSI ID: IET     00010000
            Size: 0 MB, Block size: 1
            Backing store path: None
            Backing store flags: \n\
    Account information:
    ACL information:
        127.0.0.1
        10.94.0.12
        iqn.2026-11.io.godwit:abc:host1
Target 2: iqn.2026-11.org.example:empty
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
    LUN information:
    Account information:
    ACL information:
"""


def test_what_tgtadm_shows() -> None:
    one, two = targets(SHOWN)
    assert (one.number, one.name) == (1, IQN)
    assert one.nexuses == (
        Nexus(3, (0,), ("10.94.0.11",)),
        Nexus(4, (0, 1), ("10.94.0.12", "10.94.0.13")),
        Nexus(5, (0,), ()),
    )
    assert one.acl == ("127.0.0.1", "10.94.0.12", "iqn.2026-11.io.godwit:abc:host1")
    assert [tgt.is_name(entry) for entry in one.acl] == [False, False, True]
    assert (two.nexuses, two.acl) == ((), ())
    assert targets("") == ()
    # One that does not say where it came from may be anybody's.
    assert [nexus.number for nexus in of_clients(one, ["10.94.0.11"])] == [3, 5]
    assert [nexus.number for nexus in of_clients(one, ["10.94.0.13"])] == [4, 5]
    assert of_clients(two, ["10.94.0.11"]) == ()


@pytest.mark.parametrize(
    "text", ["tgtadm: no such thing\n", SHOWN.replace("ACL inf", "Acl inf"), "Target x: y\n"]
)
def test_other_words_are_no_answer(text: str) -> None:
    with pytest.raises(ValueError, match="tgtadm"):
        targets(text)


def test_the_block_of_an_export() -> None:
    place = PlaceSettings(
        kind="nfs", name="/shared", port=2049, file=Path("x"),
        block="Export_Id = 1;\nPath = /srv/shared;\nFSAL { Name = VFS; }\n",
    )  # fmt: skip
    assert export_block(place, ["10.94.0.12", "10.94.0.11"]).splitlines()[1:] == [
        "EXPORT {",
        "    Export_Id = 1;",
        "    Path = /srv/shared;",
        "    FSAL { Name = VFS; }",
        "    Access_Type = None;",
        "    CLIENT { Clients = 127.0.0.1; Access_Type = MDONLY_RO; }",
        "    CLIENT { Clients = 10.94.0.11, 10.94.0.12; Access_Type = RW; }",
        "}",
    ]
    assert "RW" not in export_block(place, [])
    assert place.shown == {"/shared", "/srv/shared"}


def reply(call: bytes = b"abcd", *, status: int = 0, body: bytes = bytes(4)) -> bytes:
    return call + struct.pack(">5I", 1, 0, 0, 0, status) + body


def test_what_the_mount_daemon_answers() -> None:
    one = struct.pack(">II", 1, 7) + b"/shared\0"
    groups = (
        struct.pack(">II", 1, 13) + b"10.94.0.11/32\0\0\0" + struct.pack(">II", 1, 1) + b"*\0\0\0"
    )
    body = one + groups + bytes(4) + one.replace(b"/shared", b"/second") + bytes(8)
    assert mountd.answer(b"abcd", reply(body=body)) == {
        "/shared": ("10.94.0.11/32", "*"),
        "/second": (),
    }
    for wrong in (
        reply(b"dcba"),
        reply(status=1),
        reply(body=body[:-6]),
        reply(body=struct.pack(">II", 1, 1 << 30)),
        b"",
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - each for another reason
            mountd.answer(b"abcd", wrong)
    call = mountd.question(b"abcd")
    assert struct.unpack(">I", call[:4]) == (0x80000000 | (len(call) - 4),)
