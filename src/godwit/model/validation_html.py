"""The validation report as one HTML file: it needs no other file, no script and no network.

Whatever comes from a cluster is escaped; a Content-Security-Policy forbids everything but the
style in the file itself. Results are words beside their colour, tables have captions and heads with
a scope, sections are headed and linked, and it prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from godwit.model.units import format_size
from godwit.model.validation import (
    CATEGORIES,
    Canary,
    HostRow,
    LinkRow,
    Result,
    ValidationCheck,
    ValidationReport,
)

_TITLES = {
    "inventory": "Inventory",
    "network": "Network",
    "storage": "Storage",
    "system": "System",
    "cluster": "Cluster",
}
_WORDS: dict[Result, str] = {"pass": "Pass", "warn": "Warning", "fail": "Failed"}
_SIGNS: dict[Result, str] = {"pass": "✓", "warn": "!", "fail": "✗"}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --pass: #1a7f37; --warn: #9a6700; --fail: #c62828 }
@media (prefers-color-scheme: dark) {
  :root { --pass: #4ac26b; --warn: #d4a72c; --fail: #ff7b72 }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .when { margin-top: .2rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--line) }
thead th { border-bottom-width: 2px } td.number { font-variant-numeric: tabular-nums }
.pass { color: var(--pass) } .warn { color: var(--warn) } .fail { color: var(--fail) }
.result { font-weight: 700; white-space: nowrap } .fix { display: block }
.wide { overflow-x: auto } nav ul { padding-left: 1.2rem }
@media print { body { max-width: none; margin: 0 } tr { break-inside: avoid } }
"""


def render_html(report: ValidationReport) -> str:
    """The whole document."""
    parts = [_head(report), _summary(report)]
    for category in CATEGORIES:
        checks = [check for check in report.checks if check.category == category]
        if checks:
            parts.append(_section(category, checks))
    if report.canary is not None:
        parts.append(_canary(report.canary))
    parts += [_hosts(report.hosts), _links(report.links), "</main>\n</body>\n</html>\n"]
    return "".join(parts)


def _head(report: ValidationReport) -> str:
    word = _WORDS[report.result]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{word}: validation of the cluster, {_time(report.ended_at)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
    )


def _summary(report: ValidationReport) -> str:
    spent = report.ended_at - report.started_at
    by = f" for {escape(report.by)}" if report.by else ""
    kind = "Live validation" if report.live else "Validation"
    counts = ", ".join(
        f'<span class="{result}">{report.count(result)} {word.lower()}</span>'
        for result, word in _WORDS.items()
    )
    sections = {check.category for check in report.checks}
    links = "".join(
        f'<li><a href="#{name}">{_TITLES[name]}</a></li>' for name in CATEGORIES if name in sections
    )
    return (
        f"<h1>Validation of the cluster: {_result(report.result)}</h1>\n"
        f'<p class="when">{kind}{by}, begun {_time(report.started_at)}, took {spent:.1f} s, '
        f"by Godwit {escape(report.version)}, task {escape(report.task)}</p>\n"
        f"<p>{len(report.checks)} checks: {counts}.</p>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        + _table(
            "What to put right",
            ("Result", "Check", "What was found, and what to do", "Hosts"),
            [_row(check) for check in _worst_first(report.checks) if check.result != "pass"],
        )
    )


def _worst_first(checks: Sequence[ValidationCheck]) -> list[ValidationCheck]:
    order = {"fail": 0, "warn": 1, "pass": 2}
    return sorted(checks, key=lambda check: order[check.result])


def _section(category: str, checks: Sequence[ValidationCheck]) -> str:
    title = _TITLES[category]
    head = ("Result", "Check", "What was found, and what to do", "Hosts")
    table = _table(f"{title}: every check", head, [_row(check) for check in checks])
    return f'<h2 id="{category}">{title}</h2>\n{table}'


def _row(check: ValidationCheck) -> tuple[str, ...]:
    fix = f'<span class="fix">→ {escape(check.hint)}</span>' if check.hint else ""
    return (
        _result(check.result),
        escape(check.name),
        escape(check.message) + fix,
        escape(", ".join(check.hosts)),
    )


def _result(result: Result) -> str:
    sign = f'<span aria-hidden="true">{_SIGNS[result]}</span>'
    return f'<span class="result {result}">{sign} {_WORDS[result]}</span>'


def _canary(canary: Canary) -> str:
    facts: list[tuple[str, str]] = [("VM", escape(canary.vm))]
    if canary.source and canary.destination:
        facts.append(("Way", f"{escape(canary.source)} to {escape(canary.destination)}"))
    facts += [
        (title, f"{value:.0f} ms" if unit == "ms" else f"{value:.1f} s")
        for title, value, unit in (
            ("Blackout", canary.blackout_ms, "ms"),
            ("Move in all", canary.total_ms, "ms"),
            ("Detection", canary.detection_s, "s"),
            ("Restart", canary.restart_s, "s"),
        )
        if value is not None
    ]
    facts += [("Failed", escape(canary.failure))] if canary.failure else []
    facts += [("Not tried", escape(text)) for text in canary.not_done]
    steps = [
        (escape(step.name), f"{step.seconds:.1f} s", escape(step.message)) for step in canary.steps
    ]
    return (
        '<h2 id="canary">A small VM, live</h2>\n'
        + _table("What was seen", ("What", "Figure"), facts)
        + _table("Step by step", ("Step", "Time", "Outcome"), steps)
    )


def _hosts(hosts: Sequence[HostRow]) -> str:
    head = ("Host", "State", "CPU", "Memory", "System", "Kernel", "QEMU", "Godwit", "Migration")
    rows = [
        (
            escape(host.name),
            escape(host.state),
            f"{host.cpus} × {escape(host.cpu)}" if host.cpus else "",
            format_size(host.memory_bytes) if host.memory_bytes else "",
            escape(host.system),
            escape(host.kernel),
            escape(f"{host.qemu} ({host.accelerator})" if host.qemu else ""),
            escape(host.godwit),
            escape(host.migration_address) + (f", MTU {host.mtu}" if host.mtu else ""),
        )
        for host in hosts
    ]
    return '<h2 id="hosts">Hosts and versions</h2>\n' + _table("Every host", head, rows)


def _links(links: Sequence[LinkRow]) -> str:
    rows = [
        (
            escape(link.source),
            escape(link.destination),
            f"{link.largest_bytes} bytes" if link.largest_bytes else "none arrived",
            "" if link.bits_per_s is None else f"{link.bits_per_s / 1e6:.0f} Mbit/s",
            _offset(link),
        )
        for link in links
    ]
    head = ("From", "To", "Largest packet", "Bandwidth", "Clock")
    return '<h2 id="measured">Measured between hosts</h2>\n' + _table(
        "Over the migration network", head, rows
    )


def _offset(link: LinkRow) -> str:
    if link.clock_offset_s is None:
        return "not measured"
    error = "" if link.clock_error_s is None else f" ± {link.clock_error_s * 1000:.1f}"
    return f"{link.clock_offset_s * 1000:+.1f}{error} ms"


def _table(caption: str, head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; caption and heads are ours. Nothing when there are no rows."""
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment.strftime('%Y-%m-%d %H:%M:%S')} UTC"
