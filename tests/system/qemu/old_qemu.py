"""Fetches Debian 12's own QEMU 7.2 beside the installed one, for tests that need an old QEMU.

Packages come from the configured Debian archive, are unpacked (not installed) and kept in
``${GODWIT_CACHE:-/var/cache/godwit}/qemu-7.2``. A QEMU finds firmware and modules relative to
itself, so the path alone is enough as ``binary`` in a configuration. Run as a program this
prints the path.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data")
PROGRAM = Path("usr/bin/qemu-system-x86_64")
SEABIOS = Path("/usr/share/seabios")


class NoOldQemu(Exception):
    """This machine cannot have it; the sentence says why."""


def old_qemu() -> Path:
    """The path of a QEMU 7.2 that starts here; NoOldQemu when there is none to be had."""
    cache = Path(os.environ.get("GODWIT_CACHE", "/var/cache/godwit"))
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "qemu-7.2"
    with (cache / ".qemu-7.2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / PROGRAM).is_file():
            _fetch(cache, target)
    _check(target / PROGRAM)
    return target / PROGRAM


def _fetch(cache: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".qemu-7.2-") as folder:
        here = Path(folder)
        for package in PACKAGES:
            version = _version(package)
            _run(["apt-get", "download", f"{package}={version}"], cwd=here)
        root = here / "root"
        for deb in sorted(here.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(deb), str(root)], cwd=here)
        if not SEABIOS.is_dir():
            raise NoOldQemu("seabios is not installed")
        (root / "usr/share/seabios").symlink_to(SEABIOS)
        root.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        root.rename(target)


def _version(package: str) -> str:
    listed = _run(["apt-cache", "madison", package], cwd=Path("/"))
    for line in listed.splitlines():
        version = line.split("|")[1].strip()
        if re.match(r"1:7\.2[+.]", version):
            return version
    raise NoOldQemu(f"the configured archives have no {package} 7.2 (Debian 12 has)")


def _check(program: Path) -> None:
    text = _run([str(program), "--version"], cwd=Path("/"))
    if " 7.2" not in text:
        raise NoOldQemu(f"{program} is not 7.2: {text.splitlines()[0]}")


def _run(argv: list[str], *, cwd: Path) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300)
    except OSError as error:
        raise NoOldQemu(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise NoOldQemu(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{old_qemu()}\n")
    except NoOldQemu as problem:
        sys.exit(f"no QEMU 7.2: {problem}")
