"""``godwit event``: what happens in the cluster, as it happens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from godwit.cli.errors import one_line
from godwit.cli.look import looking, noun_group
from godwit.cli.session import Command, say

if TYPE_CHECKING:
    from godwit.model.event import Event

_MARKS = {"info": " ", "warning": "!", "error": "✗"}


def line(event: Event) -> str:
    """One event for a person."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{clock} {_MARKS[event.level]} {event.subject:<20} {one_line(event.message)}"


def _follow(since: str | None, subject: str | None) -> None:
    now = looking()
    with now.client() as client:
        for event in client.events(since=since, subject=subject):
            if now.json:
                say(event.model_dump_json())
            elif event.kind != "migration.progress":
                say(line(event))


event = noun_group("event", "What happens in the cluster.")
event.add_command(
    Command(
        "follow",
        params=[
            click.Option(
                ["--since"], metavar="ID", help="Begin after this position; 0: all known."
            ),
            click.Option(["--subject"], metavar="KIND/NAME", help="Only about this, like vm/web."),
        ],
        callback=_follow,
        help="Print events as they come, until Ctrl-C; -o json prints one object a line.",
    )
)
