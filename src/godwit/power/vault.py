"""Passwords, sealed by a key that is not in the store.

The key is a file that the managers of a cluster have alone, mode 0600; what the store, its backups
and its watchers see is useless without it. A sealed text is

    gw1.KEY.NONCE+CIPHERTEXT       KEY names the key (not secret), the rest is base64

by AES-256-GCM, with what it is about as associated data: a password sealed for one device cannot be
put into another's record, and its own record cannot be turned to another address.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from godwit.host.files import sync_directory
from godwit.model.errors import OperationFailed, Refused

FILE = "secrets.key"
_FORM = "gw1"
_HEAD = b"godwit secrets key 1 "
_NONCE_BYTES = 12
_KEY_BYTES = 32


def key_of(sealed: str) -> str:
    """The name of the key that a text was sealed with; empty when it is none of ours."""
    form, _, rest = sealed.partition(".")
    return rest.partition(".")[0] if form == _FORM else ""


class Vault:
    """Seals and opens. The key is read when it is first needed, and made by `create`.

    ``about`` says what a secret is for, its first line to people.

    ``path`` None: this process has no key, and everything is refused.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._key: bytes | None = None

    @property
    def key_id(self) -> str:
        """The name of our key. Errors: Refused when we have none."""
        return hashlib.sha256(b"godwit key id " + self._load()).hexdigest()[:12]

    @property
    def present(self) -> bool:
        """Whether there is a key."""
        return self._key is not None or (self._path is not None and self._path.exists())

    def create(self) -> None:
        """Make a key where there is none; of several who try at once, one wins for all."""
        if self._path is None or self._path.exists():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = _HEAD + base64.b64encode(AESGCM.generate_key(bit_length=8 * _KEY_BYTES)) + b"\n"
        made = self._path.with_name(f".{self._path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(made, self._path)
            except FileExistsError:
                return
        finally:
            made.unlink()
        sync_directory(self._path.parent)

    def seal(self, secret: str, *, about: str) -> str:
        """The sealed form. Errors: Refused without a key."""
        nonce = os.urandom(_NONCE_BYTES)
        hidden = AESGCM(self._load()).encrypt(nonce, secret.encode(), about.encode())
        return f"{_FORM}.{self.key_id}.{base64.b64encode(nonce + hidden).decode()}"

    def open(self, sealed: str, *, about: str) -> str:
        """The secret. Errors: Refused when it was sealed with another key, OperationFailed when it
        was tampered with or is about something else."""
        if key_of(sealed) != self.key_id:
            raise Refused(
                f"the secret of {_shown(about)} was sealed with the key {key_of(sealed) or '?'},"
                f" ours is {self.key_id}",
                hint=f"give this manager the {FILE} of the one that sealed it, or set it again",
            )
        try:
            raw = base64.b64decode(sealed.rpartition(".")[2], validate=True)
            plain = AESGCM(self._load()).decrypt(
                raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], about.encode()
            )
        except (InvalidTag, binascii.Error, ValueError):
            raise OperationFailed(
                f"what the secret of {_shown(about)} is for was changed since it was sealed",
                hint="set it again",
            ) from None
        return plain.decode()

    def _load(self) -> bytes:
        if self._key is None:
            self._key = self._read()
        return self._key

    def _read(self) -> bytes:
        if self._path is None:
            raise Refused("this process has no key for secrets", hint="ask a manager")
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            raise Refused(
                f"there is no {self._path}, so secrets cannot be opened here",
                hint=f"copy {FILE} from another manager of this cluster, mode 0600",
            ) from None
        try:
            key = base64.b64decode(text.removeprefix(_HEAD).strip(), validate=True)
        except ValueError:
            key = b""
        if not text.startswith(_HEAD) or len(key) != _KEY_BYTES:
            raise OperationFailed(
                f"{self._path} holds no key for secrets",
                hint=f"copy {FILE} from another manager of this cluster",
            )
        return key


def _shown(about: str) -> str:
    """What people are told of it: the first line."""
    return about.partition("\n")[0]


def about_secret(secret_id: str) -> str:
    """What a secret is about that was handed in and not yet used."""
    return f"the secret {secret_id}"
