"""Print a typed request as what a person may run: CLI line, curl, Python, Ansible playbook.

``godwit.model.parse.parse(render(request, form), form) == request`` for every request and form.
What a request says comes from two tables, ``words.ACTIONS`` and ``requests.ROUTES``; a new kind
of request needs no code here.

No form holds a secret: each reads the token from the file that ``GODWIT_TOKEN_FILE`` names when
it runs, and none puts it on a command line. Fields at their default are left out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from godwit.model.spelling import plain, spell
from godwit.model.words import ACTIONS, Action, Flag

if TYPE_CHECKING:
    from godwit.model.requests import Request

Form = Literal["cli", "curl", "python", "ansible"]
FORMS: tuple[Form, ...] = ("cli", "curl", "python", "ansible")
WAIT_S = 60  # how long a form asks the server to hold its answer; more it does not grant


def render(request: Request, form: Form, *, wait: bool = True, dry_run: bool = False) -> str:
    """The request in that form, ending in a newline. ``dry_run`` is for ``vm.migrate`` only."""
    return _RENDERERS[form](request, wait and not dry_run, dry_run)


def said_fields(request: Request) -> dict[str, Any]:
    """The request's fields as JSON, without its kind and without those at their default."""
    return request.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})


# --- command line


def _cli(request: Request, wait: bool, dry_run: bool) -> str:
    action, fields = ACTIONS[request.kind], said_fields(request)
    words = ["godwit", *action.words]
    placed, said = _arguments(action, fields)
    for flag in action.flags:
        if flag.field in fields and flag.field not in said:
            words += _option(flag, fields[flag.field])
    if dry_run:
        words.append("--dry-run")
    elif not wait:
        words.append("--no-wait")
    if any(text.startswith("-") for text in placed):
        words += ["--", *placed]  # else it would be taken for an option
    else:
        after = 1 + len(action.words)
        words[after:after] = placed
    return shlex.join(words) + "\n"


def _arguments(action: Action, fields: dict[str, Any]) -> tuple[list[str], set[str]]:
    """The texts of the command's arguments, and the fields that they say."""
    placed, said = [], set()
    if action.subject:
        placed, said = [str(fields[action.subject])], {action.subject}
    for flag in action.arguments:
        names = flag.said(fields)
        if names:
            part = {name: fields[name] for name in names}
            placed.append(spell(flag.sort, part if flag.covers else part[flag.field]))
            said.update(names)
    return placed, said


def _option(flag: Flag, value: Any) -> list[str]:
    if flag.sort == "switch":
        return [flag.option]
    words: list[str] = []
    for one in value if flag.many else [value]:
        text = spell(flag.sort, one)
        words += [f"{flag.option}={text}"] if text.startswith("-") else [flag.option, text]
    return words


# --- curl

# The token reaches curl on its standard input: a command line is readable by everybody.
CURL_END = """ <<END
header = "Authorization: Bearer $(cat "$GODWIT_TOKEN_FILE")"
END
"""


def _curl(request: Request, wait: bool, dry_run: bool) -> str:
    method, path, body = _call(request, wait, dry_run)
    lines = [
        "curl --fail-with-body --silent --show-error --config -",
        '${GODWIT_CA_FILE:+--cacert "$GODWIT_CA_FILE"}',
        f"--request {method}",
    ]
    if body is not None:
        lines.append("--header 'Content-Type: application/json'")
        lines.append(f"--data {shlex.quote(json.dumps(body, ensure_ascii=False))}")
    lines.append(f'"$GODWIT_URL{path}"')
    return " \\\n  ".join(lines) + CURL_END


def _call(request: Request, wait: bool, dry_run: bool) -> tuple[str, str, dict[str, Any] | None]:
    from godwit.model.requests import http_call

    method, path, body = http_call(request)
    query = "?dry_run=true" if dry_run else f"?wait={WAIT_S}" if wait else ""
    return method, path + query, body


# --- Python

_PYTHON = '''\
#!/usr/bin/env python3
"""{doing}."""

import sys

from godwit.client import Client
from godwit.model.errors import GodwitError

try:
    with Client() as client:
{body}
except GodwitError as error:
    print(error.message, error.hint, sep="\\n", file=sys.stderr)
    sys.exit(error.exit_code)
'''
_WAITED = """\
        task = {call}
        print(client.result(client.wait(task)).model_dump_json(indent=2))"""
_NOT_WAITED = """\
        task = {call}
        print(task.model_dump_json(indent=2))"""
_PLANNED = """\
        plan = {call}
        print(plan.model_dump_json(indent=2))
        sys.exit(4 if plan.failed else 0)"""


def _python(request: Request, wait: bool, dry_run: bool) -> str:
    action, fields = ACTIONS[request.kind], said_fields(request)
    subject = fields.pop(action.subject, "")
    words = [_quoted(subject)] if action.subject else []
    words += [_quoted(fields.pop(one.field)) for one in action.arguments if not one.covers]
    for name, flag in action.fields.items():
        if name in fields:
            words.append(f"{name}={_literal(flag, fields[name])}")
    if dry_run:
        words.append("dry_run=True")
    call = f"client.{action.nouns}.{action.method}({', '.join(words)})"
    body = _PLANNED if dry_run else _WAITED if wait else _NOT_WAITED
    return _PYTHON.format(doing=action.doing.format(subject), body=body.format(call=call))


def _literal(flag: Flag, value: Any) -> str:
    if flag.sort == "disk":
        value = [spell("disk", disk) for disk in value]
    if isinstance(value, list):
        return "[" + ", ".join(_quoted(one) for one in value) + "]"
    return _quoted(value)


def _quoted(value: Any) -> str:
    text = repr(value)
    # As formatters write it; repr() takes single quotes only where the text holds none.
    if text.startswith("'") and '"' not in text:
        return f'"{text[1:-1]}"'
    return text


# --- Ansible

_ASKED = """\
        headers:
          Authorization: "Bearer {{ lookup('ansible.builtin.file', \
lookup('ansible.builtin.env', 'GODWIT_TOKEN_FILE')) | trim }}"
        ca_path: "{{ lookup('ansible.builtin.env', 'GODWIT_CA_FILE') | default(omit, true) }}"
        timeout: 90
        return_content: true
"""
_SENT = """\
- name: {doing}
  hosts: localhost
  gather_facts: false
  tasks:
    - name: {doing}
      ansible.builtin.uri:
        url: "{{{{ lookup('ansible.builtin.env', 'GODWIT_URL') }}}}{path}"
        method: {method}
{body}{asked}\
      no_log: true  # the request carries the token
      register: answer
      failed_when: false
"""
_FOLLOWED = """\
    - name: Wait for its end
      ansible.builtin.uri:
        url: "{{ lookup('ansible.builtin.env', 'GODWIT_URL') }}/v1/tasks/\
{{ answer.json.id }}?wait=60"
{asked}\
      no_log: true
      register: done
      until: done.json.state | default('running') not in ['waiting', 'running']
      retries: 600
      delay: 1
      when: answer.status == 202
"""
_JUDGED = """\
    - name: Tell how it went
      ansible.builtin.assert:
        that: {that}
        success_msg: "{{{{ done.json.reason | default('done', true) }}}}"
        fail_msg: "{{{{ done.json.reason | default(answer.json.detail) | \
default(answer.msg) }}}}"
"""
_DONE = "done.json.state | default('') == 'completed'"
_ACCEPTED = "answer.status == 202"
_PLAN_IS_GOOD = (
    "answer.status == 200 and "
    "answer.json.checks | selectattr('result', 'equalto', 'fail') | length == 0"
)


def _ansible(request: Request, wait: bool, dry_run: bool) -> str:
    method, path, body = _call(request, wait=False, dry_run=dry_run)
    action = ACTIONS[request.kind]
    doing = action.doing.format(said_fields(request).get(action.subject, ""))
    lines = ""
    if body is not None:
        lines = "        body_format: json\n"
        lines += "        body:\n" if body else "        body: {}\n"
        lines += "".join(f"          {key}: {_yaml(value)}\n" for key, value in body.items())
    text = _SENT.format(doing=json.dumps(doing), path=path, method=method, body=lines, asked=_ASKED)
    if wait:
        text += _FOLLOWED.replace("{asked}", _ASKED)
    that = _PLAN_IS_GOOD if dry_run else _DONE if wait else _ACCEPTED
    return text + _JUDGED.format(that=that)


def _yaml(value: Any) -> str:
    """A value in YAML's flow style. What looks like a template is marked as not being one."""
    if isinstance(value, str):
        quoted = '"' + "".join(_yaml_character(character) for character in value) + '"'
        return f"!unsafe {quoted}" if "{" in value else quoted
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = plain(value)  # 1e-05 would be a string in YAML 1.1
        return text if "." in text else text + ".0"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    return str(value)


def _yaml_character(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return "\\" + character
    if 0x20 <= code < 0x7F:
        return character
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


_RENDERERS: dict[Form, Callable[[Request, bool, bool], str]] = {
    "cli": _cli,
    "curl": _curl,
    "python": _python,
    "ansible": _ansible,
}
