"""``godwit host``: the machines that VMs run on."""

from __future__ import annotations

from urllib.parse import quote

import click

from godwit.cli.act import action_command
from godwit.cli.look import list_command, looking, noun_group, show_command
from godwit.cli.session import Command, completer, say, say_json


def _show_power(name: str) -> None:
    now = looking()
    with now.client() as client:
        row = client.row(f"hosts/{quote(name, safe='')}", "power")
    if now.json:
        say_json(row)
    else:
        from godwit.cli.tables import sheet

        say(sheet(row))


host = noun_group("host", "The machines that VMs run on.")
host.add_command(list_command("host", "All hosts, with what they have free."))
host.add_command(show_command("host", "One host: facts, networks, volumes."))
host.add_command(action_command("host.confirm-down"))
power = noun_group("power", "What switches a host's power: Redfish, IPMI, a fence agent.")
power.add_command(action_command("host.power.set"))
power.add_command(
    Command(
        "show",
        params=[click.Argument(["name"], metavar="NAME", shell_complete=completer("host"))],
        callback=_show_power,
        help="How a host's power is switched; never the password.",
    )
)
for verb in ("remove", "test", "on", "off", "reset"):
    power.add_command(action_command(f"host.power.{verb}"))
host.add_command(power)
host.add_command(action_command("host.drain"))
host.add_command(action_command("host.return"))
maintenance = noun_group("maintenance", "Empty a host so that it may be switched off, and back.")
for verb in ("enter", "exit"):
    maintenance.add_command(action_command(f"host.maintenance.{verb}"))
host.add_command(maintenance)
