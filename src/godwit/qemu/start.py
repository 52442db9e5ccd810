"""Starts a VM's QEMU: bind first, pass the descriptors, connect, and undo all of it on failure.

Order, and what a crash of the agent leaves at each step:

1. runtime record with pid 0, sockets bound, taps open  - the next agent finds a record whose
   monitor refuses or answers ``prelaunch``/``inmigrate``, see `end_unfinished`
2. QEMU started, our copies of its descriptors closed
3. record with pid and start time                      - the next agent adopts
4. monitor session, control group                      - as 3
Nothing ran so far: the machine comes up stopped. The guest first runs at `Machine.cont`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from godwit.host.cgroup import open_cgroup
from godwit.host.errors import HostError
from godwit.host.process import Process, kill, wait_exit
from godwit.host.sockets import bind_unix
from godwit.host.taps import Tap, open_tap
from godwit.model.errors import Conflict, OperationFailed
from godwit.model.vm import Vm
from godwit.qemu.argv import Plugs, build_argv
from godwit.qemu.devices import grant_device
from godwit.qemu.firmware import opened_code
from godwit.qemu.launch import Binary, log_size, log_tail
from godwit.qemu.layout import tap_name
from godwit.qemu.machine import Machine, discard_traces
from godwit.qemu.runtime import Runtime, load_runtime
from godwit.qmp import Monitor, MonitorError, MonitorLost

SPAWN_DEADLINE = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where on this host a VM's QEMU lives.

    ``run`` and ``state`` are the VM's own directories. ``cgroup`` is the name of its control
    group, empty for none. ``features`` come from `BinaryFacts`. ``broker`` is the socket of the
    VM's storage broker, empty when it has none; the QEMU user must be able to connect to it.
    ``locking``, ``served`` and ``boot`` are as in `Plugs`.
    """

    host: str
    run: Path
    state: Path
    binary: Binary
    features: frozenset[str] = frozenset()
    cgroup: str = ""
    boot_id: str = ""
    sandbox: bool = True
    aio: Literal["threads", "native", "io_uring"] = "threads"
    locking: bool = True
    broker: str = ""
    served: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    boot: Mapping[str, str] = field(default_factory=dict)


async def spawn(
    vm: Vm,
    place: Place,
    *,
    epoch: int,
    incoming: bool = False,
    migration: str | None = None,
    deadline: float = SPAWN_DEADLINE,
) -> Machine:
    """Start the VM's QEMU, stopped, or (``incoming``) waiting for a move's stream.

    Taps are open and on no bridge. Conflict when a QEMU of this VM is recorded already,
    OperationFailed with QEMU's own words when it does not come up within ``deadline`` seconds.
    An incoming one may still be on its way into its control group: see `Machine.joined`.
    Refused when this host's UEFI firmware is not the one that the record names.
    After any failure no process, tap, socket, record or control group of this start is left.
    """
    if load_runtime(place.run) is not None:
        raise Conflict(
            f"a QEMU of {vm.name} is recorded on {place.host} already",
            hint="end or adopt that one first",
        )
    place.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    runtime = Runtime(
        vm=vm.name,
        host=place.host,
        epoch=epoch,
        role="incoming" if incoming else "started",
        migration=migration,
        boot_id=place.boot_id,
        run=place.run,
        state=place.state,
        cgroup=place.cgroup,
        taps={nic.id: tap_name(vm.name, nic.id) for nic in vm.nics},
        uuid=vm.pins.uuid,
        created_at=time.time(),
    )
    async with AsyncExitStack() as undo:
        undo.callback(discard_traces, runtime)
        runtime.save()
        offset = log_size(runtime.qemu_log)
        try:
            machine = await _bring_up(undo, vm, place, runtime, incoming, deadline)
        except (_Ended, MonitorError, HostError, OSError, ValueError) as error:
            said = log_tail(runtime.qemu_log, offset=offset)
            raise OperationFailed(
                f"the QEMU of {vm.name} did not come up on {place.host}: {said or error}",
                hint=f"see {runtime.qemu_log} on {place.host}",
            ) from error
        undo.pop_all()
        return machine


async def _bring_up(
    undo: AsyncExitStack,
    vm: Vm,
    place: Place,
    runtime: Runtime,
    incoming: bool,
    deadline: float,
) -> Machine:
    for disk in vm.disks:
        if disk.source == "device":
            grant_device(Path(disk.path), place.binary.user)
    with contextlib.ExitStack() as ours:
        plugs = _plug(ours, vm, place, runtime, incoming)
        options = build_argv(vm, plugs)
        process = place.binary.start(options, pass_fds=plugs.descriptors(), log=runtime.qemu_log)
    # From here QEMU alone holds the sockets: should it die, a connect fails at once.
    undo.push_async_callback(_reap, process)
    undo.callback(kill, process)
    runtime = runtime.but(
        pid=process.pid, start_time=process.start_time, argv=(place.binary.path, *options)
    )
    runtime.save()
    monitor = await _connect_or_exit(runtime, deadline)
    undo.push_async_callback(monitor.close)
    # The kernel takes 10-20 ms to move a process between groups, and lets it make no thread
    # meanwhile. So QEMU comes up first, and a copy on its way in does other things beside.
    joining = asyncio.create_task(
        asyncio.to_thread(_join_cgroup, place.cgroup, process.pid), name=f"qemu {vm.name}: cgroup"
    )
    undo.push_async_callback(asyncio.wait, {joining})
    machine = Machine(runtime, monitor, joining=joining)
    undo.push_async_callback(machine.close)
    if not incoming:
        await machine.joined()
    machine.witness("START", role=runtime.role, migration=runtime.migration)
    return machine


def _join_cgroup(name: str, pid: int) -> None:
    if name:
        group = open_cgroup(name)
        group.create()
        group.add_process(pid)


def _plug(
    ours: contextlib.ExitStack, vm: Vm, place: Place, runtime: Runtime, incoming: bool
) -> Plugs:
    """Open everything QEMU inherits; ``ours`` closes our copies."""

    def listen(path: Path) -> int:
        listener: socket.socket = ours.enter_context(bind_unix(path))
        return listener.fileno()

    monitors = listen(runtime.monitor), listen(runtime.guard_monitor)
    serial = listen(runtime.serial)
    guest_agent = listen(runtime.guest_agent) if vm.guest_agent else None
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    log = os.open(runtime.console_log, flags, 0o640)
    ours.callback(os.close, log)
    code = None if vm.firmware is None else ours.enter_context(opened_code(vm.firmware.code))
    taps: dict[str, tuple[int, ...]] = {}
    for nic in vm.nics:
        tap: Tap = ours.enter_context(
            open_tap(runtime.taps[nic.id], mtu=nic.mtu, queues=nic.queues, vm_mac=nic.mac)
        )
        taps[nic.id] = tap.fds
    return Plugs(
        monitors=monitors,
        serial=serial,
        console_log=log,
        guest_agent=guest_agent,
        firmware=code,
        taps=taps,
        incoming=incoming,
        features=place.features,
        sandbox=place.sandbox,
        data_dir=place.binary.data_dir,
        aio=place.aio,
        locking=place.locking,
        broker=place.broker,
        served=place.served,
        boot=place.boot,
    )


async def _connect_or_exit(runtime: Runtime, deadline: float) -> Monitor:
    """A session on the agent's monitor, or the news that QEMU died on the way there."""
    name = f"{runtime.vm} on {runtime.host}"
    connecting = asyncio.create_task(
        Monitor.connect(runtime.monitor, name=name, deadline=deadline), name=f"qemu {name}: connect"
    )
    ending = asyncio.create_task(wait_exit(runtime.process), name=f"qemu {name}: early end")
    try:
        await asyncio.wait({connecting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
            return connecting.result()
        if ending.done():
            raise _Ended(f"it ended at once with status {ending.result()}")
        return await connecting
    finally:
        ending.cancel()
        if not connecting.done():
            connecting.cancel()
        await asyncio.gather(connecting, ending, return_exceptions=True)


async def _reap(process: Process) -> None:
    await wait_exit(process)


class _Ended(Exception):
    """QEMU ended before it answered; its own words are in the log."""


async def end_unfinished(runtime: Runtime, *, deadline: float = 3.0) -> None:
    """End and clear away what a start that was cut short (pid 0) left.

    Such a QEMU never ran a guest, for its ``cont`` comes after the record; whoever answers on its
    monitor is told to quit. OperationFailed, and nothing is touched, when that is not so or when
    it does not answer within ``deadline`` seconds.
    """
    if runtime.pid:
        raise Conflict(f"the start of {runtime.vm} was not cut short", hint="adopt it")
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.connect(str(runtime.monitor))
    except (FileNotFoundError, ConnectionRefusedError):
        channel.close()
        discard_traces(runtime)
        return
    try:
        async with asyncio.timeout(deadline):
            name = f"unfinished {runtime.vm}"
            async with await Monitor.connect(channel, name=name, deadline=deadline) as monitor:
                status = str((await monitor.execute("query-status"))["status"])
                if status not in ("prelaunch", "inmigrate"):
                    raise OperationFailed(
                        f"an unrecorded QEMU of {runtime.vm} is {status}",
                        hint="it should never have run: end it by hand",
                    )
                with contextlib.suppress(MonitorLost):
                    await monitor.execute("quit")
                await monitor.wait_lost()
    except (MonitorError, TimeoutError) as error:
        raise OperationFailed(
            f"an unrecorded QEMU of {runtime.vm} does not answer: {error}",
            hint="end it by hand; it never ran its guest",
        ) from error
    discard_traces(runtime)
