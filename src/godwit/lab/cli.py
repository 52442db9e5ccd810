"""``godwit lab``: a whole cluster on this machine, to try and to test."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from godwit.cli.session import Command, Group, note, say, say_json, session
from godwit.lab.layout import DEFAULT_NAME, StorageKind, StoreKind
from godwit.model.errors import InvalidRequest


def name_option() -> click.Option:
    """``--name LAB``."""
    return click.Option(
        ["--name"], default=DEFAULT_NAME, envvar="GODWIT_LAB", metavar="LAB", help="Which lab."
    )


def plain(*, dry_run: bool = False) -> Any:
    """The session; the options that mean nothing here are refused."""
    now = session()
    if now.script is not None or (now.dry_run and not dry_run):
        option = "--script" if now.script is not None else "--dry-run"
        raise InvalidRequest(f"{option} means nothing for lab commands", hint="leave it out")
    return now


lab = Group("lab", help="A whole cluster on this machine, to try and to test.")


# up and down


def _up(
    name: str,
    hosts: int,
    store: StoreKind,
    managers: int,
    storage: StorageKind | None,
    migration_rate: str,
    retain: bool,
    volume: tuple[str, ...],
    volume_size: str | None,
    own_volume: tuple[str, ...],
    image_locks: bool,
    agent_source: Path | None,
) -> None:
    from godwit.lab import up
    from godwit.lab.options import with_defaults
    from godwit.model.units import parse_size

    now = plain(dry_run=True)
    options = with_defaults(
        name,
        hosts,
        rate=_rate(migration_rate),
        store=store,
        managers=managers,
        retain=retain,
        storage=storage,
        volumes=volume,
        volume_bytes=parse_size(volume_size) if volume_size else 0,
        own_volumes=own_volume,
        image_locks=image_locks,
        agent_source=agent_source,
    )
    if now.dry_run:
        up.check(options)
        for action in up.actions(options):
            say(action.doing)
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupted)
    up.up(options, say=note)
    if now.json:
        from godwit.lab.handle import Lab

        say_json(Lab.load(name).status())
        return
    for line in next_commands(name, options.layout.host_names):
        say(line)


def _rate(text: str) -> str:
    from godwit.host.config import parse_rate

    if text in ("none", "0"):
        return ""
    try:
        parse_rate(text)
    except Exception as error:
        raise InvalidRequest(
            f"--migration-rate: {error}", hint="write it like 1gbit, or none for no limit"
        ) from None
    return text


def _interrupted(_number: int, _frame: object) -> None:
    # What was made is being taken away: a second time is not needed, and would leave things.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def next_commands(name: str, hosts: tuple[str, ...]) -> tuple[str, ...]:
    """What one would type next, printed at the end of ``lab up``."""
    move = [f"  godwit vm migrate web --to {hosts[1]}"] if len(hosts) > 1 else []
    mine = "" if name == DEFAULT_NAME else f" --name {name}"
    append = '--append "godwit.ip=10.91.0.100/22"'
    return (
        f"lab {name} is up. Next:",
        "  godwit host list",
        f"  godwit vm create web --memory 256M --image demo --network lan {append}",
        f"  godwit vm start web --host {hosts[0]}",
        f"  godwit lab exec{mine} client -- busybox ping -c 3 10.91.0.100",
        *move,
        f"  godwit lab down{mine}",
    )


lab.add_command(
    Command(
        "up",
        params=[
            click.Option(
                ["--hosts"], type=int, default=3, show_default=True, help="How many hosts."
            ),
            name_option(),
            click.Option(
                ["--store"],
                type=click.Choice(["sqlite", "etcd"]),
                default="sqlite",
                show_default=True,
                help="What keeps the records: the embedded store, or etcd on the first hosts.",
            ),
            click.Option(
                ["--managers"],
                type=int,
                default=0,
                show_default=True,
                metavar="N",
                help="A manager on each of the first N hosts; 0: one, beside the hosts.",
            ),
            click.Option(
                ["--storage"],
                type=click.Choice(["dir", "nfs", "iscsi"]),
                help="What serves the volumes over the storage network (nfs), or dir: nothing "
                "does, they are directories of this machine.",
            ),
            click.Option(
                ["--migration-rate"],
                default="1gbit",
                show_default=True,
                help="Speed of the migration network, both ways; none for no limit.",
            ),
            click.Option(
                ["--volume"],
                multiple=True,
                metavar="NAME",
                help="One more directory that all hosts share. May be repeated.",
            ),
            click.Option(
                ["--volume-size"],
                metavar="SIZE",
                help="Give the volume shared a file system of its own, which can be filled.",
            ),
            click.Option(
                ["--own-volume"],
                multiple=True,
                metavar="NAME",
                help="A directory of which each host has its own. May be repeated.",
            ),
            click.Option(
                ["--image-locks/--no-image-locks"],
                default=True,
                help="Whether hosts let QEMU lock its images; without, ownership and gates stand "
                "alone.",
            ),
            click.Option(["--retain"], is_flag=True, help="Keep what was made when it fails."),
            # For tests: the hosts' agents and guards are of another version of Godwit.
            click.Option(["--agent-source"], type=click.Path(path_type=Path), hidden=True),
        ],
        callback=_up,
        help="Raise a lab and make it the current cluster.",
    )
)


def _down(name: str, keep_logs: bool) -> None:
    from godwit.lab.down import down
    from godwit.lab.layout import checked_name

    plain()
    found = down(checked_name(name), keep_logs=keep_logs, say=lambda line: note(f"✓ {line}"))
    note(f"lab {name} is gone" if found else f"nothing of a lab {name} is here")


lab.add_command(
    Command(
        "down",
        params=[
            name_option(),
            click.Option(["--keep-logs"], is_flag=True, help="Keep the logs of its daemons."),
        ],
        callback=_down,
        help="Take a lab away, whatever state it is in.",
    )
)


# Looking


def _status(name: str) -> None:
    from godwit.lab.handle import Lab

    now = plain()
    view = Lab.load(name).status()
    if now.json:
        say_json(view)
    else:
        say(status_text(view))


def status_text(view: dict[str, Any]) -> str:
    """The status for people."""
    limit = view["migration_rate"] or "unlimited"
    lines = [
        f"lab {view['name']}, store {view['store']}, migration network {limit}",
        f"API  {' '.join(view['manager_urls'])}   token {view['token_file']}",
    ]
    if view["store_members"]:
        states = ", ".join(f"{row['node']} {row['state']}" for row in view["store_members"])
        lines += [f"etcd {states}", f"     {view['quorum']}"]
    for net in view["networks"]:
        lines.append(f"network {net['name']}  {net['subnet']}, client {net['client_address']}")
    for node in (view["control"], *filter(None, (view.get("storage_node"),)), *view["hosts"]):
        units = ", ".join(f"{unit} {seen['state']}" for unit, seen in node["units"].items())
        cut = [f"{net} {state}" for net, state in node["networks"].items() if state != "up"]
        words = [f"{node['name']:8} {node['state']:3} ", units]
        words += [f"  networks: {', '.join(cut)}"] if cut else []
        lines.append(" ".join(words).rstrip())
    return "\n".join(lines)


lab.add_command(
    Command("status", params=[name_option()], callback=_status, help="What the lab consists of.")
)


def _logs(name: str, where: str | None, unit: str | None, lines: int, follow: bool) -> None:
    from godwit.lab.handle import Lab
    from godwit.lab.logs import files, follow_files, tail

    plain()
    chosen = files(Lab.load(name), where, unit)
    for path in chosen:
        if len(chosen) > 1:
            say(f"==> {path.parent.name} {path.stem} <==")
        for line in tail(path, lines):
            say(line)
    if follow:
        follow_files(chosen, say)


lab.add_command(
    Command(
        "logs",
        params=[
            click.Argument(["where"], required=False),
            click.Argument(["unit"], required=False),
            name_option(),
            click.Option(["-n", "--lines"], type=int, default=20, help="How many of the last."),
            click.Option(["-f", "--follow"], is_flag=True, help="Go on with what comes."),
        ],
        callback=_logs,
        help="Logs of the daemons: of all, of a node, of one.",
    )
)


# Running things


def _exec(name: str, where: str, command: tuple[str, ...]) -> int:
    from godwit.host.errors import ProgramMissing
    from godwit.lab.handle import Lab, place

    plain()
    argv = command[1:] if command[:1] == ("--",) else command
    if not argv:
        raise InvalidRequest("no command is given", hint=f"godwit lab exec {where} -- CMD ...")
    chosen = Lab.load(name)
    sys.stdout.flush()
    try:
        return chosen.run_attached(place(chosen.layout, where), argv)
    except ProgramMissing:
        return 127


lab.add_command(
    Command(
        "exec",
        params=[
            name_option(),
            click.Argument(["where"]),
            click.Argument(["command"], nargs=-1, type=click.UNPROCESSED, metavar="-- CMD..."),
        ],
        callback=_exec,
        help="Run a command on a host (host1, ...), on control, client or switch.",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )
)


def _probe(
    name: str, address: str, seconds: float | None, interval_ms: float, save: str | None
) -> int:
    from godwit.lab import probe
    from godwit.lab.handle import Lab
    from godwit.lab.layout import CLIENT

    plain()
    words = [address, "--netns", Lab.load(name).layout.netns(CLIENT)]
    words += ["--interval-ms", f"{interval_ms:g}"]
    words += ["--seconds", f"{seconds:g}"] if seconds is not None else []
    words += ["--save", save] if save else []
    return probe.main(words)


lab.add_command(
    Command(
        "probe",
        params=[
            name_option(),
            click.Argument(["address"]),
            click.Option(["--seconds"], type=float, help="How long; until Ctrl-C without."),
            click.Option(["--interval-ms"], type=float, default=1.0, show_default=True),
            click.Option(["--save"], type=click.Path(), help="File for every send and arrival."),
        ],
        callback=_probe,
        hidden=True,
        help="From the client, ask a VM's UDP echo at every tick; how long was it silent?",
    )
)


def _add_fault() -> None:
    from godwit.lab.cli_fault import fault

    lab.add_command(fault)


_add_fault()
