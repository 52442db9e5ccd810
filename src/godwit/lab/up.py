"""Raises a lab: a list of small actions over one shared context.

Each action does one thing and returns a line for people. When one fails, ``down`` takes away
whatever there is, unless ``retain``; the same way is taken after a kill -9 in the middle.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.host.errors import HostError
from godwit.host.run import run
from godwit.lab import (
    bmcs,
    configs,
    control,
    daemons,
    keeping,
    network,
    nodes,
    older,
    pki,
    preflight,
    serving,
    volume_dirs,
)
from godwit.lab.configs import Unit
from godwit.lab.down import remove
from godwit.lab.image import DemoImage, cache_root, ensure_demo_image, find_demo_image
from godwit.lab.initramfs import ImageError
from godwit.lab.layout import LAN, NETS, STORAGE, Layout
from godwit.lab.options import Options
from godwit.lab.publish import publish_image
from godwit.lab.record import LabRecord, exclusive
from godwit.model.errors import GodwitError, OperationFailed

Say = Callable[[str], None]

READY_S = 40.0
HOSTS_UP_S = 40.0
_IMAGE_BUILD_S = 300.0


@dataclass(slots=True)
class Context:
    """What the actions share."""

    options: Options
    say: Say
    record: LabRecord
    image: DemoImage | None = None
    api: dict[str, socket.socket] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Where things are."""
        return self.options.layout

    def keep(self, **changes: Any) -> None:
        """Change the record and write it."""
        self.record = self.record.but(**changes)
        self.record.save(self.layout.state_root)

    def units(self, node: str) -> tuple[Unit, ...]:
        """The daemons of a node."""
        given = self.options.units.get(node)
        if given is not None:
            return given
        found = daemons.units(self.layout, node, sys.executable)
        older_host = self.options.agent_source and node in self.layout.host_names
        return older.from_source(found) if older_host else found


@dataclass(frozen=True, slots=True)
class Action:
    """One step: ``doing`` is shown when it fails, what ``act`` returns when it is done."""

    doing: str
    act: Callable[[Context], str]


def up(options: Options, *, say: Say = lambda _: None) -> LabRecord:
    """Raise a lab. Refused or Conflict before anything is touched; any other error after what was
    made is gone again, unless ``retain``."""
    layout = options.layout
    made = LabRecord(
        name=layout.name,
        hosts=layout.hosts,
        rate=layout.rate,
        store=layout.store,
        managers=layout.managers,
        storage=layout.storage,
        run_root=str(layout.run_root),
        qemu=options.qemu,
        volume_bytes=options.volume_bytes,
    )
    context = Context(options, say, made)
    with exclusive(layout.name), contextlib.ExitStack() as opened:
        for action in BEFORE:
            _perform(action, context)
        try:
            for node in layout.manager_nodes:
                context.api[node] = opened.enter_context(nodes.listener())
            for action in MAKING:
                _perform(action, context)
        except BaseException:
            if options.retain:
                say(f"  what was made is kept; godwit lab down --name {layout.name} removes it")
            else:
                remove(layout.name, root=layout.state_root)
                say("  what was made is gone again")
            raise
    return context.record


def actions(options: Options) -> tuple[Action, ...]:
    """What ``up`` would do, in order."""
    return (*BEFORE, *MAKING)


def check(options: Options) -> None:
    """The pre-flight alone; changes nothing that lasts."""
    qemu = str(options.qemu.get("binary", "qemu-system-x86_64"))
    for need in preflight.needs(options.layout, qemu_binary=qemu):
        need.look()
    if options.agent_source is not None:
        older.checked_source(options.agent_source)


def _perform(action: Action, context: Context) -> None:
    start = time.monotonic()
    try:
        done = action.act(context)
    except BaseException:
        context.say(f"✗ {action.doing}")
        raise
    spent = context.spent[action.doing] = time.monotonic() - start
    if done:
        context.say(f"✓ {done} ({spent:.1f} s)")


# Before anything is touched


def _check(context: Context) -> str:
    check(context.options)
    return "this machine has what a lab needs"


def _find_image(context: Context) -> str:
    if not context.options.image:
        return ""
    source, cache = preflight.image_source(), cache_root()
    try:
        if source is not None:
            context.image = ensure_demo_image(
                source=source, cache=cache, run=_run, say=lambda line: context.say(f"  {line}")
            )
        else:
            context.image = find_demo_image(cache)
    except (ImageError, HostError) as error:
        hint = getattr(error, "hint", "") or "run scripts/setup"
        raise OperationFailed(f"the demo image cannot be built: {error}", hint=hint) from error
    if context.image is None:
        return "no demo image here: boot VMs with --kernel"
    return f"image demo ({context.image.kernel_package})"


def _run(argv: list[str], *, cwd: Path | None = None) -> bytes:
    return run(argv, timeout=_IMAGE_BUILD_S, cwd=str(cwd) if cwd else None)


# Making


def _prepare(context: Context) -> str:
    layout = context.layout
    layout.state.mkdir(parents=True, mode=0o755)
    etc = configs.ETC
    made_etc = not etc.exists()
    # First of all what is to be made is noted, so that it can be found.
    ports = {node: int(sock.getsockname()[1]) for node, sock in context.api.items()}
    context.keep(made_etc=made_etc, ports=ports)
    etc.mkdir(exist_ok=True)
    layout.run.mkdir(parents=True, mode=0o700)
    for node in layout.nodes:
        nodes.make_directories(layout, node)
    wanted = context.options
    volume_dirs.make(
        layout, shared=wanted.volumes, own=wanted.own_volumes, size_bytes=wanted.volume_bytes
    )
    layout.images.mkdir()
    if context.image is not None:
        publish_image(context.image, layout.images)
    return ""


def _make(context: Context) -> str:
    """Wires, certificates and byte code take a while each and need nothing of one another."""
    layout = context.layout

    def wires() -> None:
        network.make_namespaces(layout)
        network.wire(layout)

    def watchdog() -> None:
        if context.options.watchdog:
            nodes.start_watchdog(layout)  # each host is shown its end of it

    _together([wires, watchdog, lambda: _identities(context), _compile])
    shown = ", ".join(net.name for net in NETS)
    limit = f" (migration at {layout.rate} both ways)" if layout.rate else ""
    return f"networks {shown}{limit}; certificates"


def _identities(context: Context) -> None:
    layout = context.layout
    pki.make(layout)
    bmcs.make(layout)
    for node in layout.nodes:
        etc = layout.node_dir(node) / "etc"
        (etc / "units.json").write_text(configs.units_file(context.units(node)))
        options = context.options
        earlier = options.agent_source is not None
        daemons.write_files(layout, node, qemu=options.qemu, earlier=earlier)
    if context.options.agent_source is not None:
        older.keep(layout, context.options.agent_source)


def _compile() -> None:
    # Hosts see the package read-only: without byte code every daemon would compile it anew.
    compileall.compile_dir(Path(__file__).parents[1], quiet=2)


def _start(context: Context) -> str:
    layout = context.layout
    started: dict[str, tuple[int, int]] = {}

    def start(node: str) -> None:
        api = context.api.get(node)
        binary = str(context.options.qemu.get("binary", ""))
        first = nodes.start(layout, node, api=api, qemu_binary=binary)
        started[node] = (first.pid, first.start_time)

    try:
        _together([lambda node=node: start(node) for node in layout.nodes])  # type: ignore[misc]
        _together([lambda h=host: bmcs.start(layout, h) for host in layout.host_names])  # type: ignore[misc]
    finally:
        context.keep(nodes=started)
    return f"{', '.join(layout.nodes)}: namespaces and supervisors"


def _store(context: Context) -> str:
    """The members of etcd find one another before anybody waits for those who ask them."""
    layout = context.layout
    if not layout.store_members or context.options.units:
        return ""
    leader = keeping.wait_led(keeping.client(layout, control_root=""))
    name = next(m.name for m in layout.store_members if m.client_url == leader)
    return f"etcd on {', '.join(m.name for m in layout.store_members)}; {name} leads"


def _daemons(context: Context) -> str:
    wanted = [(node, [unit.name for unit in context.units(node)]) for node in context.layout.nodes]

    def ready(node: str, units: list[str]) -> None:
        path = context.layout.control_socket(node)
        try:
            control.tell(path, "wait-ready", units=units, timeout=READY_S)
        except OperationFailed as error:
            raise _explained(context, node, error) from error

    _together([lambda n=n, u=u: ready(n, u) for n, u in wanted if u])  # type: ignore[misc]
    if STORAGE in context.layout.nodes and STORAGE not in context.options.units:
        serving.wait_open(context.layout, timeout=READY_S)
    count = sum(len(units) for _, units in wanted)
    return f"{count} daemons are ready"


def _explained(context: Context, node: str, error: OperationFailed) -> OperationFailed:
    """The last words of the units of a node that did not become ready."""
    words = []
    for unit in context.units(node):
        log = context.layout.logs(node) / Path(unit.log).name
        if unit.name in error.message and log.exists():
            lines = log.read_text(errors="replace").strip().splitlines()
            words.append(f"{unit.name}: {lines[-1] if lines else 'it printed nothing'}")
    return OperationFailed(
        f"{error.message}; {'; '.join(words)}", hint="look at the logs: use --retain, lab logs"
    )


def _join(context: Context) -> str:
    if not context.options.join:
        return ""
    return asyncio.run(_joined(context))


async def _joined(context: Context) -> str:
    from godwit.client.api import AsyncClient

    layout = context.layout
    async with AsyncClient(
        ",".join(context.record.urls),
        token_file=layout.token,
        ca_file=layout.state / "ca.pem",
        name="lab/0.1",
    ) as client:
        async with asyncio.timeout(HOSTS_UP_S):
            await _answering(client)
            await _define(context, client)
            volumes = {volume.name for volume in serving.volumes(layout)}
            await _all_up(client, layout.host_names, volumes)
    shown = " and ".join(sorted(volumes, reverse=True))
    return f"{layout.hosts} hosts are up, network {LAN.name}, volume {shown}"


async def _answering(client: Any) -> None:
    while True:
        try:
            await client.rows("hosts")
        except GodwitError as error:
            # It says so while it reads the store for the first time; nothing announces the end.
            if error.code not in ("unavailable", "outcome-unknown"):
                raise
            await asyncio.sleep(0.05)
        else:
            return


async def _define(context: Context, client: Any) -> None:
    from godwit.lab.handle import Lab
    from godwit.model import keys
    from godwit.model.requests import CreateNetwork
    from godwit.store.records import encode

    store = Lab(context.record, context.layout).store_client()
    try:
        for volume in serving.volumes(context.layout):
            await store.put(keys.volume(volume.name), encode(volume))
        for host in context.layout.host_names:
            power = bmcs.power_config(context.layout, host, at=time.time())
            await store.put(keys.host_power(host), encode(power))
    finally:
        await store.aclose()
    wanted = CreateNetwork(name=LAN.name, subnet=LAN.subnet, uplink=LAN.port)
    await client.wait(await client.send(wanted))


async def _all_up(client: Any, names: Iterable[str], volumes: set[str]) -> None:
    missing = set(names)
    why: dict[str, str] = {}
    try:
        while missing:
            for row in await client.rows("hosts"):
                why[row["name"]] = f"{row['name']} is {row['state']}: {row.get('reason') or '?'}"
                joined = LAN.name in row["networks"] and volumes <= set(row["volumes"])
                if row["state"] == "up" and joined:
                    missing.discard(row["name"])
            if missing:
                # A host's state is worked out by the manager from two leases; it is no event.
                await asyncio.sleep(0.1)
    except asyncio.CancelledError:
        first = sorted(missing)[0]
        raise OperationFailed(
            f"not all hosts joined in time; {why.get(first, f'{first} was not heard of')}",
            hint=f"look: godwit lab up --retain, then godwit lab logs {first}",
        ) from None


def _finish(context: Context) -> str:
    said = ""
    if context.options.join:
        from godwit.client.settings import Target, save_context

        target = Target(
            url=context.record.url,
            others=context.record.urls[1:],
            token_file=context.layout.token,
            ca_file=context.layout.state / "ca.pem",
        )
        file = save_context(context.layout.name, target, file=context.options.contexts_file)
        context.keep(contexts_file=str(file))
        said = f"context {context.layout.name} in {file}"
    context.keep(complete=True)
    return said


def _together(works: list[Callable[[], None]]) -> None:
    """Do several things at once; all have ended when this returns or raises the first error."""
    if not works:
        return
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="lab") as pool:
        futures = [pool.submit(work) for work in works]
    for future in futures:
        future.result()


BEFORE = (
    Action("checking this machine", _check),
    Action("finding the demo image", _find_image),
)
MAKING = (
    Action("making directories", _prepare),
    Action("making networks and certificates", _make),
    Action("starting the nodes", _start),
    Action("waiting for the store", _store),
    Action("waiting for the daemons", _daemons),
    Action("waiting for the hosts to join", _join),
    Action("writing the context", _finish),
)
