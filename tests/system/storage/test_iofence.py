"""The fencing daemon against a real tgtd and a real nfs-ganesha, on a lab's storage node."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from godwit.host.netns import in_netns, opened_netns
from godwit.host.process import Process, is_alive, kill, spawn, wait_exit
from godwit.host.run import run, with_netns
from godwit.lab import fault, leaks, serving
from godwit.lab.configs import STATE
from godwit.lab.down import down
from godwit.lab.handle import Lab
from godwit.lab.layout import CONTROL, OPERATOR, STORAGE, Layout, StorageKind
from godwit.lab.options import Options
from godwit.lab.up import up
from godwit.manager.cutting import HttpDaemons
from godwit.model.errors import NotFound, Unavailable
from godwit.model.fencing import CutAsk, CutDone, FenceStatus, place_of
from godwit.model.volume import Volume
from godwit.storage.places import initiator_name
from godwit.wire.identity import Identity

pytestmark = [pytest.mark.system]
SBIN = "/usr/sbin:/usr/bin"
MIB = 1 << 20
PATIENCE_S = 20.0


class Fenced:
    """A lab whose storage node serves, and its daemon as a manager on the control node asks it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.layout = lab, lab.layout
        volumes = serving.volumes(self.layout)
        self.volume: Volume = next(one for one in volumes if one.kind == self.layout.storage)
        if self.volume.kind == "nfs":
            self.file = self.layout.volume / "disk.raw"
            self.file.write_bytes(bytes(16 * MIB))
            self.file.chmod(0o666)
        else:
            kept = serving.lun_file(1).relative_to(STATE)
            self.file = self.layout.node_dir(STORAGE) / "state" / kept

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async def ask() -> Any:
            daemons = HttpDaemons(Identity.load(self.layout.pki / OPERATOR))
            try:
                return await daemons.call(
                    self.layout.fence_url, method, path, body, deadline_s=PATIENCE_S
                )
            finally:
                await daemons.aclose()

        return self.inside(CONTROL, ask)

    def inside(self, node: str, work: Callable[[], Awaitable[Any]]) -> Any:
        async def whole() -> Any:
            return await work()

        with opened_netns(self.layout.netns(node)) as space:
            return in_netns(space, lambda: asyncio.run(whole()))

    def status(self) -> FenceStatus:
        return FenceStatus.model_validate(self.call("GET", "/v1/status"))

    def heard(self) -> FenceStatus | None:
        """None while the daemon does not answer."""
        try:
            return self.status()
        except Unavailable:
            return None

    def cut(self, host: str) -> CutDone:
        ask = CutAsk(place=place_of(self.volume), host=host, vm="web", boot_id="b", revision=1)
        return CutDone.model_validate(self.call("POST", "/v1/cuts", ask.model_dump(mode="json")))

    def image(self, host: str) -> list[str]:
        """The options by which qemu-img opens the disk as that host's QEMU would."""
        volume = self.volume
        if volume.kind == "nfs":
            path = f"{volume.export}/{self.file.name}"
            words = f"driver=nfs,server.type=inet,server.host={volume.server},path={path}"
        else:
            words = (
                f"driver=iscsi,transport=tcp,portal={volume.portal}:3260,target={volume.target},"
                f"lun=1,initiator-name={initiator_name('test', host)}"
            )
        return ["--image-opts", f"driver=raw,file.{words.replace(',', ',file.')}"]

    def opens(self, host: str) -> bool:
        """Whether the host's QEMU could open the disk now."""
        try:
            argv = ["qemu-img", "info", *self.image(host)]
            run(argv, timeout=5.0, netns=self.layout.netns(host))
        except Exception:
            return False
        return True

    def writer(self, host: str) -> Process:
        """A process there that writes without end, with eight requests under way."""
        argv = ["qemu-img", "bench", "-w", "-c", "100000000", "-d", "8", "-s", "65536"]
        argv += ["--pattern=165", "-t", "none", *self.image(host)]
        return spawn(with_netns(argv, self.layout.netns(host)))

    def digest(self) -> str:
        with self.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def clear(self) -> None:
        """What is written next shows: the image is read as zeroes, past its server."""
        with self.file.open("r+b") as stream:
            stream.write(bytes(16 * MIB))

    def await_written(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while b"\xa5" not in self.file.read_bytes()[: 16 * MIB]:
            assert time.monotonic() < until, "nothing is written"
            time.sleep(0.02)


@contextmanager
def raised(storage: StorageKind) -> Iterator[Fenced]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program, package in serving.PROGRAMS[storage]:
        if shutil.which(program, path=SBIN) is None:
            pytest.skip(f"{package} is not installed")
    root = Path(tempfile.mkdtemp(prefix="gwfence-"))
    root.chmod(0o755)
    name = "f" + uuid.uuid4().hex[:5]
    layout = Layout(name, 2, "", root, storage=storage)
    before = leaks.take(name)
    try:
        nobody: dict[str, Any] = {CONTROL: (), "host1": (), "host2": ()}
        up(Options(layout, image=False, join=False, units=nobody))
        yield Fenced(Lab.load(name, root=root))
    finally:
        down(name, root=root)
        shutil.rmtree(root, ignore_errors=True)
    assert leaks.compare(before, leaks.take(name)) == []


@pytest.fixture(scope="module", params=["iscsi", "nfs"])
def fenced(request: pytest.FixtureRequest) -> Iterator[Fenced]:
    with raised(request.param) as made:
        yield made


def _end(process: Process) -> None:
    kill(process)
    asyncio.run(wait_exit(process))


def test_each_host_is_let_in_and_nobody_else(fenced: Fenced) -> None:
    (place,) = fenced.status().places
    assert (place.why, place.hosts) == ("", ("host1", "host2"))
    assert fenced.opens("host1")
    assert fenced.opens("host2")


def test_nothing_of_a_host_that_is_cut_off_reaches_the_disk(fenced: Fenced) -> None:
    fenced.clear()
    writer = fenced.writer("host1")
    try:
        fenced.await_written()
        done = fenced.cut("host1")
        first = fenced.digest()
        assert not fenced.opens("host1")
        assert fenced.opens("host2")
        time.sleep(2.0)  # what somebody still wrote would show
        assert fenced.digest() == first
        assert [cut.id for cut in fenced.status().cuts] == [done.cut.id]
    finally:
        _end(writer)
    fenced.call("DELETE", f"/v1/cuts/{done.cut.id}")
    assert fenced.opens("host1")
    with pytest.raises(NotFound):
        fenced.call("DELETE", f"/v1/cuts/{done.cut.id}")


def test_another_hosts_requests_go_on(fenced: Fenced) -> None:
    fenced.clear()
    writer = fenced.writer("host2")
    try:
        fenced.await_written()
        done = fenced.cut("host1")
        fenced.clear()
        fenced.await_written()
        assert is_alive(writer)
    finally:
        _end(writer)
    fenced.call("DELETE", f"/v1/cuts/{done.cut.id}")


def test_a_cut_outlives_the_server_and_the_daemon(fenced: Fenced) -> None:
    done = fenced.cut("host1")
    server = "nfs" if fenced.volume.kind == "nfs" else "tgtd"
    for what in (server, "iofence"):
        fault.kill_process(fenced.lab, STORAGE, what)
        until = time.monotonic() + PATIENCE_S
        while not fenced.opens("host2"):
            assert not fenced.opens("host1")
            assert time.monotonic() < until, f"{what} is not back"
            time.sleep(0.05)
        assert not fenced.opens("host1")
    until = time.monotonic() + PATIENCE_S
    while (status := fenced.heard()) is None:  # nothing tells that it listens again
        assert time.monotonic() < until, "its daemon is not back"
        time.sleep(0.05)
    assert [cut.id for cut in status.cuts] == [done.cut.id]
    fenced.call("DELETE", f"/v1/cuts/{done.cut.id}")
    assert fenced.opens("host1")


def test_a_server_that_hangs_confirms_nothing(fenced: Fenced) -> None:
    server = "nfs" if fenced.volume.kind == "nfs" else "tgtd"
    fault.freeze_process(fenced.lab, STORAGE, server, hold=True)
    try:
        assert fenced.status().places[0].why
        with pytest.raises(Exception, match=r"not confirm|not answer|nothing usable"):
            fenced.cut("host1")
    finally:
        fault.thaw_process(fenced.lab, STORAGE, server)
    (cut,) = fenced.status().cuts
    fenced.call("DELETE", f"/v1/cuts/{cut.id}")
