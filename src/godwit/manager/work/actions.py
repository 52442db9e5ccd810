"""From the kind of a request to what carries it out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from godwit.manager.work import (
    cancel,
    checkpoints,
    clones,
    define_acts,
    disk_moves,
    disks,
    drains,
    host_acts,
    leave,
    moves,
    power_acts,
    returns,
    settings,
    updates,
    validation,
    vms,
    volumes,
)
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import requests as ask

Act = Callable[[World, TaskRun, Any], Awaitable[Done]]


async def _cancel_move(world: World, run: TaskRun, request: ask.CancelMigration) -> Done:
    return await cancel.cancel(world, run, request.id)


# Each takes the request of its type; a test sees to it that none is missing.
ACTS: dict[type[Any], Act] = {
    ask.CreateVm: define_acts.create_vm,
    ask.DeleteVm: define_acts.delete_vm,
    ask.SetVm: settings.set_vm,
    ask.StartVm: vms.start,
    ask.RestoreVm: vms.start,
    ask.StopVm: vms.stop,
    ask.PauseVm: vms.hold,
    ask.ResumeVm: vms.hold,
    ask.SaveVm: vms.save,
    ask.MigrateVm: moves.migrate,
    ask.CloneVm: clones.clone,
    ask.AddDisk: disks.add,
    ask.RemoveDisk: disks.remove,
    ask.ResizeDisk: disks.resize,
    ask.MoveDisk: disk_moves.move,
    ask.ExportDisk: volumes.export_disk,
    ask.CreateCheckpoint: checkpoints.create,
    ask.RevertCheckpoint: checkpoints.revert,
    ask.DeleteCheckpoint: checkpoints.delete,
    ask.CreateNetwork: define_acts.create_network,
    ask.DeleteNetwork: define_acts.delete_network,
    ask.CreateVolume: volumes.create_volume,
    ask.SetVolume: volumes.set_volume,
    ask.DeleteVolume: volumes.delete_volume,
    ask.RedirectVolume: volumes.redirect,
    ask.RestoreVolume: volumes.redirect,
    ask.ImportDisk: volumes.import_disk,
    ask.SetCluster: settings.set_cluster,
    ask.UpdateCluster: updates.update,
    ask.DrainHost: drains.empty,
    ask.EnterMaintenance: drains.empty,
    ask.ReturnHost: returns.fill,
    ask.ExitMaintenance: returns.fill,
    ask.ConfirmHostDown: host_acts.confirm_down,
    ask.SetHostPower: power_acts.set_device,
    ask.RemoveHostPower: power_acts.remove_device,
    ask.CheckHostPower: power_acts.check,
    ask.SwitchHostOn: power_acts.switch_on,
    ask.SwitchHostOff: power_acts.switch_off,
    ask.ResetHost: power_acts.switch_off,
    ask.ValidateCluster: validation.validate,
    ask.RemoveHost: leave.remove,
    ask.CancelMigration: _cancel_move,
    ask.CancelTask: cancel.cancel_task,
}


async def act(world: World, run: TaskRun) -> Done:
    """Carry out the task's request to its end. Raises Godwit errors and those of the store."""
    request = run.request
    return await ACTS[type(request)](world, run, request)
