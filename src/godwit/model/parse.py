"""Read back what ``render`` printed: the typed request of a CLI line, curl, Python or playbook.

Meant for our own words, also after a person has changed a value or an option; it is no parser of
shell, Python or YAML at large. Whatever it cannot read is InvalidRequest.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from godwit.model.errors import InvalidRequest
from godwit.model.render import Form
from godwit.model.requests import ROUTES, Request, parse_request
from godwit.model.spelling import read, read_disk
from godwit.model.words import (
    ACTIONS,
    METHODS,
    Action,
    merge,
    place_arguments,
)


def parse(text: str, form: Form) -> Request:
    """The request that a text in that form carries; InvalidRequest when it carries none."""
    try:
        return parse_request(_PARSERS[form](text))
    except (ValueError, SyntaxError, KeyError, RecursionError) as error:
        raise _unreadable(form) from error


def _unreadable(form: str) -> InvalidRequest:
    return InvalidRequest(
        f"this is not a {form} form of a request", hint="print one with --script and change that"
    )


# --- command line


def _cli(text: str) -> dict[str, Any]:
    words = shlex.split(text)
    if words[:1] != ["godwit"] or len(words) < 3:
        raise _unreadable("cli")
    action = ACTIONS.get(".".join(words[1:3])) or ACTIONS[".".join(words[1:4])]
    options: dict[str, Any] = {}
    placed: list[str] = []
    rest = iter(words[1 + len(action.words) :])
    for word in rest:
        if word == "--":
            placed += rest
        elif word.startswith("--"):
            option, equals, value = word.partition("=")
            _option(action, options, option, [value] if equals else rest)
        else:
            placed.append(word)
    return {"kind": action.kind, **merge(_placed(action, placed), options)}


def _placed(action: Action, words: list[str]) -> dict[str, Any]:
    first = 1 if action.subject else 0
    most = first + len(action.arguments)
    if len(words) > most:
        raise InvalidRequest(
            f"{words[most]!r} is one word too many", hint="put quotes around a value with spaces"
        )
    subject = {action.subject: words[0]} if first and words else {}
    return subject | place_arguments(action, words[first:])


def _option(action: Action, fields: dict[str, Any], option: str, values: Any) -> None:
    if option in ("--dry-run", "--no-wait"):
        return  # how it is sent, not what is asked
    flag = action.flag(option)
    if flag.sort == "switch":
        fields[flag.field] = True
        return
    text = next(iter(values), None)
    if text is None:
        raise InvalidRequest(f"{option} needs a value", hint=f"write {option} {flag.metavar}")
    value = read(flag.sort, text)
    if flag.many:
        fields.setdefault(flag.field, []).append(value)
    else:
        fields[flag.field] = value


# --- curl


def _curl(text: str) -> dict[str, Any]:
    words = shlex.split(text.rpartition(" <<")[0])
    method, body, path = "GET", "{}", ""
    rest = iter(words)
    for word in rest:
        if word == "--request":
            method = next(rest, "")
        elif word == "--data":
            body = next(rest, "")
        elif word.startswith("$GODWIT_URL"):
            path = word.removeprefix("$GODWIT_URL")
    return _from_call(method, path, json.loads(body))


def _from_call(method: str, path: str, body: Any) -> dict[str, Any]:
    path = path.partition("?")[0]
    for kind, (wanted, template) in ROUTES.items():
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template))
        match = re.fullmatch(pattern, path)
        if match and wanted == method and isinstance(body, dict):
            named = {key: unquote(value) for key, value in match.groupdict().items()}
            return body | named | {"kind": kind}
    raise InvalidRequest(
        f"no action is at {method} {path}", hint="see /v1/openapi.json for what there is"
    )


# --- Python


def _python(text: str) -> dict[str, Any]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and (action := _called(node)):
            return _arguments(action, node)
    raise _unreadable("python")


def _called(node: ast.Call) -> Action | None:
    match node.func:
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="client"), attr=nouns), attr=verb):
            return METHODS.get((nouns, verb))
    return None


def _arguments(action: Action, node: ast.Call) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": action.kind}
    names = [one.field for one in action.arguments if not one.covers]
    if action.subject:
        names.insert(0, action.subject)
    for name, value in zip(names, node.args, strict=True):
        fields[name] = ast.literal_eval(value)
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _unreadable("python")
        if keyword.arg not in ("dry_run",):
            fields[keyword.arg] = ast.literal_eval(keyword.value)
    if "disks" in fields:
        fields["disks"] = [read_disk(disk) for disk in fields["disks"]]
    return fields


# --- Ansible

_URL = re.compile(r"^ +url: \"\{\{[^}]*\}\}(.*)\"$", re.MULTILINE)
_METHOD = re.compile(r"^ +method: (\w+)$", re.MULTILINE)
_BODY_LINE = re.compile(r"^          (\w+): (.*)$", re.MULTILINE)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_ESCAPE = re.compile(r"\\(?:U([0-9a-f]{8})|.)")
_BARE_KEY = re.compile(r"(\w+): ")


def _ansible(text: str) -> dict[str, Any]:
    url, method = _URL.search(text), _METHOD.search(text)
    if not url or not method:
        raise _unreadable("ansible")
    block = text.partition("        body:\n")[2].partition("\n        headers:")[0]
    body = {key: _json(value) for key, value in _BODY_LINE.findall(block)}
    return _from_call(method[1], url[1], body)


def _json(flow: str) -> Any:
    """A value in the flow style that ``render`` writes: JSON but for keys, ``!unsafe``, ``\\U``."""
    out, last = [], 0
    for match in _STRING.finditer(flow):
        out += [_structure(flow[last : match.start()]), _ESCAPE.sub(_wide, match[0])]
        last = match.end()
    return json.loads("".join([*out, _structure(flow[last:])]))


def _structure(text: str) -> str:
    return _BARE_KEY.sub(r'"\1": ', text.replace("!unsafe ", ""))


def _wide(match: re.Match[str]) -> str:
    # JSON knows characters beyond 16 bits only as two halves.
    return json.dumps(chr(int(match[1], 16)))[1:-1] if match[1] else match[0]


_PARSERS: dict[Form, Callable[[str], dict[str, Any]]] = {
    "cli": _cli,
    "curl": _curl,
    "python": _python,
    "ansible": _ansible,
}
