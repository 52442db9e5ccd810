"""Run a program that speaks to a power device, with its secret on a way nobody else sees.

Only through ``godwit.host.run``. Command lines are readable by every user of a machine; an
environment by the same user alone; standard input by nobody.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from godwit.host.errors import ProgramMissing
from godwit.host.run import run_async
from godwit.power.errors import PowerFailed

# Daemons are often started without the directories of administrators' programs.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


async def call(
    argv: Sequence[str],
    *,
    deadline_s: float,
    package: str,
    env: dict[str, str] | None = None,
    stdin: str | None = None,
) -> str:
    """What a program printed. Errors: PowerFailed when it is not installed (``package`` brings it);
    ProgramFailed and ProgramTimedOut as they are, for only the caller knows what they mean."""
    path = f"{os.environ.get('PATH', '')}:{_PATH}"
    found = shutil.which(argv[0], path=path)
    if found is None:
        raise PowerFailed(
            f"{argv[0]} is not installed here", hint=f"on every manager: apt install {package}"
        )
    try:
        out = await run_async(
            [found, *argv[1:]],
            timeout=deadline_s,
            input=None if stdin is None else stdin.encode(),
            env={"PATH": path, "LANG": "C.UTF-8", **(env or {})},
        )
    except ProgramMissing as error:  # it went between the look and the start
        raise PowerFailed(error.message, hint=error.hint) from None
    return out.decode(errors="replace")
