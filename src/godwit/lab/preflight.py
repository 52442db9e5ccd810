"""Everything a lab needs of the machine, looked at before anything is touched."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from godwit.host import links, netns
from godwit.host.cgroup import detect
from godwit.host.errors import HostError
from godwit.host.facts import memory_facts
from godwit.host.shaping import shape
from godwit.lab import groups, keeping, record, serving
from godwit.lab.layout import MAX_HOSTS, QEMU_USER, Layout, StorageKind
from godwit.model.errors import Conflict, GodwitError, Refused
from godwit.model.units import format_size

# Measured: agent, guard and supervisor of a host; store, manager and supervisor of the control
# node. The rest is for one small guest.
HOST_BYTES = 160 << 20
MEMBER_BYTES = 64 << 20
MANAGER_BYTES = 110 << 20
CONTROL_BYTES = 256 << 20
SPARE_BYTES = 512 << 20

_SETUP = "run scripts/setup, which installs what is missing"
_PROGRAMS = ("ip", "tc", "nsenter", "setpriv", "qemu-img")
_DAEMON_MODULES = ("cryptography", "fastapi", "uvicorn", "qemu.qmp", "prometheus_client")


@dataclass(frozen=True, slots=True)
class Need:
    """One thing a lab needs; ``look`` raises when it is not there."""

    what: str
    look: Callable[[], None]


def needs(layout: Layout, *, qemu_binary: str) -> tuple[Need, ...]:
    """What a lab of this layout needs, the cheap and telling ones first."""
    return (
        Need("root", _root),
        Need("programs, QEMU and its user", lambda: _programs(qemu_binary)),
        Need("the daemons' libraries", _libraries),
        Need("what keeps the records", lambda: _store(layout)),
        Need("what serves the storage", lambda: _serving(layout.storage)),
        Need("the lab's name is free", lambda: _free(layout)),
        Need("memory", lambda: _memory(layout)),
        Need("control groups", lambda: _groups()),
        Need("network namespaces, bridges, veth, tbf and tun", lambda: _kernel(layout)),
    )


def _store(layout: Layout) -> None:
    if layout.store_members and shutil.which(keeping.ETCD) is None:
        raise Refused(
            "etcd of the package etcd-server is not installed",
            hint="scripts/setup --servers, or apt-get install --no-install-recommends etcd-server",
        )


def _root() -> None:
    if os.geteuid() != 0:
        words = " ".join(sys.argv[1:])
        raise Refused("a lab needs root: it makes namespaces", hint=f"run: sudo godwit {words}")


def _programs(qemu_binary: str) -> None:
    for program in (*_PROGRAMS, qemu_binary):
        if shutil.which(program) is None:
            raise Refused(f"{program} is not installed", hint=_SETUP)
    try:
        pwd.getpwnam(QEMU_USER)
    except KeyError:
        raise Refused(f"there is no user {QEMU_USER} to run QEMU as", hint=_SETUP) from None


def _serving(storage: StorageKind) -> None:
    for program, package in serving.PROGRAMS[storage]:
        path = f"/usr/sbin:/usr/bin:{os.environ.get('PATH', '')}"
        if shutil.which(program, path=path) is None:
            packages = " ".join(dict.fromkeys(name for _, name in serving.PROGRAMS[storage]))
            raise Refused(
                f"{program} of the package {package} is not installed",
                hint=f"scripts/setup, or apt-get install --no-install-recommends {packages}; "
                "--storage dir works without",
            )
    for file, package in serving.FILES[storage]:
        if not any(Path("/").glob(file)):
            raise Refused(
                f"the package {package} is not installed",
                hint=f"scripts/setup, or apt-get install {package}; --storage dir works without",
            )


def _libraries() -> None:
    for module in _DAEMON_MODULES:
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise Refused(f"the Python library {module} is missing", hint="install godwit[daemon]")


def _free(layout: Layout) -> None:
    hint = f"godwit lab down --name {layout.name}, or choose another --name"
    if layout.record.exists():
        raise Conflict(f"there is a lab {layout.name} already", hint=hint)
    left = [name for name in netns.names() if name.startswith(layout.prefix)]
    # The rest of the prefix must be a place: lab `a` and lab `a-b` are different ones.
    places = (*layout.places, "check", *(f"host{n}" for n in range(1, MAX_HOSTS + 1)))
    left = [name for name in left if name.removeprefix(layout.prefix) in places]
    left += groups.of_lab(layout.name)
    left += [str(path) for path in (layout.state, layout.run) if path.exists()]
    if left:
        raise Conflict(f"something of a lab {layout.name} is left: {left[0]}", hint=hint)


def _memory(layout: Layout) -> None:
    wanted = CONTROL_BYTES + layout.hosts * HOST_BYTES + SPARE_BYTES
    wanted += len(layout.store_members) * MEMBER_BYTES
    wanted += max(0, layout.managers - 1) * MANAGER_BYTES
    there = memory_facts().available
    if there < wanted:
        raise Refused(
            f"a lab of {layout.hosts} hosts needs {format_size(wanted)} of memory, "
            f"{format_size(there)} are free",
            hint="end something, or use fewer --hosts",
        )


def _groups() -> None:
    found = detect()
    missing = {"cpu", "freezer"} - set(found.controllers) if found.version == 1 else set()
    if missing:
        raise Refused(
            f"control groups lack the controller {sorted(missing)[0]}",
            hint="mount it below /sys/fs/cgroup",
        )


def _kernel(layout: Layout) -> None:
    name = layout.netns("check")
    what = "network namespaces"
    try:
        netns.create(name)
        what = "bridges"
        links.apply([links.bridge("br-check")], netns=name)
        what = "veth pairs"
        links.apply([links.veth("check0", "check1"), links.up("check0")], netns=name)
        what = "rate limits (tbf)"
        shape("check0", 10**9, netns=name)
        what = "tun devices"
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except (HostError, OSError) as error:
        reason = getattr(error, "message", None) or str(error)
        raise Refused(
            f"this machine offers no {what}: {reason}",
            hint="a kernel with namespaces, bridge, veth, tun and sch_tbf is needed",
        ) from error
    finally:
        with contextlib.suppress(GodwitError):
            netns.delete(name)


def image_source() -> Path | None:
    """The demo image's recipe, in a checkout of the repository."""
    folder = Path(__file__).resolve().parents[3] / "images" / "demo"
    return folder if folder.is_dir() else None


def known_labs() -> tuple[str, ...]:
    """Every lab of which anything is known here."""
    return tuple(sorted({*record.names(), *groups.labs()}))
