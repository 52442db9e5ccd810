"""IPMI against OpenIPMI's simulator, and what programs are told and see."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from godwit.host.clock import RealClock
from godwit.host.process import kill, spawn
from godwit.model.power import PowerConfig, PowerState
from godwit.power.choose import driver_of
from godwit.power.device import Confirmed
from godwit.power.errors import PowerDenied, PowerFailed, PowerNotConfirmed, PowerUnavailable
from godwit.power.ipmi import split_place

PASSWORD = "fifteen-letters"
LAN = """\
name "simulator"
set_working_mc 0x20
  startlan 1
    addr 127.0.0.1 {port}
    priv_limit admin
    allowed_auths_callback none md2 md5 straight
    allowed_auths_user none md2 md5 straight
    allowed_auths_operator none md2 md5 straight
    allowed_auths_admin none md2 md5 straight
    guid a123456789abcdefa123456789abcdef
  endlan
  chassis_control "{control}"
  user 1 true "" "none" user 10 none md2 md5 straight
  user 2 true "admin" "{password}" admin 10 none md2 md5 straight
"""
COMMANDS = """\
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02 persist_sdr
mc_enable 0x20
"""
CONTROL = """\
#!/bin/sh
# called with: get power, or: set power VALUE
while [ $# -gt 0 ]; do
  case "$1" in
    get) shift; [ "$1" = power ] && echo "power:$(cat {state})" ;;
    set) shift; [ "$1" = power ] && {{ shift; [ -e {deaf} ] || echo "$1" >{state}; }} ;;
  esac
  shift
done
exit 0
"""
needs_ipmi = pytest.mark.skipif(
    not (shutil.which("ipmi_sim") and shutil.which("ipmitool")), reason="no ipmi_sim or ipmitool"
)


class Simulator:
    """A running ipmi_sim whose chassis is two files."""

    def __init__(self, folder: Path) -> None:
        self.state, self.deaf = folder / "power", folder / "deaf"
        self.state.write_text("1\n")
        control = folder / "control"
        control.write_text(CONTROL.format(state=self.state, deaf=self.deaf))
        control.chmod(0o755)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = {"port": self.port, "control": control, "password": PASSWORD}
        (folder / "lan.conf").write_text(LAN.format(**words))
        (folder / "commands").write_text(COMMANDS)
        (folder / "state").mkdir()
        argv = ["ipmi_sim", "-n", "-c", str(folder / "lan.conf")]
        argv += ["-f", str(folder / "commands"), "-s", str(folder / "state")]
        self.log = folder / "log"
        self.process = spawn(argv, stdout=self.log, stderr=self.log)

    def device(self, password: str = PASSWORD) -> Confirmed:
        config = PowerConfig(
            type="ipmi",
            address=f"127.0.0.1:{self.port}",
            user="admin",
            password="(sealed)",
            options={"cipher": "3"},
        )
        return Confirmed(driver_of(config, password), RealClock())


@pytest.fixture
async def simulator(tmp_path: Path) -> AsyncIterator[Simulator]:
    made = Simulator(tmp_path)
    try:
        async with asyncio.timeout(20):
            while True:  # it announces nothing
                try:
                    await made.device().state(deadline_s=2)
                    break
                except PowerUnavailable:
                    await asyncio.sleep(0.05)
        yield made
    finally:
        kill(made.process)
        await asyncio.to_thread(os.waitpid, made.process.pid, 0)


@needs_ipmi
async def test_ipmi_off_is_read_back_from_a_real_bmc_simulator(simulator: Simulator) -> None:
    device = simulator.device()
    assert await device.state(deadline_s=10) is PowerState.ON
    proof = await device.off(deadline_s=20)
    assert (proof.state, proof.commands) == (PowerState.OFF, 1)
    assert simulator.state.read_text() == "0\n"
    assert (await device.on(deadline_s=20)).state is PowerState.ON


@needs_ipmi
async def test_ipmi_that_accepts_and_does_nothing_is_no_proof(simulator: Simulator) -> None:
    simulator.deaf.touch()
    with pytest.raises(PowerNotConfirmed, match=r"never said off|not seen within"):
        await simulator.device().off(deadline_s=2)


@needs_ipmi
async def test_ipmi_tells_a_wrong_password_from_silence(simulator: Simulator) -> None:
    with pytest.raises(PowerDenied) as caught:
        await simulator.device("another").off(deadline_s=15)
    assert "another" not in f"{caught.value.message}{caught.value.hint}"
    kill(simulator.process)
    with pytest.raises(PowerUnavailable):
        await simulator.device().state(deadline_s=1)


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


async def test_no_secret_is_on_a_command_line(programs: Path) -> None:
    note = programs / "note"
    see = f"""
        tr '\\0' ' ' </proc/$$/cmdline >>{note}
        cat >/dev/null
        echo Chassis Power is off
    """
    _program(programs, "ipmitool", see)
    _program(programs, "fence_seen", see)
    common: dict[str, Any] = {"address": "192.0.2.1", "user": "admin", "password": "(sealed)"}
    for more in ({"type": "ipmi"}, {"type": "fence-agent", "agent": "fence_seen"}):
        driver = driver_of(PowerConfig(**common, **more), PASSWORD)
        await driver.read(deadline_s=10)
    seen = note.read_text()
    assert "chassis power status" in seen
    assert "fence_seen" in seen
    assert PASSWORD not in seen


async def test_a_fence_agent_gets_lines_and_answers_by_its_status(programs: Path) -> None:
    _program(programs, "fence_note", f"cat >{programs}/said; exit $(cat {programs}/status)")
    config = PowerConfig(
        type="fence-agent",
        agent="fence_note",
        address="192.0.2.1:8443",
        user="admin",
        password="(sealed)",
        options={"plug": "7"},
    )
    driver = driver_of(config, PASSWORD)
    answers = {"0": PowerState.ON, "2": PowerState.OFF}
    for status, state in answers.items():
        (programs / "status").write_text(status)
        assert await driver.read(deadline_s=5) is state
    said = (programs / "said").read_text().splitlines()
    assert sorted(said) == sorted(
        [
            *("action=status", "plug=7", "ip=192.0.2.1", "ipport=8443"),
            *("username=admin", f"password={PASSWORD}"),
        ]
    )
    (programs / "status").write_text("1")
    with pytest.raises(PowerFailed, match="exit status 1"):
        await driver.read(deadline_s=5)
    # "done" of an agent is no proof: its status still says on
    (programs / "status").write_text("0")
    with pytest.raises(PowerNotConfirmed):
        await Confirmed(driver, RealClock()).off(deadline_s=0.5)


async def test_an_agent_that_hangs_is_ended(programs: Path) -> None:
    _program(programs, "fence_hang", "exec sleep 60")
    config = PowerConfig(
        type="fence-agent", agent="fence_hang", address="a", user="u", password="(sealed)"
    )
    with pytest.raises(PowerUnavailable, match="did not answer"):
        await driver_of(config, PASSWORD).read(deadline_s=0.3)


async def test_what_an_agent_says_is_shown_without_the_password(programs: Path) -> None:
    _program(programs, "fence_talk", f"echo 'login {PASSWORD} is wrong' >&2; exit 1")
    config = PowerConfig(
        type="fence-agent", agent="fence_talk", address="a", user="u", password="(sealed)"
    )
    with pytest.raises(PowerDenied, match=r"login \*\*\* is wrong"):
        await driver_of(config, PASSWORD).read(deadline_s=5)


async def test_a_program_that_is_not_installed_says_where_it_is_from() -> None:
    config = PowerConfig(
        type="fence-agent", agent="fence_nowhere", address="a", user="u", password="(sealed)"
    )
    with pytest.raises(PowerFailed, match="fence_nowhere is not installed") as caught:
        await driver_of(config, PASSWORD).read(deadline_s=5)
    assert "fence-agents" in caught.value.hint


def test_places() -> None:
    assert split_place("192.0.2.1", 623) == ("192.0.2.1", 623)
    assert split_place("bmc.example:6230", 623) == ("bmc.example", 6230)
    assert split_place("[fd00::1]", 623) == ("fd00::1", 623)
    assert split_place("[fd00::1]:77", 623) == ("fd00::1", 77)
