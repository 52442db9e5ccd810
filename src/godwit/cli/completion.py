"""``godwit completion SHELL``: the script that teaches a shell our words."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from godwit.cli.session import Command, say

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_GODWIT_COMPLETE"


def script(shell: str) -> str:
    """The shell's completion script."""
    from godwit.cli.main import godwit

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"there is no completion for {shell}")
    # Not kind.source(): for bash that runs a bash to ask for its version.
    return ShellComplete.source(kind(godwit, {}, "godwit", VARIABLE)).strip() + "\n"


completion = Command(
    "completion",
    params=[click.Argument(["shell"], type=click.Choice(SHELLS))],
    callback=lambda shell: say(script(shell).rstrip("\n")),
    help='Print the completion script of a shell, for example: eval "$(godwit completion bash)".',
)
