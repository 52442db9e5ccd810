"""What this machine is and can do.

Paths start at a root directory, so that tests can show other machines.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Usable:
    """Whether a facility works here, and why not."""

    usable: bool
    reason: str = ""

    def __str__(self) -> str:
        return "usable" if self.usable else f"unusable ({self.reason})"


@dataclass(frozen=True, slots=True)
class CpuFacts:
    """Processors as /proc/cpuinfo shows them."""

    count: int
    vendor: str
    model_name: str
    flags: frozenset[str]
    virtualization_flags: frozenset[str] = frozenset()  # "vmx flags": Linux 5.6 lists them apart

    @property
    def slat(self) -> str:
        """``ept``, ``npt``, or nothing when guests' addresses are not translated in hardware."""
        shown = self.flags | self.virtualization_flags
        return next((flag for flag in ("ept", "npt") if flag in shown), "")

    @property
    def virtualization(self) -> str:
        """``vmx``, ``svm``, or nothing when the processor offers none here."""
        return next((flag for flag in ("vmx", "svm") if flag in self.flags), "")


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory in bytes; ``available`` is what new programs can take without swapping."""

    total: int
    free: int
    available: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """All of it."""

    hostname: str
    boot_id: str
    kernel: str
    machine: str
    system: str
    python: str
    cpu: CpuFacts
    memory: MemoryFacts
    kvm: Usable
    userfaultfd: Usable


def cpu_facts(root: Path = _ROOT) -> CpuFacts:
    """Processors; unknown fields are empty (other architectures name them differently)."""
    count = 0
    first: dict[str, str] = {}
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        key = key.strip()
        count += key == "processor"
        first.setdefault(key, value.strip())
    return CpuFacts(
        count=count,
        vendor=first.get("vendor_id", ""),
        model_name=first.get("model name", ""),
        flags=frozenset(first.get("flags", first.get("Features", "")).split()),
        virtualization_flags=frozenset(first.get("vmx flags", "").split()),
    )


def memory_facts(root: Path = _ROOT) -> MemoryFacts:
    """Memory now."""
    values: dict[str, int] = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        values[key] = int(value.split()[0]) * 1024
    return MemoryFacts(
        total=values["MemTotal"],
        free=values["MemFree"],
        available=values.get("MemAvailable", values["MemFree"]),
    )


def _opens(path: Path) -> str:
    """Empty when a device opens for reading and writing, else why not."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/{path.name}: {error.strerror}"
    return ""


def kvm_facts(root: Path = _ROOT) -> Usable:
    """KVM works when its device opens *and* the processor shows the extension it needs.

    A device that opens proves little: without vmx or svm the first VM would fail.
    """
    refusal = _opens(root / "dev/kvm")
    if refusal:
        return Usable(False, refusal)
    if not cpu_facts(root).virtualization:
        return Usable(False, "/dev/kvm opens, but the processor shows neither vmx nor svm")
    return Usable(True)


def userfaultfd_facts(root: Path = _ROOT) -> Usable:
    """Post-copy needs /dev/userfaultfd (kernel 6.1 or newer) to be openable."""
    refusal = _opens(root / "dev/userfaultfd")
    return Usable(not refusal, refusal)


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _system(root: Path) -> str:
    for name in ("etc/os-release", "usr/lib/os-release"):
        for line in _line(root / name).splitlines():
            key, _, value = line.partition("=")
            if key == "PRETTY_NAME":
                return value.strip('"')
    return ""


def host_facts(root: Path = _ROOT) -> HostFacts:
    """Everything about this machine, read now."""
    return HostFacts(
        hostname=_line(root / "proc/sys/kernel/hostname"),
        boot_id=_line(root / "proc/sys/kernel/random/boot_id"),
        kernel=_line(root / "proc/sys/kernel/osrelease"),
        machine=platform.machine(),
        system=_system(root),
        python=platform.python_version(),
        cpu=cpu_facts(root),
        memory=memory_facts(root),
        kvm=kvm_facts(root),
        userfaultfd=userfaultfd_facts(root),
    )
