"""What this host publishes about itself, and what it has free right now."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from godwit.host import cgroup
from godwit.host.config import AgentConfig
from godwit.host.facts import host_facts, memory_facts
from godwit.model.errors import OperationFailed
from godwit.model.host import HostInfo
from godwit.model.skew import our_own
from godwit.qemu.facts import BinaryFacts, facts_of
from godwit.qemu.launch import Binary
from godwit.qemu.pins import choose_accelerator
from godwit.storage.files import FileFacts


@dataclass(frozen=True)
class Equipment:
    """What was found out about this host when its agent started."""

    info: HostInfo
    qemu: BinaryFacts
    binary: Binary
    warnings: tuple[str, ...]


async def survey(config: AgentConfig, *, now: float) -> Equipment:
    """Look at machine, KVM and QEMU. OperationFailed when no VM could run here."""
    machine = host_facts()
    accelerator, why = choose_accelerator(config.qemu.accelerator, machine.kvm)
    binary = Binary.named(
        config.qemu.binary,
        user=config.qemu.user,
        data_dir=config.qemu.data_dir,
        library_path=config.qemu.library_path,
    )
    qemu = await facts_of(binary, accelerator, cache=config.paths.state)
    public = qemu.public(
        accelerator_reason=why,
        allow_tcg_migration_on_old_qemu=config.qemu.allow_tcg_migration_on_old_qemu,
    )
    if not qemu.machines:
        raise OperationFailed(f"{binary.path} offers no q35 machine", hint="install another QEMU")
    ours = our_own()
    info = HostInfo(
        name=config.host,
        agent_url=f"https://{config.agent.address}:{config.agent.port}",
        cpus=machine.cpu.count,
        cpu_vendor=machine.cpu.vendor,
        cpu_model_name=machine.cpu.model_name,
        memory_bytes=machine.memory.total,
        boot_id=machine.boot_id,
        kernel=machine.kernel,
        qemu=public,
        migration_address=config.migration.address,
        migration_subnet=config.migration.subnet,
        migration_rate_bits=config.migration.rate_bits,
        networks={name: port.mtu for name, port in config.networks.items()},
        volumes=seen_volumes(config.paths.volumes),
        cgroup=f"v{cgroup.detect().version}",
        userfaultfd=machine.userfaultfd.usable,
        version=ours.version,
        level=ours.level,
        started_at=now,
    )
    return Equipment(info=info, qemu=qemu, binary=binary, warnings=(why,) if why else ())


def seen_volumes(root: Path) -> tuple[str, ...]:
    """Names of the shared volumes this host sees. They themselves are not touched, one may hang."""
    try:
        with os.scandir(root) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    except (FileNotFoundError, NotADirectoryError):
        return ()


def memory_free(*, promised_bytes: int) -> int:
    """Bytes that a further VM could have: what the machine has, less what VMs here may take."""
    memory = memory_facts()
    return max(0, min(memory.available, memory.total - promised_bytes))


def load() -> float:
    """Runnable processes, averaged over a minute."""
    return os.getloadavg()[0]


def usable_by(facts: FileFacts, uid: int, gid: int, *, write: bool) -> str:
    """Empty when the QEMU user may open the file, else why not (permissions only). Pure."""
    wanted = 6 if write else 4
    mode = facts.mode
    granted = mode & 7
    if facts.uid == uid:
        granted = mode >> 6 & 7
    elif facts.gid == gid:
        granted = mode >> 3 & 7
    return "" if granted & wanted == wanted else "the QEMU user may not open it"


def same_subnet(address: str, subnet: str) -> bool:
    """Whether an address lies in a subnet; True when no subnet is configured."""
    return not subnet or ipaddress.ip_address(address) in ipaddress.ip_network(subnet)
