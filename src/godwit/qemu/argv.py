"""The QEMU command line of a VM: a pure function, so that two hosts start the same machine.

Every device has an explicit address and every default that a newer QEMU may change is written
out.  What differs from host to host (descriptors, paths, accelerator threads) is in `Plugs` and
is no part of what the guest sees.  ``tests/golden/argv`` holds one file per kind of VM, one
option a line: a changed line there means a guest that old hosts may no longer take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from godwit.model.errors import InvalidRequest
from godwit.model.vm import Cdrom, Disk, Nic, Vm
from godwit.qemu import layout
from godwit.qemu.blocks import (
    Node,
    cdrom_device,
    cdrom_node,
    disk_device,
    disk_nodes,
    firmware_node,
)
from godwit.qemu.intervals import TRACE_POINT
from godwit.qemu.quirks import SHORT_RAM, SHORT_RAM_BYTES, SHORT_RAM_MULTIPLE, USO_FEATURE

TCG_CACHE_MIB = 256
"""Translated code kept per VM; QEMU's own default is 1 GiB, which a host with many VMs lacks."""

MAX_SCSI_QUEUES = 8
CONSOLE_SET, FIRMWARE_SET = 1, 2
"""Numbers of descriptor sets, which QEMU opens like files."""


@dataclass(frozen=True, slots=True)
class Plugs:
    """What this host plugs into the machine: descriptors by number, and its QEMU's abilities.

    ``monitors`` and ``serial`` are listening unix sockets, ``console_log`` is open for appending,
    ``firmware`` is open for reading, None for a VM with BIOS. ``guest_agent`` is a listening unix
    socket, None for a VM without that port.
    ``taps`` holds the queues of each card by its id, ``vhost`` the matching /dev/vhost-net.
    ``broker`` is the socket of the VM's storage broker, empty when it has none. ``locking`` is
    whether QEMU locks images. ``served`` has, by disk, the nodes of those that lie on a volume
    served over the network; ``boot`` the files of this host for boot files that lie on one.
    """

    monitors: tuple[int, int]
    serial: int
    console_log: int
    firmware: int | None = None
    guest_agent: int | None = None
    taps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vhost: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    incoming: bool = False
    features: frozenset[str] = frozenset()
    sandbox: bool = True
    data_dir: str = ""
    aio: Literal["threads", "native", "io_uring"] = "threads"
    locking: bool = True
    broker: str = ""
    served: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    boot: Mapping[str, str] = field(default_factory=dict)

    def descriptors(self) -> tuple[int, ...]:
        """Everything the new process has to inherit."""
        queues = [fd for fds in (*self.taps.values(), *self.vhost.values()) for fd in fds]
        some = [fd for fd in (self.firmware, self.guest_agent) if fd is not None]
        return (*self.monitors, self.serial, self.console_log, *some, *queues)


def build_argv(vm: Vm, plugs: Plugs) -> list[str]:
    """Options of QEMU for this VM, without the program's name.

    The machine comes up stopped (``-S``) in any case.  InvalidRequest when the record cannot be
    built: two cards or disks in one place, a card without a tap.
    """
    _check_places(vm)
    options = [
        *_process(vm, plugs),
        *_machine(vm),
        *_firmware(vm, plugs),
        *_boot(vm, plugs.boot),
        *_fixed_devices(vm),
        *_guest_agent(vm, plugs),
        *(option for disk in vm.disks for option in _disk(vm, disk, plugs)),
        *(option for n, cdrom in enumerate(vm.cdroms) for option in _cdrom(vm, cdrom, n, plugs)),
        *_ports(),
        *(option for nic in vm.nics for option in _nic(nic, plugs)),
        *_channels(plugs),
    ]
    return [word for option in options for word in option]


def one_per_line(argv: list[str]) -> str:
    """The options as a person reads them: an option and its value on one line."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


Option = tuple[str, ...]


def _check_places(vm: Vm) -> None:
    ports = [layout.nic_port(nic) for nic in vm.nics]
    luns = [disk.lun for disk in vm.disks]
    ids = [disk.id for disk in vm.disks] + [nic.id for nic in vm.nics]
    ids += [cdrom.id for cdrom in vm.cdroms]
    ids += [vm.firmware.variables.id] if vm.firmware is not None else []
    for what, values in (("card places", ports), ("disk places", luns), ("ids", ids)):
        if len(set(values)) != len(values):
            raise InvalidRequest(f"{vm.name}: two devices share {what}: {sorted(values)}")


def _process(vm: Vm, plugs: Plugs) -> Iterator[Option]:
    yield "-name", f"{vm.name},debug-threads=on"
    yield ("-nodefaults",)
    yield ("-no-user-config",)
    if plugs.data_dir:
        yield "-L", plugs.data_dir
    if plugs.sandbox:
        denied = "obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
        yield "-sandbox", f"on,{denied}"
    yield "-display", "none"
    yield ("-S",)
    yield ("-no-shutdown",)  # a guest that powers off stays visible until its end is recorded
    yield ("-only-migratable",)
    yield "-msg", "timestamp=on"
    # QEMU's own witness of when its vCPUs ran, whatever becomes of the agent.
    yield "-trace", TRACE_POINT
    if plugs.incoming:
        yield "-incoming", "defer"


def _machine(vm: Vm) -> Iterator[Option]:
    pins = vm.pins
    flash = ""
    if vm.firmware is not None:
        variables = layout.format_node(vm.firmware.variables)
        flash = f",pflash0={layout.FIRMWARE},pflash1={variables}"
    yield "-machine", f"{pins.machine},usb=off,sata=off,smbus=off,dump-guest-core=off{flash}"
    if pins.accelerator == "tcg":
        yield "-accel", f"tcg,thread=multi,tb-size={TCG_CACHE_MIB}"
    else:
        yield "-accel", pins.accelerator
    yield "-cpu", f"{pins.cpu_model},enforce"
    n = vm.cpus
    yield "-smp", f"cpus={n},sockets=1,dies=1,cores={n},threads=1,maxcpus={n}"
    yield "-m", f"size={_ram_bytes(vm) // 1024}k"
    yield "-uuid", pins.uuid
    yield "-rtc", "base=utc,clock=host"
    # A guest asleep in S3/S4 cannot be told from a paused one by anybody who waits for it.
    yield "-global", "ICH9-LPC.disable_s3=1"
    yield "-global", "ICH9-LPC.disable_s4=1"


def _ram_bytes(vm: Vm) -> int:
    # QEMU rounds up to 8 KiB by itself; done here, so that what is pinned is what is.
    size = -(-vm.memory_bytes // 8192) * 8192
    if SHORT_RAM in vm.pins.qemu_quirks and size % SHORT_RAM_MULTIPLE == 0:
        size -= SHORT_RAM_BYTES
    return size


def _firmware(vm: Vm, plugs: Plugs) -> Iterator[Option]:
    if vm.firmware is None:
        return
    if plugs.firmware is None:
        raise InvalidRequest(f"{vm.name} has UEFI firmware but none was opened for it")
    yield "-add-fd", f"fd={plugs.firmware},set={FIRMWARE_SET},opaque={layout.FIRMWARE}"
    yield _blockdev(firmware_node(FIRMWARE_SET))
    variables = vm.firmware.variables
    served = plugs.served.get(variables.id)
    nodes = disk_nodes(variables, vm=vm.name, aio=plugs.aio, served=served, locking=plugs.locking)
    for node in nodes:
        yield _blockdev(node)


def _blockdev(node: Node) -> Option:
    return "-blockdev", json.dumps(node, separators=(",", ":"))


def _boot(vm: Vm, here: Mapping[str, str]) -> Iterator[Option]:
    yield "-boot", "menu=off,strict=on"
    if vm.boot.kernel:
        yield "-kernel", here.get(vm.boot.kernel, vm.boot.kernel)
        if vm.boot.initrd:
            yield "-initrd", here.get(vm.boot.initrd, vm.boot.initrd)
        if vm.boot.append:
            yield "-append", vm.boot.append


def _fixed_devices(vm: Vm) -> Iterator[Option]:
    queues = min(vm.cpus, MAX_SCSI_QUEUES)
    yield (
        "-device",
        f"virtio-scsi-pci,id={layout.SCSI},bus={layout.BUS},addr={layout.SCSI_ADDRESS}"
        f",num_queues={queues},disable-legacy=on,disable-modern=off",
    )
    yield (
        "-device",
        f"virtio-balloon-pci,id={layout.BALLOON},bus={layout.BUS},addr={layout.BALLOON_ADDRESS}"
        ",disable-legacy=on,disable-modern=off,deflate-on-oom=on",
    )
    yield "-object", "rng-builtin,id=rng-source0"
    yield (
        "-device",
        f"virtio-rng-pci,id={layout.RNG},bus={layout.BUS},addr={layout.RNG_ADDRESS}"
        ",rng=rng-source0,disable-legacy=on,disable-modern=off",
    )


def _guest_agent(vm: Vm, plugs: Plugs) -> Iterator[Option]:
    if not vm.guest_agent:
        return
    if plugs.guest_agent is None:
        raise InvalidRequest(f"{vm.name} has a guest agent's port but no socket for it")
    yield (
        "-device",
        f"virtio-serial-pci,id={layout.PORTS},bus={layout.BUS},addr={layout.PORTS_ADDRESS}"
        ",max_ports=2,disable-legacy=on,disable-modern=off",
    )
    yield (
        "-chardev",
        f"socket,id={layout.GUEST_AGENT},fd={plugs.guest_agent},server=on,wait=off",
    )
    yield (
        "-device",
        f"virtserialport,bus={layout.PORTS}.0,nr=1,chardev={layout.GUEST_AGENT}"
        ",name=org.qemu.guest_agent.0",
    )


def _disk(vm: Vm, disk: Disk, plugs: Plugs) -> Iterator[Option]:
    served = plugs.served.get(disk.id)
    nodes = disk_nodes(
        disk,
        vm=vm.name,
        aio=plugs.aio,
        broker=plugs.broker,
        served=served,
        locking=plugs.locking,
    )
    for node in nodes:
        yield _blockdev(node)
    boot = not vm.boot.kernel and disk is vm.disks[0]
    yield "-device", _device(disk_device(disk, boot=boot))


def _cdrom(vm: Vm, cdrom: Cdrom, place: int, plugs: Plugs) -> Iterator[Option]:
    yield _blockdev(cdrom_node(cdrom, aio=plugs.aio, locking=plugs.locking))
    yield "-device", _device(cdrom_device(cdrom, place, boot=not vm.boot.kernel))


def _device(properties: Mapping[str, object]) -> str:
    # Plain text and not JSON, for whoever reads a process list.
    driver, *rest = properties.items()
    words = [str(driver[1])]
    words += [f"{key}={str(value).replace(',', ',,')}" for key, value in rest]
    return ",".join(words)


def _ports() -> Iterator[Option]:
    for n in range(layout.NIC_PORTS):
        first = ",multifunction=on" if n == 0 else ""
        yield (
            "-device",
            f"pcie-root-port,id=port{n},bus={layout.BUS},addr={layout.PORT_SLOT:#x}.{n:#x}"
            f",port={n},chassis={n + 1}{first}",
        )


def nic_device(nic: Nic, *, features: frozenset[str]) -> dict[str, object]:
    """The network card, as ``device_add`` takes it."""
    device: dict[str, object] = {
        "driver": "virtio-net-pci",
        "id": nic.id,
        "bus": f"port{layout.nic_port(nic)}",
        "addr": "0x0",
        "netdev": layout.netdev(nic),
        "mac": nic.mac,
        "romfile": "",
        "host_mtu": nic.mtu,
    }
    if nic.queues > 1:
        device |= {"mq": "on", "vectors": 2 * nic.queues + 2}
    if USO_FEATURE in features:
        # Kernels before 6.2 cannot do it, and the guest would lose it on such a host.
        device |= {"guest_uso4": "off", "guest_uso6": "off", "host_uso": "off"}
    return device


def _nic(nic: Nic, plugs: Plugs) -> Iterator[Option]:
    taps, vhost = plugs.taps.get(nic.id, ()), plugs.vhost.get(nic.id, ())
    if len(taps) != nic.queues:
        raise InvalidRequest(f"card {nic.id} has {nic.queues} queues but {len(taps)} taps")
    backend = f"tap,id={layout.netdev(nic)},{_fds('fd', taps)}"
    yield "-netdev", backend + (f",vhost=on,{_fds('vhostfd', vhost)}" if vhost else ",vhost=off")
    yield "-device", _device(nic_device(nic, features=plugs.features))


def _fds(key: str, fds: tuple[int, ...]) -> str:
    if len(fds) == 1:
        return f"{key}={fds[0]}"
    return f"{key}s=" + ":".join(str(fd) for fd in fds)


def _channels(plugs: Plugs) -> Iterator[Option]:
    # QEMU may not open the log by itself: it has no right to the directory.
    yield "-add-fd", f"fd={plugs.console_log},set={CONSOLE_SET},opaque=console-log"
    yield (
        "-chardev",
        f"socket,id={layout.SERIAL},fd={plugs.serial},server=on,wait=off"
        f",logfile=/dev/fdset/{CONSOLE_SET},logappend=on",
    )
    yield "-device", f"isa-serial,id=com1,index=0,chardev={layout.SERIAL}"
    for name, fd in zip(("agent", "guard"), plugs.monitors, strict=True):
        yield "-chardev", f"socket,id=qmp-{name},fd={fd},server=on,wait=off"
        yield "-mon", f"id=monitor-{name},chardev=qmp-{name},mode=control"
