"""``godwit vm``: virtual machines."""

from __future__ import annotations

from urllib.parse import quote

import click

from godwit.cli.act import action_command
from godwit.cli.look import list_command, looking, noun_group, show_command
from godwit.cli.session import Command, completer, say, say_json


def _console(name: str, linger: str) -> int:
    from godwit.cli.console import attach
    from godwit.model.words import read

    now = looking()
    return attach(name, url=now.url, context=now.context, linger_s=read("seconds", linger))


def _list_disks(name: str) -> None:
    now = looking()
    with now.client() as client:
        rows = client.rows(f"vms/{quote(name, safe='')}/disks")
    if now.json:
        say_json(rows)
    else:
        from godwit.cli.tables import table

        say(table("disk", rows))


vm = noun_group("vm", "Virtual machines.")
vm.add_command(action_command("vm.create"))
vm.add_command(list_command("vm", "All VMs: their state and where they run."))
vm.add_command(show_command("vm", "One VM: disks, network cards, state."))
for verb in ("start", "stop", "pause", "resume", "save", "restore", "migrate", "clone", "delete"):
    vm.add_command(action_command(f"vm.{verb}"))
disk = noun_group("disk", "A VM's disks.")
for verb in ("add", "remove", "resize", "move", "export"):
    disk.add_command(action_command(f"vm.disk.{verb}"))
disk.add_command(
    Command(
        "list",
        params=[click.Argument(["name"], metavar="NAME", shell_complete=completer("vm"))],
        callback=_list_disks,
        help="A VM's disks: where they lie and how they are reached.",
    )
)
vm.add_command(disk)
vm.add_command(
    Command(
        "console",
        params=[
            click.Argument(["name"], metavar="NAME", shell_complete=completer("vm")),
            click.Option(
                ["--linger"],
                metavar="TIME",
                default="1s",
                show_default=True,
                help="When the input is no terminal: stay until the VM is silent for so long.",
            ),
        ],
        callback=_console,
        help="Attach to the serial port; Ctrl-] leaves.",
    )
)
