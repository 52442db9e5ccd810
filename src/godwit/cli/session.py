"""What one command line has said: which cluster, which output, how to carry it out.

The common options may stand before the noun, between noun and verb, or after the verb; the last
one counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from godwit.client.sync import Client
    from godwit.model.render import Form

NAME = "cli/0.1"
_LONG_LIST = 500  # from here on indenting takes longer than fetching
HELP_OPTIONS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@dataclass(slots=True)
class Session:
    """The common options of one command line."""

    url: str | None = None
    context: str | None = None
    output: str = "table"
    script: Form | None = None
    dry_run: bool = False
    no_wait: bool = False

    @property
    def json(self) -> bool:
        """Exactly one JSON document goes to standard output."""
        return self.output == "json"

    def client(self) -> Client:
        """The cluster that is meant; not connected yet."""
        from godwit.client.sync import Client

        return Client(self.url, context=self.context, name=NAME)


def session() -> Session:
    """The session of the command that runs."""
    return click.get_current_context().find_root().ensure_object(Session)


def say(text: str) -> None:
    """Print to standard output."""
    click.echo(text)


def say_json(value: Any) -> None:
    """Print one JSON document to standard output; a long list has a line for each object."""
    if isinstance(value, list) and len(value) > _LONG_LIST:
        rows = (json.dumps(row, ensure_ascii=False) for row in value)
        click.echo("[\n" + ",\n".join(rows) + "\n]")
    else:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Print for a person, beside the result: to standard error."""
    click.echo(text, err=True)


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None and value is not False and not ctx.resilient_parsing:
        setattr(ctx.find_root().ensure_object(Session), str(param.name), value)


def common_options() -> list[click.Parameter]:
    """The options that every command takes."""

    def option(*words: str, **more: Any) -> click.Option:
        return click.Option(words, expose_value=False, callback=_keep, **more)

    return [
        option("--url", metavar="URL", help="The cluster's address (or GODWIT_URL)."),
        option("--context", metavar="NAME", help="The cluster's name in the contexts file."),
        option("-o", "--output", type=click.Choice(["table", "json"]), help="How to print."),
        option(
            "--script",
            type=click.Choice(["cli", "curl", "python", "ansible"]),
            help="Print the action as a script instead of doing it.",
        ),
        option("--dry-run", is_flag=True, help="Show the plan; change nothing."),
        option("--no-wait", is_flag=True, help="Print the task's id at once."),
    ]


class Command(click.Command):
    """A verb, with the common options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["params"] = [*(kwargs.get("params") or []), *common_options()]
        kwargs.setdefault("context_settings", HELP_OPTIONS)
        super().__init__(*args, **kwargs)


class Group(click.Group):
    """A noun, with the common options."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["params"] = [*(kwargs.get("params") or []), *common_options()]
        kwargs.setdefault("context_settings", HELP_OPTIONS)
        super().__init__(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order they were written, which is the order of use."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A wrong verb is told with those there are."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(
                f"there is no command '{ctx.command_path} {args[0]}'; there are: {known}", ctx
            ) from error


Completer = Callable[[click.Context, click.Parameter, str], Sequence[str]]


def completer(noun: str) -> Completer:
    """Shell completion with the names of a noun's objects; silent when there is no answer."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Sequence[str]:
        from godwit.cli.complete import names

        said = ctx.find_root().ensure_object(Session)
        found = names(noun, url=said.url, context=said.context)
        return [name for name in found if name.startswith(incomplete)]

    return complete
