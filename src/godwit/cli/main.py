"""The program ``godwit``: finds the noun, runs the verb, turns errors into two lines and a code."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click
from click.shell_completion import CompletionItem

from godwit.cli.errors import INTERRUPTED, from_click, tell
from godwit.cli.session import Group
from godwit.model.errors import GodwitError

# noun -> (module, its one line). Read without importing: help and completion stay quick.
NOUNS: dict[str, tuple[str, str]] = {
    "lab": ("godwit.lab.cli", "A whole cluster on this machine, to try and to test."),
    "cluster": (
        "godwit.cli.cluster",
        "The cluster as a whole: form it, join it, update it.",
    ),
    "host": ("godwit.cli.host", "The machines that VMs run on."),
    "vm": ("godwit.cli.vm", "Virtual machines: create, start, move, ..."),
    "network": ("godwit.cli.network", "Networks that VMs plug into."),
    "volume": ("godwit.cli.volume", "Places that hold disks."),
    "migration": ("godwit.cli.migration", "Moves of VMs, under way and past."),
    "task": ("godwit.cli.task", "Pieces of work that somebody asked for."),
    "event": ("godwit.cli.event", "What happens in the cluster."),
    "completion": ("godwit.cli.completion", "Shell completion for bash, zsh and fish."),
}
OPTIONAL = {"lab"}
ENTRY_POINTS = "godwit.cli"  # other packages bring nouns: name = module:click command


class Nouns(Group):
    """The root group: its nouns are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The nouns that are installed; those of other packages are found when named."""
        return [noun for noun in NOUNS if noun not in OPTIONAL or _installed(NOUNS[noun][0])]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The noun's group, imported now."""
        if cmd_name in self.list_commands(ctx):
            command: click.Command = getattr(import_module(NOUNS[cmd_name][0]), cmd_name)
            return command
        return _brought(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The nouns with their lines, from the table."""
        with formatter.section("Nouns"):
            formatter.write_dl([(noun, NOUNS[noun][1]) for noun in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[Any]]:
        """The nouns, from the table."""
        found = [
            CompletionItem(noun, help=NOUNS[noun][1])
            for noun in self.list_commands(ctx)
            if noun.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _brought(noun: str) -> click.Command | None:
    # Costs 25 ms and more: only for a noun that is not our own.
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS, name=noun):
        command = point.load()
        if isinstance(command, click.Command):
            return command
    return None


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"godwit {version('godwit')}")
        ctx.exit()


godwit = Nouns(
    "godwit",
    help="Virtual machines that move between hosts and never stop.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 refused, 5 cancelled, "
    "6 outcome unknown.",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_version,
            help="Show the version and exit.",
        )
    ],
)


def run(arguments: list[str]) -> int:
    """Carry out one command line; the exit code."""
    try:
        code = godwit.main(args=arguments, prog_name="godwit", standalone_mode=False)
        sys.stdout.flush()
    except GodwitError as error:
        return tell(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return tell(from_click(error))
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as with "| head": no fault, nobody to tell.
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115, PTH123
        return 1
    return code if isinstance(code, int) else 0


def main() -> None:
    """The entry point of the ``godwit`` program."""
    # Imports make many objects and no garbage: collecting among them takes a sixth of a command.
    gc.set_threshold(100_000)
    code = run(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # taking the interpreter apart costs tens of milliseconds and gains nothing
