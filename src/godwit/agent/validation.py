"""What this host tells and measures when the cluster is validated. Nothing here judges.

    manager                  this agent                        a peer's agent
    | POST .../paths ------> |                                  |
    |                        | POST /v1/peer/measure ---------> |  opens ports on its migration
    |                        | <------------------- the ports   |  address, for this host, once
    |                        | packets, bytes ................> |
    | <------- what arrived  |                                  |  closes them by itself

Measuring goes over the migration network alone; everything is bounded in bytes and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from godwit.agent.desk import Desk
from godwit.agent.peering import HttpPeer
from godwit.agent.validation_files import Marks
from godwit.host import netmeasure
from godwit.host.errors import HostError
from godwit.host.facts import HostFacts, host_facts
from godwit.host.netmeasure import Interface, Listening
from godwit.migration.peer import PeerSilent
from godwit.model.errors import Conflict, GodwitError, Refused
from godwit.model.validation_facts import (
    TOKEN_BYTES,
    CpuSeen,
    HostProbe,
    LinkSeen,
    MeasureAsk,
    MeasurePorts,
    PathsAsk,
    PathSeen,
    PathsSeen,
    PeerAt,
)
from godwit.wire.clock import measure_offset

_OPEN_S = 20.0
_ANSWER_S = 5.0
_MOST_OPEN = 64
_LARGEST = 65535  # an IP packet has no more, whatever the interface could carry


class Validation:
    """Answers for one host. Belongs to the agent's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._open = 0
        self._measuring = asyncio.Lock()  # a rate beside another one would be half of it
        self.marks = Marks(desk.host, desk.config.paths.volumes)

    async def probe(self) -> HostProbe:
        """This host as it is at this moment; processors and interfaces are looked at anew."""
        desk, config = self._desk, self._desk.config
        machine = await asyncio.to_thread(host_facts)
        with_address = await netmeasure.interfaces()
        info = await desk.host_info()
        return HostProbe(
            name=desk.host,
            boot_id=machine.boot_id,
            kernel=machine.kernel,
            machine=machine.machine,
            system=machine.system,
            version=info.version,
            cpu=_cpu(machine),
            memory_bytes=machine.memory.total,
            kvm=machine.kvm.usable,
            kvm_reason=machine.kvm.reason,
            userfaultfd=machine.userfaultfd.usable,
            qemu=info.qemu,
            management=_link(with_address.get(config.agent.address)),
            migration=_link(with_address.get(config.migration.address)),
            migration_address=config.migration.address,
            migration_subnet=config.migration.subnet,
            migration_rate_bits=config.migration.rate_bits,
            networks=self._bridges(info.networks),
            image_locks=config.qemu.image_locks,
            guard=desk.guard.connected,
        )

    def _bridges(self, stated: dict[str, int]) -> dict[str, int]:
        """The MTU that each VM network's bridge really has; the stated one where there is none."""
        found = dict(stated)
        for network, port in self._desk.networks.items():
            with contextlib.suppress(HostError, OSError):
                found[network] = self._desk.links.mtu(port.bridge)
        return found

    async def paths(self, ask: PathsAsk) -> PathsSeen:
        """Measure the way to each peer, one after the other, so that none disturbs another."""
        mine = self._desk.config.migration.address
        interface = (await netmeasure.interfaces()).get(mine) if mine else None
        return PathsSeen(
            paths=tuple([await self._path(peer, ask, interface) for peer in ask.peers])
        )

    async def _path(self, peer: PeerAt, ask: PathsAsk, interface: Interface | None) -> PathSeen:
        desk = self._desk
        other = desk.peers.to(peer.host, peer.agent_url)
        path = PathSeen(source=desk.host, destination=peer.host)
        if ask.packets:
            path = path.but(**await self._clock(other))
        wants_rate = peer.host in ask.rate
        if wants_rate and desk.moving:
            wants_rate = False
            path = path.but(rate_reason=f"{min(desk.moving)} is on the move")
        if interface is None:
            return path.but(reason=f"{desk.host} does not have its migration address")
        token = secrets.token_bytes(TOKEN_BYTES)
        mine = desk.config.migration.address
        try:
            ports = await other.measure(
                MeasureAsk(
                    host=desk.host,
                    address=mine,
                    token=token.hex(),
                    rate=wants_rate,
                    bytes_limit=ask.bytes_limit,
                    seconds_limit=ask.seconds_limit,
                ),
                timeout=_ANSWER_S,
            )
        except (GodwitError, PeerSilent) as error:
            return path.but(reason=f"{peer.host} does not listen: {error}")
        if not ask.packets:
            return await self._rate(path, peer, ports, token, ask) if ports.tcp else path
        full = min(interface.mtu, _LARGEST)
        path = path.but(full_bytes=full)
        try:
            largest = await netmeasure.largest_packet(
                mine, peer.address, ports.udp, token=token, full=full
            )
        except OSError as error:
            return path.but(reason=error.strerror or str(error))
        if not largest:
            return path.but(reason="no packet is answered")
        path = path.but(largest_bytes=largest)
        return await self._rate(path, peer, ports, token, ask) if ports.tcp else path

    async def _rate(
        self, path: PathSeen, peer: PeerAt, ports: MeasurePorts, token: bytes, ask: PathsAsk
    ) -> PathSeen:
        try:
            async with self._measuring:
                found = await netmeasure.rate(
                    self._desk.config.migration.address,
                    peer.address,
                    ports.tcp,
                    token=token,
                    bytes_limit=ask.bytes_limit,
                    seconds_limit=ask.seconds_limit,
                )
        except (OSError, EOFError, TimeoutError) as error:
            return path.but(rate_reason=str(error) or "no answer in time")
        if not found.bits_per_s:
            return path.but(rate_reason="too little arrived to tell")
        return path.but(bits_per_s=found.bits_per_s, sent_bytes=found.bytes, sent_s=found.seconds)

    async def _clock(self, other: HttpPeer) -> dict[str, object]:
        try:
            offset = await measure_offset(
                lambda: other.clock(timeout=_ANSWER_S), now=self._desk.clock.realtime
            )
        except (GodwitError, PeerSilent, ValueError) as error:
            return {"clock_reason": str(error)}
        return {"clock_offset_s": offset.offset_s, "clock_error_s": offset.error_s}

    async def listen(self, ask: MeasureAsk) -> MeasurePorts:
        """Open ports on the migration address for one measurement of that peer's."""
        desk, mine = self._desk, self._desk.config.migration.address
        if not mine:
            raise Refused(f"{desk.host} has no migration address", hint="configure one")
        if self._open >= _MOST_OPEN:
            raise Conflict(
                f"{desk.host} takes part in {self._open} measurements already", hint="ask again"
            )
        try:
            end = Listening(mine, peer=ask.address, token=bytes.fromhex(ask.token), rate=ask.rate)
        except (OSError, ValueError) as error:
            raise Refused(
                f"{desk.host} cannot listen on {mine}: {error}", hint="look at its addresses"
            ) from error
        ports = MeasurePorts(udp=end.udp_port, tcp=end.tcp_port)
        desk.background(self._serve(end, ask), f"measured by {ask.host}")
        return ports

    async def _serve(self, end: Listening, ask: MeasureAsk) -> None:
        self._open += 1
        try:
            await end.serve(
                bytes_limit=ask.bytes_limit, seconds_limit=ask.seconds_limit, open_s=_OPEN_S
            )
        finally:
            self._open -= 1


def _cpu(machine: HostFacts) -> CpuSeen:
    cpu = machine.cpu
    return CpuSeen(
        count=cpu.count,
        vendor=cpu.vendor,
        model_name=cpu.model_name,
        flags=tuple(sorted(cpu.flags)),
        virtualization=cpu.virtualization,
        slat=cpu.slat,
    )


def _link(found: Interface | None) -> LinkSeen | None:
    if found is None:
        return None
    return LinkSeen(name=found.name, address=found.address, mtu=found.mtu)
