"""``godwit host``: the machines that VMs run on."""

from __future__ import annotations

from godwit.cli.act import action_command
from godwit.cli.look import list_command, noun_group, show_command

host = noun_group("host", "The machines that VMs run on.")
host.add_command(list_command("host", "All hosts, with what they have free."))
host.add_command(show_command("host", "One host: facts, networks, volumes."))
host.add_command(action_command("host.confirm-down"))
host.add_command(action_command("host.drain"))
host.add_command(action_command("host.return"))
maintenance = noun_group("maintenance", "Empty a host so that it may be switched off, and back.")
for verb in ("enter", "exit"):
    maintenance.add_command(action_command(f"host.maintenance.{verb}"))
host.add_command(maintenance)
