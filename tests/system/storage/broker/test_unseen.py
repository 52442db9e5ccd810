"""A daemon and its agent end together: what the kernel still holds of it is waited for."""

from __future__ import annotations

import os

import pytest
from tests.system.storage.broker.rig import PROGRAM, Start

from godwit.host.process import kill, wait_exit
from godwit.model.errors import OperationFailed
from godwit.storage import broker_daemon
from godwit.storage.broker import Broker, Opening
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.broker_record import load_broker
from godwit.storage.gate import GateState
from godwit.storage.nodes import BrokerDisk

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(PROGRAM is None, reason="qemu-storage-daemon is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
NAME = "[10.95.7.1]:42000-[10.95.7.2]:2049"


async def test_nobody_opens_its_images_before_the_kernel_has_nothing_left(
    disk: BrokerDisk, place: DaemonPlace, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await start(disk, disk0=Opening(1))
    first.record = first.record.but(connections=(NAME,))  # a daemon with a server has one
    first.record.save()
    daemon = first.record.process
    await first.close()  # its agent is gone
    kill(daemon)
    await wait_exit(daemon)
    held = {NAME}
    monkeypatch.setattr(broker_daemon, "unsent", lambda names: tuple(sorted(held & set(names))))
    record = load_broker(place.run)
    assert record is not None
    assert record.connections == (NAME,)
    listener = first._listener
    assert listener is not None
    second = await Broker.recall(place, record, listener=listener)
    with pytest.raises(OperationFailed, match="still has unsent data"):
        second.check_left()
    with pytest.raises(OperationFailed, match="still has unsent data"):
        await second.restart({"disk0": Opening(1)})
    assert not second.alive
    held.clear()
    await second.restart({"disk0": Opening(1)})
    assert second.gate("disk0").state is GateState.OPEN
    assert second.record.connections == ()  # an image in a directory needs none
    await second.kill()
    await second.close()
