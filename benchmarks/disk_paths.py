"""What a disk's way costs: opened by QEMU itself, through a broker, through a peer. One machine.

    direct      qemu-img bench --> the nodes QEMU gets (`godwit.qemu.blocks`) --> image
    brokered    qemu-img bench --NBD--> the VM's broker --> image
    redirected  qemu-img bench --NBD--> the VM's broker ==NBD, TLS==> a peer's export --> image

4 KiB writes one at a time (what a database waits for), 4 KiB sixteen at a time, 64 KiB eight at a
time, each with the cache passed by. The three ways of one format are measured in turn, round by
round; what is printed are medians, and ratios to direct of the same rounds. The peer is a second
daemon on this machine, so its link costs nothing: a real one adds its round trip. It writes through
(a write is answered when it would survive the peer's end), which the other two ways do only where
the format needs it. Formats that QEMU cannot migrate by itself are opened by their own driver in
the direct row: it says what the broker costs, a VM never has it.

    .venv/bin/python benchmarks/disk_paths.py [--rounds 7] [--output docs/proof/bench-disks.json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import facts
from measure import Machine

from godwit.host.run import run_async
from godwit.model.disks import tier_of
from godwit.model.vm import Disk, DiskFormat
from godwit.qemu import blocks, tls
from godwit.qemu.launch import Binary
from godwit.storage import nodes
from godwit.storage.broker import Broker, Opening, listen
from godwit.storage.broker_daemon import DaemonPlace
from godwit.storage.broker_peer import PeerExport, listen_tcp
from godwit.storage.images import create_image
from godwit.storage.nodes import BrokerDisk
from godwit.wire.ca import ClusterCa, write_qemu_credentials
from godwit.wire.identity import migration_dns

SIZE = 256 << 20
EPOCH = 1
VM = "bench"
USER = (65534, 65534)
WAYS = ("direct", "brokered", "redirected")


@dataclass(frozen=True)
class Load:
    """A kind of writing: bytes of a request, how many at once, how many in all."""

    name: str
    size: int
    depth: int
    count: int


LOADS = (
    Load("4k, 1 at a time", 4096, 1, 2000),
    Load("4k, 16 at a time", 4096, 16, 10000),
    Load("64k, 8 at a time", 65536, 8, 2000),
)


class Ground:
    """A directory with an image, a broker's socket, and certificates of two hosts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        authority = ClusterCa.create(cluster="bench")
        for host in ("h1", "h2"):
            folder = root / "tls" / host
            write_qemu_credentials(folder, authority, host=host, gid=USER[1])
            tls.ensure_dh_params(folder)
        (root / "tls").chmod(0o755)

    def place(self, host: str) -> DaemonPlace:
        """Where a host's daemons live."""
        program = shutil.which("qemu-storage-daemon")
        assert program is not None
        binary = Binary(path=program, user=USER)
        return DaemonPlace(
            host=host, run=self.root / f"r-{host}", state=self.root / f"s-{host}", binary=binary
        )

    async def disk(self, kind: DiskFormat) -> Disk:
        """A fresh image whose clusters are all there: allocation is not what is compared."""
        path = self.root / f"disk.{kind}"
        path.unlink(missing_ok=True)
        await create_image(path, format=kind, size_bytes=SIZE, owner=USER)
        return Disk(
            id="disk0",
            volume="bench",
            path=str(path),
            size_bytes=SIZE,
            format=kind,
            serial="GWBENCH",
            lun=0,
        )

    @contextlib.asynccontextmanager
    async def way(self, name: str, disk: Disk) -> AsyncIterator[str]:
        """The disk by one of the ways, as qemu-img names it."""
        if name == "direct":
            yield _direct(disk)
            return
        served = BrokerDisk(id=disk.id, path=disk.path, format=disk.format, size_bytes=SIZE)
        async with contextlib.AsyncExitStack() as stack:
            peer = None
            if name == "redirected":
                export = await self._peer(stack)
                target = await export.export_for_peer(served, epoch=EPOCH, host="127.0.0.1")
                peer = target.but(
                    tls_dir=str(self.root / "tls" / "h1"), tls_hostname=migration_dns("h2")
                )
            socket = self.root / "nbd.sock"
            listener = stack.enter_context(contextlib.closing(listen(socket)))
            broker = await Broker.start(
                self.place("h1"), VM, socket=socket, listener=listener, disks=[served],
                opening={disk.id: Opening(epoch=EPOCH, peer=peer)},
            )  # fmt: skip
            stack.push_async_callback(_end, broker)
            node = nodes.client_node("disk", socket=socket, export=nodes.export_name(VM, disk.id))
            yield "json:" + json.dumps(node)
            await broker.release_all()

    async def _peer(self, stack: contextlib.AsyncExitStack) -> PeerExport:
        listener = stack.enter_context(listen_tcp("127.0.0.1"))
        export = await PeerExport.start(
            self.place("h2"), VM, listener=listener, tls_dir=str(self.root / "tls" / "h2")
        )
        stack.push_async_callback(_end, export)
        return export


async def _end(daemon: Broker | PeerExport) -> None:
    await daemon.kill()
    daemon.discard()


def _direct(disk: Disk) -> str:
    """The nodes QEMU gets, one inside the other. VHD and VHDX: what their drivers alone do."""
    if tier_of(disk) == "brokered":
        plain = {"driver": "file", "filename": disk.path, "cache": {"direct": True}}
        driver = nodes.image_node(
            BrokerDisk(id="d", path=disk.path, format=disk.format, size_bytes=SIZE)
        )["driver"]
        return "json:" + json.dumps({"driver": driver, "file": plain})
    file, image = blocks.disk_nodes(disk, vm=VM, aio="native")
    file = {key: value for key, value in file.items() if key != "node-name"}
    image = {key: value for key, value in image.items() if key != "node-name"}
    return "json:" + json.dumps({**image, "file": file})


async def bench(name: str, load: Load) -> float:
    """Requests per second of one run."""
    argv = ["qemu-img", "bench", "-w", "-t", "none", "-c", str(load.count), "-d", str(load.depth)]
    argv += ["-s", str(load.size), "-S", str(load.size)]
    printed = (await run_async([*argv, name], timeout=120.0)).decode()
    found = re.search(r"Run completed in ([\d.]+) seconds", printed)
    assert found is not None, printed
    return load.count / float(found[1])


async def measure(ground: Ground, kinds: list[DiskFormat], rounds: int) -> dict[str, Any]:
    """Format -> load -> way -> requests per second, one value a round."""
    found: dict[str, Any] = {}
    for kind in kinds:
        disk = await ground.disk(kind)
        rows: dict[str, dict[str, list[float]]] = {
            load.name: {way: [] for way in WAYS} for load in LOADS
        }
        async with ground.way("direct", disk) as name:
            for load in LOADS:
                await bench(name, load)  # allocates what the rounds write to
        for _ in range(rounds):
            for way in WAYS:
                async with ground.way(way, disk) as name:
                    for load in LOADS:
                        rows[load.name][way].append(await bench(name, load))
        found[kind] = rows
        tell(kind, rows)
        Path(disk.path).unlink()
    return found


def tell(kind: str, rows: dict[str, dict[str, list[float]]]) -> None:
    """Medians, and ratios to direct within the same round."""
    for load, ways in rows.items():
        words = []
        for way in WAYS:
            ratio = statistics.median(
                mine / direct for mine, direct in zip(ways[way], ways["direct"], strict=True)
            )
            words.append(f"{way} {statistics.median(ways[way]):8.0f}/s ({ratio:.2f})")
        sys.stdout.write(f"{kind:10} {load:18} {'   '.join(words)}\n")
        sys.stdout.flush()


async def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="some formats: raw,vhdx")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    kinds = [kind for kind in get_args(DiskFormat) if kind in (given.only or kind).split(",")]
    with tempfile.TemporaryDirectory(prefix="godwit-disks-", dir="/var/tmp") as folder:
        root = Path(folder)
        root.chmod(0o755)
        rows = await measure(Ground(root), kinds, given.rounds)
    if given.output:
        found = {
            "commit": facts.commit(),
            "machine": facts.machine(Machine(machine="", cpu="", accel="", memory_mib=0)),
            "requests_per_s": rows,
        }
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("root is needed: daemons run as another user")
    sys.exit(asyncio.run(main()))
