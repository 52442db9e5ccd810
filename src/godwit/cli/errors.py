"""How a command ends that did not succeed: two lines on standard error, and an exit code.

The first line says what failed, the second what to do. Nothing else is printed.
"""

from __future__ import annotations

import click

from godwit.model.errors import GodwitError, InvalidRequest

INTERRUPTED = 130  # by a person's Ctrl-C, as shells count it


def tell(error: GodwitError) -> int:
    """Print the two lines of an error; its exit code."""
    click.echo(f"error: {one_line(error.message)}", err=True)
    click.echo(f"hint: {one_line(error.hint) or 'see: godwit --help'}", err=True)
    return error.exit_code


def from_click(error: click.ClickException) -> GodwitError:
    """What click found wrong with the words, in our form."""
    message = one_line(error.format_message()).rstrip(".")
    message = message[:1].lower() + message[1:]
    path = "godwit"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        path = error.ctx.command_path
    return InvalidRequest(message, hint=f"run: {path} --help")


def one_line(text: str) -> str:
    """Printable text on one line: what a server says must not move a terminal's cursor."""
    words = " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in words)
