"""``godwit network``: networks that VMs plug into."""

from __future__ import annotations

from godwit.cli.act import action_command
from godwit.cli.look import list_command, noun_group, show_command

network = noun_group("network", "Networks that VMs plug into.")
network.add_command(action_command("network.create"))
network.add_command(list_command("network", "All networks."))
network.add_command(show_command("network", "One network."))
network.add_command(action_command("network.delete"))
