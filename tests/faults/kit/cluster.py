"""A lab of our own, for faults: raised and taken down by the same code as ``godwit lab``.

It keeps its contexts file apart, so that nobody's current cluster changes. Everything here is
synchronous; the store is read on the real machine's side, past every cut of a network.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from godwit.client.sync import Client
from godwit.lab import fault, leaks
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.layout import CLIENT, Layout, StorageKind, StoreKind, checked_name, state_root
from godwit.lab.options import Options
from godwit.lab.preflight import known_labs
from godwit.lab.up import up
from godwit.model import keys
from godwit.model.errors import GodwitError
from godwit.model.event import Event
from godwit.model.migration import Migration
from godwit.model.ownership import Owner
from godwit.store.errors import StoreError
from godwit.store.records import Records

from .guest import Guest

T = TypeVar("T")

MIB = 1 << 20
BOOT_S = 90.0
STEADY_S = 2.0
FIRST_ADDRESS = 100


@dataclass(frozen=True)
class Said:
    """What a command line answered."""

    code: int
    out: str
    err: str
    wall_s: float


class Cluster:
    """A running lab with a client; ``close`` takes it down and tells what it left behind."""

    def __init__(self, name: str, *, lab: Lab, home: Path, before: leaks.Snapshot) -> None:
        self.name = name
        self.home = home
        self._before = before
        self._lab = lab
        self._addresses: dict[str, int] = {}
        self._tasks: dict[str, str] = {}
        self.client = self.new_client()

    @classmethod
    def up(
        cls,
        name: str,
        *,
        hosts: int = 2,
        rate: str = "1gbit",
        qemu: dict[str, str | bool] | None = None,
        volumes: tuple[str, ...] = ("other",),
        storage: StorageKind = "dir",
        volume_bytes: int = 0,
        own_volumes: tuple[str, ...] = ("local",),
        image_locks: bool = True,
        store: StoreKind = "sqlite",
        managers: int = 0,
        watchdog: bool = True,
        agent_source: Path | None = None,
    ) -> Cluster:
        """Raise it. Its name gets this process's number, so that two runs do not meet; what a
        run that is dead left under such a name is taken away first. ``agent_source``: a source
        tree that the hosts' agents and guards are taken from."""
        for old in known_labs():
            stem, _, number = old.rpartition("-")
            if stem == name and number.isdigit() and not Path(f"/proc/{number}").exists():
                down(old)
        name = checked_name(f"{name}-{os.getpid()}")
        down(name)
        before = leaks.take(name)
        home = Path(tempfile.mkdtemp(prefix=f"godwit-{name}-"))
        layout = Layout(
            name, hosts, rate, state_root(), storage=storage, store=store, managers=managers
        )
        options = replace(
            Options(layout),
            qemu=(qemu or {}) | ({} if image_locks else {"image_locks": False}),
            contexts_file=home / "godwit" / "contexts.toml",
            volumes=volumes,
            volume_bytes=volume_bytes,
            own_volumes=own_volumes,
            watchdog=watchdog,
            agent_source=agent_source,
        )
        up(options)
        return cls(name, lab=Lab.load(name), home=home, before=before)

    def close(self) -> list[str]:
        """Take it down; what is left of it, one line each."""
        try:
            self.client.close()
        finally:
            down(self.name, keep_logs=bool(os.environ.get("GODWIT_KEEP_LOGS")))
            shutil.rmtree(self.home, ignore_errors=True)
        return leaks.compare(self._before, leaks.take(self.name))

    @property
    def lab(self) -> Lab:
        """The lab as it is now."""
        return self._lab

    def refresh(self) -> None:
        """Look again what nodes there are: one was switched off or on."""
        self._lab = self._lab.reload()

    @property
    def hosts(self) -> tuple[str, ...]:
        """host1, host2, ..."""
        return self._lab.layout.host_names

    @property
    def netns(self) -> str:
        """Where the client machine is."""
        return self._lab.layout.netns(CLIENT)

    def other(self, host: str) -> str:
        """The first host that is not this one."""
        return next(name for name in self.hosts if name != host)

    def new_client(self) -> Client:
        """One more client; whoever asks closes it."""
        return Client(
            ",".join(self._lab.record.urls),
            token_file=self._lab.layout.token,
            ca_file=self._lab.layout.state / "ca.pem",
            name="faults/0.1",
        )

    # Asking

    def cli(self, *words: str, timeout: float = 120.0) -> Said:
        """Run ``godwit WORDS``, as a person would."""
        return self.program(
            [str(Path(sys.executable).with_name("godwit")), *words], timeout=timeout
        )

    def program(self, argv: Sequence[str], *, timeout: float = 120.0) -> Said:
        """Run a program that finds this cluster by its contexts file."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GODWIT_")}
        environ = {**kept, "XDG_CONFIG_HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "200"}
        start = time.monotonic()
        done = subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=timeout)
        return Said(done.returncode, done.stdout, done.stderr, time.monotonic() - start)

    def store(self, work: Callable[[Records], Awaitable[T]], *, patience_s: float = 15.0) -> T:
        """Do something with the store; again while a fault keeps it away. For reads only."""
        until = time.monotonic() + patience_s
        while True:
            try:
                return asyncio.run(self._with_store(work))
            except (StoreError, OSError, GodwitError):
                if time.monotonic() > until:
                    raise
                # A store that a fault has just killed; nothing announces that it is back.
                time.sleep(0.1)

    async def _with_store(self, work: Callable[[Records], Awaitable[T]]) -> T:
        store = self._lab.store_client(timeout=2.0)
        try:
            return await work(Records(store))
        finally:
            await store.aclose()

    def owner(self, vm: str) -> Owner:
        """The ownership record."""
        found = self.store(lambda records: records.owner(vm))
        assert found is not None, f"no record of {vm}"
        return found.value

    def migration(self, migration_id: str) -> Migration | None:
        """A move's record; None when there is none."""
        found = self.store(lambda records: records.migration(migration_id))
        return found.value if found else None

    def reservations(self) -> dict[str, list[str]]:
        """Host -> VMs for which it keeps memory."""

        async def work(records: Records) -> dict[str, list[str]]:
            kept: dict[str, list[str]] = {}
            for kv in (await records.store.range(keys.HOSTS)).kvs:
                host, _, vm = kv.key.removeprefix(keys.HOSTS).partition("/reservations/")
                if vm:
                    kept.setdefault(host, []).append(vm)
            return kept

        return self.store(work)

    def dump(self, prefix: str = keys.VMS) -> dict[str, bytes]:
        """Every record below a prefix, to compare two moments; the status is only a hint."""

        async def work(records: Records) -> dict[str, bytes]:
            found = await records.store.range(prefix)
            return {kv.key: kv.value for kv in found.kvs if not kv.key.endswith("/status")}

        return self.store(work)

    def events(self, vm: str) -> list[Event]:
        """The event log of a VM, oldest first."""
        found = self.store(lambda records: records.list(keys.EVENTS, Event))
        events = (record.value for _, record in sorted(found.items()))
        return [event for event in events if event.subject == f"vm/{vm}"]

    # VMs

    def address(self, vm: str) -> str:
        """The address a VM has on the VM network."""
        number = self._addresses.setdefault(vm, FIRST_ADDRESS + len(self._addresses))
        return f"10.91.0.{number}"

    def guest(self, vm: str) -> Guest:
        """The control port of the guest."""
        return Guest(self.netns, self.address(vm))

    def make(
        self,
        vm: str,
        *,
        host: str,
        memory_mib: int = 256,
        cpus: int = 1,
        append: str = "",
        disks: Sequence[str] = (),
    ) -> Guest:
        """Define a VM with the demo image, start it and wait until its guest answers."""
        self.define(vm, memory_mib=memory_mib, cpus=cpus, append=append, disks=disks)
        return self.boot(vm, host=host)

    def define(
        self,
        vm: str,
        *,
        memory_mib: int = 256,
        cpus: int = 1,
        append: str = "",
        disks: Sequence[str] = (),
    ) -> None:
        """Define a VM with the demo image, on the VM network at its address."""
        words = f"godwit.ip={self.address(vm)}/22 godwit.host={vm} {append}".strip()
        self.client.wait(
            self.client.vms.create(
                vm,
                memory_bytes=memory_mib * MIB,
                cpus=cpus,
                image="demo",
                append=words,
                networks=["lan"],
                disks=list(disks),
            )
        )

    def boot(self, vm: str, *, host: str) -> Guest:
        """Start a VM there and wait until its guest answers."""
        self.client.wait(self.client.vms.start(vm, host=host))
        guest = self.guest(vm)
        guest.await_answer(BOOT_S)
        return guest

    def start_at_once(self, vm: str) -> dict[str, str]:
        """Tell every host's agent to start a VM at one moment, past the manager; host -> why it
        refused, empty where the VM was started."""

        def start(host: str) -> str:
            try:
                self.lab.agent(host, "POST", f"/v1/vms/{vm}/start", {}, deadline_s=30.0)
            except GodwitError as error:
                return error.message
            return ""

        with ThreadPoolExecutor(len(self.hosts)) as pool:
            return dict(zip(self.hosts, pool.map(start, self.hosts), strict=True))

    def remove(self, vm: str) -> None:
        """Stop a VM at once and forget it."""
        self.await_task(vm)
        if self.client.vms.get(vm).state.value != "stopped":
            self.client.wait(self.client.vms.stop(vm, force=True))
        self.client.wait(self.client.vms.delete(vm))

    def begin(self, vm: str, to: str, **fields: Any) -> str:
        """Ask for a move; its id as soon as it has one."""
        self.await_task(vm)
        task = self.client.vms.migrate(vm, to=to, **fields)
        self._tasks[vm] = task.id
        until = time.monotonic() + 20.0
        while True:
            now = self.client.tasks.get(task.id)
            move = self.client.migration_of(now)
            if move is not None:
                return move.id
            assert not now.state.final, f"the move was not taken on: {now.reason}"
            assert time.monotonic() < until, "the move got no record"
            time.sleep(0.01)

    def await_task(self, vm: str) -> None:
        """The task of a VM's last move ends a little after the move's own record."""
        until = time.monotonic() + 20.0
        while vm in self._tasks and not self.client.tasks.get(self._tasks[vm]).state.final:
            assert time.monotonic() < until, f"the task {self._tasks[vm]} did not end"
            time.sleep(0.02)

    def await_end(self, migration_id: str, *, timeout: float) -> Migration | None:
        """The move's record once it is final; the last one seen when the time is up."""
        until = time.monotonic() + timeout
        while True:
            move = self.migration(migration_id)
            if move is not None and move.state.final:
                return move
            if time.monotonic() > until:
                return move
            time.sleep(0.03)

    def move(self, vm: str, to: str, *, timeout: float = 120.0, **fields: Any) -> Migration:
        """Move a VM and wait for the end, whatever it is."""
        done = self.await_end(self.begin(vm, to, **fields), timeout=timeout)
        assert done is not None
        return done

    # Faults

    def hold(self, host: str, point: str, role: str) -> None:
        """Arm a hold point."""
        fault.hold(self._lab, point, host, role=role)

    def await_held(self, host: str, point: str, role: str, *, timeout: float = 30.0) -> None:
        """Wait until a move stands at the point."""
        fault.held(self._lab, host, wait=point, role=role, timeout=timeout)

    def release(self, host: str) -> None:
        """Let go of everything on a host; an agent that is dead holds nothing."""
        try:
            fault.release(self._lab, host)
        except GodwitError as error:
            sys.stderr.write(f"  release on {host}: {error.message}\n")

    def power_off(self, node: str) -> None:
        """Everything on that node ends at once."""
        self._lab = fault.power_off(self._lab, node)

    def power_on(self, node: str) -> None:
        """Start it again and wait for its daemons."""
        self._lab = fault.power_on(self._lab, node)

    def heal(self) -> None:
        """Undo what faults leave: cuts, holds; wait until every daemon is ready again."""
        for host in self.hosts:
            fault.restore_network(self._lab, host, "all")
        for node in self._lab.layout.nodes:
            self._lab.tell(node, "wait-ready", timeout=30.0)
        for host in self.hosts:
            self.release(host)
        self._answering()

    def admit(self, host: str) -> None:
        """Wait until a host serves again; out of quarantine, as an administrator would let it.

        A host that is lost over and over is quarantined, about a second after it is back.
        """
        until, up_since = time.monotonic() + 30.0, None
        while up_since is None or time.monotonic() - up_since < STEADY_S:
            view = self.client.hosts.get(host)
            assert time.monotonic() < until, f"{host} is {view.state.value}: {view.reason}"
            if view.state.value == "quarantined":
                self.client.wait(self.client.hosts.return_(host))
            up = view.state.value == "up"
            up_since = (up_since or time.monotonic()) if up else None
            time.sleep(0.1)

    def _answering(self) -> None:
        until = time.monotonic() + 30.0
        while True:
            try:
                rows = self.client.rows("hosts")
                for row in rows:
                    if row["state"] == "quarantined":
                        self.client.wait(self.client.hosts.return_(row["name"]))
                if all(row["state"] == "up" for row in rows):
                    return
                why = str([(row["name"], row["state"], row.get("reason")) for row in rows])
            except GodwitError as error:
                why = error.message
            assert time.monotonic() < until, f"the cluster did not recover: {why}"
            time.sleep(0.1)
