"""After a restart: end what an agent began with a disk and did not finish.

Nothing is copied on. What QEMU writes to is the disk; without a QEMU it is what the record names.
The other image is closed and deleted, unless it is the old one and was to be kept.
"""

from __future__ import annotations

import logging
from pathlib import Path

from godwit.agent.desk import Desk
from godwit.agent.disk_journal import Journal, Verdict, forget_journal, judge, load_journal, named
from godwit.agent.disk_record import write_back, write_forward
from godwit.model.errors import GodwitError, OperationFailed
from godwit.model.vm import Vm
from godwit.qemu.machine import Machine
from godwit.qemu.mirror import Mirror, let_go
from godwit.qemu.runtime import load_runtime
from godwit.store.records import Unreadable

_log = logging.getLogger("agent")

_SAID = {
    Verdict.BACK_OUT: "the disk keeps its old image",
    Verdict.GO_ON: "the record names the new image, and its machine takes to it",
    Verdict.CORRECT_BACK: "its machine kept the old image, and the record says so again",
    Verdict.FINISH: "the disk has its new image",
    Verdict.CORRECT_FORWARD: "its machine has the new image, and the record says so now",
}


async def settle_running(desk: Desk, vm: Vm, machine: Machine) -> Vm:
    """Of a VM whose QEMU was found, before its vCPUs are let go; the VM as its record is then."""
    state = desk.config.paths.vm_state(vm.name)
    journal = load_journal(state)
    if journal is None:
        return vm
    mirror = Mirror(machine, journal.old, journal.new)
    verdict = judge(named(vm, journal), await mirror.seen())
    if verdict is Verdict.GO_ON:
        try:
            await mirror.finalize()
        except OperationFailed:
            verdict = Verdict.CORRECT_BACK
    await desk.event("vm.disk-move", vm.name, f"{journal.id} was cut short: {_SAID[verdict]}")
    if verdict in (Verdict.BACK_OUT, Verdict.CORRECT_BACK):
        vm = await write_back(desk.records, vm.name, journal.old, journal.new) or vm
        if not await let_go(mirror):
            raise OperationFailed(f"the copy of {journal.old.id} does not end", hint="")
        gone, delete = journal.new, True
    else:
        if verdict is Verdict.CORRECT_FORWARD:
            vm = await write_forward(desk.records, vm.name, journal.old, journal.new) or vm
        await mirror.forget()
        await mirror.close_old()
        gone, delete = journal.old, not journal.keep
    await desk.brokers.remove(vm.name, gone)
    if delete:
        await _delete(desk, vm.name, gone.path)
    forget_journal(state)
    return vm


async def settle_others(desk: Desk) -> None:
    """Of VMs that have no QEMU here."""
    for path in sorted((desk.config.paths.state / "vms").glob("*/disk-move.json")):
        name = path.parent.name
        if name in desk.slots or load_runtime(desk.config.paths.vm_run(name)) is not None:
            continue  # settled, or not adopted: then nothing is known
        try:
            journal = load_journal(path.parent)
            if journal is not None:
                await _settle_dead(desk, name, journal, path.parent)
        except (GodwitError, OSError) as error:
            await desk.event("vm.disk-move", name, str(error), level="error")


async def _settle_dead(desk: Desk, name: str, journal: Journal, state: Path) -> None:
    spec = await desk.records.vm(name)
    vm = None if spec is None else spec.value
    verdict = judge(named(vm, journal), None)
    if verdict is Verdict.BACK_OUT:
        if named(vm, journal) == "old":
            await write_back(desk.records, name, journal.old, journal.new)
        await _delete(desk, name, journal.new.path)
    elif not journal.keep:
        await _delete(desk, name, journal.old.path)
    forget_journal(state)
    await desk.event("vm.disk-move", name, f"{journal.id} was cut short: {_SAID[verdict]}")


async def _delete(desk: Desk, vm: str, path: str) -> None:
    """Unless a VM has it by now: what was said to be deleted may have been taken meanwhile."""
    try:
        vms = await desk.records.vms()
    except Unreadable as error:
        _log.warning("%s stays: %s", path, error.message)
        return
    if any(disk.path == path for one in vms.values() for disk in one.disks):
        _log.warning("%s stays: a VM has it", path)
        return
    await desk.catalog.sync()  # where it lies, should the store have been away before
    try:
        await desk.catalog.files_at(path).remove(Path(path))
    except OSError as error:  # no reason to keep a VM from being adopted
        words = f"{path} is of no use any more and could not be deleted: {error.strerror or error}"
        await desk.event("vm.disk-move", vm, words, level="warning")
