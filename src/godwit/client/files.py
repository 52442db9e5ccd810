"""Small files here whose content goes into a request."""

from __future__ import annotations

import sys
from pathlib import Path

from godwit.model.errors import InvalidRequest


def read_text(path: str) -> str:
    """A file's text; ``-`` is standard input. Errors: InvalidRequest."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text()
    except UnicodeDecodeError:
        reason = "it is no text"
    except OSError as error:
        reason = error.strerror or str(error)
    raise InvalidRequest(f"{path} cannot be read: {reason}", hint="check the path and its rights")


def read_secret(path: str) -> str:
    """The one line of a file, without its end. Errors: InvalidRequest, without what is there."""
    secret = read_text(path).removesuffix("\n").removesuffix("\r")
    if not secret or not secret.isprintable():
        raise InvalidRequest(
            f"{path} does not hold one line with a password",
            hint="write it there, and nothing else",
        )
    return secret
