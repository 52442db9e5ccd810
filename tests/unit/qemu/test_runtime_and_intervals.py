"""Records that outlive an agent, and the evidence by which two running copies are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from godwit.model.errors import OperationFailed
from godwit.qemu import intervals
from godwit.qemu.intervals import Span, append_line, overlaps, running_spans
from godwit.qemu.launch import Binary, log_tail
from godwit.qemu.layout import broker_id, file_node, format_node, tap_name
from godwit.qemu.runtime import (
    Runtime,
    forget_started,
    load_runtime,
    note_started,
    read_started,
    scan,
)
from godwit.qemu.tree import Device, DeviceTree


def _runtime(root: Path, vm: str = "web", **more: object) -> Runtime:
    run, state = root / "run" / vm, root / "state" / vm
    run.mkdir(parents=True)
    state.mkdir(parents=True)
    values: dict[str, object] = {
        "vm": vm,
        "host": "host1",
        "epoch": 3,
        "role": "started",
        "run": run,
        "state": state,
        "taps": {"net0": tap_name(vm, "net0")},
    }
    return Runtime.model_validate(values | more)


def test_runtime_comes_back_as_it_was(tmp_path: Path) -> None:
    runtime = _runtime(tmp_path, pid=77, start_time=99, argv=("qemu", "-S"))
    assert load_runtime(runtime.run) is None
    runtime.save()
    assert load_runtime(runtime.run) == runtime
    assert (runtime.run / "runtime.json").stat().st_mode & 0o077 == 0
    assert [path.name for path in runtime.run.iterdir()] == ["runtime.json"]
    runtime.remove()
    runtime.remove()
    assert load_runtime(runtime.run) is None


def test_scan_names_what_it_cannot_read(tmp_path: Path) -> None:
    _runtime(tmp_path, "a").save()
    _runtime(tmp_path, "b").save()
    (tmp_path / "run" / "b" / "runtime.json").write_text('{"vm": "b"')
    (tmp_path / "run" / "empty").mkdir()
    found, damaged = scan(tmp_path / "run")
    assert [runtime.vm for runtime in found] == ["a"]
    assert len(damaged) == 1
    assert "b/runtime.json" in damaged[0]
    assert scan(tmp_path / "nowhere") == ((), ())


def test_started_note_only_rises(tmp_path: Path) -> None:
    state = tmp_path / "web"
    assert read_started(state, uuid="u1") is None
    note_started(state, uuid="u1", epoch=4, migration_id="m1")
    note = read_started(state, uuid="u1")
    assert note is not None
    assert (note.epoch, note.migration_id) == (4, "m1")
    note_started(state, uuid="u1", epoch=4, migration_id="m1")
    with pytest.raises(OperationFailed, match="epoch 4 was started"):
        note_started(state, uuid="u1", epoch=3, migration_id=None)
    note_started(state, uuid="u2", epoch=1, migration_id=None)  # another VM of this name
    assert read_started(state, uuid="u1") is None
    forget_started(state)
    assert read_started(state, uuid="u1") is None


def _trace(state: Path, *lines: tuple[int, float, int]) -> None:
    with (state / intervals.LOG).open("a") as log:
        for thread, at, running in lines:
            log.write(f"{thread}@{at:.6f}:vm_state_notify running {running} reason 9 (running)\n")


def _line(state: Path, event: str, at: float, pid: int, epoch: int = 1, host: str = "h1") -> None:
    append_line(state, event=event, at=at, host=host, vm="web", pid=pid, epoch=epoch)


def test_spans_come_from_qemu_itself(tmp_path: Path) -> None:
    _line(tmp_path, "START", 9.0, 100)
    _trace(tmp_path, (100, 10.0, 1), (117, 12.0, 0), (100, 13.0, 1))
    with (tmp_path / intervals.LOG).open("a") as log:
        log.write("qemu: warning: something else\n")
    _line(tmp_path, "EXIT", 15.0, 100)
    assert running_spans(tmp_path, until=99.0) == [
        Span(10.0, 12.0, "h1", 100, 1),
        Span(13.0, 15.0, "h1", 100, 1),
    ]


def test_a_killed_qemu_ends_with_its_exit_and_a_live_one_now(tmp_path: Path) -> None:
    _line(tmp_path, "START", 9.0, 100)
    _trace(tmp_path, (100, 10.0, 1))
    assert running_spans(tmp_path, until=50.0) == [Span(10.0, 50.0, "h1", 100, 1)]
    _line(tmp_path, "EXIT", 11.0, 100)
    _line(tmp_path, "START", 20.0, 100, epoch=2)
    _trace(tmp_path, (100, 21.0, 1))
    assert running_spans(tmp_path, until=50.0) == [
        Span(10.0, 11.0, "h1", 100, 1),
        Span(21.0, 50.0, "h1", 100, 2),
    ]


def test_an_end_nobody_saw_is_before_the_next_start(tmp_path: Path) -> None:
    _line(tmp_path, "START", 9.0, 100)
    _trace(tmp_path, (100, 10.0, 1))
    _line(tmp_path, "START", 14.0, 200, epoch=2)
    _line(tmp_path, "EXIT", 14.5, 100)
    _trace(tmp_path, (200, 15.0, 1))
    _line(tmp_path, "EXIT", 15.5, 100)
    assert running_spans(tmp_path, until=16.0) == [
        Span(10.0, 14.0, "h1", 100, 1),
        Span(15.0, 16.0, "h1", 200, 2),
    ]


def test_the_guard_says_when_it_stood_still(tmp_path: Path) -> None:
    state, guard = tmp_path / "web", tmp_path / "guard.log"
    state.mkdir()
    _line(state, "START", 9.0, 100)
    _trace(state, (100, 10.0, 1))
    said = [
        ("web", "freeze", "freezing", 18.0),
        ("web", "freeze", "frozen", 18.1),
        ("web", "freeze", "frozen", 18.2),
        ("other", "thaw", "running", 19.0),
        ("web", "thaw", "running", 30.0),
        ("web", "freeze", "frozen", 50.0),
        ("web", "kill", "gone", 60.0),
    ]
    lines = [{"vm": v, "act": a, "result": r, "time": t} for v, a, r, t in said]
    guard.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert running_spans(state, until=99.0, guard=guard) == [
        Span(10.0, 18.1, "h1", 100, 1),
        Span(30.0, 50.0, "h1", 100, 1),
    ]
    _trace(state, (100, 40.0, 0))  # it was paused when it was frozen the second time
    lines.append({"vm": "web", "act": "thaw", "result": "running", "time": 70.0})
    guard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert running_spans(state, until=99.0, guard=guard) == [
        Span(10.0, 18.1, "h1", 100, 1),
        Span(30.0, 40.0, "h1", 100, 1),
    ]


def test_a_planted_double_run_is_caught(tmp_path: Path) -> None:
    first = Span(10.0, 20.0, "h1", 100, 1)
    assert overlaps([first, Span(20.0, 30.0, "h2", 7, 2)]) == []
    double = Span(19.999, 30.0, "h2", 7, 2)
    assert overlaps([first, double]) == [(first, double)]
    assert overlaps([first, double], slack=0.01) == []
    assert overlaps([first, Span(12.0, 13.0, "h1", 100, 1)]) == []
    inner = Span(11.0, 12.0, "h1", 101, 1)
    assert overlaps([inner, first]) == [(first, inner)], "two processes on one host count too"


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    _line(tmp_path, "START", 1.0, 5)
    with (tmp_path / intervals.FILE).open("a") as file:
        file.write('{"event":"EX')
    assert [line["event"] for line in intervals.read_lines(tmp_path)] == ["START"]


def test_names_fit_kernel_and_qemu() -> None:
    assert len(tap_name("x" * 63, "net7")) <= 15
    assert tap_name("web", "net0") != tap_name("web", "net1")

    class Long:
        id = "a-very-long-disk-name-with-too-many-letters"
        generation = 0

    class Second(Long):
        generation = 1

    for one in (Long(), Second()):
        assert len(file_node(one)) <= 31  # type: ignore[arg-type]
        assert len(format_node(one)) <= 31  # type: ignore[arg-type]
    assert file_node(Long()) != file_node(Second())  # type: ignore[arg-type]
    assert broker_id(Long()) != broker_id(Second())  # type: ignore[arg-type]


def test_log_tail_starts_where_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == ""
    log.write_text("old\n")
    offset = log.stat().st_size
    log.write_text("old\nnew one\n\nnew two\n")
    assert log_tail(log, offset=offset) == "new one | new two"


def _tree(*devices: Device, **more: object) -> DeviceTree:
    values: dict[str, object] = {
        "machine": "pc-q35-9.0",
        "cpu_model": "Westmere-v1",
        "cpus": 1,
        "memory_bytes": 256 << 20,
        "devices": devices,
    }
    return DeviceTree.model_validate(values | more)


def test_trees_tell_every_difference() -> None:
    nic = Device(id="net0", driver="virtio-net-pci", address="port0:00.0", properties={"mac": "a"})
    disk = Device(id="disk0", driver="scsi-hd", properties={"size": "1"})
    assert _tree(nic, disk).differences(_tree(disk, nic)) == ()
    said = _tree(nic, disk).differences(
        _tree(nic.but(properties={"mac": "b"}), disk.but(id="disk1"), cpus=2)
    )
    assert len(said) == 4
    assert any("mac=a here" in line and "mac=b there" in line for line in said)
    assert "disk0 (scsi-hd) is missing there" in said
    assert "disk1 (scsi-hd) is there but not here" in said
    assert "cpus is 1 here and 2 there" in said


def test_what_only_a_newer_agent_tells_of_a_device_is_no_difference() -> None:
    """Its questions are more; what every version tells is compared even where one has none."""
    disk = Device(id="disk0", driver="scsi-hd", properties={"size": "1"})
    newer = Device.model_validate(
        {**dict(disk), "properties": {"size": "1", "rotation": "0"}, "slot": 4}
    )
    assert _tree(disk).differences(_tree(newer)) == ()
    assert _tree(newer).differences(_tree(disk)) == ()
    other = newer.but(properties={"size": "1", "rotation": "7200"})
    assert len(_tree(newer).differences(_tree(other))) == 1
    empty = disk.but(properties={})
    assert len(_tree(disk).differences(_tree(empty))) == 1
    assert len(_tree(empty).differences(_tree(newer))) == 1


def test_a_missing_qemu_user_is_told_with_the_remedy() -> None:
    with pytest.raises(OperationFailed, match="no user 'nobody-of-that-name'") as caught:
        Binary.named("qemu-system-x86_64", user="nobody-of-that-name")
    assert "useradd" in caught.value.hint


def test_qemu_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GODWIT_TOKEN", "secret")
    binary = Binary(path="/opt/q/bin/qemu", library_path="/opt/q/lib")
    assert "secret" not in str(binary.environment())
    assert binary.environment()["LD_LIBRARY_PATH"] == "/opt/q/lib"
