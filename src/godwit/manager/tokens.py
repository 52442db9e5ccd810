"""Who may call the API: tokens in a file that only its owner can read, one ``NAME:TOKEN`` a line.

Only hashes are kept in memory, and comparing takes the same time whatever was offered. The file
is read again when it changes, so a token is taken back without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

from godwit.model.errors import InvalidRequest

_SHORTEST = 16


class Tokens:
    """The callers known by token."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._hashes: tuple[tuple[str, bytes], ...] = ()
        self._refresh()

    def caller(self, token: str) -> str | None:
        """The name this token belongs to; every known one is compared."""
        self._refresh()
        offered = hashlib.sha256(token.encode()).digest()
        found = None
        for name, known in self._hashes:
            if hmac.compare_digest(offered, known):
                found = name
        return found

    def _refresh(self) -> None:
        try:
            facts = self._path.stat()
        except OSError:
            # Taken away: nobody gets in until it is back.
            self._seen, self._hashes = None, ()
            return
        mark = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        if mark != self._seen:
            self._hashes = load_tokens(self._path)
            self._seen = mark


def load_tokens(path: Path) -> tuple[tuple[str, bytes], ...]:
    """Names and SHA-256 hashes of a token file; InvalidRequest when it is open to others."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise InvalidRequest(
            f"{path} can be read by others (mode {mode:04o})", hint=f"run: chmod 600 {path}"
        )
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, _, token = text.partition(":")
        if not name or len(token) < _SHORTEST:
            # The line itself is a secret and stays out of the message.
            raise InvalidRequest(
                f"{path}: line {number} is not NAME:TOKEN",
                hint=f"a token has at least {_SHORTEST} characters",
            )
        found.append((name.strip(), hashlib.sha256(token.strip().encode()).digest()))
    return tuple(found)
