"""Where and on what the figures were measured: they mean nothing without it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from measure import Machine


def said(*line: str) -> str:
    """The first line that a program prints; empty when it cannot be run."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def commit() -> dict[str, Any]:
    """The commit, and whether the tree differs from it."""
    folder = str(Path(__file__).resolve().parents[1])
    return {
        "id": said("git", "-C", folder, "rev-parse", "HEAD"),
        "changed": bool(said("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")),
    }


def machine(guest: Machine) -> dict[str, Any]:
    """Processor, memory, system and versions."""
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((row.partition(": ")[2] for row in rows if row.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpus": os.cpu_count(),
        "cpu_model": model,
        "memory_bytes": memory,
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "qemu": said("qemu-system-x86_64", "--version"),
        "libvirt": said("virsh", "--version"),
        "guest_machine": guest.machine,
        "guest_cpu": guest.cpu,
        "accelerator": guest.accel,
    }
