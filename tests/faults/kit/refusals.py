"""Bad input: one clear line, a hint, the documented exit code, nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from godwit.host.facts import memory_facts
from godwit.lab import fault
from godwit.model import keys
from godwit.store.records import Records, encode

from .cells import VM
from .cluster import Cluster
from .report import Say, Section, tell

IDLE = "idle"


@dataclass(frozen=True)
class Bad:
    """A command that must be refused; ``says`` is a word of the reason."""

    what: str
    words: tuple[str, ...]
    code: int
    says: str


def cases(source: str, destination: str) -> tuple[Bad, ...]:
    """Those that need nothing but a running VM ``web`` and a stopped one ``idle``."""
    move = ("vm", "migrate")
    create = ("vm", "create", "new", "--image", "demo")
    return (
        Bad("unknown VM", (*move, "nosuch", "--to", destination), 3, "nosuch"),
        Bad("unknown host", (*move, VM, "--to", "host9"), 3, "host9"),
        Bad("same host", (*move, VM, "--to", source), 4, source),
        Bad("stopped VM", (*move, IDLE, "--to", destination), 4, "stopped"),
        Bad("occupied name", ("vm", "create", VM, "--memory", "256M", "--image", "demo"), 4, VM),
        Bad("running VM deleted", ("vm", "delete", VM), 4, VM),
        Bad("garbage size", (*create, "--memory", "12parsecs"), 2, "--memory"),
        Bad("size too small", (*create, "--memory", "1K"), 2, "--memory"),
        Bad("negative size", (*create, "--memory", "-5G"), 2, "--memory"),
        Bad("garbage disk", (*create, "--memory", "64M", "--disk", "shared:much"), 2, "--disk"),
        Bad("garbage name", ("vm", "create", "No/Name", "--memory", "64M"), 2, "name"),
        Bad("garbage budget", (*move, VM, "--max-blackout", "soon"), 2, "--max-blackout"),
        Bad("negative deadline", (*move, VM, "--deadline", "-5"), 2, "--deadline"),
        Bad("unknown option", (*move, VM, "--quickly"), 2, "--quickly"),
        Bad("unknown move", ("migration", "cancel", "m-nosuch"), 3, "m-nosuch"),
        Bad(
            "unknown image", ("vm", "create", "new", "--memory", "64M", "--image", "nix"), 3, "nix"
        ),
    )


def run(cluster: Cluster, *, say: Say = tell) -> Section:
    """All of them."""
    names = {vm.name for vm in cluster.client.vms.list()}
    if VM not in names:
        cluster.make(VM, host="host1")
    if IDLE not in names:
        cluster.client.wait(cluster.client.vms.create(IDLE, memory_bytes=64 << 20, image="demo"))
    cluster.heal()
    source = str(cluster.owner(VM).host)
    destination = cluster.other(source)
    rows = [_try(cluster, bad, say) for bad in cases(source, destination)]
    with _foreign_cpu(cluster):
        bad = Bad("wrong CPU", ("vm", "migrate", VM, "--to", destination), 4, "CPU")
        rows.append(_try(cluster, bad, say))
    with _full(cluster, source, destination) as vm:
        bad = Bad("not enough memory", ("vm", "migrate", vm, "--to", destination), 4, "free")
        rows.append(_try(cluster, bad, say))
    rows.append(_two_at_once(cluster, source, destination, say))
    section = Section("refusals", {"cases": rows})
    for row in rows:
        section.judge(
            f"{row['what']}: one line, a hint, exit {row['wanted']}, nothing changed",
            not row["wrong"],
            {"exit": row["exit"], "stderr": row["stderr"], "wrong": row["wrong"]},
        )
    return section


def _try(cluster: Cluster, bad: Bad, say: Say) -> dict[str, Any]:
    before = _state(cluster)
    said = cluster.cli(*bad.words)
    changed = _changes(before, _state(cluster))
    lines = said.err.splitlines()
    wrong = [f"changed: {key}" for key in changed]
    if said.code != bad.code:
        wrong.append(f"exit code {said.code}, expected {bad.code}")
    if [line.partition(": ")[0] for line in lines] != ["error", "hint"]:
        wrong.append(f"{len(lines)} lines on stderr")
    if said.out:
        wrong.append("something on stdout")
    if bad.says.lower() not in said.err.lower():
        wrong.append(f"{bad.says!r} is not named")
    say(f"{'✗' if wrong else '✓'} {bad.what}: {' / '.join(lines)} {wrong or ''}")
    return {
        "what": bad.what,
        "words": list(bad.words),
        "wanted": bad.code,
        "exit": said.code,
        "stderr": said.err,
        "wrong": wrong,
    }


def _state(cluster: Cluster) -> dict[str, bytes]:
    """What a refused command must not change; the reservations are in the hosts' records."""
    return cluster.dump(keys.VMS) | {
        key: value for key, value in cluster.dump(keys.HOSTS).items() if "/reservations/" in key
    }


def _changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


@contextmanager
def _foreign_cpu(cluster: Cluster) -> Iterator[None]:
    """The running VM's record names a CPU model that no host here has.

    An agent believes what it started a VM with, so it has to adopt the VM anew each time.
    """
    host = str(cluster.owner(VM).host)
    model = _set_cpu_model(cluster, "Vulcan-v9")
    try:
        fault.restart_daemon(cluster.lab, host, "agent")
        cluster.heal()
        yield
    finally:
        _set_cpu_model(cluster, model)
        fault.restart_daemon(cluster.lab, host, "agent")
        cluster.heal()


def _set_cpu_model(cluster: Cluster, model: str) -> str:
    """Rewrite the VM's record behind everybody's back; the model before."""

    async def work(records: Records) -> str:
        found = await records.vm(VM)
        assert found is not None
        vm = found.value
        changed = vm.but(pins=vm.pins.but(cpu_model=model))
        await records.store.put(keys.vm_spec(VM), encode(changed))
        return vm.pins.cpu_model

    return cluster.store(work)


@contextmanager
def _full(cluster: Cluster, source: str, destination: str) -> Iterator[str]:
    """A running VM on the source that does not fit beside the one on the destination."""
    facts = memory_facts()
    size = int(facts.total * 0.55) >> 20 << 20
    assert size < facts.available * 0.95, "this machine has too little free memory for the case"
    names = {"large": source, "filler": destination}
    for name, host in names.items():
        # Promised, hardly used: they have nothing to boot, and the firmware touches little.
        cluster.client.wait(
            cluster.client.vms.create(name, memory_bytes=size, disks=["shared:1M:raw"])
        )
        cluster.client.wait(cluster.client.vms.start(name, host=host))
    try:
        yield "large"
    finally:
        for name in names:
            cluster.remove(name)


def _two_at_once(cluster: Cluster, source: str, destination: str, say: Say) -> dict[str, Any]:
    cluster.hold(source, "setup", "source")
    try:
        first = cluster.begin(VM, destination)
        cluster.await_held(source, "setup", "source")
        bad = Bad("two moves at once", ("vm", "migrate", VM, "--to", destination), 4, VM)
        row = _try(cluster, bad, say)
    finally:
        cluster.release(source)
    done = cluster.await_end(first, timeout=60.0)
    if done is None or done.state.value != "completed":
        row["wrong"].append(f"the first move ended {done.state.value if done else 'nowhere'}")
    return row
