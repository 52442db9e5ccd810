"""``godwit cluster validate``: what is printed, what it exits with, what is written."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from godwit.cli.cluster_validate import render_text, show
from godwit.cli.main import run
from godwit.cli.session import Session
from godwit.model.validation import Canary, CanaryStep, ValidationCheck, ValidationReport


def check(category: str, name: str, result: str, message: str, hint: str = "") -> ValidationCheck:
    return ValidationCheck.model_validate(
        {
            "category": category,
            "name": name,
            "result": result,
            "message": message,
            "hint": hint,
        }
    )


GOOD = ValidationReport(
    task="t-1",
    started_at=10.0,
    ended_at=12.5,
    result="warn",
    checks=(
        check("inventory", "hosts", "pass", "all 2 hosts answered", "not said of a pass"),
        check("system", "slat", "warn", "no EPT on host1", "switch it on"),
    ),
)
BAD = GOOD.but(
    result="fail",
    checks=(*GOOD.checks, check("system", "clock", "fail", "off by \x1b[2J5 s", "set it")),
)


def plain(report: ValidationReport) -> str:
    return click.unstyle(render_text(report))


def test_each_category_is_headed_once_and_each_fix_is_below_its_check() -> None:
    assert plain(BAD).splitlines() == [
        "inventory",
        "  ✓ hosts: all 2 hosts answered",
        "",
        "system",
        "  ! slat: no EPT on host1",
        "      → switch it on",
        "  ✗ clock: off by ?[2J5 s",
        "      → set it",
        "",
        "3 checks in 2.5 s: 1 pass, 1 warn, 1 fail",
    ]


def test_a_canary_is_told_with_its_figures() -> None:
    canary = Canary(
        vm="canary",
        blackout_ms=61.4,
        total_ms=1450.0,
        steps=(CanaryStep(name="moving it live to host2", seconds=1.5),),
        not_done=("a drain was not tried",),
    )
    text = plain(GOOD.but(canary=canary))
    assert "     1.5 s  moving it live to host2" in text
    assert "blackout 61 ms, 1.45 s in all" in text
    assert "not tried: a drain was not tried" in text


@pytest.mark.parametrize(("report", "code"), [(GOOD, 0), (BAD, 4)])
def test_only_a_failed_check_fails(
    report: ValidationReport, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(report, Session(output="json")) == code
    said = capsys.readouterr()
    assert ValidationReport.model_validate(json.loads(said.out)) == report
    assert said.err == ""


def test_the_page_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert show(BAD, Session(), html=str(page)) == 4
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert f"written: {page}" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_told_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cluster", "validate", "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_it_is_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cluster", "validate", "--live", "--script", "cli"]) == 0
    assert capsys.readouterr().out == "godwit cluster validate --live\n"
    assert run(["cluster", "validate", "--script", "python"]) == 0
    assert "client.cluster.validate()" in capsys.readouterr().out
    assert run(["cluster", "validate", "--script", "cli", "--html", "x.html"]) == 0
    said = capsys.readouterr()
    assert said.out == "godwit cluster validate\n"
    assert "makes no page" in said.err
    assert run(["cluster", "validate", "--no-wait", "--html", "x.html"]) == 2
