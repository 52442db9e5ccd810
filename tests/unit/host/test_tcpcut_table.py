"""The kernel's table of TCP connections, read for data that nobody can take back."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.host import tcpcut

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt ...\n"
ROW = "   {n}: {here} {there} {state} {queue}:00000000 01:00000014 00000002     0        0 0 1\n"
OURS = "[10.95.7.1]:42000-[10.95.7.2]:2049"


def _row(here: str, there: str, *, state: str = "04", queue: str = "0000000B", n: int = 0) -> str:
    return ROW.format(n=n, here=here, there=there, state=state, queue=queue)


def _tables(
    monkeypatch: pytest.MonkeyPatch, folder: Path, four: str, six: str | None = None
) -> None:
    paths = (folder / "tcp", folder / "tcp6")
    paths[0].write_text(HEAD + four)
    if six is not None:
        paths[1].write_text(HEAD + six)
    monkeypatch.setattr(tcpcut, "_TABLES", paths)


def test_only_ours_and_only_with_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = ("01075F0A:A410", "02075F0A:0801")
    _tables(monkeypatch, tmp_path, _row(*ours))
    assert tcpcut.unsent([OURS]) == (OURS,)
    assert tcpcut.unsent(["[10.95.7.1]:42001-[10.95.7.2]:2049"]) == ()
    assert tcpcut.unsent([]) == ()
    _tables(monkeypatch, tmp_path, _row(*ours, queue="00000000"))
    assert tcpcut.unsent([OURS]) == ()
    _tables(monkeypatch, tmp_path, _row("0100007F:0801", "0100007F:A410"))
    assert tcpcut.unsent([OURS]) == ()


def test_an_address_of_the_old_kind_in_a_new_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mapped = "0000000000000000FFFF0000{}"
    ours = (mapped.format("01075F0A:A410"), mapped.format("02075F0A:0801"))
    new = ("B80D0120000000000000000001000000:A410", "B80D0120000000000000000002000000:0CBC")
    _tables(monkeypatch, tmp_path, "", _row(*ours) + _row(*new, n=1))
    assert tcpcut.unsent([OURS]) == (OURS,)
    six = "[2001:db8::1]:42000-[2001:db8::2]:3260"
    assert tcpcut.unsent([six]) == (six,)
