"""The units as systemd reads them, and what must never be changed in them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGING = ROOT / "packaging"
BIN = Path(sys.executable).parent
DAEMONS = ("store", "manager", "guard", "agent", "iofence")
ANALYZE = shutil.which("systemd-analyze")


def unit(daemon: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string((PACKAGING / "systemd" / f"godwit-{daemon}.service").read_text())
    return found


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    assert ANALYZE is not None
    for daemon in DAEMONS:
        name = f"godwit-{daemon}.service"
        text = (PACKAGING / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/bin/godwit-", f"{BIN}/godwit-"))

    def verify() -> tuple[int, str]:
        units = sorted(map(str, tmp_path.glob("*.service")))
        done = subprocess.run(
            [ANALYZE, "verify", "--man=no", *units], capture_output=True, text=True, check=False
        )
        mine = [line for line in done.stderr.splitlines() if "godwit" in line]
        return done.returncode, "\n".join(mine)

    assert verify() == (0, "")
    # What it would not understand it says.
    with (tmp_path / "godwit-agent.service").open("a") as stream:
        stream.write("\n[Service]\nKilMode=process\n")
    assert "KilMode" in verify()[1]


@pytest.mark.parametrize("daemon", DAEMONS)
def test_each_says_when_it_is_ready_and_is_watched(daemon: str) -> None:
    service = unit(daemon)["Service"]
    assert service["Type"] == "notify"
    assert service["WatchdogSec"]
    assert service["Restart"] == "always"
    assert service["ExecStart"].startswith(f"/usr/bin/godwit-{daemon} --config /etc/godwit/")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert f"godwit-{daemon}" in scripts


def test_vms_outlive_their_agent_and_its_unit() -> None:
    service = unit("agent")["Service"]
    assert service["KillMode"] == "process"
    # A mount namespace of its own would be that of its VMs, too, and theirs for longer.
    sandbox = ("Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary")
    assert [key for key in service if key.startswith(sandbox) and service[key] != "no"] == []
    for daemon in ("agent", "guard"):
        assert unit(daemon)["Service"]["RuntimeDirectoryPreserve"] == "yes"


def test_who_serves_people_is_no_root() -> None:
    users = {line.split()[1] for line in _lines("sysusers.d/godwit.conf") if line[0] == "u"}
    for daemon in ("manager", "store"):
        service = unit(daemon)["Service"]
        assert service["User"] in users
        assert service["CapabilityBoundingSet"] == ""
        assert service["ProtectSystem"] == "strict"
    assert "godwit-qemu" in users


def test_the_units_name_the_directories_that_init_writes_into_configurations() -> None:
    from godwit.form.places import HostFacts, Places, host_config, manager_config, store_config

    places = Places()
    host: dict[str, Any] = host_config(places, HostFacts(name="h", address="10.0.0.1"), ())
    manager = manager_config(places, address="10.0.0.1", endpoints=(), embedded=True)
    store = store_config(places, address="10.0.0.1")
    states = {
        "agent": host["paths"]["state"],
        "guard": host["paths"]["state"],
        "manager": manager["paths"]["state"],
        "store": store["store"]["data"],
    }
    for daemon, path in states.items():
        assert f"/var/lib/{unit(daemon)['Service']['StateDirectory']}" == path
    for daemon in ("agent", "guard"):
        assert f"/run/{unit(daemon)['Service']['RuntimeDirectory']}" == host["paths"]["run"]
    assert f"/run/{unit('store')['Service']['RuntimeDirectory']}/" in store["store"]["listen"][1]
    writable = unit("manager")["Service"]["ReadWritePaths"].replace("-/", "/").split()
    assert {*manager["tls"]["keeps"], manager["tls"]["dir"], manager["ca"]["dir"]} == set(writable)


def test_install_puts_all_of_it_in_place(tmp_path: Path) -> None:
    command = [PACKAGING / "install", "--destdir", tmp_path, "--venv", "/opt/other"]
    subprocess.run(command, check=True)
    units = {path.name for path in (tmp_path / "usr/lib/systemd/system").iterdir()}
    assert units == {f"godwit-{daemon}.service" for daemon in DAEMONS}
    for name in ("godwit", *(f"godwit-{daemon}" for daemon in DAEMONS)):
        assert str((tmp_path / "usr/bin" / name).readlink()) == f"/opt/other/bin/{name}"
    assert (tmp_path / "usr/lib/sysusers.d/godwit.conf").is_file()


def _lines(name: str) -> list[str]:
    text = (PACKAGING / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]
