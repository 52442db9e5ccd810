"""The destination's half of the stream: everything its QEMU must know, and an open port."""

from __future__ import annotations

import asyncio

from godwit.migration.peer import PrepareAsk
from godwit.migration.stream import TLS_OBJECT, Stream
from godwit.migration.world import DestinationWorld
from godwit.model.errors import Refused
from godwit.qemu.machine import Machine


async def listen(machine: Machine, ask: PrepareAsk, world: DestinationWorld) -> int:
    """Set up the waiting QEMU and let it listen on the migration network; the port.

    Refused without a certificate; MonitorError when QEMU refuses.
    """
    stream = Stream(machine.monitor)
    wanted = {"events", "return-path", "validate-uuid", "late-block-activate"}
    if ask.postcopy:
        wanted.add("postcopy-ram")
    if ask.tls and world.migration_tls_dir is None:
        raise Refused(f"{world.host} has no migration certificate", hint="issue one")
    secured = (
        [stream.use_tls(world.migration_tls_dir, endpoint="server")]
        if ask.tls and world.migration_tls_dir is not None
        else []
    )
    await asyncio.gather(stream.set_capabilities(wanted), *secured)
    # QEMU announces at load, while the VM still belongs to the source: as little as possible, and
    # the gate is closed, so it goes nowhere. Not 0 rounds: then QEMU frees the timer of each
    # virtio-net card and dies when the guest resets it, at its next shutdown or reboot.
    await stream.set_parameters(
        announce_rounds=1,
        tls_creds=TLS_OBJECT if ask.tls else "",
    )
    return await stream.listen(world.migration_address)
