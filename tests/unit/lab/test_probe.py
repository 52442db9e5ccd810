"""What the probe makes of its samples, and that it measures what it says."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from godwit.lab import probe
from godwit.lab.probe import Prober, Samples, analyse

MS = 1_000_000


def samples(rtts: list[float | None], *, sent_ms: list[float] | None = None) -> Samples:
    """One tick a millisecond from 1 s on; None was never answered."""
    at = sent_ms or [1000 + index for index in range(len(rtts))]
    sent = [round(ms * MS) for ms in at]
    arrived = [0 if r is None else s + round(r * MS) for s, r in zip(sent, rtts, strict=True)]
    return Samples(sent, arrived, MS)


def test_a_guest_that_always_answers() -> None:
    report = analyse(samples([0.5] * 100))
    assert (report.sent, report.answered, report.lost) == (100, 100, 0)
    assert (report.blackout_ms, report.silence_ms, report.stalled_ms) == (0, 0, 0)
    assert report.p50_rtt_ms == 0.5
    assert report.windows == ()


def test_what_was_lost_is_the_blackout() -> None:
    report = analyse(samples([0.5] * 50 + [None] * 60 + [0.5] * 50))
    assert report.lost == 60
    assert report.blackout_ms == 60
    assert report.silence_ms == 60
    (window,) = report.windows
    assert (window.start_s, window.duration_ms, window.lost) == (0.0495, 60, 60)


def test_what_was_answered_late_is_silence() -> None:
    """Paused and resumed: the datagrams waited, none was lost."""
    late = [float(60 - index) for index in range(60)]
    report = analyse(samples([0.0] * 50 + late + [0.0] * 50))
    assert report.lost == 0
    assert report.blackout_ms == 0
    assert report.silence_ms == 60
    assert report.p99_rtt_ms == 59.0


def test_single_losses_do_not_add_up() -> None:
    report = analyse(samples([0.5, None] * 50 + [0.5]))
    assert report.lost == 50
    assert report.blackout_ms == 1


def test_a_guest_that_does_not_come_back_is_dark_until_the_end() -> None:
    report = analyse(samples([0.5] * 50 + [None] * 200))
    assert report.blackout_ms == 199
    assert report.windows[-1].lost == 200


def test_a_guest_that_never_answered() -> None:
    report = analyse(samples([None] * 100))
    assert report.answered == 0
    assert report.blackout_ms == 98
    assert len(report.windows) == 1


def test_no_samples() -> None:
    report = analyse(Samples([], []))
    assert (report.sent, report.blackout_ms, report.windows) == (0, 0, ())


def test_a_prober_that_was_late_says_so() -> None:
    at = [1000.0 + index for index in range(50)] + [1090.0 + index for index in range(50)]
    report = analyse(samples([0.5] * 100, sent_ms=at))
    assert report.stalled_ms == 40
    assert report.blackout_ms == 40


def test_answers_out_of_order() -> None:
    report = analyse(samples([0.5] * 10 + [5.0] + [0.5] * 20))
    assert report.lost == 0
    assert report.silence_ms == 1


def test_files_are_read_back(tmp_path: Path) -> None:
    kept = samples([0.5, None, 1.5])
    path = tmp_path / "probe"
    kept.save(path)
    read = Samples.load(path)
    assert (list(read.sent), list(read.arrived)) == (list(kept.sent), list(kept.arrived))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut short|multiple"):
        Samples.load(path)


def test_it_measures_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind(("127.0.0.1", 0))
    monkeypatch.setattr(probe, "ECHO_PORT", echo.getsockname()[1])
    monkeypatch.setattr(probe, "LINGER_S", 0.2)
    done = threading.Event()

    def serve() -> None:
        echo.settimeout(0.1)
        while not done.is_set():
            try:
                data, sender = echo.recvfrom(64)
            except TimeoutError:
                continue
            echo.sendto(b"noise" + data, sender)
            if data[8] != 7:  # the eighth datagram, and none else within 256
                echo.sendto(data, sender)

    server = threading.Thread(target=serve)
    server.start()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
            found = Prober(channel, "127.0.0.1").run(seconds=0.2)
    finally:
        done.set()
        server.join()
        echo.close()
    assert len(found.sent) == 200
    assert [index for index, at in enumerate(found.arrived) if not at] == [7]
    report = analyse(found)
    assert report.lost == 1
    assert 0 < report.p50_rtt_ms < 50
    # On an absolute schedule lateness does not add up.
    assert found.sent[-1] - found.sent[0] < 0.3e9
