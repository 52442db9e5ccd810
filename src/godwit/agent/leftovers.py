"""Records of VMs of which this host has nothing left."""

from __future__ import annotations

from godwit.agent.desk import Desk
from godwit.model import keys, ownership
from godwit.model.errors import Conflict
from godwit.model.ownership import OwnerState
from godwit.model.vm import VmState, VmStatus
from godwit.qemu.runtime import load_runtime
from godwit.store.records import CasFailed

_RUNS = (OwnerState.RUNNING, OwnerState.STARTING)


async def record_gone(desk: Desk, name: str) -> VmStatus | None:
    """Record as stopped what the record has here and nothing is left of; None otherwise.

    Its host lost its power, somebody asks for its end, and the cluster has not yet decided what
    becomes of it. The VM's lock is held. Conflict when the record changed at that moment.
    """
    found = await desk.records.owner(name)
    if found is None or found.value.migration is not None or found.value.state not in _RUNS:
        return None
    left = load_runtime(desk.config.paths.vm_run(name))
    if found.value.host != desk.host or left is not None:
        return None
    after = ownership.stopped(found.value)
    try:
        await desk.records.cas(keys.vm_owner(name), after, found.revision)
    except CasFailed:
        raise Conflict(f"{name} was changed at this moment", hint="look, and ask again") from None
    status = VmStatus(
        state=VmState.STOPPED,
        host=desk.host,
        epoch=found.value.epoch,
        reason="stopped by request; nothing of it was left",
        since=desk.clock.realtime(),
    )
    await desk.publish_status(name, status)
    return status
