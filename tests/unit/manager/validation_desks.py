"""Agents' desks whose measuring is real, for a manager's validation; and how one is asked for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.agent.peering import Peers
from godwit.host.clock import RealClock
from godwit.host.config import AgentConfig
from godwit.host.ifctl import LinkControl
from godwit.model.validation import ValidationReport

SUBNET = "127.0.0.0/8"


class Clock(RealClock):
    """The real one, that may be off."""

    off_s = 0.0

    def realtime(self) -> float:
        return super().realtime() + self.off_s


@dataclass
class Guard:
    connected: bool = True


@dataclass
class Desk:
    """As much of an agent's desk as a validation looks at; the measuring on it is real."""

    host: str
    root: Path
    identity: Any
    info: Any
    clock: Clock = field(default_factory=Clock)
    guard: Guard = field(default_factory=Guard)
    moving: set[str] = field(default_factory=set)
    networks: dict[str, Any] = field(default_factory=dict)
    migration: dict[str, str] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.links = LinkControl()
        self.peers = Peers(self.identity)

    @property
    def config(self) -> AgentConfig:
        return AgentConfig.parse(
            {
                "host": self.host,
                "paths": {"volumes": str(self.root)},
                "migration": {"address": "127.0.0.1", "subnet": SUBNET} | self.migration,
            }
        )

    async def host_info(self) -> Any:
        return self.info

    def background(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def clock_route(desk: Desk) -> Any:
    from godwit.agent.routes import route

    async def clock(_request: Any) -> dict[str, float]:
        return {"realtime": desk.clock.realtime()}

    return route("/v1/clock", "GET", clock, roles=("host", "manager"))


async def validated(api: Any, **body: Any) -> tuple[dict[str, Any], ValidationReport]:
    task = await api.act("POST", "/v1/cluster/actions/validate", body, wait=60)
    assert task["state"] == "completed", task
    report = ValidationReport.model_validate(await api.api.get("/v1/cluster/validation"))
    assert report.task == task["id"]
    return task, report


def results(report: ValidationReport, *names: str) -> list[str]:
    return [check.result for check in report.checks if check.name in names]
