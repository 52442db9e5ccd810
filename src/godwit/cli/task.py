"""``godwit task``: pieces of work that somebody asked for."""

from __future__ import annotations

import click

from godwit.cli.act import action_command, follow
from godwit.cli.look import list_command, looking, noun_group, show_command
from godwit.cli.session import Command, completer


def _wait(name: str) -> int:
    now = looking()
    with now.client() as client:
        return follow(client, client.tasks.get(name), now)


task = noun_group("task", "Pieces of work that somebody asked for.")
task.add_command(list_command("task", "All tasks: who asked for what, and how it went."))
task.add_command(show_command("task", "One task, with its request and its result."))
task.add_command(
    Command(
        "wait",
        params=[click.Argument(["name"], metavar="ID", shell_complete=completer("task"))],
        callback=_wait,
        help="Wait until a task is over; ends as the task ended.",
    )
)
task.add_command(action_command("task.cancel"))
