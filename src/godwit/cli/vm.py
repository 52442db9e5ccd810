"""``godwit vm``: virtual machines."""

from __future__ import annotations

from urllib.parse import quote

import click

from godwit.cli.act import action_command
from godwit.cli.look import list_command, looking, noun_group, show_command
from godwit.cli.session import Command, completer, say, say_json


def _console(name: str, linger: str) -> int:
    from godwit.cli.console import attach
    from godwit.model.spelling import read

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


def _list_checkpoints(name: str) -> None:
    now = looking()
    with now.client() as client:
        rows = client.rows(f"vms/{quote(name, safe='')}/checkpoints")
    if now.json:
        say_json(rows)
    else:
        from godwit.cli.tables import table

        say(table("checkpoint", rows))


def _show_checkpoint(name: str, checkpoint: str) -> None:
    now = looking()
    with now.client() as client:
        row = client.row(f"vms/{quote(name, safe='')}/checkpoints", checkpoint)
    if now.json:
        say_json(row)
    else:
        from godwit.cli.tables import sheet

        say(sheet(row))


vm = noun_group("vm", "Virtual machines.")
vm.add_command(action_command("vm.create"))
vm.add_command(
    list_command(
        "vm",
        "All VMs: their state and where they run.",
        filters=[
            click.Option(
                ["--host"],
                metavar="HOST",
                shell_complete=completer("host"),
                help="Only those on this host.",
            ),
            click.Option(["--state"], metavar="STATE", help="Only those in this state."),
        ],
    )
)
vm.add_command(show_command("vm", "One VM: disks, network cards, state."))
vm.add_command(action_command("vm.set"))
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
_NAME = click.Argument(["name"], metavar="NAME", shell_complete=completer("vm"))
checkpoint = noun_group("checkpoint", "What a VM's disks held at an instant.")
for verb in ("create", "revert", "delete"):
    checkpoint.add_command(action_command(f"vm.checkpoint.{verb}"))
checkpoint.add_command(
    Command("list", params=[_NAME], callback=_list_checkpoints, help="A VM's checkpoints.")
)
checkpoint.add_command(
    Command(
        "show",
        params=[_NAME, click.Argument(["checkpoint"], metavar="CHECKPOINT")],
        callback=_show_checkpoint,
        help="One checkpoint: when it was made, and of which disks.",
    )
)
vm.add_command(checkpoint)
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
