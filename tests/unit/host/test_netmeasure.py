"""The two ends of a measurement, on loopback; what a network does to it is the lab's to show."""

from __future__ import annotations

import asyncio
import socket

import pytest

from godwit.host.netmeasure import Listening, Rate, interfaces, largest_packet, rate

TOKEN = bytes(range(16))
HERE = "127.0.0.1"


def listening(*, rate: bool = False, peer: str = HERE) -> Listening:
    return Listening(HERE, peer=peer, token=TOKEN, rate=rate)


async def served(end: Listening, *, limit: int = 1 << 22, open_s: float = 20.0) -> asyncio.Task:
    return asyncio.create_task(
        end.serve(bytes_limit=limit, seconds_limit=2.0, open_s=open_s), name="end"
    )


async def test_a_packet_of_full_size_is_answered() -> None:
    end = listening()
    task = await served(end)
    found = await largest_packet(HERE, HERE, end.udp_port, token=TOKEN, full=1500)
    task.cancel()
    assert found == 1500


async def test_larger_than_the_interface_lets_through_is_found_to_the_byte() -> None:
    mtu = (await interfaces())[HERE].mtu
    assert mtu <= 65536
    end = listening()
    task = await served(end)
    # Loopback's MTU is larger than any datagram: the kernel refuses what is beyond 65,507 + 28.
    found = await largest_packet(HERE, HERE, end.udp_port, token=TOKEN, full=65600)
    task.cancel()
    assert found == 65535


async def test_without_the_token_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("godwit.host.netmeasure._PATIENCE_S", 0.02)
    end = listening()
    task = await served(end)
    assert await largest_packet(HERE, HERE, end.udp_port, token=b"x" * 16, full=1500) == 0
    task.cancel()


async def test_a_packet_with_another_token_gets_no_answer_at_all() -> None:
    end = listening()
    task = await served(end)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind((HERE, 0))
        stranger.setblocking(False)
        # In order, so that the answer to the second one says that the first had none.
        for token in (b"x" * 16, TOKEN):
            stranger.sendto(token + bytes(84), (HERE, end.udp_port))
        async with asyncio.timeout(5.0):
            answer = await loop.sock_recv(stranger, 256)
        assert answer.startswith(TOKEN)
        stranger.sendto(TOKEN + bytes(20), (HERE, end.udp_port))
        async with asyncio.timeout(5.0):
            second = await loop.sock_recv(stranger, 256)
        assert int.from_bytes(second[-4:], "big") == 36  # no answer lay between
    task.cancel()


async def test_another_address_than_the_peers_is_not_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("godwit.host.netmeasure._PATIENCE_S", 0.02)
    end = listening(peer="127.0.0.9")
    task = await served(end)
    assert await largest_packet(HERE, HERE, end.udp_port, token=TOKEN, full=1500) == 0
    assert await largest_packet("127.0.0.9", HERE, end.udp_port, token=TOKEN, full=1500) == 1500
    task.cancel()


async def test_a_rate_counts_what_arrived_and_the_ports_close() -> None:
    end = listening(rate=True)
    ports = end.udp_port, end.tcp_port
    task = await served(end)
    found = await rate(HERE, HERE, ports[1], token=TOKEN, bytes_limit=1 << 22, seconds_limit=2.0)
    assert 1 << 22 <= found.bytes < (1 << 22) + (1 << 19)
    assert found.bits_per_s == 8 * found.bytes / found.seconds
    await task
    with socket.socket() as again, pytest.raises(ConnectionRefusedError):
        again.connect((HERE, ports[1]))


async def test_a_stranger_does_not_use_the_port_up() -> None:
    end = listening(rate=True)
    task = await served(end)
    with pytest.raises((EOFError, OSError)):
        await rate(
            HERE, HERE, end.tcp_port, token=b"x" * 16, bytes_limit=1 << 16, seconds_limit=0.2
        )
    found = await rate(
        HERE, HERE, end.tcp_port, token=TOKEN, bytes_limit=1 << 20, seconds_limit=2.0
    )
    assert found.bytes >= 1 << 20
    await task


async def test_a_port_that_nobody_uses_closes_by_itself() -> None:
    end = listening(rate=True)
    task = await served(end, open_s=0.05)
    await asyncio.wait_for(task, 5.0)
    assert not task.cancelled()


def test_no_time_is_no_rate() -> None:
    assert Rate(100, 0.0).bits_per_s == 0.0
