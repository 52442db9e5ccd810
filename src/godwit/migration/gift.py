"""The gift: a VM that never ran on its new owner goes back to the source of its move."""

from __future__ import annotations

import logging

from godwit.migration.world import DiskGate
from godwit.model import keys, ownership
from godwit.model.errors import GodwitError
from godwit.model.world import Clock
from godwit.store.errors import StoreError
from godwit.store.records import CasFailed, Records

_RETRY_S = 0.1
_log = logging.getLogger("migration")


async def give_back(records: Records, clock: Clock, *, vm: str, migration: str, host: str) -> bool:
    """Return a VM that never ran here to the source of ``migration``; waits for the store.

    The caller is the live agent of ``host`` and knows that no QEMU of the record's epoch ever had
    running vCPUs here. False when the record does not (or no longer) give the VM to this host.
    """
    while True:
        try:
            found = await records.owner(vm)
            if found is None or found.value.host != host:
                return False
            move = found.value.migration
            if move is None or move.id != migration:
                return False
            gift = ownership.gift_back(found.value, migration)
            await records.cas(keys.vm_owner(vm), gift, found.revision)
        except (CasFailed, StoreError):
            await clock.sleep(_RETRY_S)
            continue
        return True


async def close_disks(disks: DiskGate, clock: Clock, *, ran: bool) -> None:
    """Return when nothing of this host writes the disks, however long a process takes to die.

    A path that was lost keeps nobody waiting: the source syncs what this host cannot. Only what a
    guest that may have run here (``ran``) was told is tried to be synced first.
    """
    sync = ran
    while True:
        try:
            await disks.close(sync=sync)
        except (GodwitError, OSError) as error:
            _log.warning("the disks do not close: %s", error)
            sync = False
            await clock.sleep(_RETRY_S)
        else:
            return
