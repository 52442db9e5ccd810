"""What a host of a lab sees, and what faults do to it."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from godwit.host.errors import ProgramFailed
from godwit.host.netns import opened_netns, socket_in_netns
from godwit.host.process import is_alive, is_stopped, kill
from godwit.host.shaping import shaping
from godwit.lab import fault
from godwit.lab.handle import Lab
from godwit.lab.layout import MGMT, MIG
from godwit.lab.probe import Prober, analyse
from godwit.model.errors import InvalidRequest, NotFound, Unavailable

pytestmark = pytest.mark.system


def sh(lab: Lab, where: str, script: str) -> str:
    return lab.run(where, ["sh", "-c", script], timeout=20).decode().strip()


def test_a_host_sees_its_own_things_only(shared: Lab) -> None:
    state = shared.layout.state
    assert sh(shared, "host1", "ls /etc/godwit") == "host.toml\nmigration-tls\ntls\nunits.json"
    keys = [sh(shared, host, "cat /etc/godwit/tls/key.pem") for host in ("host1", "host2")]
    assert keys[0] != keys[1]
    assert (state / "pki/ca-key.pem").exists()
    for path in (state, "/run/gw", Path.home() / ".config"):
        with pytest.raises(ProgramFailed):
            sh(shared, "host1", f"ls {path}")
    sh(shared, "host1", "touch /etc/godwit/x")  # certificates are renewed there
    assert "x" not in sh(shared, "host2", "ls /etc/godwit").split()
    sh(shared, "host1", "rm /etc/godwit/x")
    sh(shared, "host1", "echo ours > /clusterstorage/shared/x")
    assert (
        sh(shared, "host2", "cat /clusterstorage/shared/x; rm /clusterstorage/shared/x") == "ours"
    )
    assert sh(shared, "host1", "stat -c %U /clusterstorage/shared") == "godwit-qemu"


def test_a_host_sees_its_own_processes_only(shared: Lab) -> None:
    seen = sh(shared, "host1", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; hostname")
    assert "host1" in seen
    assert "host2" not in seen
    # What it starts is in its own group, and there it is the top.
    assert sh(shared, "host1", "grep freezer /proc/1/cgroup").endswith(
        shared.layout.cgroup("host1")
    )
    assert "godwit-lab" not in sh(shared, "host1", "ls /sys/fs/cgroup/* 2>/dev/null || true")


def test_a_host_cannot_open_anothers_sockets(shared: Lab) -> None:
    path = "/run/godwit/guard.sock"
    serve = (
        f"import socket,os;s=socket.socket(socket.AF_UNIX);s.bind('{path}');s.listen();"
        "os.fork() and os._exit(0);[os.close(f) for f in (0,1,2)];s.accept();s.accept()"
    )
    call = f"import socket;s=socket.socket(socket.AF_UNIX);s.connect('{path}')"
    shared.run("host1", [sys.executable, "-c", serve])
    shared.run("host1", [sys.executable, "-c", call])  # the check can succeed
    with pytest.raises(ProgramFailed, match="FileNotFoundError"):
        shared.run("host2", [sys.executable, "-c", call])
    # Neither by way of /proc, where root on the real machine finds it.
    reached = shared.root_of("host1") / path[1:]
    assert reached.is_socket()
    with pytest.raises(ProgramFailed):
        sh(shared, "host2", f"ls {reached}")


def test_secrets_are_for_their_owner(shared: Lab) -> None:
    state = shared.layout.state
    secrets = [shared.layout.token, state / "pki/ca-key.pem"]
    secrets += [*state.glob("nodes/*/etc/*tls/key.pem"), state / "nodes/control/etc/tokens"]
    assert len(secrets) == 7
    assert [path.stat().st_mode & 0o077 for path in secrets] == [0] * 7
    line = sh(shared, "host1", "ls -l /etc/godwit/migration-tls/server-key.pem")
    assert "-rw-r-----" in line
    assert "godwit-qemu" in line
    as_qemu = ["setpriv", "--reuid=godwit-qemu", "--regid=godwit-qemu", "--clear-groups"]
    shared.run("host1", [*as_qemu, "cat", "/etc/godwit/migration-tls/server-key.pem"])
    with pytest.raises(ProgramFailed, match="Permission denied"):
        shared.run("host1", [*as_qemu, "cat", "/etc/godwit/tls/key.pem"])


def transfer(lab: Lab, sender: str, receiver: str, size: int) -> float:
    """Seconds that so many bytes take over the migration network."""
    listener = _socket(lab, receiver)
    address = lab.layout.address(receiver, MIG)
    listener.bind((address, 0))
    listener.listen()
    got = [0]

    def take() -> None:
        with listener.accept()[0] as channel:
            while chunk := channel.recv(1 << 20):
                got[0] += len(chunk)

    taker = threading.Thread(target=take)
    taker.start()
    with _socket(lab, sender) as channel:
        channel.connect((address, listener.getsockname()[1]))
        start = time.monotonic()
        channel.sendall(bytes(size))
        channel.shutdown(socket.SHUT_WR)
        taker.join(20)
    listener.close()
    assert got[0] == size
    return time.monotonic() - start


def _socket(lab: Lab, host: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    with opened_netns(lab.layout.netns(host)) as descriptor:
        made = socket_in_netns(descriptor, kind=kind)
    made.settimeout(5)
    return made


def test_the_migration_network_is_limited_both_ways(shared: Lab) -> None:
    size = 2_000_000
    least = (size - 140_000) * 8 / 80e6  # what fits into the buckets is free
    for sender, receiver in (("host1", "host2"), ("host2", "host1")):
        assert transfer(shared, sender, receiver, size) > least * 0.95
    ends = [(MIG.port, "host1"), ("host1-mig", "switch")]
    for port, place in ends:
        made = shaping(port, netns=shared.layout.netns(place))
        assert made is not None
        assert made.rate_bits == 80_000_000
    assert shaping("host1-mgmt", netns=shared.layout.netns("switch")) is None


def reaches(lab: Lab, host: str, other: str) -> bool:
    """Whether datagrams of a host arrive at another one."""
    with (
        _socket(lab, other, socket.SOCK_DGRAM) as taker,
        _socket(lab, host, socket.SOCK_DGRAM) as sender,
    ):
        taker.settimeout(0.5)
        taker.bind((lab.layout.address(other, MGMT), 0))
        try:
            sender.sendto(b"?", taker.getsockname())
            return taker.recv(10) == b"?"
        except OSError:
            return False


@pytest.mark.parametrize(("how", "carrier"), [("black-hole", "1"), ("cable", "0")])
def test_a_cut_network_and_its_mending(shared: Lab, how: str, carrier: str) -> None:
    look = "cat /sys/class/net/mgmt0/carrier"
    assert reaches(shared, "host1", "host2")
    fault.cut_network(shared, "host1", "mgmt", how=how)  # type: ignore[arg-type]
    try:
        assert not reaches(shared, "host1", "host2")
        assert sh(shared, "host1", look) == carrier
        host = shared.status()["hosts"][0]
        assert host["networks"]["mgmt"] == ("black-hole" if how == "black-hole" else "down")
    finally:
        fault.restore_network(shared, "host1", "all")
    assert sh(shared, "host1", look) == "1"
    # A bridge learns again which port leads where once the cable is back; nothing tells of it.
    until = time.monotonic() + 10
    while not reaches(shared, "host1", "host2"):
        assert time.monotonic() < until
    with pytest.raises(InvalidRequest, match="no network"):
        fault.cut_network(shared, "host1", "nonet")


def until_ready(lab: Lab, where: str, unit: str, starts: int) -> dict[str, object]:
    limit = time.monotonic() + 10
    while True:
        view: dict[str, object] = lab.tell(where, "status")["units"][unit]
        if view["ready"] and view["starts"] == starts:
            return view
        assert time.monotonic() < limit, view
        time.sleep(0.02)


def starts(lab: Lab, where: str, unit: str) -> int:
    return int(lab.tell(where, "status")["units"][unit]["starts"])


def test_killed_daemons_come_back(shared: Lab) -> None:
    for where, unit in (("host1", "agent"), ("host2", "guard"), ("control", "store")):
        count, at = starts(shared, where, unit), time.monotonic()
        target = fault.kill_process(shared, where, unit)
        until_ready(shared, where, unit, count + 1)
        assert time.monotonic() - at < 1.5
        assert not is_alive(target)


def test_a_frozen_daemon_is_replaced_by_its_watchdog(shared: Lab) -> None:
    count, at = starts(shared, "host1", "guard"), time.monotonic()
    target = fault.freeze_process(shared, "host1", "guard")
    assert is_stopped(target)
    view = until_ready(shared, "host1", "guard", count + 1)
    assert view["watchdog_kills"] == 1
    assert 1.5 < time.monotonic() - at < 4.0


def test_a_held_daemon_stays_frozen_until_it_thaws(shared: Lab) -> None:
    count = starts(shared, "host2", "agent")
    target = fault.freeze_process(shared, "host2", "agent", hold=True)
    time.sleep(2.4)  # longer than its watchdog
    assert fault.frozen(shared, "host2", "agent")
    fault.thaw_process(shared, "host2", "agent")
    time.sleep(0.3)
    assert shared.process("host2", "agent") == target
    assert not is_stopped(target)
    assert starts(shared, "host2", "agent") == count


def test_a_held_kill_stays_dead_until_it_thaws(shared: Lab) -> None:
    count = starts(shared, "host2", "guard")
    fault.kill_process(shared, "host2", "guard", hold=True)
    time.sleep(0.3)
    with pytest.raises(NotFound, match="does not run"):
        shared.process("host2", "guard")
    fault.thaw_process(shared, "host2", "guard")
    until_ready(shared, "host2", "guard", count + 1)


def test_orphans_outlive_the_unit_and_are_reaped(shared: Lab) -> None:
    """As QEMU does when its agent is killed."""
    sh(shared, "host1", "setsid --fork sleep 0.9 >/dev/null 2>&1")
    fault.restart_daemon(shared, "host1", "agent")
    assert "(sleep)" in sh(shared, "host1", "cat /proc/[0-9]*/stat")
    limit = time.monotonic() + 3
    while "sleep" in (left := sh(shared, "host1", "cat /proc/[0-9]*/stat | cut -d' ' -f2,3")):
        assert time.monotonic() < limit, left
        time.sleep(0.05)
    assert "Z" not in left.split()


def test_power_off_and_on(shared: Lab) -> None:
    sh(shared, "host2", "echo kept > /var/lib/godwit/x; echo lost > /run/x")
    first, boot = shared.init("host2"), boot_id(shared, "host2")
    assert boot == boot_id(shared, "host2") != boot_id(shared, "host1")
    lab = fault.power_off(shared, "host2")
    assert not is_alive(first)
    assert not reaches_powerless(lab)
    assert lab.status()["hosts"][1]["state"] == "off"
    assert set(lab.status()["hosts"][1]["networks"].values()) == {"down"}
    with pytest.raises(Unavailable, match="off"):
        fault.power_off(lab, "host2")
    with pytest.raises(Unavailable, match="off"):
        fault.restore_network(lab, "host2", "all")
    lab = fault.power_on(lab, "host2")
    assert sh(lab, "host2", "cat /var/lib/godwit/x; ls /run/x 2>&1 || true").startswith("kept\nls:")
    assert boot_id(lab, "host2") not in (boot, boot_id(lab, "host1"))  # this is another boot
    assert reaches(lab, "host1", "host2")
    assert lab.tell("host2", "status")["units"]["agent"]["ready"]


def boot_id(lab: Lab, host: str) -> str:
    return sh(lab, host, "cat /proc/sys/kernel/random/boot_id").strip()


def reaches_powerless(lab: Lab) -> bool:
    """A powered-off host must not even refuse a connection."""
    with _socket(lab, "host1") as channel:
        channel.settimeout(0.5)
        try:
            channel.connect((lab.layout.address("host2", MGMT), 1))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return True


def test_the_probe_measures_a_known_silence(shared: Lab) -> None:
    """An echo at the far end of the VM network that stops answering for 150 ms."""
    sh(shared, "host1", "ip address add 10.91.0.200/22 dev br-lan")
    gone = threading.Event()
    done = threading.Event()
    echo = _socket(shared, "host1", socket.SOCK_DGRAM)
    echo.bind(("10.91.0.200", 7))
    echo.settimeout(0.2)

    def serve() -> None:
        while not done.is_set():
            try:
                data, sender = echo.recvfrom(64)
            except TimeoutError:
                continue
            if not gone.is_set():
                echo.sendto(data, sender)

    with opened_netns(shared.layout.netns("client")) as descriptor:
        channel = socket_in_netns(descriptor, kind=socket.SOCK_DGRAM)
    server = threading.Thread(target=serve)
    server.start()
    timer = threading.Timer(0.5, gone.set), threading.Timer(0.65, gone.clear)
    try:
        for one in timer:
            one.start()
        report = analyse(Prober(channel, "10.91.0.200").run(seconds=1.2))
    finally:
        for one in timer:
            one.join()
        done.set()
        server.join()
        echo.close()
        channel.close()
        sh(shared, "host1", "ip address del 10.91.0.200/22 dev br-lan")
    assert report.sent == 1200
    assert 100 < report.lost < 300
    assert 120 < report.blackout_ms < 300
    assert 120 < report.silence_ms < 300


def test_a_process_is_found_by_the_real_machines_number(shared: Lab) -> None:
    agent = shared.process("host1", "agent")
    assert Path(f"/proc/{agent.pid}/cgroup").read_text().count(shared.layout.cgroup("host1")) > 0
    for where, what in (("host1", "store"), ("control", "agent"), ("host1", "qemu:none")):
        with pytest.raises(NotFound):
            shared.process(where, what)
    kill(agent)
    shared.tell("host1", "wait-ready")
