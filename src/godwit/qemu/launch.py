"""How QEMU is started on this host: which program, as whom, with which environment."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from godwit.host.errors import ProgramMissing
from godwit.host.process import Process, spawn
from godwit.model.errors import OperationFailed

_SEARCH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/libexec")
_TAIL_BYTES = 4096
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Binary:
    """A QEMU program and what it needs to run.

    ``user`` is (uid, gid), None = as ourselves. ``data_dir`` is where its firmware lies,
    ``library_path`` where its libraries lie, both empty for an installed one.
    """

    path: str
    user: tuple[int, int] | None = None
    groups: tuple[int, ...] = ()
    data_dir: str = ""
    library_path: str = ""

    @staticmethod
    def named(program: str, *, user: str, data_dir: str = "", library_path: str = "") -> Binary:
        """The program of this name, run as ``user``; OperationFailed when there is no such user.

        A QEMU unpacked elsewhere finds its firmware and modules beside itself; ``data_dir`` and
        ``library_path`` are for one that does not.
        """
        try:
            account = pwd.getpwnam(user)
        except KeyError:
            raise OperationFailed(
                f"there is no user {user!r} to run QEMU as",
                hint=f"useradd --system --no-create-home {user}",
            ) from None
        return Binary(
            path=find_program(program),
            user=(account.pw_uid, account.pw_gid),
            groups=_kvm_group(),
            data_dir=data_dir,
            library_path=library_path,
        )

    def environment(self) -> dict[str, str]:
        """All QEMU gets to see of the environment: nothing of ours, no proxy, no secret."""
        env = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
        if self.library_path:
            env["LD_LIBRARY_PATH"] = self.library_path
        return env

    def start(self, options: Sequence[str], *, pass_fds: Sequence[int], log: Path) -> Process:
        """Start QEMU in a session of its own; OperationFailed when it cannot be started.

        What it prints is appended to ``log``. The caller awaits ``wait_exit``.
        """
        try:
            return spawn(
                [self.path, *options],
                user=self.user,
                groups=self.groups,
                pass_fds=pass_fds,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self.environment(),
                umask=0o077,
            )
        except (ProgramMissing, OSError) as error:
            raise OperationFailed(
                f"cannot start {self.path}: {error}", hint="run scripts/setup, which installs QEMU"
            ) from error


def find_program(name: str) -> str:
    """The absolute path of a program, or the name itself when it is nowhere to be found."""
    if "/" in name:
        return name
    candidates = (Path(folder) / name for folder in _SEARCH)
    return next((str(path) for path in candidates if path.is_file()), name)


def _kvm_group() -> tuple[int, ...]:
    try:
        return (grp.getgrnam("kvm").gr_gid,)
    except KeyError:
        return ()


def log_tail(log: Path, *, offset: int = 0) -> str:
    """The last lines QEMU printed after ``offset``, in one line; empty when it said nothing."""
    try:
        with log.open("rb") as stream:
            end = stream.seek(0, 2)
            stream.seek(max(offset, end - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-_TAIL_LINES:] if line.strip())


def log_size(log: Path) -> int:
    """Bytes in the log now, to be given to `log_tail` later."""
    try:
        return log.stat().st_size
    except FileNotFoundError:
        return 0
