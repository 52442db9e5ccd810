"""Real QEMUs, with a guest of sixty bytes instead of an operating system.

The guest says ``GW`` on its serial port, then a dot every few milliseconds, and cuts its own
power when the power button is pressed. It boots as a Linux kernel or as a disk's first sector.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from godwit.host.inotify import MODIFIED, PathWatch
from godwit.model.vm import Boot, Disk, Nic, Pins, Vm
from godwit.qemu.facts import BinaryFacts, probe
from godwit.qemu.launch import Binary
from godwit.qemu.machine import Machine
from godwit.qemu.start import Place, spawn

NOBODY = (65534, 65534)
UUID = "6f0e9b6c-4d3c-4f0a-9a53-0a4f5e1f2b3c"


def guest_code() -> bytes:
    """Sixteen-bit code; every jump is relative, so it runs wherever it lies."""
    out = b"\xba\xf8\x03"  # mov dx, serial
    for letter in b"GW\n":
        out += bytes([0xB0, letter, 0xEE])  # mov al, letter; out dx, al
    out += b"\xfa"  # cli
    out += b"\xba\x02\x06\xb8\x00\x01\xef"  # enable the power button
    loop = len(out)
    out += b"\xba\x00\x06\xed\xf6\xc4\x01"  # button pressed?
    jump = len(out)
    out += b"\x75\x00"  # jnz off, filled in below
    out += b"\x66\xb9\x00\x00\x20\x00\x67\xe2\xfd"  # count down from 2^21
    out += b"\xba\xf8\x03\xb0\x2e\xee"  # a dot
    out += bytes([0xEB, (loop - len(out) - 2) & 0xFF])
    off = len(out)
    out = out[: jump + 1] + bytes([off - jump - 2]) + out[jump + 2 :]
    return out + b"\xba\x04\x06\xb8\x00\x20\xef\xf4\xeb\xfd"  # power off; hlt; jmp $-1


def guest_kernel() -> bytes:
    """The guest as a bzImage: a setup part with the code, and a protected-mode part of nothing."""
    head = bytearray(1024)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, 32)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x200:0x202] = b"\xeb\x66"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x0203)
    head[0x211] = 1
    struct.pack_into("<I", head, 0x214, 0x100000)
    struct.pack_into("<I", head, 0x22C, 0x37FFFFFF)
    head[0x268 : 0x268 + len(guest_code())] = guest_code()
    return bytes(head) + bytes(512)


def guest_sector() -> bytes:
    """The guest as a boot sector."""
    return guest_code().ljust(510, b"\0") + b"\x55\xaa"


@pytest.fixture(scope="session")
def qemu() -> Binary:
    """The installed QEMU, run as nobody."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    return Binary(path=program, user=NOBODY)


@pytest.fixture(scope="session")
def old_qemu() -> Binary:
    """Debian 12's QEMU 7.2, unpacked beside."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    spec = importlib.util.spec_from_file_location(
        "old_qemu", Path(__file__).with_name("old_qemu.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return Binary(path=str(module.old_qemu()), user=NOBODY)
    except module.NoOldQemu as reason:
        pytest.skip(str(reason))


@pytest.fixture
async def facts(qemu: Binary) -> BinaryFacts:
    """What the installed QEMU can do."""
    return await probe(qemu, "tcg")


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path that nobody can walk through (sockets, images)."""
    with tempfile.TemporaryDirectory(prefix="gwq-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        kernel = path / "kernel"
        kernel.write_bytes(guest_kernel())
        kernel.chmod(0o644)
        yield path


@pytest.fixture
def make_place(root: Path, qemu: Binary) -> Callable[..., Place]:
    """Places on hosts of their own names."""

    def make(host: str = "h1", **more: object) -> Place:
        values: dict[str, object] = {
            "host": host,
            "run": root / host / "r",
            "state": root / host / "s",
            "binary": qemu,
            "cgroup": f"godwit-test-{os.getpid()}/{host}/web",
        }
        return Place(**(values | more))  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_vm(root: Path) -> Callable[..., Vm]:
    """A VM that boots the guest; ``disks`` are made here as raw images with the boot sector."""

    def make(
        *,
        disks: int = 0,
        nics: int = 0,
        kernel: bool = True,
        machine: str = "pc-q35-7.2",
        **more: object,
    ) -> Vm:
        made = []
        for n in range(disks):
            path = root / f"disk{n}.raw"
            if not path.exists():
                path.write_bytes(guest_sector().ljust(4 << 20, b"\0"))
                os.chown(path, *NOBODY)
            made.append(
                Disk(
                    id=f"disk{n}",
                    volume="shared",
                    path=str(path),
                    size_bytes=4 << 20,
                    format="raw",
                    serial=f"GWTEST{n}",
                    lun=n,
                )
            )
        values: dict[str, object] = {
            "name": "web",
            "cpus": 1,
            "memory_bytes": 64 << 20,
            "created_at": 0.0,
            "pins": Pins(uuid=UUID, machine=machine, cpu_model="Nehalem-v1", accelerator="tcg"),
            "boot": Boot(kernel=str(root / "kernel")) if kernel else Boot(),
            "disks": made,
            "nics": [
                Nic(id=f"net{n}", network="lan", mac=f"02:00:00:00:99:{n:02x}", mtu=1400)
                for n in range(nics)
            ],
        }
        return Vm.model_validate(values | more)

    return make


@pytest.fixture
def wait_for_console() -> Callable[[Machine, str], Awaitable[None]]:
    """Waits until the guest has printed some text, at most ten seconds."""

    async def wait(machine: Machine, wanted: str) -> None:
        log = machine.runtime.console_log
        async with asyncio.timeout(10):
            with PathWatch(log, mask=MODIFIED) as watch:
                while wanted not in log.read_text(errors="replace"):
                    await watch.changed()

    return wait


@pytest.fixture
async def start(make_place: Callable[..., Place]) -> AsyncIterator[Callable[..., object]]:
    """Spawns machines and ends and clears away those that a test left."""
    made: list[Machine] = []
    epochs = itertools.count(1)

    async def spawn_one(vm: Vm, place: Place | None = None, **more: object) -> Machine:
        values: dict[str, object] = {"epoch": next(epochs)}
        machine = await spawn(vm, place or make_place(), **(values | more))  # type: ignore[arg-type]
        made.append(machine)
        return machine

    yield spawn_one
    for machine in made:
        if not machine.exited.is_set():
            await machine.kill()
        await machine.discard()
    for tree in Path("/sys/fs/cgroup").glob(f"*/godwit-test-{os.getpid()}"):
        for folder in sorted(tree.rglob("*"), reverse=True):
            if folder.is_dir():
                folder.rmdir()
        tree.rmdir()
