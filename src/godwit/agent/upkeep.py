"""Commands that an administrator of this host has allowed, run as root once and noted durably.

Nothing is allowed by default: whoever may use the manager's API would else be root on every host.
A command is a list of words that stands in this host's own configuration, whole and as it is; no
shell reads it. A run has an id: asked again it is not run again but answered as it ended. A run
that this agent did not see to its end is told as interrupted, never as done.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from godwit.agent.routes import Body, body_of, route
from godwit.host.config import AgentConfig
from godwit.host.errors import ProgramFailed, ProgramMissing, ProgramTimedOut
from godwit.host.files import load_json, save_json
from godwit.host.run import run_async
from godwit.model.base import check_name
from godwit.model.errors import Conflict, InvalidRequest, NotAllowed
from godwit.wire.identity import MANAGER

_TAIL = 4096
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


class Upkeep:
    """The commands of this host; one runs at a time."""

    def __init__(self, config: AgentConfig) -> None:
        self._host = config.host
        self._note: Path = config.paths.state / "upkeep.json"
        self.allowed = tuple(tuple(shlex.split(text)) for text in config.maintenance.commands)
        self._running: dict[str, asyncio.Task[Body]] = {}

    async def run(self, run_id: str, argv: tuple[str, ...], *, timeout_s: float) -> Body:
        """Run a command, or answer how that run has ended.

        NotAllowed when the configuration does not list it; Conflict while another one runs.
        """
        check_name(run_id)
        if argv not in self.allowed:
            raise NotAllowed(
                f"{self._host} does not allow this command: {shlex.join(argv)}",
                hint="its administrator lists it in maintenance.commands of the host's "
                "configuration",
            )
        if run_id in self._running:
            return await asyncio.shield(self._running[run_id])
        if self._running:
            raise Conflict(f"{self._host} runs another command", hint="wait for its end")
        known = load_json(self._note)
        if isinstance(known, dict) and known.get("id") == run_id:
            return known if known.get("state") == "done" else {**known, "state": "interrupted"}
        task = asyncio.create_task(self._carry_out(run_id, argv, timeout_s), name=f"run {run_id}")
        self._running[run_id] = task
        task.add_done_callback(lambda _: self._running.pop(run_id, None))
        # Whoever asked may go away: the command is not ended in its middle.
        return await asyncio.shield(task)

    async def _carry_out(self, run_id: str, argv: tuple[str, ...], timeout_s: float) -> Body:
        note: dict[str, Any] = {"id": run_id, "argv": list(argv), "state": "running"}
        self._note.parent.mkdir(parents=True, exist_ok=True)
        save_json(self._note, note)
        try:
            out = await run_async(argv, timeout=timeout_s, env=_ENVIRONMENT, cwd="/")
            code, said = 0, out.decode(errors="replace")
        except ProgramFailed as error:
            code, said = error.returncode, error.stderr
        except ProgramMissing:
            code, said = 127, f"{argv[0]}: there is no such program on {self._host}"
        except ProgramTimedOut:
            code, said = 124, f"it took longer than {timeout_s:g} s and was ended"
        note |= {"state": "done", "exit": code, "output": said[-_TAIL:]}
        save_json(self._note, note)
        return note


def upkeep_routes(upkeep: Upkeep) -> list[Route]:
    """What may be run here, and running it."""

    async def listed(_request: Request) -> Body:
        return {"commands": [list(argv) for argv in upkeep.allowed], "user": os.geteuid()}

    async def run(request: Request) -> Body:
        body = await body_of(request)
        argv, timeout_s = body.get("argv"), body.get("timeout_s", 1800.0)
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
            raise InvalidRequest("argv is a list of words", hint="send argv and timeout_s")
        return await upkeep.run(request.path_params["id"], tuple(argv), timeout_s=float(timeout_s))

    return [
        route("/v1/upkeep", "GET", listed, roles=(MANAGER,)),
        route("/v1/upkeep/{id}", "POST", run, roles=(MANAGER,)),
    ]
