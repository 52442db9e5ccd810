"""QEMU itself judges the migration credentials: one real stream over TLS, and three refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from godwit.wire.ca import ClusterCa, write_qemu_credentials
from godwit.wire.identity import migration_dns

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"),
]


class Qemu:
    """Just enough of a monitor for one migration."""

    def __init__(self, monitor: socket.socket) -> None:
        self._file = monitor.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        self._file.write(json.dumps({"execute": name, "arguments": arguments or {}}) + "\n")
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline())):
            pass
        return answer["return"]

    def close(self) -> None:
        self._file.close()


@contextmanager
def qemu(credentials: Path, endpoint: str, *extra: str) -> Iterator[Qemu]:
    ours, theirs = socket.socketpair()
    tls = f"tls-creds-x509,id=tls,dir={credentials},endpoint={endpoint},verify-peer=yes"
    argv = ["qemu-system-x86_64", "-S", "-machine", "q35,accel=tcg", "-m", "32"]
    argv += ["-display", "none", "-nodefaults", "-object", tls]
    argv += ["-chardev", f"socket,id=q,fd={theirs.fileno()}", "-mon", "chardev=q,mode=control"]
    with ours, subprocess.Popen([*argv, *extra], pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        try:
            ours.settimeout(20)
            monitor = Qemu(ours)
            monitor("migrate-set-parameters", {"tls-creds": "tls"})
            yield monitor
            monitor.close()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qemu-tls")
    cluster, stranger = ClusterCa.create(cluster="a"), ClusterCa.create(cluster="b")
    for host in ("host1", "host2"):
        write_qemu_credentials(root / host, cluster, host=host, gid=os.getgid())
    write_qemu_credentials(root / "stranger", stranger, host="host2", gid=os.getgid())
    return root


@pytest.mark.parametrize(
    ("source", "destination", "asked_for", "wanted"),
    [
        ("host1", "host2", "host2", "completed"),
        ("host1", "host2", "host3", "does not match the hostname"),
        ("stranger", "host2", "host2", "known issuer"),
        ("host1", "stranger", "host2", "known issuer"),
    ],
)
def test_qemu_accepts_ours_and_refuses_others(
    credentials: Path, source: str, destination: str, asked_for: str, wanted: str
) -> None:
    with (
        qemu(credentials / destination, "server", "-incoming", "defer") as there,
        qemu(credentials / source, "client") as here,
    ):
        there("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        port = there("query-migrate")["socket-address"][0]["port"]
        here("migrate-set-parameters", {"tls-hostname": migration_dns(asked_for)})
        here("migrate", {"uri": f"tcp:127.0.0.1:{port}"})
        deadline = time.monotonic() + 15
        state: dict[str, Any] = {}
        while state.get("status") not in ("completed", "failed") and time.monotonic() < deadline:
            state = here("query-migrate")
        assert wanted in f"{state['status']} {state.get('error-desc', '')}"


def test_the_private_keys_are_for_the_group_only(credentials: Path) -> None:
    for side in ("server", "client"):
        assert (credentials / "host1" / f"{side}-key.pem").stat().st_mode & 0o777 == 0o640
    assert (credentials / "host1").stat().st_mode & 0o777 == 0o750
