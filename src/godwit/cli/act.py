"""The verbs that change something: built from ``words.ACTIONS``, carried out in one way.

Words become a typed request; the request becomes a script (``--script``), a plan (``--dry-run``)
or a task, which is waited for unless ``--no-wait``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from godwit.cli.session import Command, Session, completer, say, say_json, session
from godwit.model.errors import GodwitError, InvalidRequest, OutcomeUnknown
from godwit.model.spelling import read
from godwit.model.words import ACTIONS, PLANNED, Action, Flag, merge, place_arguments

if TYPE_CHECKING:
    from godwit.client.sync import Client
    from godwit.client.waiting import Listening
    from godwit.model.create import CreatePlan
    from godwit.model.drain import DrainPlan
    from godwit.model.migration import Migration, MovePlan
    from godwit.model.requests import Request
    from godwit.model.task import Task


def action_command(kind: str) -> click.Command:
    """The command of a kind of request."""
    action = ACTIONS[kind]

    def carry_out(**words: Any) -> int:
        return perform(_request(action, words))

    noun = None if action.verb == "create" else action.about or action.noun
    subject = (
        [
            click.Argument(
                [action.subject],
                metavar=action.subject.upper(),
                shell_complete=completer(noun) if noun else None,
            )
        ]
        if action.subject
        else []
    )
    more = [
        click.Argument([flag.field], metavar=flag.metavar, required=flag.required)
        for flag in action.arguments
    ]
    params = [*subject, *more, *options_of(kind)]
    return Command(action.words[-1], params=params, callback=carry_out, help=action.help)


def options_of(kind: str) -> list[click.Parameter]:
    """The options that a kind of request has; for a command that has more of its own."""
    return [_option(flag) for flag in ACTIONS[kind].flags]


def request_of(kind: str, words: dict[str, Any]) -> Request:
    """The request that these options make. InvalidRequest names the option that is off."""
    return _request(ACTIONS[kind], words)


def _option(flag: Flag) -> click.Option:
    # Always text for click: values are read by `words`, whose errors say what to write.
    more: dict[str, Any] = {"help": flag.help, "required": flag.required}
    if flag.sort == "switch":
        return click.Option([flag.option, flag.field], is_flag=True, help=flag.help)
    if flag.choices:
        more["type"] = click.Choice(flag.choices)
    elif flag.sort == "path":
        more["type"] = click.Path()
    if flag.completes:
        more["shell_complete"] = completer(flag.completes)
    if flag.metavar:
        more["metavar"] = flag.metavar
    return click.Option([flag.option, flag.field], multiple=flag.many, **more)


def _request(action: Action, words: dict[str, Any]) -> Request:
    from godwit.model.requests import parse_request

    placed = place_arguments(action, [words[flag.field] for flag in action.arguments])
    fields: dict[str, Any] = {}
    for flag in action.flags:
        value = words[flag.field]
        if value is None or value is False or value == ():
            continue
        try:
            if flag.many:
                fields[flag.field] = [read(flag.sort, text) for text in value]
            else:
                fields[flag.field] = value if value is True else read(flag.sort, value)
        except InvalidRequest as error:
            raise InvalidRequest(f"{flag.option}: {error.message}", hint=error.hint) from None
    try:
        subject = {action.subject: words[action.subject]} if action.subject else {}
        return parse_request({"kind": action.kind} | subject | merge(placed, fields))
    except InvalidRequest as error:
        raise _named_by_option(action, error) from None


def _named_by_option(action: Action, error: InvalidRequest) -> InvalidRequest:
    field, _, said = error.message.partition(": ")
    flag = action.fields.get(field.partition(".")[0])
    if flag is None:
        return error
    name = flag.option or flag.metavar.strip("[]")
    return InvalidRequest(f"{name}: {said[:1].lower()}{said[1:]}", hint=error.hint)


def perform(request: Request) -> int:
    """Carry out a typed request as the session says; the exit code."""
    now = session()
    if now.dry_run and request.kind not in PLANNED:
        raise InvalidRequest(
            f"{request.kind.replace('.', ' ')} has no plan to show",
            hint="see what would be sent with --script curl",
        )
    if now.script is not None:
        from godwit.model.render import render

        text = render(request, now.script, wait=not now.no_wait, dry_run=now.dry_run)
        say(text.rstrip("\n"))
        return 0
    with now.client() as client:
        if now.dry_run:
            return _show_plan(client.dry_run(request), now)
        if now.no_wait:
            task = _send(client, request)
            if now.json:
                say_json(task.model_dump(mode="json"))
            else:
                say(task.id)
            return 0
        # What takes time here comes before the request: afterwards it would be in a move's way.
        import godwit.cli.progress
        import godwit.model.migration  # noqa: F401

        listening = client.listen(request)
        return follow(client, _send(client, request), now, listening)


def _send(client: Client, request: Request) -> Task:
    try:
        return client.send(request)
    except KeyboardInterrupt:
        raise OutcomeUnknown(
            "interrupted while asking; it may have begun", hint="look with: godwit task list"
        ) from None


def follow(client: Client, task: Task, now: Session, listening: Listening | None = None) -> int:
    """Wait for a task's end and show what came of it. Errors: whatever it ended in."""
    from godwit.cli.progress import teller

    try:
        with teller() as showing:
            done = client.wait(task, on_progress=showing.tell, listening=listening)
    except KeyboardInterrupt:
        raise _detached(client, task) from None
    except GodwitError as error:
        _show_failed_move(client, task, error, now)
        raise
    _show_result(client, done, now)
    return 0


def _is_move(task: Task) -> bool:
    return task.request.get("kind") == "vm.migrate"


def _detached(client: Client, task: Task) -> OutcomeUnknown:
    """Ctrl-C leaves the waiting, not the work: say that it goes on, and how to stop it."""
    cancel = f"godwit task cancel {task.id}"
    what = f"task {task.id}"
    if _is_move(task):
        move = client.migration_of(client.tasks.get(task.id))
        if move is not None:
            what, cancel = f"move {move.id} of {move.vm}", f"godwit migration cancel {move.id}"
    return OutcomeUnknown(
        f"no longer waiting; {what} goes on", hint=f"{cancel}   or   godwit task wait {task.id}"
    )


def _show_failed_move(client: Client, task: Task, error: GodwitError, now: Session) -> None:
    # A script that reads the object wants it above all when the move did not succeed.
    if not _is_move(task) or (isinstance(error, OutcomeUnknown) and "task" not in error.context):
        return
    try:
        move = client.migration_of(client.tasks.get(task.id))
    except GodwitError:
        return  # the first error is the one to tell
    if move is None:
        return
    if now.json:
        say_json(move.model_dump(mode="json"))
    if "task show" in error.hint:
        error.hint = f"see what happened: godwit migration show {move.id}"


def _show_result(client: Client, task: Task, now: Session) -> None:
    found = client.result(task)
    if now.json:
        say_json(found.model_dump(mode="json"))
    else:
        say(_told(found, task))


def _told(found: Any, task: Task) -> str:
    from godwit.model.migration import Migration
    from godwit.model.network import NetworkView
    from godwit.model.vm import VmView
    from godwit.model.volume import VolumeView

    if isinstance(found, Migration):
        return timeline_or_state(found)
    reason = f": {task.reason}" if task.reason else ""
    if isinstance(found, VmView):
        where = f" on {found.host}" if found.host and found.state.value != "stopped" else ""
        return f"{found.name} is {found.state.value}{where}{reason}"
    if isinstance(found, NetworkView):
        return f"network {found.name} is there{reason}"
    if isinstance(found, VolumeView):
        return f"volume {found.name} is there{reason}"
    said = ACTIONS.get(str(task.request.get("kind")))
    name = task.subject.partition("/")[2]
    return f"{said.doing.format(name) if said else task.subject}: done{reason}"


def timeline_or_state(move: Migration) -> str:
    """The report of a finished move; the progress of one under way."""
    from godwit.cli.timeline import render_timeline

    if move.state.final:
        return render_timeline(move)
    said = f"{move.progress.stage.value}, {move.progress.percent:.0f} %"
    return f"{move.vm}: {move.source} → {move.destination}, {move.state.value}, {said}"


def _show_plan(plan: MovePlan | DrainPlan | CreatePlan, now: Session) -> int:
    from godwit.model.create import CreatePlan
    from godwit.model.drain import DrainPlan

    if now.json:
        say_json(plan.model_dump(mode="json"))
    elif isinstance(plan, DrainPlan):
        from godwit.cli.drain import render_drain

        say(render_drain(plan))
    elif isinstance(plan, CreatePlan):
        from godwit.cli.plan import render_create

        say(render_create(plan))
    else:
        from godwit.cli.plan import render_plan

        say(render_plan(plan))
    if isinstance(plan, CreatePlan):
        return 0
    nowhere = not isinstance(plan, DrainPlan) and plan.destination is None
    return 4 if plan.failed or nowhere else 0
