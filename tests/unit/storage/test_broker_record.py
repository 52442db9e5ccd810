"""The record of a broker outlives the agent, and a damaged one says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from godwit.model.errors import OperationFailed
from godwit.storage import gate as gates
from godwit.storage.broker_record import BrokerRecord, PeerRecord, Served, load_broker, load_peer
from godwit.storage.gate import Gate
from godwit.storage.nodes import BrokerDisk, PeerTarget

DISK = BrokerDisk(id="disk0", path="/x/d.vhdx", format="vhdx", size_bytes=1 << 20)
PEER = PeerTarget(host="h2", port=1, export="web-disk0@3")


def test_a_broker_is_found_again(tmp_path: Path) -> None:
    gate = gates.acquire(Gate(), epoch=3, via="peer")
    record = BrokerRecord(
        vm="web",
        host="h1",
        run=tmp_path,
        pid=7,
        start_time=8,
        socket=tmp_path / "s",
        disks={"disk0": Served(disk=DISK, gate=gate, peer=PEER)},
    )
    record.save()
    assert load_broker(tmp_path) == record
    assert (tmp_path / "broker.json").stat().st_mode & 0o777 == 0o600
    record.remove()
    record.remove()
    assert load_broker(tmp_path) is None


def test_a_peer_export_is_found_again(tmp_path: Path) -> None:
    record = PeerRecord(
        vm="web", host="h2", run=tmp_path, port=10900, exports={"disk0": 3}, floors={"disk0": 3}
    )
    record.save()
    assert load_peer(tmp_path) == record


def test_both_live_in_one_directory(tmp_path: Path) -> None:
    PeerRecord(vm="web", host="h2", run=tmp_path, port=1).save()
    assert load_broker(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"vm": 3}'])
def test_a_damaged_record_says_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "broker.json").write_text(text)
    with pytest.raises(OperationFailed, match="cannot be read") as failure:
        load_broker(tmp_path)
    assert "by hand" in failure.value.hint
