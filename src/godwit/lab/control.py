"""Talks to the supervisor of a lab node: one line of JSON there, one back."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from godwit.model.errors import OperationFailed, Unavailable

_ANSWER_S = 5.0


def ask(path: Path, op: str, **more: Any) -> dict[str, Any]:
    """The answer to one question, errors included; waits ``timeout`` seconds longer if given.

    Unavailable when nobody is there (the node is off) or it does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(_ANSWER_S + float(more.get("timeout", 30.0 if op != "status" else 0.0)))
        try:
            channel.connect(os.fsencode(path))
            channel.sendall(json.dumps({"op": op, **more}).encode() + b"\n")
            text = b""
            while not text.endswith(b"\n"):
                chunk = channel.recv(65536)
                if not chunk:
                    raise ConnectionResetError("the connection was closed")
                text += chunk
        except OSError as error:
            raise Unavailable(
                f"the supervisor of {path.stem} does not answer: {error.strerror or error}",
                hint=f"if it is off: godwit lab fault power-on {path.stem}",
            ) from error
    answer: dict[str, Any] = json.loads(text)
    return answer


def tell(path: Path, op: str, **more: Any) -> dict[str, Any]:
    """Like :func:`ask`; what the supervisor refuses or could not do is raised."""
    answer = ask(path, op, **more)
    if "error" in answer:
        raise OperationFailed(
            f"{path.stem}: {answer['error']}", hint=f"look with: godwit lab logs {path.stem}"
        )
    return answer
