"""``godwit lab fault KIND WHERE ...``: break something in a lab, and mend it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from godwit.cli.session import Command, Group, say, say_json
from godwit.lab.layout import DEFAULT_NAME

if TYPE_CHECKING:
    from godwit.lab.handle import Lab

fault = Group("fault", help="Break something in a lab, and mend it.")

_PROCESS = click.Argument(["process"], metavar="PROCESS")
_WHERE = click.Argument(["where"], metavar="WHERE")
_HOLD = click.Option(["--hold"], is_flag=True, help="Its supervisor shall leave it like that.")
_ROLE = click.Option(
    ["--role"],
    type=click.Choice(["source", "destination", "disk"]),
    default="source",
    show_default=True,
    help="Which side of the move; disk: of a disk's.",
)


def _add(kind: str, act: Callable[..., Any], params: Sequence[click.Parameter], help_: str) -> None:
    def run(name: str, **words: Any) -> None:
        from godwit.lab.cli import plain
        from godwit.lab.handle import Lab

        now = plain()
        answer = act(Lab.load(name), **words)
        if now.json:
            say_json(answer)
        else:
            say(_told(kind, answer))

    option = click.Option(
        ["--name"], default=DEFAULT_NAME, envvar="GODWIT_LAB", metavar="LAB", help="Which lab."
    )
    fault.add_command(Command(kind, params=[*params, option], callback=run, help=help_))


def _told(kind: str, answer: dict[str, Any]) -> str:
    """One line for people."""
    if "armed" in answer:
        armed = ", ".join(f"{a['point']} ({a['role']})" for a in answer["armed"]) or "nothing"
        held = ", ".join(f"{h['vm']} at {h['point']} ({h['role']})" for h in answer["held"])
        return f"armed: {armed}; held: {held or 'nothing'}"
    words = [str(value) for key, value in answer.items() if key != "kind" and value is not None]
    return f"{kind}: {' '.join(words)}"


def _done(kind: str, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, **facts}


def _cut(lab: Lab, where: str, network: str, cable: bool) -> dict[str, Any]:
    from godwit.lab.fault import cut_network

    cut_network(lab, where, network, how="cable" if cable else "black-hole")
    return _done("cut-network", where=where, network=network)


def _restore(lab: Lab, where: str, network: str) -> dict[str, Any]:
    from godwit.lab.fault import restore_network

    restore_network(lab, where, network)
    return _done("restore-network", where=where, network=network)


def _kill(lab: Lab, where: str, process: str, hold: bool) -> dict[str, Any]:
    from godwit.lab.fault import kill_process

    target = kill_process(lab, where, process, hold=hold)
    return _done("kill", where=where, process=process, pid=target.pid)


def _freeze(lab: Lab, where: str, process: str, hold: bool) -> dict[str, Any]:
    from godwit.lab.fault import freeze_process

    target = freeze_process(lab, where, process, hold=hold)
    return _done("freeze", where=where, process=process, pid=target.pid)


def _thaw(lab: Lab, where: str, process: str) -> dict[str, Any]:
    from godwit.lab.fault import thaw_process

    thaw_process(lab, where, process)
    return _done("thaw", where=where, process=process)


def _restart(lab: Lab, where: str, process: str) -> dict[str, Any]:
    from godwit.lab.fault import restart_daemon

    view = restart_daemon(lab, where, process)
    what = "starts" if "starts" in view else "pid"
    return _done("restart", where=where, process=process, **{what: view[what]})


def _host_first(lab: Lab, one: str, other: str) -> tuple[str, str]:
    """Host and stage, whichever was said first."""
    if other in lab.layout.host_names and one not in lab.layout.host_names:
        one, other = other, one
    return lab.host(one), other


def _hold(lab: Lab, where: str, stage: str, role: str) -> dict[str, Any]:
    from godwit.lab.fault import hold

    host, point = _host_first(lab, where, stage)
    return hold(lab, point, host, role=role)


def _release(lab: Lab, where: str, stage: str | None) -> dict[str, Any]:
    from godwit.lab.fault import release

    return release(lab, lab.host(where), stage)


def _held(lab: Lab, where: str, wait: str | None, role: str, timeout: float) -> dict[str, Any]:
    from godwit.lab.fault import held

    return held(lab, lab.host(where), wait=wait, role=role, timeout=timeout)


def _power_off(lab: Lab, where: str) -> dict[str, Any]:
    from godwit.lab.fault import power_off

    power_off(lab, where)
    return _done("power-off", where=where)


def _power_on(lab: Lab, where: str, no_ready: bool) -> dict[str, Any]:
    from godwit.lab.fault import power_on

    power_on(lab, where, wait=not no_ready)
    return _done("power-on", where=where)


def _fill(lab: Lab, where: str, leave: str) -> dict[str, Any]:
    from godwit.lab.small_volume import fill
    from godwit.model.units import parse_size

    left = fill(lab, where, leave_bytes=parse_size(leave))
    return _done("fill-volume", volume=where, free_bytes=left)


def _free(lab: Lab, where: str) -> dict[str, Any]:
    from godwit.lab.small_volume import free

    return _done("free-volume", volume=where, free_bytes=free(lab, where))


def _grow(lab: Lab, where: str, size: str) -> dict[str, Any]:
    from godwit.lab.small_volume import grow
    from godwit.model.units import parse_size

    return _done("grow-volume", volume=where, free_bytes=grow(lab, where, parse_size(size)))


_NETWORK = click.Argument(["network"], metavar="NETWORK")
_CABLE = click.Option(["--cable"], is_flag=True, help="Pull the cable: the link goes down too.")
_add(
    "cut-network",
    _cut,
    [_WHERE, _NETWORK, _CABLE],
    "Cut a node from lan, mgmt, mig or stor: what it sends vanishes, its link stays up.",
)
_add(
    "restore-network",
    _restore,
    [_WHERE, _NETWORK],
    "Undo a cut of a network, or of all.",
)
_add(
    "kill",
    _kill,
    [_WHERE, _PROCESS, _HOLD],
    "SIGKILL agent, guard, bmc, etcd, manager, qemu:VM, broker:VM or lent:VM on a host, manager, "
    "store or etcd on control.",
)
_add(
    "freeze",
    _freeze,
    [_WHERE, _PROCESS, _HOLD],
    "SIGSTOP; without --hold a daemon's watchdog ends it after 2 seconds.",
)
_add("thaw", _thaw, [_WHERE, _PROCESS], "Undo freeze, or kill --hold.")
_add("restart", _restart, [_WHERE, _PROCESS], "Restart a daemon; waits until it is ready.")
_add(
    "hold",
    _hold,
    [_WHERE, click.Argument(["stage"], metavar="STAGE"), _ROLE],
    "Hold every move that comes to a stage on a host.",
)
_add(
    "release",
    _release,
    [_WHERE, click.Argument(["stage"], metavar="[STAGE]", required=False)],
    "Let moves go on: from one stage, or from all.",
)
_add(
    "held",
    _held,
    [
        _WHERE,
        click.Option(["--wait"], metavar="STAGE", help="Not before a move is held there."),
        _ROLE,
        click.Option(["--timeout"], type=float, default=60.0, show_default=True),
    ],
    "What is armed and held on a host.",
)
_add("power-off", _power_off, [_WHERE], "Cut a node's power: all on it ends at once.")
_add(
    "power-on",
    _power_on,
    [_WHERE, click.Option(["--no-ready"], is_flag=True, help="Do not wait for its daemons.")],
    "Start a node again; waits until its daemons are ready.",
)
_VOLUME = click.Argument(["where"], metavar="VOLUME")
_add(
    "fill-volume",
    _fill,
    [
        _VOLUME,
        click.Option(
            ["--leave"], default="0", show_default=True, metavar="SIZE", help="What stays free."
        ),
    ],
    "Fill the volume shared of a lab that was raised with --volume-size.",
)
_add("free-volume", _free, [_VOLUME], "Undo fill-volume.")
_add(
    "grow-volume",
    _grow,
    [_VOLUME, click.Argument(["size"], metavar="SIZE")],
    "Let that volume grow to SIZE, in use as it is.",
)
