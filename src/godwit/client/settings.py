"""Which cluster is meant, and with which token: arguments, environment, contexts file.

In this order: an explicit context, an explicit URL, ``GODWIT_CONTEXT``, ``GODWIT_URL``, the
file's current context. A context's token goes only to that context's own URL; for any other
address ``GODWIT_TOKEN_FILE`` and ``GODWIT_CA_FILE`` count, so that no token reaches a stranger.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.model.errors import InvalidRequest, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The addresses of a cluster's API, one for each manager, and the files that open them."""

    url: str
    others: tuple[str, ...] = ()
    token_file: Path | None = None
    ca_file: Path | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """Every address; any manager does."""
        return (self.url, *self.others)

    def token(self) -> str | None:
        """The bearer token, read anew; InvalidRequest when its file cannot be used."""
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not plain text"
            raise InvalidRequest(
                f"the token file {self.token_file} cannot be read: {reason}",
                hint="set GODWIT_TOKEN_FILE to a file with the cluster's token",
            ) from None
        if not token or any(character.isspace() for character in token):
            raise InvalidRequest(
                f"the token file {self.token_file} holds no token",
                hint="put the cluster's token there, on one line",
            )
        return token


def contexts_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where contexts are kept: ``${XDG_CONFIG_HOME:-~/.config}/godwit/contexts.toml``."""
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "godwit" / "contexts.toml"


def resolve(
    *,
    url: str | None = None,
    context: str | None = None,
    token_file: Path | None = None,
    ca_file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Target:
    """The cluster that is meant; ``url`` may be several, with commas between.

    Errors: InvalidRequest, NotFound (no such context).
    """
    if context is None and url is None:
        context = environ.get("GODWIT_CONTEXT") or None
    if url is None and context is None:
        url = environ.get("GODWIT_URL") or None
    chosen = None
    if context is not None or url is None:
        chosen = _context(context, contexts_file(environ))
    elif token_file is None and not environ.get("GODWIT_TOKEN_FILE"):
        chosen = _context_of(url, contexts_file(environ))
    urls = _split(url)
    if chosen is not None and (not urls or set(urls) <= set(chosen.urls)):
        token_file, ca_file = token_file or chosen.token_file, ca_file or chosen.ca_file
        urls = urls or chosen.urls
    else:
        token_file = token_file or _path(environ.get("GODWIT_TOKEN_FILE"))
        ca_file = ca_file or _path(environ.get("GODWIT_CA_FILE"))
    for one in urls or ("",):
        if not one.startswith(("https://", "http://", "unix://")):
            raise InvalidRequest(
                f"{one!r} is not the address of a cluster", hint="write it like https://host1:8443"
            )
    return Target(url=urls[0], others=urls[1:], token_file=token_file, ca_file=ca_file)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(one.strip().rstrip("/") for one in (text or "").split(",") if one.strip())


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None


def _context(name: str | None, file: Path) -> Target:
    data = _load(file)
    contexts = data.get("contexts", {})
    wanted = name if name is not None else data.get("current")
    if wanted is None:
        raise InvalidRequest(
            "no cluster is chosen", hint="run 'godwit lab up', or set GODWIT_URL or --url"
        )
    if wanted not in contexts:
        known = ", ".join(sorted(contexts)) or "none"
        raise NotFound(f"there is no context named {wanted}", hint=f"known in {file}: {known}")
    return _target(contexts[wanted])


def _context_of(url: str, file: Path) -> Target | None:
    found = (_target(entry) for entry in _load(file).get("contexts", {}).values())
    return next((target for target in found if set(_split(url)) <= set(target.urls)), None)


def _target(entry: Mapping[str, Any]) -> Target:
    urls = _split(str(entry.get("url", ""))) or ("",)
    return Target(
        url=urls[0],
        others=urls[1:],
        token_file=_path(entry.get("token_file")),
        ca_file=_path(entry.get("ca_file")),
    )


def _load(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"the contexts file {file} cannot be read: {error}", hint="correct or remove it"
        ) from None


def save_context(name: str, target: Target, *, file: Path | None = None) -> Path:
    """Write (or replace) a context and make it the current one; the file is 0600."""
    file = file or contexts_file()
    data = _load(file)
    entry = {
        "url": ",".join(target.urls),
        "token_file": target.token_file,
        "ca_file": target.ca_file,
    }
    texts = {key: str(value) for key, value in entry.items() if value is not None}
    contexts = {**data.get("contexts", {}), name: texts}
    _write(file, name, contexts)
    return file


def forget_context(name: str, *, file: Path | None = None) -> None:
    """Remove a context; when it was the current one, another (or none) becomes current."""
    file = file or contexts_file()
    data = _load(file)
    contexts = {key: value for key, value in data.get("contexts", {}).items() if key != name}
    current = data.get("current")
    if current not in contexts:
        current = next(iter(sorted(contexts)), None)
    if contexts:
        _write(file, current, contexts)
    else:
        file.unlink(missing_ok=True)


def _write(file: Path, current: str | None, contexts: Mapping[str, Mapping[str, str]]) -> None:
    lines = [f"current = {_quoted(current)}"] if current else []
    for name in sorted(contexts):
        lines += ["", f"[contexts.{_quoted(name)}]"]
        lines += [f"{key} = {_quoted(value)}" for key, value in contexts[name].items()]
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".contexts.")  # is 0600
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")
    Path(temporary).replace(file)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
