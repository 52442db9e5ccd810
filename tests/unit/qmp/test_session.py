"""The monitor session against a fake that speaks the real protocol."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from pathlib import Path

import pytest

from godwit.qmp import (
    Monitor,
    MonitorLost,
    MonitorTimeout,
    MonitorUnreachable,
    QmpError,
    session,
)
from godwit.qmp.fake import FakeQemu, requests

GREETING = {
    "QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 2}}, "capabilities": ["oob"]}
}


async def test_a_session_knows_version_and_oob(monitor: Monitor) -> None:
    assert monitor.version == (10, 0, 2)
    assert monitor.oob
    assert await monitor.execute("query-status") == {"status": "running", "running": True}


async def test_oob_can_be_declined(qemu: FakeQemu, tmp_path: Path) -> None:
    async with await Monitor.connect(tmp_path / "a", name="n", deadline=2, oob=False) as monitor:
        assert not monitor.oob
        with pytest.raises(QmpError, match="no out-of-band"):
            await monitor.execute_oob("yank", {"instances": []})
        await monitor.execute("query-status")


async def test_connect_waits_for_a_socket_that_appears_later(tmp_path: Path) -> None:
    connecting = asyncio.create_task(Monitor.connect(tmp_path / "late", name="n", deadline=2))
    await asyncio.sleep(0.03)
    fake = FakeQemu()
    await fake.listen(tmp_path / "late")
    async with await connecting as monitor:
        assert (await monitor.execute("query-version"))["qemu"]["major"] == 10
    await fake.die()


async def test_connect_takes_a_connected_socket() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    writer.write(json.dumps(GREETING).encode() + b"\n")

    async def answer() -> None:
        request = await anext(requests(reader))
        writer.write(json.dumps({"id": request.get("id"), "return": {}}).encode() + b"\n")

    answering = asyncio.create_task(answer())
    monitor = await Monitor.connect(ours, name="n", deadline=2)
    assert monitor.version == (9, 1, 2)
    await answering
    await monitor.close()
    writer.close()
    await writer.wait_closed()


async def test_an_event_before_the_greeting_is_retried(tmp_path: Path) -> None:
    attempts = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            event = {"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}
            writer.write(json.dumps(event).encode() + b"\n")
        writer.write(json.dumps(GREETING).encode() + b"\n")
        async for request in requests(reader):
            writer.write(json.dumps({"id": request.get("id"), "return": {}}).encode() + b"\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "a")
    async with await Monitor.connect(tmp_path / "a", name="n", deadline=2):
        assert attempts == 2
    server.close()


async def test_a_frozen_qemu_is_unreachable_at_the_deadline(tmp_path: Path) -> None:
    fake = FakeQemu()
    await fake.listen(tmp_path / "a")
    fake.freeze()
    started = time.monotonic()
    with pytest.raises(MonitorUnreachable, match=r"within 0\.2 s"):
        await Monitor.connect(tmp_path / "a", name="n", deadline=0.2)
    assert time.monotonic() - started < 0.4
    await fake.die()


async def test_the_reason_of_an_unreachable_monitor_is_told(tmp_path: Path) -> None:
    with pytest.raises(MonitorUnreachable, match="No such file"):
        await Monitor.connect(tmp_path / "none", name="n", deadline=0.1)


async def test_a_refusal_is_a_qmp_error_and_the_session_goes_on(monitor: Monitor) -> None:
    with pytest.raises(QmpError) as caught:
        await monitor.execute("make-coffee")
    assert caught.value.error_class == "CommandNotFound"
    assert "make-coffee" in caught.value.desc
    await monitor.execute("query-status")


async def test_after_a_timeout_late_answers_reach_their_own_request(
    qemu: FakeQemu, monitor: Monitor
) -> None:
    release = qemu.hang("query-version")
    with pytest.raises(MonitorTimeout) as caught:
        await monitor.execute("query-version", timeout=0.05)
    assert caught.value.sent
    assert caught.value.late is not None
    waiting = asyncio.create_task(monitor.execute("query-status", timeout=2))
    release.set()
    assert (await waiting)["status"] == "running"
    late = await caught.value.late
    assert isinstance(late, dict)
    assert "qemu" in late


async def test_a_cancelled_caller_leaves_the_session_usable(
    qemu: FakeQemu, monitor: Monitor
) -> None:
    release = qemu.hang("query-version")
    task = asyncio.create_task(monitor.execute("query-version"))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    assert (await monitor.execute("query-status"))["running"]


async def pile_up(monitor: Monitor, qemu: FakeQemu) -> list[asyncio.Task[object]]:
    """A hung main loop with far more in-band commands than QEMU queues."""
    qemu.hang("query-version")
    tasks = [asyncio.create_task(monitor.execute("query-version", timeout=0.3)) for _ in range(30)]
    await asyncio.sleep(0.05)
    return tasks


async def test_oob_gets_through_however_many_in_band_commands_hang(
    qemu: FakeQemu, monitor: Monitor
) -> None:
    tasks = await pile_up(monitor, qemu)
    with pytest.raises(QmpError) as caught:
        await monitor.execute_oob("yank", {"instances": [{"type": "migration"}]}, timeout=0.2)
    assert caught.value.error_class == "DeviceNotFound"
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    sent = [o.sent for o in outcomes if isinstance(o, MonitorTimeout)]
    assert sent.count(True) == session.MAX_IN_BAND
    assert sent.count(False) == 30 - session.MAX_IN_BAND


async def test_without_the_in_band_limit_oob_would_not_get_through(
    qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The planted fault that shows the check above can fail.
    monkeypatch.setattr(session, "MAX_IN_BAND", 100)
    async with await Monitor.connect(tmp_path / "a", name="n", deadline=2) as monitor:
        tasks = await pile_up(monitor, qemu)
        with pytest.raises(MonitorTimeout):
            await monitor.execute_oob("yank", {"instances": []}, timeout=0.1)
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_loss_reaches_every_waiter(qemu: FakeQemu, monitor: Monitor) -> None:
    qemu.hang("query-version")
    stream = monitor.events()
    waiters = [
        asyncio.create_task(monitor.execute("query-version")),
        asyncio.create_task(monitor.wait_event(lambda event: False, timeout=None)),
        asyncio.create_task(stream.wait(lambda event: event.name == "X", timeout=None)),
    ]
    await asyncio.sleep(0.02)
    await qemu.die()
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [MonitorLost] * 3
    assert "query-version" in str(outcomes[0])
    assert "closed the connection" in (await monitor.wait_lost()).reason
    with pytest.raises(MonitorLost):
        await monitor.execute("query-status")
    with pytest.raises(MonitorLost):
        await anext(monitor.events())


async def test_events_before_the_loss_are_still_read(qemu: FakeQemu, monitor: Monitor) -> None:
    stream = monitor.events()
    await monitor.execute("quit")
    await monitor.wait_lost()
    assert (await anext(stream)).name == "SHUTDOWN"
    with pytest.raises(MonitorLost):
        await anext(stream)


async def test_subscribers_are_independent_ordered_and_filtered(
    qemu: FakeQemu, monitor: Monitor
) -> None:
    everything, stops = monitor.events(), monitor.events("STOP")
    before = time.time()
    for _ in range(3):
        await monitor.execute("stop")
        await monitor.execute("cont")
    assert [event.name for event in everything.take()] == ["STOP", "RESUME"] * 3
    taken = stops.take()
    assert [event.name for event in taken] == ["STOP"] * 3
    for event in taken:
        assert before - 0.001 <= event.timestamp <= event.arrived <= time.time()
    assert [e.timestamp for e in taken] == sorted(e.timestamp for e in taken)


async def test_no_event_is_kept_when_nobody_subscribed(qemu: FakeQemu, monitor: Monitor) -> None:
    stream = monitor.events()
    for _ in range(50):
        qemu.emit("RTC_CHANGE", {"offset": 0})
    await monitor.execute("query-status")
    assert len(stream.take()) == 50
    assert monitor._client.events.history == ()
    assert monitor._client.events.empty()
    del stream
    gc.collect()
    assert len(monitor._streams) == 0


async def test_wait_event_times_out_and_unsubscribes(monitor: Monitor) -> None:
    with pytest.raises(TimeoutError):
        await monitor.wait_event(lambda event: True, timeout=0.02)
    assert len(monitor._streams) == 0


async def test_closing_never_waits_for_a_frozen_qemu(qemu: FakeQemu, monitor: Monitor) -> None:
    qemu.freeze()
    waiting = asyncio.create_task(monitor.execute("query-status"))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(0.5):
        await monitor.close()
    with pytest.raises(MonitorLost, match="closed by us"):
        await waiting
    await monitor.close()


async def test_a_socket_serves_one_client_at_a_time(
    qemu: FakeQemu, monitor: Monitor, tmp_path: Path
) -> None:
    with pytest.raises(MonitorUnreachable):
        await Monitor.connect(tmp_path / "a", name="second", deadline=0.1)
    await qemu.listen(tmp_path / "b")
    async with await Monitor.connect(tmp_path / "b", name="guard", deadline=2) as second:
        stream = second.events("STOP")
        await monitor.execute("stop")
        assert (await stream.wait(timeout=1)).name == "STOP"
