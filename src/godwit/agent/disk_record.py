"""Which image is a disk's, in the VM's record: written by its host while it moves a disk."""

from __future__ import annotations

import asyncio
import logging

from godwit.agent.disk_journal import replaced
from godwit.model import keys
from godwit.model.errors import Conflict
from godwit.model.vm import Disk, Vm
from godwit.store.api import mod_is
from godwit.store.errors import StoreError, StoreOutcomeUnknown
from godwit.store.records import CasFailed, Records

_log = logging.getLogger("agent")
RETRY_S = 0.2


async def write_new(records: Records, vm: str, old: Disk, new: Disk, *, owner: int) -> None:
    """The record names ``new`` when this returns, and does not and will not when it raises.

    ``owner`` is the revision of the ownership record on the strength of which it is written;
    Conflict when that or the definition changed. A write whose answer was lost is made again
    until the store answers; cancelled, nobody knows: see `godwit.agent.disk_journal`.
    """
    spec = await records.vm(vm)
    if spec is None or old not in spec.value.disks:
        raise Conflict(f"the definition of {vm} does not have {old.path}", hint="look, ask again")
    after, unsure = replaced(spec.value, new), False
    while True:
        try:
            await records.cas(
                keys.vm_spec(vm),
                after,
                spec.revision,
                compare=[mod_is(keys.vm_owner(vm), owner)],
            )
        except CasFailed:
            if unsure and await _names(records, vm, new):
                return  # it was ours
            raise Conflict(
                f"{vm} was changed by somebody else at this moment", hint="look, and ask again"
            ) from None
        except StoreError as error:
            unsure = unsure or isinstance(error, StoreOutcomeUnknown)
            if not unsure:
                raise
            _log.warning("%s: is its disk's new image in the record? %s", vm, error)
            await asyncio.sleep(RETRY_S)  # nothing announces that the store is back
        else:
            return


async def write_back(records: Records, vm: str, old: Disk, new: Disk) -> Vm | None:
    """The record names ``old``, and no write of ``new`` that is still under way can succeed.

    Asks until the store answers. The VM as it is then; None when it is gone.
    """
    return await _put(records, vm, given=new, wanted=old)


async def write_forward(records: Records, vm: str, old: Disk, new: Disk) -> Vm | None:
    """The record names ``new``: its machine writes to it."""
    return await _put(records, vm, given=old, wanted=new)


async def _put(records: Records, vm: str, *, given: Disk, wanted: Disk) -> Vm | None:
    def change(spec: Vm) -> Vm:
        # Written even when it says so already: the new revision is what stops a late write.
        return replaced(spec, wanted) if given in spec.disks else spec

    while True:
        try:
            found = await records.update(keys.vm_spec(vm), Vm, change)
        except StoreError as error:
            _log.warning("%s: its disk's image is not in the record yet: %s", vm, error)
            await asyncio.sleep(RETRY_S)
        else:
            return None if found is None else found.value


async def _names(records: Records, vm: str, disk: Disk) -> bool:
    while True:
        try:
            spec = await records.vm(vm)
        except StoreError:
            await asyncio.sleep(RETRY_S)
            continue
        return spec is not None and disk in spec.value.disks
