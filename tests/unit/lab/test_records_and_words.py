"""The lab's record, its lock, its pre-flight and what it says to people."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from godwit.host.process import identify
from godwit.lab import down, keeping, leaks, preflight, record
from godwit.lab.cli import next_commands, status_text
from godwit.lab.handle import outer
from godwit.lab.layout import Layout
from godwit.lab.options import Options
from godwit.lab.record import LabRecord
from godwit.lab.up import actions, check
from godwit.model.errors import Conflict, NotFound, OperationFailed, Refused

RECORD = LabRecord(
    name="x",
    hosts=2,
    rate="1gbit",
    store="etcd",
    run_root="/run/gw",
    nodes={"host1": (7, 8)},
    managers=1,
    ports={"host1": 7},
)


def test_records_are_read_back(tmp_path: Path) -> None:
    RECORD.save(tmp_path)
    assert record.load("x", root=tmp_path) == RECORD
    assert record.names(root=tmp_path) == ("x",)
    assert record.load("x", root=tmp_path).layout(tmp_path).state == tmp_path / "x"


def test_a_missing_lab_is_told_with_those_there_are(tmp_path: Path) -> None:
    RECORD.save(tmp_path)
    with pytest.raises(NotFound, match="no lab y") as caught:
        record.load("y", root=tmp_path)
    assert "up: x" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"nodes": {"host1": [1]}}'])
def test_damaged_records_are_told(tmp_path: Path, text: str) -> None:
    RECORD.save(tmp_path)
    (tmp_path / "x/lab.json").write_text(text)
    with pytest.raises(OperationFailed, match=r"lab\.json"):
        record.load("x", root=tmp_path)


def test_a_number_used_again_is_no_node() -> None:
    mine = identify(os.getpid())
    assert mine is not None
    right = RECORD.but(nodes={"host1": (mine.pid, mine.start_time)})
    wrong = RECORD.but(nodes={"host1": (mine.pid, mine.start_time + 1)})
    assert right.node("host1") == mine
    assert wrong.node("host1") is None
    assert right.node("host2") is None


def test_one_command_at_a_time() -> None:
    with record.exclusive("some-lab"):
        with pytest.raises(Conflict), record.exclusive("some-lab"):
            pass
        with record.exclusive("another-lab"):
            pass
    with record.exclusive("some-lab"):
        pass


def test_a_missing_etcd_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "ETCD", "no-such-etcd")
    options = Options(Layout("x", 2, state_root=tmp_path, store="etcd"))
    with pytest.raises(Refused, match="package etcd-server is not installed"):
        check(options)


def test_memory_is_looked_at_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        need
        for need in preflight.needs(Layout("x", 32, state_root=tmp_path), qemu_binary="true")
        if need.what == "memory"
    ]
    monkeypatch.setattr(preflight, "HOST_BYTES", 1 << 40)
    with pytest.raises(Refused, match="needs 32 TiB"):
        wanted[0].look()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    need = preflight.needs(Layout("x", 1, state_root=tmp_path), qemu_binary="no-such-qemu")[1]
    with pytest.raises(Refused, match="no-such-qemu is not installed"):
        need.look()


def test_the_plan_names_every_step(tmp_path: Path) -> None:
    doing = [action.doing for action in actions(Options(Layout("x", 1, state_root=tmp_path)))]
    assert doing[0] == "checking this machine"
    assert doing[-1] == "writing the context"


def test_the_next_commands_name_the_lab_only_where_needed() -> None:
    assert "  godwit lab down" in next_commands("lab", ("host1", "host2"))
    assert "  godwit lab down --name x" in next_commands("x", ("host1", "host2"))


def test_the_status_names_what_is_cut() -> None:
    node = {"state": "on", "units": {"agent": {"state": "held"}}, "networks": {"mig": "up"}}
    view = {
        "name": "x",
        "store": "sqlite",
        "migration_rate": "",
        "store_members": [],
        "manager_urls": ["https://127.0.0.1:1"],
        "token_file": "/t",
        "networks": [{"name": "lan", "subnet": "10.91.0.0/22", "client_address": "10.91.0.1"}],
        "control": {"name": "control", **node},
        "hosts": [{"name": "host1", **node, "networks": {"mig": "black-hole", "lan": "up"}}],
    }
    lines = status_text(view).splitlines()
    assert lines[0].endswith("unlimited")
    assert lines[-2] == "control  on   agent held"
    assert lines[-1] == "host1    on   agent held   networks: mig black-hole"


def test_own_process_is_found_in_its_own_namespace() -> None:
    assert outer(os.getpid(), os.getpid()) == identify(os.getpid())
    assert outer(os.getpid(), 1 << 30) is None


def test_a_leak_is_named_by_its_kind() -> None:
    with tempfile.TemporaryDirectory():
        before = leaks.take("nobodys")
    planted = leaks.Snapshot(
        **{
            name: getattr(before, name) | ({"gw-nobodys-x"} if name == "namespaces" else set())
            for name in before.__slots__
        }
    )
    assert leaks.compare(before, planted) == ["namespaces: gw-nobodys-x"]
    assert leaks.compare(planted, before) == []


def test_down_without_anything_is_fine(tmp_path: Path) -> None:
    assert not down.remove("nobodys-lab", root=tmp_path / "none")
