"""Labs that serve their volumes over the storage network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from godwit.iofence.settings import Settings
from godwit.lab import fault, network, nodes, preflight, serving
from godwit.lab.layout import STORAGE, Layout, StorageKind
from godwit.lab.options import with_defaults
from godwit.model.errors import InvalidRequest, Refused
from godwit.model.fencing import place_of

KINDS: tuple[StorageKind, ...] = ("dir", "nfs", "iscsi")


def test_what_serves_has_cables_to_the_storage_network_and_to_managers() -> None:
    assert STORAGE not in Layout("x", 2).nodes
    layout = Layout("x", 2, storage="nfs")
    assert layout.nodes == ("control", STORAGE, "host1", "host2")
    lines = network.node_lines(layout, STORAGE)
    assert [line for line in lines if "set dev" not in line or "up" in line] == [
        "address add 10.92.0.2/24 dev mgmt0",
        "link set dev mgmt0 up",
        "address add 10.94.0.1/24 dev stor0",
        "link set dev stor0 up",
    ]


@pytest.mark.parametrize("kind", ["nfs", "iscsi"])
def test_hosts_are_let_in_by_a_fencing_daemon_alone(kind: StorageKind, tmp_path: Path) -> None:
    layout = Layout("x", 2, storage=kind, state_root=tmp_path)
    (layout.node_dir(STORAGE) / "etc").mkdir(parents=True)
    serving.write_files(layout)
    settings = Settings.load(layout.node_dir(STORAGE) / "etc" / "iofence.toml")
    assert settings.hosts == {"host1": ("10.94.0.11",), "host2": ("10.94.0.12",)}
    volume = next(one for one in serving.volumes(layout) if one.kind == kind)
    assert [place.place for place in settings.places] == [place_of(volume)]
    assert volume.fence_url == f"https://{settings.address}:{settings.port}"
    if kind == "nfs":
        made = layout.node_dir(STORAGE) / "state" / "iofence" / "export.conf"
        assert "Access_Type = None;" in made.read_text()
        assert "10.94" not in made.read_text(), "closed until the daemon opens it"
        assert str(settings.places[0].file) in serving.GANESHA
        assert settings.places[0].shown == {"/shared", "/srv/shared"}


def test_a_host_has_no_directory_of_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.lab.groups.create", lambda _group: ())
    shown: dict[StorageKind, bool] = {}
    for kind in KINDS:
        steps = nodes.plan(Layout("x", 2, storage=kind), "host1", control_fd=3, fds={}).steps
        shown[kind] = any(step["dst"] == "/clusterstorage/shared" for step in steps)
    assert shown == {"dir": True, "nfs": False, "iscsi": True}


def test_the_volumes_say_where_they_are_served() -> None:
    told = {kind: serving.volumes(Layout("x", 1, storage=kind)) for kind in KINDS}
    assert [volume.kind for volume in told["dir"]] == ["dir"]
    assert [(v.name, v.kind, v.server) for v in told["nfs"]] == [("shared", "nfs", "10.94.0.1")]
    assert [(v.name, v.kind) for v in told["iscsi"]] == [("shared", "dir"), ("luns", "iscsi")]
    for kind in KINDS:
        names = [unit.name for unit in serving.units(kind, "/py")] if kind != "dir" else []
        assert tuple(names) == serving.NAMES[kind]


def test_a_cut_that_would_cut_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[str] = []
    monkeypatch.setattr(network, "cut", lambda _layout, node, net, **_more: cut.append(net.name))
    for kind in KINDS:
        lab = SimpleNamespace(layout=Layout("x", 2, storage=kind))
        fault.cut_network(lab, "host1", "mig")  # type: ignore[arg-type]
        if kind == "dir":
            with pytest.raises(Refused, match="nothing travels over stor"):
                fault.cut_network(lab, "host1", "stor")  # type: ignore[arg-type]
        else:
            fault.cut_network(lab, "host1", "stor")  # type: ignore[arg-type]
    assert cut == ["mig", "mig", "stor", "mig", "stor"]


def test_a_missing_server_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "which", lambda _program, path="": None)
    with pytest.raises(Refused, match="rpcbind of the package rpcbind") as refused:
        preflight._serving("nfs")
    assert "apt-get install --no-install-recommends rpcbind nfs-ganesha" in refused.value.hint
    preflight._serving("dir")
    assert "--storage dir works without" in refused.value.hint


def test_a_lab_is_served_unless_somebody_says_otherwise() -> None:
    assert with_defaults("x", 2, rate="").layout.storage == "nfs"
    assert with_defaults("x", 2, rate="", storage="dir").layout.storage == "dir"
    # Only a directory has a size of its own.
    assert with_defaults("x", 2, rate="", volume_bytes=1 << 29).layout.storage == "dir"
    with pytest.raises(InvalidRequest, match="size of its own"):
        with_defaults("x", 2, rate="", volume_bytes=1 << 29, storage="nfs")


def test_hosts_lock_images_unless_somebody_says_otherwise() -> None:
    assert "image_locks" not in with_defaults("x", 2, rate="").qemu
    assert with_defaults("x", 2, rate="", image_locks=False).qemu == {"image_locks": False}
