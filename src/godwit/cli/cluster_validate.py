"""``godwit cluster validate``: ask for a validation, show its steps, print and keep its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from godwit.cli.act import options_of, perform, request_of
from godwit.cli.errors import one_line
from godwit.cli.session import Command, note, say, say_json, session
from godwit.model.errors import InvalidRequest, OperationFailed

if TYPE_CHECKING:
    from godwit.cli.session import Session
    from godwit.model.migration import Migration
    from godwit.model.task import Task
    from godwit.model.validation import Canary, ValidationReport

_SIGNS = {"pass": "✓", "warn": "!", "fail": "✗"}
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
FAILED = 4


def _validate(html: str | None, **words: Any) -> int:
    now, request = session(), request_of("cluster.validate", words)
    if now.script is not None or now.dry_run or now.no_wait:
        if html is not None and now.no_wait:
            raise InvalidRequest("--html needs the report", hint="leave --no-wait out")
        if html is not None:
            note("--html is the command line's own: the script makes no page")
        return perform(request)
    if html is not None:
        _writable(Path(html))
    with now.client() as client:
        done = client.wait(client.send(request), on_progress=_Steps(quiet=now.json).tell)
        report = client.cluster.validation()
        if report.task != done.id:
            raise OperationFailed(
                "another validation has ended meanwhile, its report is the one that is kept",
                hint=f"what this one found: godwit task show {done.id}",
            )
    return show(report, now, html=html)


def show(report: ValidationReport, now: Session, *, html: str | None = None) -> int:
    """Print a report as the session says, write it as a page; the exit code."""
    if html is not None:
        from godwit.model.validation_html import render_html

        Path(html).write_text(render_html(report), encoding="utf-8")
        note(f"written: {html}")
    if now.json:
        say_json(report.model_dump(mode="json"))
    else:
        say(render_text(report))
    return FAILED if report.failed else 0


def _writable(path: Path) -> None:
    """A report that cannot be written is better known before it is made."""
    if not path.parent.is_dir() or path.is_dir():
        raise InvalidRequest(
            f"{path} cannot be written", hint="name a file in a directory there is"
        )


class _Steps:
    """Tells each step once, on standard error."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._told = ""

    def tell(self, news: Task | Migration) -> None:
        """One line for each sentence that is new."""
        reason = one_line(getattr(news, "reason", ""))
        running = news.state.value == "running"
        if running and reason and reason not in (self._told, "accepted") and not self._quiet:
            self._told = reason
            note(f"… {reason}")


def render_text(report: ValidationReport) -> str:
    """The report for a terminal: category by category, each fix below what it is for."""
    lines: list[str] = []
    category = ""
    for check in report.checks:
        if check.category != category:
            category = check.category
            lines += ["", click.style(category, bold=True)]
        sign = click.style(_SIGNS[check.result], fg=_COLOURS[check.result], bold=True)
        lines.append(f"  {sign} {one_line(check.name)}: {one_line(check.message)}")
        if check.hint and check.result != "pass":
            lines.append(f"      → {one_line(check.hint)}")
    if report.canary is not None:
        lines += ["", click.style("a small VM, live", bold=True), *_canary(report.canary)]
    counts = (
        f"{report.count('pass')} pass, {report.count('warn')} warn, {report.count('fail')} fail"
    )
    spent = report.ended_at - report.started_at
    lines += ["", f"{len(report.checks)} checks in {spent:.1f} s: {counts}"]
    return "\n".join(lines[1:])


def _canary(canary: Canary) -> list[str]:
    lines = [f"  {step.seconds:6.1f} s  {one_line(step.name)}" for step in canary.steps]
    if canary.blackout_ms is not None:
        total = f", {canary.total_ms / 1000:.2f} s in all" if canary.total_ms is not None else ""
        lines.append(f"  blackout {canary.blackout_ms:.0f} ms{total}")
    if canary.restart_s is not None:
        noticed = f"detected after {canary.detection_s:.1f} s, " if canary.detection_s else ""
        lines.append(f"  power lost: {noticed}running again after {canary.restart_s:.1f} s")
    lines += [f"  not tried: {one_line(text)}" for text in canary.not_done]
    return lines


validate = Command(
    "validate",
    params=[
        *options_of("cluster.validate"),
        click.Option(
            ["--html"], metavar="FILE", type=click.Path(), help="Write the report as a page, too."
        ),
    ],
    callback=_validate,
    help="Check hosts, networks, storage and the cluster; print a report. Exits 4 when one fails.",
)
