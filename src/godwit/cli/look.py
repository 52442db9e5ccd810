"""The verbs that only look: ``list`` and ``show``, printed straight from the API's JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from godwit.cli.session import Command, Group, completer, say, say_json, session
from godwit.model.errors import InvalidRequest

Show = Callable[[dict[str, Any]], str]


def noun_group(noun: str, help_: str) -> Group:
    """An empty group of a noun's verbs."""
    return Group(noun, help=help_)


def list_command(noun: str, help_: str, *, filters: Sequence[click.Option] = ()) -> click.Command:
    """``NOUN list``; ``filters`` are options that the API's list takes under the same names."""

    def run(**only: str | None) -> None:
        from godwit.cli.tables import FIELDS, table

        now = looking()
        # A table needs a tenth of what the API could say; thousands of rows show the difference.
        fields = () if now.json else FIELDS.get(noun, ())
        with now.client() as client:
            try:
                rows = client.rows(f"{noun}s", fields=fields, **only)
            except InvalidRequest:
                if not fields:
                    raise
                # An older manager does not know all of these; it gives what it has.
                rows = client.rows(f"{noun}s", **only)
        if now.json:
            say_json(rows)
        else:
            say(table(noun, rows))

    return Command("list", params=list(filters), callback=run, help=help_)


def show_command(noun: str, help_: str, *, show: Show | None = None) -> click.Command:
    """``NOUN show NAME``."""

    def run(name: str) -> None:
        now = looking()
        with now.client() as client:
            row = client.row(f"{noun}s", name)
        if now.json:
            say_json(row)
        else:
            from godwit.cli.tables import sheet

            say((show or sheet)(row))

    what = "ID" if noun in ("migration", "task") else "NAME"
    argument = click.Argument(["name"], metavar=what, shell_complete=completer(noun))
    return Command("show", params=[argument], callback=run, help=help_)


def looking() -> Any:
    """The session of a command that changes nothing, so that there is nothing to script."""
    now = session()
    if now.script is not None or now.dry_run:
        path = click.get_current_context().command_path.partition(" ")[2]
        option = "--script" if now.script is not None else "--dry-run"
        raise InvalidRequest(
            f"{path} changes nothing, so {option} means nothing", hint="leave it out"
        )
    return now
