"""The documents say what is so: links lead somewhere, commands parse, tests and keys exist.

Command lines in the documents meet the real command line: nouns, verbs and options are resolved
by click, and what changes something is turned into its typed request (``--script cli``), which
needs no cluster. What the lab brings is parsed once the lab has a command line.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest

from godwit.cli.main import godwit, run
from godwit.host.config import AgentConfig
from godwit.model.errors import ALL
from godwit.model.requests import ROUTES
from godwit.model.words import ACTIONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
REFERENCE = ROOT / "docs" / "reference"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_SCRIPT = re.compile(r"\b((?:scripts|benchmarks)/[a-z][a-z_-]*(?:\.py)?)\b(?!/)")
_TEST = re.compile(r"\btests/[\w/]+\.py(?:::\w+)?")
_SOURCE = re.compile(r"\bsrc/godwit/[\w/.]+\.py\b")
_PLACEHOLDER = re.compile(r"\.\.\.|\[?[A-Z]+\]?(?:\.\.\.)?")
_END_OF_COMMAND = frozenset({"|", "||", "&&", ";", ">", ">>", "&"})


def _without_blocks(text: str) -> str:
    return _FENCE.sub("", text)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    found = set()
    for line in _without_blocks(page.read_text()).splitlines():
        if line.startswith("#"):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(words.replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for target in _LINK.findall(_without_blocks(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A Head\n[a](page.md) [b](#a-head) [c](gone.md) [d](page.md#gone)\n")
    assert broken_links(page) == ["gone.md", "page.md#gone"]


def test_every_page_is_reachable() -> None:
    """Design notes are reached by their folder; every other page by a link."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in _LINK.findall(page.read_text())
    }
    pages = [page for page in PAGES if page.parent.name != "design" and page.name != "README.md"]
    assert [str(page) for page in pages if page not in linked and page.parent != ROOT] == []


# --- command lines


def _commands(line: str) -> Iterator[list[str]]:
    """The ``godwit`` commands of one shell line, as words without their redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word in _END_OF_COMMAND:
            while command and (command[0] == "sudo" or re.match(r"[A-Z_]+=", command[0])):
                command.pop(0)
            if command and Path(command[0]).name == "godwit":
                yield command[1:]
            command = []
        else:
            command.append(word)


def shown_commands(page: Path) -> list[list[str]]:
    """Every ``godwit`` command line in the code blocks of a page."""
    found = []
    for language, block in _FENCE.findall(page.read_text()):
        if language not in ("sh", "console", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            found += list(_commands(line.removeprefix("$ ")))
    return found


def mentioned_commands(page: Path) -> list[list[str]]:
    """``godwit NOUN VERB ...`` as named within a sentence; words may be left out there."""
    found = []
    for code in _CODE.findall(_without_blocks(page.read_text())):
        words = code.split()
        if words[0] == "godwit" and len(words) > 1 and re.fullmatch("[a-z]+", words[1]):
            found.append(words[1:])
    return found


def _lab_is_there() -> bool:
    return "lab" in godwit.list_commands(click.Context(godwit, info_name="godwit"))


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that ``words`` name, and what is left for it. Errors: click.UsageError."""
    context = godwit.make_context("godwit", list(words))
    command: click.Command = godwit
    rest = [*context._protected_args, *context.args]
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        if found is None:
            raise click.UsageError(f"there is no command {words}")
        command = found
        if isinstance(command, click.Group):
            context = command.make_context(name, rest, parent=context)
            rest = [*context._protected_args, *context.args]
    return command, rest


def check_command(words: list[str]) -> None:
    """A whole command line: everything it needs is there and nothing else. click.UsageError."""
    if "--help" in words:
        resolve([word for word in words if word != "--help"])
        return
    command, rest = resolve(words)
    # A context runs nothing; it reads the words and fails on those that are wrong.
    command.make_context(command.name, rest)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_shown_commands_parse(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in shown_commands(page):
        if words[0] == "lab" and not _lab_is_there():
            continue
        try:
            check_command(words)
        except click.ClickException as error:
            pytest.fail(f"godwit {shlex.join(words)}: {error.format_message()}")
        if ".".join(words[:2]) in ACTIONS and "--script" not in words and "--help" not in words:
            code = run([*words, "--script", "cli"])
            out, err = capfd.readouterr()
            assert code == 0, f"godwit {shlex.join(words)}: {out}{err}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_mentioned_commands_exist(page: Path) -> None:
    for words in mentioned_commands(page):
        if words[0] in ("lab", "NOUN") and not _lab_is_there():
            continue
        try:
            command, rest = resolve([word for word in words if not _PLACEHOLDER.fullmatch(word)])
        except click.exceptions.NoArgsIsHelpError:
            continue  # a noun alone
        except click.ClickException as error:
            pytest.fail(f"`godwit {' '.join(words)}`: {error.format_message()}")
        known = {option for param in command.params for option in param.opts}
        assert {word for word in rest if re.match("--[a-z]", word)} - known == set()


def test_lab_commands_are_checked() -> None:
    if not _lab_is_there():
        pytest.skip("the lab has no command line yet: godwit.lab.cli")
    shown = [words for page in PAGES for words in shown_commands(page) if words[0] == "lab"]
    assert shown
    for words in shown:
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "godwit vm migrate web --too host2",
        "godwit vm move web",
        "godwit virtual list",
        "godwit vm migrate",
        "sudo godwit vm list --bad && true",
    ],
)
def test_a_wrong_command_line_is_seen(line: str) -> None:
    (words,) = _commands(line)
    with pytest.raises(click.ClickException):
        check_command(words)


def test_commands_are_found_in_lines() -> None:
    line = "A=1 godwit vm list -o json | jq . # godwit none"
    assert list(_commands(line)) == [["vm", "list", "-o", "json"]]
    assert list(_commands('godwit vm show web > "a b"; .venv/bin/godwit host list')) == [
        ["vm", "show", "web"],
        ["host", "list"],
    ]


# --- files, tests, figures


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    named = {*_SCRIPT.findall(text), *_SOURCE.findall(text)}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_the_makefile_calls_scripts_that_exist() -> None:
    named = set(_SCRIPT.findall((ROOT / "Makefile").read_text()))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_documents_named_in_the_code_exist() -> None:
    named = re.compile(r"\bdocs/(?:design/\d{4}|[\w/-]+/[\w-]+\.md)")
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("src", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}-*.md"))
    }
    assert sorted(missing) == []


def _functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_tests_exist(page: Path) -> None:
    missing = []
    for name in sorted(set(_TEST.findall(page.read_text()))):
        path, _, function = name.partition("::")
        if not (ROOT / path).is_file() or (function and function not in _functions(ROOT / path)):
            missing.append(name)
    assert missing == []


def _promises() -> list[str]:
    lines = (ROOT / "SPECIFICATION.md").read_text().splitlines()
    return [line for line in lines if re.match(r"\| [A-Z]\d+ \|", line)]


def test_every_promise_has_a_test_or_is_pending() -> None:
    promises = _promises()
    assert len(promises) > 50
    shown = ("pending", "docs/proof/")  # a figure is shown by the raw values of its proof
    bare = [line for line in promises if not _TEST.search(line)]
    assert [line for line in bare if not any(word in line for word in shown)] == []
    numbers = [line.split()[1] for line in promises]
    assert len(set(numbers)) == len(numbers)


def test_no_figure_is_proven_without_its_raw_values() -> None:
    """A line with a measured figure may lose its "pending" only when the proof lies there."""
    measured = [line for line in _promises() if re.match(r"\| F\d+ \|", line)]
    done = [line for line in measured if "pending" not in line]
    assert not done or (ROOT / "docs" / "proof" / "A.json").is_file()


# --- reference pages


def _rows(page: Path) -> list[list[str]]:
    """The cells of every table row of a page, code marks taken off."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def _keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name == "networks":
            continue
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.default


def _told(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    if default == ():
        return "[]"
    return str(default) or "empty"


def test_every_key_of_a_host_is_described() -> None:
    from godwit.host.config import NetworkConfig

    wanted = {key: _told(default) for key, default in _keys(AgentConfig)}
    wanted |= {f"networks.NAME.{key}": _told(value) for key, value in _keys(NetworkConfig)}
    section = (REFERENCE / "configuration.md").read_text().partition("## The manager")[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    assert {row[0]: row[1] for row in rows} == wanted


def test_examples_of_configuration_are_read(tmp_path: Path) -> None:
    blocks = _FENCE.findall((REFERENCE / "configuration.md").read_text())
    host = next(block for language, block in blocks if language == "toml" and "host =" in block)
    path = tmp_path / "host.toml"
    path.write_text(host)
    assert AgentConfig.load(path).networks["lan"].bridge == "br-lan"


def test_every_error_is_described() -> None:
    rows = {row[0]: row[1:3] for row in _rows(REFERENCE / "exit-codes.md")}
    for kind in ALL:
        assert rows[kind.code] == [str(kind.exit_code), str(kind.http_status)]


def test_every_route_is_described() -> None:
    rows = {row[0]: tuple(row[1:3]) for row in _rows(REFERENCE / "api.md")}
    assert {kind: rows.get(kind) for kind in ROUTES} == ROUTES


def test_every_fault_and_hold_point_is_described() -> None:
    if not _lab_is_there():
        pytest.skip("the lab has no command line yet: godwit.lab.cli")
    from godwit.migration.world import DESTINATION_HOLDS, SOURCE_HOLDS

    rows = _rows(REFERENCE / "lab.md")
    command, _ = resolve(["lab", "fault", "kill"])
    assert command.name == "kill"
    context = click.Context(godwit, info_name="godwit")
    lab = godwit.get_command(context, "lab")
    assert isinstance(lab, click.Group)
    faults = lab.commands["fault"]
    assert isinstance(faults, click.Group)
    first = [row[0] for row in rows]
    assert sorted(set(faults.commands) - set(first)) == []
    points = {(row[0], row[1]) for row in rows if row[0] in ("source", "destination")}
    wanted = {("source", point) for point in SOURCE_HOLDS}
    assert points == wanted | {("destination", point) for point in DESTINATION_HOLDS}


def test_the_license_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
