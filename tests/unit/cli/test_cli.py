"""The command line against a cluster on a real socket: output, errors, exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from godwit.cli import session, tables
from godwit.cli.main import godwit, run
from godwit.cli.session import say_json
from godwit.client.sync import Client
from godwit.model.errors import ALL, Conflict, GodwitError, InvalidRequest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = [sys.executable, "-c", "from godwit.cli.main import main; main()"]

LIST = """\
NAME  STATE    HOST   CPUS   MEMORY  HA  REASON
web   running  host1     2  512 MiB  no  -
"""
HOSTS = """\
NAME   STATE  VMS  CPUS  MEMORY   FREE  GODWIT  REASON
host1  up       1     4   8 GiB  6 GiB  -       -
host2  up       0     4   8 GiB  6 GiB  -       -
"""


def godwit_(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(list(words))
    out, err = capfd.readouterr()
    return code, out, err


def two_lines(err: str) -> tuple[str, str]:
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("hint: ")
    return first.removeprefix("error: "), second.removeprefix("hint: ")


def test_a_manager_that_does_not_know_a_field_is_asked_for_all(
    api: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = Client.rows, []

    def rows(self: Client, noun: str, *, fields: Any = (), **only: Any) -> Any:
        asked.append(fields)
        if fields:
            raise InvalidRequest("there is no field 'version'", hint="choose another")
        return whole(self, noun, **only)

    monkeypatch.setattr(Client, "rows", rows)
    assert godwit_(capfd, "host", "list") == (0, HOSTS, "")
    assert [bool(fields) for fields in asked] == [True, False]


def test_lists_and_single_objects(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert godwit_(capfd, "vm", "list") == (0, LIST, "")
    assert godwit_(capfd, "host", "list") == (0, HOSTS, "")
    code, out, err = godwit_(capfd, "vm", "show", "web")
    assert (code, err) == (0, "")
    assert "memory" in out
    assert "512 MiB" in out
    for noun in ("network", "volume", "migration", "task"):
        assert godwit_(capfd, noun, "list")[0] == 0


def test_a_table_is_made_of_the_fields_that_are_asked_for(api: Any) -> None:
    for noun, fields in tables.FIELDS.items():
        rows = list(api.rows[f"{noun}s"].values())
        assert rows
        few = [{field: row[field] for field in fields if field in row} for row in rows]
        assert tables.table(noun, few) == tables.table(noun, rows)


def test_a_long_list_is_json_with_a_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"name": f"vm{number}", "host": None, "said": "größer"} for number in range(5)]
    say_json(rows)
    short = capsys.readouterr().out
    monkeypatch.setattr(session, "_LONG_LIST", 4)
    say_json(rows)
    long = capsys.readouterr().out
    assert json.loads(short) == json.loads(long) == rows
    assert len(long.splitlines()) == 7


DISKS = """\
ID     LUN   SIZE  FORMAT  TIER      VOLUME  PATH
disk0    0  2 GiB  vhdx    brokered  shared  /clusterstorage/shared/web/disk0.vhdx
"""
VOLUMES = """\
NAME    KIND  HEALTH      USED  CAPACITY  HOSTS
shared  dir   degraded  30 GiB   100 GiB  host1, host2 (redirected)
"""


def test_disks_and_volumes_are_shown(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert godwit_(capfd, "vm", "disk", "list", "web") == (0, DISKS, "")
    code, out, _ = godwit_(capfd, "vm", "disk", "list", "web", "-o", "json")
    assert (code, [row["id"] for row in json.loads(out)]) == (0, ["disk0"])
    assert godwit_(capfd, "vm", "disk", "list", "nope")[0] == 3
    assert godwit_(capfd, "volume", "list") == (0, VOLUMES, "")
    sheet = godwit_(capfd, "volume", "show", "shared")[1]
    assert "host2: state=redirected reason=lost path to LUN 3" in sheet


@pytest.mark.parametrize(
    ("words", "path", "body"),
    [
        (
            ["vm", "disk", "add", "web", "shared:2G:vhdx"],
            "/v1/vms/web/disks",
            {"volume": "shared", "size_bytes": 2 << 30, "format": "vhdx"},
        ),
        (
            ["vm", "disk", "add", "web", "shared", "--existing", "a.vhd", "--format", "vhd"],
            "/v1/vms/web/disks",
            {"volume": "shared", "path": "a.vhd", "format": "vhd"},
        ),
        (
            ["vm", "disk", "add", "web", "--device", "/dev/sdb", "--passthrough"],
            "/v1/vms/web/disks",
            {"device": "/dev/sdb", "passthrough": True},
        ),
        (
            ["vm", "disk", "remove", "web", "disk1", "--force", "--keep"],
            "/v1/vms/web/disks/disk1/actions/remove",
            {"force": True, "keep": True},
        ),
        (
            ["vm", "disk", "resize", "web", "disk1", "3G"],
            "/v1/vms/web/disks/disk1/actions/resize",
            {"size_bytes": 3 << 30},
        ),
        (
            ["volume", "create", "fast", "--kind", "local", "--path", "/srv/fast"],
            "/v1/volumes",
            {"name": "fast", "type": "local", "path": "/srv/fast"},
        ),
        (["volume", "delete", "fast"], "/v1/volumes/fast", None),
    ],
)
def test_disk_and_volume_verbs_are_sent(
    api: Any, capfd: pytest.CaptureFixture[str], words: list[str], path: str, body: Any
) -> None:
    code, out, err = godwit_(capfd, *words, "--no-wait")
    assert (code, out, err) == (0, "t-1\n", "")
    assert (api.actions()[0].path, api.actions()[0].json) == (path, body)
    for form in ("cli", "curl", "python", "ansible"):
        assert godwit_(capfd, *words, "--script", form)[0] == 0
    assert godwit_(capfd, *words, "--dry-run")[0] == 2
    assert len(api.actions()) == 1
    # Waited for, it says what came of it.
    assert godwit_(capfd, *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vm", "disk", "add", "web"], "name a volume"),
        (["vm", "disk", "add", "web", "shared:lots"], "is not a size"),
        (["vm", "disk", "add", "web", "shared:1G", "--device", "/dev/sdb"], "no volume"),
        (["vm", "disk", "add", "web", "s:1G:raw", "--format", "vhd"], "said twice"),
        (["vm", "disk", "resize", "web", "disk1", "0"], "is not a usable size"),
        (["vm", "disk", "resize", "web", "DISK", "1G"], "DISK: use lower-case"),
        (["vm", "disk", "resize", "web", "disk1"], "missing argument"),
        (["vm", "disk", "grow"], "there are: add, remove, resize, move, export, list"),
    ],
)
def test_wrong_words_about_disks(
    api: Any, capfd: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, err = godwit_(capfd, *words)
    assert (code, out) == (2, "")
    assert said in two_lines(err)[0]
    assert api.asked == []


def test_json_is_exactly_the_object(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["vm", "list", "-o", "json"], ["-o", "json", "vm", "list"]):
        code, out, err = godwit_(capfd, *words)
        assert (code, err) == (0, "")
        assert json.loads(out) == list(api.rows["vms"].values())
    assert json.loads(godwit_(capfd, "vm", "show", "web", "--output=json")[1])["epoch"] == 3
    # The last word counts.
    assert godwit_(capfd, "-o", "json", "vm", "list", "-o", "table")[1] == LIST


def test_a_move_shows_its_stages_and_its_picture(
    api: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = godwit_(capfd, "vm", "migrate", "web", "--to", "host2")
    assert code == 0
    assert out.startswith("web: host1 → host2 (live), completed in 870 ms, dark 47 ms")
    assert "▓" in out
    stages = [line.rpartition(": ")[2] for line in err.splitlines()]
    assert "precopy" in stages
    assert len(stages) == len(set(stages))
    sent = api.actions()[0]
    assert (sent.path, sent.json) == ("/v1/vms/web/actions/migrate", {"to": "host2"})
    assert sent.headers["x-godwit-client"] == "cli/0.1"


def test_a_move_as_json(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = godwit_(capfd, "vm", "migrate", "web", "-o", "json")
    report = json.loads(out)
    assert code == 0
    assert (report["outcome"], report["blackout_ms"]) == ("completed", 47.0)
    assert report["stages"][0] == {"name": "setup", "start_s": 0.0, "duration_ms": 120.0}


@pytest.mark.parametrize(("fate", "code"), [("failed", 1), ("cancelled", 5), ("unknown", 6)])
def test_a_move_that_does_not_succeed(
    api: Any, capfd: pytest.CaptureFixture[str], fate: str, code: int
) -> None:
    api.fate = fate
    found, out, err = godwit_(capfd, "vm", "migrate", "web", "-o", "json")
    assert found == code
    assert json.loads(out)["outcome"] == fate
    assert "godwit migration show m-1" in two_lines("\n".join(err.splitlines()[-2:]))[1]


@pytest.mark.parametrize("kind", ALL)
def test_every_refusal_has_its_exit_code(
    api: Any, capfd: pytest.CaptureFixture[str], kind: type[GodwitError]
) -> None:
    api.refusal = kind("it cannot\nbe \x1b[31m", hint="do something else")
    code, out, err = godwit_(capfd, "vm", "start", "web")
    assert (code, out) == (kind.exit_code, "")
    assert two_lines(err) == ("it cannot be ?[31m", "do something else")


def test_limits_are_read_with_their_units(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--max-blackout", "200", "--deadline", "10", "--allow-throttle", "--no-wait"]
    code, out, _ = godwit_(capfd, "vm", "migrate", "web", *words)
    assert (code, out) == (0, "t-1\n")
    assert api.actions()[0].json == {
        "max_blackout_ms": 200.0,
        "deadline_s": 10.0,
        "allow_throttle": True,
    }


def test_create_with_everything(
    api: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    words = ["--memory", "512M", "--cpus", "2", "--kernel", str(kernel), "--append", "-v quiet"]
    words += ["--disk", "shared:2G", "--disk", "shared:1G:raw", "--network", "lan", "--ha"]
    code, out, err = godwit_(capfd, "vm", "create", "new", *words, "--host", "host2")
    assert (code, out, err) == (0, "new is stopped\n", "")
    body = api.actions()[-1].json
    assert body.pop("kernel").startswith("/clusterstorage/")
    assert body == {
        "name": "new",
        "memory_bytes": 512 << 20,
        "cpus": 2,
        "append": "-v quiet",
        "disks": [
            {"volume": "shared", "size_bytes": 2 << 30},
            {"volume": "shared", "size_bytes": 1 << 30, "format": "raw"},
        ],
        "networks": ["lan"],
        "host": "host2",
        "ha": True,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("vm migrate web --max-blackout fast", "--max-blackout: 'fast' is not a duration"),
        ("vm migrate web --deadline 0", "--deadline: '0' is not a usable duration"),
        ("vm create web --memory lots", "--memory: 'lots' is not a size"),
        ("vm create web --memory 1K", "--memory: input should be greater than or equal"),
        ("vm create web --memory 1G --disk shared", "--disk: 'shared' is not a disk"),
        ("vm create web --memory 1G --disk shared:1G:zip", "--disk: input should be"),
        ("vm create web --memory 1G --cpus two", "--cpus: 'two' is not a number"),
        ("vm create web", "missing option '--memory'"),
        ("vm start Web!", "name: use lower-case"),
        ("vm migrate web --method slow", "invalid value for '--method'"),
        ("vm migrate", "missing argument"),
        ("vm fly web", "there is no command 'godwit vm fly'; there are: create"),
        ("fly", "there is no command 'godwit fly'; there are:"),
        ("vm list extra", "got unexpected extra argument"),
        ("vm list --wide", "no such option"),
        ("vm list --dry-run", "vm list changes nothing"),
        ("vm start web --dry-run", "vm start has no plan to show"),
    ],
)
def test_garbage_is_one_clear_line(
    api: Any, capfd: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    code, out, err = godwit_(capfd, *words.split())
    assert (code, out) == (2, "")
    assert two_lines(err)[0].startswith(said)
    assert api.asked == []


def test_no_cluster_and_no_manager(
    api: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.stop()
    code, _, err = godwit_(capfd, "vm", "list")
    assert code == 1
    assert api.url in two_lines(err)[0]
    monkeypatch.delenv("GODWIT_URL")
    code, _, err = godwit_(capfd, "vm", "list")
    assert code == 2
    assert two_lines(err)[0] == "no cluster is chosen"
    api.start()


def test_the_plan(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = godwit_(capfd, "vm", "migrate", "web", "--dry-run")
    assert (code, out.splitlines()[1]) == (0, "  ✓ memory: enough")
    code, out, _ = godwit_(capfd, "--dry-run", "vm", "migrate", "web", "-o", "json")
    assert json.loads(out)["destination"] == "host2"
    assert api.rows["tasks"] == {}


def test_tasks_and_migrations(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    task = godwit_(capfd, "vm", "migrate", "web", "--no-wait")[1].strip()
    code, out, _ = godwit_(capfd, "task", "wait", task)
    assert code == 0
    assert out.startswith("web: host1 → host2")
    assert godwit_(capfd, "migration", "show", "m-1")[1].startswith("web: host1 → host2 (live)")
    assert "870 ms" in godwit_(capfd, "migration", "list")[1]
    assert "cli/0.1" in godwit_(capfd, "task", "list")[1]
    assert json.loads(godwit_(capfd, "task", "show", task, "-o", "json")[1])["id"] == task
    api.fate, api.error = "failed", Conflict("too late", hint="let it finish")
    assert godwit_(capfd, "migration", "cancel", "m-1")[0] == 4
    assert godwit_(capfd, "task", "show", "t-99")[0] == 3


def test_verbs_tell_what_came_of_them(api: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert godwit_(capfd, "vm", "start", "web")[1] == "web is running on host1\n"
    assert godwit_(capfd, "vm", "delete", "web")[1] == "Delete VM web: done\n"
    assert godwit_(capfd, "network", "create", "blue")[1] == "network blue is there\n"
    assert json.loads(godwit_(capfd, "vm", "stop", "web", "-o", "json")[1])["name"] == "web"


# Scripts


def sent(api: Any) -> list[tuple[str, str, Any]]:
    return [(one.method, one.path, one.json) for one in api.actions()]


MOVE = ["vm", "migrate", "web", "--to", "host2", "--max-blackout", "150ms"]


@pytest.mark.parametrize("form", ["python", "curl", "cli"])
def test_a_printed_script_does_the_same(
    api: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    assert run(MOVE) == 0
    [typed] = sent(api)
    capfd.readouterr()
    api.asked.clear()
    code, text, err = godwit_(capfd, *MOVE, "--script", form)
    assert (code, err, api.asked) == (0, "", [])
    script = tmp_path / "script"
    script.write_text(text)
    if form == "curl" and shutil.which("curl") is None:
        pytest.skip("no curl here")
    binary = tmp_path / "godwit"
    binary.write_text(f"#!{sys.executable}\nfrom godwit.cli.main import main\nmain()\n")
    binary.chmod(0o755)
    done = subprocess.run(
        [sys.executable if form == "python" else "/bin/sh", script],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sent(api) == [typed]
    if form == "python":
        assert json.loads(done.stdout)["blackout_ms"] == 47.0


def test_a_script_ends_as_its_request_does(
    api: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = godwit_(capfd, *MOVE, "--script", "python")[1]
    api.refusal = Conflict("web is moving", hint="wait for it")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, "web is moving\nwait for it\n")


# The program as a process


def test_an_interrupt_leaves_the_move_going_on(api: Any) -> None:
    api.hold_at = "precopy"
    process = subprocess.Popen(
        [*PROGRAM, "vm", "migrate", "web"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    line = process.stderr.readline()
    while "precopy" not in line:
        line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (6, "")
    assert "move m-1 of web goes on" in two_lines(err)[0]
    assert "godwit migration cancel m-1" in two_lines(err)[1]
    assert api.rows["migrations"]["m-1"]["state"] == "running"


def test_output_into_a_closed_pipe_is_no_traceback(api: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PROGRAM, "vm", "list"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("run(['vm', '--help'])", "asyncio ssl pydantic rich godwit.client.api"),
        ("run(['vm', 'list'])", "pydantic rich websockets godwit.model.vm"),
        ("run(['vm', 'start', 'web'])", "rich websockets"),
    ],
)
def test_commands_import_only_what_they_need(api: Any, code: str, heavy: str) -> None:
    program = f"import sys; from godwit.cli.main import run; {code}; "
    program += f"print([m for m in {heavy.split()} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


# Around it


def test_other_packages_bring_nouns(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Point:
        def load(self) -> click.Command:
            return click.Command("zoo", callback=lambda: click.echo("animals"))

    def points(*, group: str, name: str) -> list[Point]:
        return [Point()] if (group, name) == ("godwit.cli", "zoo") else []

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    assert godwit_(capfd, "zoo") == (0, "animals\n", "")


def complete(api: Any, words: str, **environment: str) -> list[str]:
    position = str(len(words.split()) - (0 if words.endswith(" ") else 1))
    extra = {"_GODWIT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": position}
    done = subprocess.run(
        PROGRAM, env=os.environ | extra | environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.split()]


def test_completion(api: Any) -> None:
    assert complete(api, "godwit vm mig") == ["migrate"]
    assert "network" in complete(api, "godwit ")
    assert complete(api, "godwit vm migrate w") == ["web"]
    assert complete(api, "godwit vm migrate web --to ") == ["host1", "host2"]
    assert "--max-blackout" in complete(api, "godwit vm migrate web --m")
    assert complete(api, "godwit vm migrate ", GODWIT_URL="https://127.0.0.1:1") == []


def test_what_is_generated_is_up_to_date() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "docs-cli", "--check"], check=True)
    shell = ROOT / "packaging" / "completion" / "godwit.bash"
    subprocess.run(["/bin/bash", "-n", shell], check=True)


def test_help_everywhere(capfd: pytest.CaptureFixture[str]) -> None:
    context = click.Context(godwit)
    for noun in ("host", "vm", "network", "volume", "migration", "task", "event"):
        group = godwit.get_command(context, noun)
        assert isinstance(group, click.Group)
        for verb in group.commands:
            code, out, err = godwit_(capfd, noun, verb, "-h")
            assert (code, err) == (0, "")
            assert f"godwit {noun} {verb}" in out
    assert godwit_(capfd)[0] == 2
    assert godwit_(capfd, "--version")[1].startswith("godwit ")
