"""What a QEMU program can do: asked once over QMP, remembered until the file changes.

Started once without a machine (``-machine none``), as an unprivileged user, it answers for its
version, machines, CPU models and commands in some 0.2 s. Features come from its schema, not from
its version, so a distribution's backport counts.
"""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from godwit.host.errors import ProcessGone
from godwit.host.files import load_json, save_json
from godwit.host.process import kill, wait_exit
from godwit.model.errors import OperationFailed, Refused
from godwit.model.host import QemuFacts
from godwit.qemu import quirks
from godwit.qemu.launch import Binary, log_tail
from godwit.qemu.quirks import OLDEST, USO_FEATURE, Quirk, Version, live_migration_refusal
from godwit.qemu.schema import Schema
from godwit.qmp import Monitor, MonitorError

PROBE_DEADLINE = 20.0
_CACHE_FORMAT: Final = 1
_CAPABILITY = "migrate-set-capabilities/capabilities/capability/"

# feature -> where the schema shows it.
FEATURES: Final[Mapping[str, str]] = {
    **{
        name: _CAPABILITY + name
        for name in (
            "auto-converge",
            "background-snapshot",
            "dirty-limit",
            "events",
            "late-block-activate",
            "mapped-ram",
            "multifd",
            "pause-before-switchover",
            "postcopy-blocktime",
            "postcopy-preempt",
            "postcopy-ram",
            "return-path",
            "switchover-ack",
            "validate-uuid",
            "xbzrle",
            "zero-copy-send",
        )
    },
    "avail-switchover-bandwidth": "migrate-set-parameters/avail-switchover-bandwidth",
    "direct-io": "migrate-set-parameters/direct-io",
    "zero-page-detection": "migrate-set-parameters/zero-page-detection",
    "migration-mode": "migrate-set-parameters/mode",
    "announce-rounds": "migrate-set-parameters/announce-rounds",
    "migrate-channels": "migrate/channels",
    "exit-on-error": "migrate-incoming/exit-on-error",
    "announce-self": "announce-self",
    "blockdev-set-active": "blockdev-set-active",
    "block-job-change": "block-job-change",
    "calc-dirty-rate": "calc-dirty-rate",
    "yank": "yank",
    "postcopy-recover-setup": "query-migrate/->/status/postcopy-recover-setup",
    "tls-creds-x509": "object-add/qom-type/tls-creds-x509",
}
# feature -> (device, property), for what the schema does not tell.
DEVICE_FEATURES: Final[Mapping[str, tuple[str, str]]] = {
    USO_FEATURE: ("virtio-net-pci", "guest_uso4"),
}


@dataclass(frozen=True, slots=True)
class BinaryFacts:
    """What one QEMU program, used with one accelerator, can do on this machine.

    ``machines`` are the versioned q35 machines (no alias), oldest first; ``cpu_models`` the
    versioned models that miss nothing here, by name.
    """

    path: str
    version: Version
    package: str
    accelerator: str
    machines: tuple[str, ...]
    cpu_models: tuple[str, ...]
    features: frozenset[str]

    @property
    def quirks(self) -> tuple[Quirk, ...]:
        """What is odd about it, with the reasons in words."""
        return quirks.quirks_of(self.version, accelerator=self.accelerator, features=self.features)

    def public(
        self, *, accelerator_reason: str = "", allow_tcg_migration_on_old_qemu: bool = False
    ) -> QemuFacts:
        """The facts as the host publishes them."""
        refusal = live_migration_refusal(self.version, accelerator=self.accelerator)
        return QemuFacts(
            version=self.version,
            accelerator=self.accelerator,
            accelerator_reason=accelerator_reason,
            machines=self.machines,
            cpu_models=self.cpu_models,
            live_migration_refusal="" if allow_tcg_migration_on_old_qemu else refusal,
        )


async def probe(binary: Binary, accelerator: str) -> BinaryFacts:
    """Start the program, ask, and end it; OperationFailed with its own words when it cannot.

    Raises Refused for a QEMU older than 7.2. Leaves no process and no file behind.
    """
    async with AsyncExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="godwit-probe-")))
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with theirs:
            number = theirs.fileno()
            options = [
                *("-machine", "none", "-accel", accelerator, "-S", "-display", "none"),
                *("-nodefaults", "-no-user-config"),
                *("-chardev", f"socket,id=qmp,fd={number}", "-mon", "chardev=qmp,mode=control"),
            ]
            if binary.data_dir:
                options += ["-L", binary.data_dir]
            log = folder / "log"
            process = binary.start(options, pass_fds=[number], log=log)
        undo.push_async_callback(wait_exit, process)
        undo.callback(kill, process)
        try:
            monitor = await Monitor.connect(
                ours, name=f"probe {binary.path}", deadline=PROBE_DEADLINE, oob=False
            )
            undo.push_async_callback(monitor.close)
            return await _ask(monitor, binary.path, accelerator)
        except (MonitorError, ProcessGone) as error:
            said = log_tail(log)
            raise OperationFailed(
                f"{binary.path} cannot be used with {accelerator}: {said or error}",
                hint="check the [qemu] section of the configuration",
            ) from error


async def _ask(monitor: Monitor, path: str, accelerator: str) -> BinaryFacts:
    version = await monitor.execute("query-version")
    number = (
        int(version["qemu"]["major"]),
        int(version["qemu"]["minor"]),
        int(version["qemu"]["micro"]),
    )
    if number < OLDEST:
        raise Refused(
            f"{path} is QEMU {'.'.join(map(str, number))}; at least 7.2 is needed",
            hint="install a newer QEMU, on Debian from the backports suite",
        )
    machines, cpus, schema = await asyncio.gather(
        monitor.execute("query-machines"),
        monitor.execute("query-cpu-definitions", timeout=PROBE_DEADLINE),
        monitor.execute("query-qmp-schema"),
    )
    known = Schema(schema)
    features = {name for name, where in FEATURES.items() if known.has(where)}
    for name, (device, wanted) in DEVICE_FEATURES.items():
        properties = await monitor.execute("device-list-properties", {"typename": device})
        if any(entry["name"] == wanted for entry in properties):
            features.add(name)
    return BinaryFacts(
        path=path,
        version=number,
        package=str(version["package"]),
        accelerator=accelerator,
        machines=q35_machines(machines),
        cpu_models=usable_models(cpus),
        features=frozenset(features),
    )


_Q35 = re.compile(r"pc-q35-(\d+(?:\.\d+)+)")


def machine_key(name: str) -> tuple[int, ...]:
    """Sorts machine versions by age: ``pc-q35-9.2`` is older than ``pc-q35-10.0``."""
    match = _Q35.fullmatch(name)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def q35_machines(answer: list[dict[str, Any]]) -> tuple[str, ...]:
    """The upstream, versioned q35 machines in an answer of ``query-machines``, oldest first."""
    names = [str(m["name"]) for m in answer]
    return tuple(sorted((name for name in names if machine_key(name)), key=machine_key))


def usable_models(answer: list[dict[str, Any]]) -> tuple[str, ...]:
    """The versioned CPU models that this machine can give in full, by name."""
    return tuple(
        sorted(
            str(cpu["name"])
            for cpu in answer
            if re.search(r"-v\d+$", cpu["name"])
            and cpu.get("static") is not None
            and cpu.get("unavailable-features") == []
        )
    )


async def facts_of(binary: Binary, accelerator: str, *, cache: Path) -> BinaryFacts:
    """`probe`, remembered in directory ``cache`` by path, time of change, size and accelerator."""
    stat = Path(binary.path).stat() if Path(binary.path).is_file() else None
    key = [_CACHE_FORMAT, binary.path, stat and [stat.st_mtime_ns, stat.st_size], accelerator]
    # The processor decides which models are usable, so another one makes the memory worthless.
    key.append(_processor())
    file = cache / f"qemu-facts-{accelerator}.json"
    known = _remembered(file, key)
    if known is not None:
        return known
    found = await probe(binary, accelerator)
    cache.mkdir(parents=True, exist_ok=True)
    save_json(file, {"key": key, "facts": asdict(found) | {"features": sorted(found.features)}})
    return found


def _remembered(file: Path, key: list[object]) -> BinaryFacts | None:
    try:
        content = load_json(file)
    except ValueError:
        return None  # damaged: ask again and replace it
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    facts: dict[str, Any] = content["facts"]
    return BinaryFacts(
        path=facts["path"],
        version=(facts["version"][0], facts["version"][1], facts["version"][2]),
        package=facts["package"],
        accelerator=facts["accelerator"],
        machines=tuple(facts["machines"]),
        cpu_models=tuple(facts["cpu_models"]),
        features=frozenset(facts["features"]),
    )


def _processor() -> str:
    """Model and microcode of the first processor, as the kernel tells them."""
    wanted = ("model name", "microcode", "flags")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    return "; ".join(line.partition(":")[2].strip() for line in lines if line.startswith(wanted))
