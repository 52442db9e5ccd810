"""Files are replaced as a whole, locks exclude, sockets are bound with the right mode."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from pathlib import Path

import pytest

from godwit.host import files, sockets
from godwit.host.clock import RealClock
from godwit.host.errors import HostError, LockHeld
from godwit.host.inotify import PathWatch
from godwit.model.world import Clock


def test_write_replaces_content_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    files.write_durable(path, b"one", 0o644)
    files.write_durable(path, b"two", 0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["note.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note"
    files.write_durable(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_durable(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_file_is_durable_before_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "note", list[str]()
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        order.append(kind)
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    files.write_durable(path, b"x")
    assert order == ["file", "rename", "directory"]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert files.load_json(path) is None
    files.save_json(path, {"epoch": 3})
    assert files.load_json(path) == {"epoch": 3}
    path.write_text('{"epoch":')
    with pytest.raises(ValueError, match=r"x\.json"):
        files.load_json(path)
    files.remove_durable(path)
    files.remove_durable(path)
    assert files.load_json(path) is None


def test_lock_excludes_and_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.locked(path), pytest.raises(LockHeld), files.locked(path):
        raise AssertionError("entered a held lock")
    with files.locked(path):
        pass


def test_bound_socket_mode_and_listening(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with sockets.bind_unix(path, 0o660) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert not listener.getblocking()
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))


def test_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    sockets.bind_unix(path).close()
    assert path.is_socket()
    with sockets.bind_unix(path), pytest.raises(OSError, match="in use"):
        sockets.bind_unix(path)
    with socket.socket(socket.AF_UNIX) as caller, pytest.raises(ConnectionRefusedError):
        caller.connect(str(path))


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        sockets.bind_unix(path)
    assert path.read_text() == "precious"


def test_too_long_socket_path(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="107"):
        sockets.bind_unix(tmp_path / ("x" * 107))


def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n"
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sockets.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    assert not sockets.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        assert sockets.notify("READY=1\nSTATUS=fine")
        assert manager.recv(100) == b"READY=1\nSTATUS=fine"


def test_watchdog_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert sockets.watchdog_interval() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert sockets.watchdog_interval() is None
    monkeypatch.delenv("WATCHDOG_USEC")
    assert sockets.watchdog_interval() is None


def test_listeners_meant_for_another_process_are_not_taken() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "X": "y"}
    assert sockets.inherited_listeners(environ) == {}
    assert environ == {"X": "y"}


async def test_clock_counts_and_sleeps() -> None:
    clock: Clock = RealClock()
    before = clock.monotonic()
    await clock.sleep(0.02)
    assert 0.02 <= clock.monotonic() - before < 1
    await clock.sleep(0)
    await clock.sleep(-1)
    assert abs(clock.realtime() - time.time()) < 1


async def test_watch_wakes_on_a_new_entry_and_remembers(tmp_path: Path) -> None:
    with PathWatch(tmp_path) as watch:
        waiting = asyncio.ensure_future(watch.changed())
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        files.write_durable(tmp_path / "x", b"1")
        async with asyncio.timeout(1):
            await waiting
        files.write_durable(tmp_path / "x", b"2")  # nobody waits now
        async with asyncio.timeout(1):
            await watch.changed()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await watch.changed()


def test_watch_of_nothing_fails_and_leaks_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        PathWatch(tmp_path / "missing")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
