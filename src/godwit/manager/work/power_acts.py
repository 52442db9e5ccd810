"""What is done about the power of hosts: its device set and forgotten, asked, and told.

A password is opened at the moment it is needed and goes to the device alone; no sentence, event or
result has it. A device that has said ``off`` has proven that this boot of the host is over, which
is written down as a person's word would be (``ConfirmedDown``).
"""

from __future__ import annotations

import time
from typing import Literal

from godwit.manager.failover.members import members_of
from godwit.manager.work.power_rules import (
    check_keys,
    device_of,
    refuse_the_last,
    refuse_with_vms,
    vms_at,
)
from godwit.manager.work.tasks import Done, TaskRun
from godwit.manager.world import World
from godwit.model import keys
from godwit.model import requests as ask
from godwit.model.errors import Conflict, NotFound, Refused
from godwit.model.host import ConfirmedDown, HostInfo
from godwit.model.host_requests import SECRET
from godwit.model.power import PowerConfig, SealedSecret
from godwit.power.choose import opened, sealed
from godwit.power.device import Proof
from godwit.power.vault import about_secret
from godwit.store.api import absent, delete, mod_is, put
from godwit.store.records import encode

TEST_S = 15.0
MEMBERS_S = 1.0


async def set_device(world: World, run: TaskRun, request: ask.SetHostPower) -> Done:
    """Take the secret that was handed in, seal it for this host, write the record; one
    transaction, so that a secret is used once."""
    name, key = request.name, keys.host_power(request.name)
    secret_id = request.password_file.removeprefix(SECRET)
    found = await world.records.get(keys.secret(secret_id), SealedSecret)
    before = await world.records.get(key, PowerConfig)
    done = Done(f"{name} has a power device: {request.type} at {request.address}", {"host": name})
    if before is not None and before.value.task == run.task.id:
        return done  # written by the manager that had this task before us
    if found is None:
        raise Refused(
            "the secret that was handed in is used or was forgotten after some minutes",
            hint="ask again, with the password",
        )
    check_keys(world.cache.snapshot, world.vault.key_id)
    password = world.vault.open(found.value.sealed, about=about_secret(secret_id))
    device = PowerConfig(
        type=request.type,
        address=request.address,
        user=request.user,
        password="",
        fingerprint=request.fingerprint,
        ca=request.ca,
        system=request.system,
        agent=request.agent,
        options=dict(option.split("=", 1) for option in request.options),
        set_at=world.clock.realtime(),
        set_by=run.task.by,
        task=run.task.id,
    )
    config = sealed(name, device, password, vault=world.vault)
    answer = await world.records.store.txn(
        [
            mod_is(keys.secret(secret_id), found.revision),
            mod_is(key, before.revision) if before else absent(key),
        ],
        [put(key, encode(config)), delete(keys.secret(secret_id))],
    )
    if not answer.succeeded:
        raise Conflict(
            f"somebody else set the power device of {name} at the same moment",
            hint=f"look: godwit host power show {name}",
        )
    message = f"{run.task.by} set the power device of {name}: {request.type} at {request.address}"
    await _log(world, "host.power-set", name, message)
    return done


async def remove_device(world: World, run: TaskRun, request: ask.RemoveHostPower) -> Done:
    """Forget it, with its password."""
    name = request.name
    if await world.records.store.delete(keys.host_power(name)) == 0:
        raise NotFound(f"{name} has no power device", hint="look with: godwit host power show HOST")
    await _log(world, "host.power-removed", name, f"{run.task.by} removed {name}'s power device")
    return Done(f"{name} has no power device any more", {"host": name})


async def check(world: World, _run: TaskRun, request: ask.CheckHostPower) -> Done:
    """One reading."""
    name, start = request.name, time.monotonic()
    config = await _config(world, name)
    async with opened(name, config, vault=world.vault, clock=world.clock) as device:
        state = await device.state(deadline_s=TEST_S)
    took_s = round(time.monotonic() - start, 3)
    said = f"{name} is {state.value}, says its power device at {config.address} ({took_s:.2f} s)"
    return Done(said, {"host": name, "state": state.value, "took_s": took_s})


async def switch_on(world: World, run: TaskRun, request: ask.SwitchHostOn) -> Done:
    """On, as the device says."""
    name = request.name
    config = await _config(world, name)
    await run.say(f"switching {name} on")
    async with opened(name, config, vault=world.vault, clock=world.clock) as device:
        proof = await device.on(deadline_s=request.timeout_s)
    message = f"{name} is on, says {proof.device}"
    await _log(world, "host.power-on", name, f"{message}; asked by {run.task.by}")
    return Done(message, _told(name, proof))


async def switch_off(
    world: World, run: TaskRun, request: ask.SwitchHostOff | ask.ResetHost
) -> Done:
    """Off with proof; of a reset, on again after it."""
    name = request.name
    config = await _config(world, name)
    if not request.force:
        refuse_with_vms(name, vms_at(world.cache.snapshot, name))
        await check_not_the_last(world, name)
    # Of this boot the reading will speak. Read before: a later boot is not what was ended.
    info = await world.records.get(keys.host_info(name), HostInfo)
    await run.say(f"cutting the power of {name}")
    async with opened(name, config, vault=world.vault, clock=world.clock) as device:
        proof = await device.off(deadline_s=request.timeout_s)
        message = f"{name} is off, says {proof.device}"
        await _log(world, "host.power-off", name, f"{message}; asked by {run.task.by}")
        if info is not None and info.value.boot_id:
            await _note_down(world, name, info.value.boot_id, by=proof.device)
        if isinstance(request, ask.ResetHost):
            await run.say(f"{message}; switching it on again")
            on = await device.on(deadline_s=request.timeout_s)
            message = f"{name} was off and is on again, says {on.device}"
            await _log(world, "host.power-on", name, f"{message}; asked by {run.task.by}")
            return Done(message, _told(name, proof) | {"state": on.state.value})
    return Done(message, _told(name, proof))


async def check_not_the_last(world: World, name: str) -> None:
    """Refused when the store's majority or the only manager would go with this host."""
    snapshot = world.cache.snapshot
    views = await world.records.store.members(timeout=MEMBERS_S)
    alive = {member.partition(".")[0] for member in snapshot.members}
    refuse_the_last(name, members_of(views, snapshot.hosts), alive)


async def _note_down(world: World, name: str, boot_id: str, *, by: str) -> None:
    said = ConfirmedDown(boot_id=boot_id, time=world.clock.realtime(), by=by)
    await world.records.store.put(keys.host_confirmed_down(name), encode(said))


async def _config(world: World, name: str) -> PowerConfig:
    found = await world.records.get(keys.host_power(name), PowerConfig)
    return found.value if found else device_of(world.cache.snapshot, name)


def _told(name: str, proof: Proof) -> dict[str, object]:
    return {
        "host": name,
        "state": proof.state.value,
        "took_s": round(proof.took_s, 3),
        "commands": proof.commands,
    }


async def _log(world: World, kind: str, name: str, message: str) -> None:
    level: Literal["info", "warning"] = "warning" if kind == "host.power-off" else "info"
    at = world.clock.realtime()
    await world.records.append_event(kind, f"host/{name}", message, at=at, level=level)
