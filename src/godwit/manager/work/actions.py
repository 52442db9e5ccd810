"""From the kind of a request to what carries it out."""

from __future__ import annotations

from godwit.manager.work import cancel, define_acts, moves, vms
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import requests as ask


async def act(world: World, run: TaskRun) -> Done:
    """Carry out the task's request to its end. Raises Godwit errors and those of the store."""
    match run.request:
        case ask.CreateVm() as request:
            return await define_acts.create_vm(world, run, request)
        case ask.DeleteVm() as request:
            return await define_acts.delete_vm(world, run, request)
        case ask.CreateNetwork() as request:
            return await define_acts.create_network(world, run, request)
        case ask.DeleteNetwork() as request:
            return await define_acts.delete_network(world, run, request)
        case ask.StartVm() | ask.RestoreVm() as request:
            return await vms.start(world, run, request)
        case ask.StopVm() as request:
            return await vms.stop(world, run, request)
        case ask.PauseVm() | ask.ResumeVm() as request:
            return await vms.hold(world, run, request)
        case ask.SaveVm() as request:
            return await vms.save(world, run, request)
        case ask.MigrateVm() as request:
            return await moves.migrate(world, run, request)
        case ask.CancelMigration() as request:
            return await cancel.cancel(world, run, request.id)
        case ask.CancelTask() as request:
            return await cancel.cancel_task(world, run, request)
