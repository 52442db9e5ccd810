"""Fetches the distribution's qemu-guest-agent beside what is installed, for tests that talk to it.

Unpacked (not installed: it would be started) and kept in
``${GODWIT_CACHE:-/var/cache/godwit}/qemu-ga``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE = "qemu-guest-agent"
PROGRAM = Path("usr/sbin/qemu-ga")


def guest_agent() -> Path:
    """The path of a qemu-ga; CalledProcessError when the archive cannot be reached."""
    cache = Path(os.environ.get("GODWIT_CACHE", "/var/cache/godwit"))
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "qemu-ga"
    with (cache / ".qemu-ga.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / PROGRAM).is_file():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".qemu-ga-") as folder:
                here = Path(folder)
                _run(["apt-get", "download", PACKAGE], here)
                (package,) = here.glob("*.deb")
                _run(["dpkg-deb", "-x", str(package), str(here / "root")], here)
                (here / "root").chmod(0o755)
                if target.exists():
                    shutil.rmtree(target)
                (here / "root").rename(target)
    return target / PROGRAM


def _run(argv: list[str], folder: Path) -> None:
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, timeout=300)
