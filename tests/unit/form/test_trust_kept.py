"""Certificates are renewed and revoked while daemons run: real sockets, nothing restarted."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from tests.unit.form.conftest import Formed

from godwit.form.places import Places
from godwit.host.clock import RealClock
from godwit.manager.issuing import Issuer, describe
from godwit.model import keys
from godwit.store.api import Watch
from godwit.store.client import StoreClient
from godwit.store.daemon.database import Database
from godwit.store.daemon.gateway import Gateway
from godwit.store.daemon.listen import TlsFiles, open_listener
from godwit.store.daemon.server import Server
from godwit.store.daemon.service import Service
from godwit.store.errors import StoreDenied, StoreError
from godwit.wire import crl
from godwit.wire.ca import ClusterCa, issue, write_identity, write_qemu_credentials
from godwit.wire.errors import IdentityUnusable, PeerNotTrusted, PeerUnreachable
from godwit.wire.follow import follow
from godwit.wire.http import PeerClient
from godwit.wire.identity import Identity
from godwit.wire.keeper import Keeper, Place
from godwit.wire.server import Listener, ServerTls, WireServer, peer_of
from godwit.wire.tls import ClientTls, Expect, refresh


async def _who(scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(peer_of(scope)).encode()})


@asynccontextmanager
async def agent(directory: Path) -> AsyncIterator[tuple[WireServer, str]]:
    """A listener as an agent's, that follows its files."""
    tls = ServerTls(Identity.load(directory), roles={"host", "manager"})
    server = WireServer(_who, [Listener.tcp("127.0.0.1", 0, tls=tls)])
    await server.start()
    following = asyncio.create_task(follow(directory, changed=server.expel), name="follow")
    try:
        yield server, f"https://127.0.0.1:{server.ports[0]}"
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await server.stop(grace_s=0)


@asynccontextmanager
async def kept(cluster: Formed, *places: Place) -> AsyncIterator[None]:
    keeper = Keeper(cluster.store, places, RealClock())
    tasks = [
        asyncio.create_task(keeper.follow_list(), name="list"),
        asyncio.create_task(keeper.renew(), name="renew"),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Any) -> None:
    """Files and sockets of other tasks: looked at often, for at most 10 s."""
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def _host(cluster: Formed, name: str) -> Identity:
    await cluster.join(name, await cluster.token())
    return Identity.load(Places(cluster.root / name).tls)


async def test_a_certificate_near_its_end_is_renewed_and_no_connection_notices(
    cluster: Formed,
) -> None:
    """Half a day is left of a certificate: less than a third of its life."""
    near = await _host(cluster, "host2")
    old = issue(cluster.authority.issuer.ca, role="host", name="host2", ips=["127.0.0.1"], days=0.4)
    write_identity(near.directory, old)
    first = Identity.load(near.directory)
    caller = ClientTls.for_daemon(await _host(cluster, "host3"), Expect("host", "host2"))
    async with agent(near.directory) as (_, url), PeerClient(url, tls=caller) as before:
        assert (await before.request("GET", "/")).body == b"host/host3"
        async with kept(cluster, Place(near.directory)):
            await until(lambda: Identity.load(near.directory).serial != first.serial)
        renewed = Identity.load(near.directory)
        assert renewed.seconds_left() > 300 * 86400
        assert renewed.peer == first.peer
        assert renewed.key.stat().st_mode & 0o777 == 0o600
        # The open connection was not touched; a new one shows the new certificate.
        assert (await before.request("GET", "/")).body == b"host/host3"
        assert _serial(before) == first.serial

        async def shown() -> int:
            async with PeerClient(url, tls=caller) as after:
                await after.request("GET", "/")
                return _serial(after)

        async with asyncio.timeout(10):
            while True:
                if await shown() == renewed.serial:
                    break
                await asyncio.sleep(0.01)
    assert await cluster.store.get(keys.issued("host", "host2", f"{renewed.serial:x}")) is not None
    left = await cluster.store.range(keys.TRUST_RENEWED)
    assert left.kvs == ()


async def test_qemus_certificate_is_renewed_for_both_ends_and_stays_readable(
    cluster: Formed,
) -> None:
    await _host(cluster, "host2")
    directory = Places(cluster.root / "host2").migration_tls
    signer = cluster.authority.issuer.of("migration")
    write_qemu_credentials(directory, signer, host="host2", gid=os.getegid(), days=0.4)
    place = Place.of_qemu(directory)
    before = place.identity()
    async with kept(cluster, place):
        await until(lambda: place.identity().serial != before.serial)
    sides = [
        [(directory / f"{side}-{what}.pem").read_bytes() for side in ("server", "client")]
        for what in ("cert", "key")
    ]
    assert all(one == two for one, two in sides)
    assert stat.S_IMODE((directory / "client-key.pem").stat().st_mode) == 0o640
    assert b"BEGIN CERTIFICATE" in sides[0][0]
    names = x509.load_pem_x509_certificate(sides[0][0]).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["host2.migration.godwit"]


def _serial(client: PeerClient) -> int:
    [connection] = client._idle
    assert connection.ssl_object is not None
    certificate = connection.ssl_object.getpeercert()
    assert certificate is not None
    return int(str(certificate["serialNumber"]), 16)


async def test_nobody_renews_in_anothers_name(
    cluster: Formed, caplog: pytest.LogCaptureFixture
) -> None:
    """host2 puts the question of host3 into the store, signed with its own key."""
    from godwit.model.trust import Renewed
    from godwit.store.records import decode, encode
    from godwit.wire import renewal

    mine, theirs = await _host(cluster, "host2"), await _host(cluster, "host3")
    _, asked = renewal.ask(mine.cert, mine.key, now=0.0)
    forged = asked.but(certificate=theirs.cert.read_text())
    serial = f"{theirs.serial:x}"
    await cluster.store.put(keys.renewal_asked(serial), encode(forged))
    async with asyncio.timeout(10), cluster.store.watch(keys.renewed(serial)) as watch:
        async for _ in watch:
            found = await cluster.store.get(keys.renewed(serial))
            if found is not None:
                break
    answer = decode(found, Renewed).value
    assert answer.certificate == ""
    assert "not signed by whom it names" in answer.problem
    assert "refused" in caplog.text


async def test_a_revoked_host_is_refused_everywhere_and_its_connections_are_cut(
    cluster: Formed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stays, goes = await _host(cluster, "host2"), await _host(cluster, "host3")
    to_host2 = ClientTls.for_daemon(goes, Expect("host", "host2"))
    from_host2 = ClientTls.for_daemon(stays, Expect("host", "host3"))
    places = Place(stays.directory), Place.of_qemu(Places(cluster.root / "host2").migration_tls)
    async with (
        agent(stays.directory) as (server, url),
        agent(goes.directory) as (_, its_url),
        PeerClient(url, tls=to_host2) as inside,
        kept(cluster, *places),
    ):
        await inside.request("GET", "/")
        assert await cluster.authority.lists.revoke("host3") == 2
        await until(lambda: not server._state.connections)
        with pytest.raises(PeerNotTrusted, match="This certificate was revoked"):
            await inside.request("GET", "/")
        async with PeerClient(its_url, tls=from_host2) as client:
            with pytest.raises(PeerNotTrusted, match="host/host3, whose certificate was revoked"):
                await client.request("GET", "/")
        # Who was not revoked is let in as ever.
        good = ClientTls.for_daemon(await _host(cluster, "host4"), Expect("host", "host2"))
        async with PeerClient(url, tls=good) as client:
            assert (await client.request("GET", "/")).body == b"host/host4"
    assert "refused host/host3" in caplog.text
    pem, ca = ((places[1].directory / name).read_bytes() for name in ("ca-crl.pem", "ca-cert.pem"))
    listed = crl.read(pem, ca=ca)
    assert len(listed.serials) == 1


async def test_who_is_removed_learns_it_once_and_lets_go(cluster: Formed) -> None:
    """A daemon ends then; the one that is started after it is not told again."""
    host = await _host(cluster, "host2")
    told: list[str] = []

    async def following(name: str) -> asyncio.Task[None]:
        seen = asyncio.Event()
        work = follow(host.directory, changed=seen.set, revoked=lambda: told.append(name))
        task = asyncio.create_task(work, name=name)
        await asyncio.wait_for(seen.wait(), 10)
        return task

    first = await following("first")
    async with kept(cluster, Place(host.directory)):
        await cluster.authority.lists.revoke("host3")
        await cluster.authority.lists.revoke("host2")
        await until(lambda: told == ["first"])
    second = await following("second")
    (host.directory / "revoked").touch()
    write_identity(host.directory, issue(cluster.authority.issuer.ca, role="host", name="host2"))
    first.cancel()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert told == ["first"]


async def test_a_revoked_certificate_cannot_be_renewed(cluster: Formed) -> None:
    gone = await _host(cluster, "host2")
    await cluster.authority.lists.revoke("host2")
    keeper = Keeper(cluster.store, [Place(gone.directory)], RealClock())
    with pytest.raises(IdentityUnusable, match="the certificate was revoked"):
        await keeper._renew(Place(gone.directory), gone)


async def test_an_older_or_foreign_list_is_not_taken(cluster: Formed) -> None:
    host = await _host(cluster, "host2")
    place, ca = Place(host.directory), cluster.authority.issuer.ca
    newer = crl.make(ca, [7], number=9)
    assert place.take_list(newer.pem)
    assert not place.take_list(crl.make(ca, [], number=8).pem)
    with pytest.raises(IdentityUnusable, match="not signed"):
        place.take_list(crl.make(ClusterCa.create(cluster="test"), [], number=10).pem)
    assert place.number() == 9
    assert refresh(host.directory).serial == host.serial


async def test_the_list_survives_a_store_that_was_restored(formed: Formed) -> None:
    """The store forgets that host2 was removed; the manager that signed it does not."""
    async with formed.serve():
        host = await _host(formed, "host2")
        await formed.authority.lists.revoke("host2")
    await formed.store.delete("", prefix=True)
    async with formed.serve():
        listed = await formed.authority.lists.newest("host")
        assert host.serial in listed.value.serials


async def test_taking_ones_record_out_of_the_store_saves_nobody(cluster: Formed) -> None:
    host = await _host(cluster, "host2")
    await cluster.store.delete(f"{keys.TRUST_ISSUED}host/host2/", prefix=True)
    await cluster.authority.lists.revoke("host2")
    listed = await cluster.authority.lists.newest("host")
    assert host.serial in listed.value.serials


async def test_the_store_daemon_hangs_up_on_a_revoked_host(cluster: Formed, tmp_path: Path) -> None:
    host = await _host(cluster, "host2")
    directory = cluster.places.store_tls
    files = TlsFiles(directory / "cert.pem", directory / "key.pem", directory / "ca.pem")
    context = files.context()
    database = Database(tmp_path / "data")
    service = Service(database, database.load(), on_failure=lambda error: None)
    server = Server(Gateway(service))
    listener = open_listener("tcp:127.0.0.1:0", context)
    port = listener.sock.getsockname()[1]
    await server.start([listener])
    tls = ClientTls.for_daemon(host, Expect("store"))
    client = StoreClient(
        [f"https://127.0.0.1:{port}"],
        ssl_context=tls.context,
        verify_peer=lambda found: tls.verify(found, where="the store"),
    )
    try:
        await client.put("/a", b"1")
        async with client.watch("/a") as watch:
            await anext(watch)
            await cluster.authority.lists.revoke("host2")
            Place(directory).take_list((cluster.places.ca / "crl.pem").read_bytes())
            server.expel(files.revoked())
            with pytest.raises(StoreError):
                await client.put("/a", b"2")
            with pytest.raises(StoreDenied):
                await asyncio.wait_for(_to_its_end(watch), 10)
    finally:
        await client.aclose()
        await server.close(grace_s=0)
        service.close()
        database.close()


async def _to_its_end(watch: Watch) -> None:
    async for _ in watch:
        pass


@pytest.mark.parametrize("kind", ["foreign", "expired", "none"])
async def test_what_is_refused_in_the_handshake_is_logged(
    cluster: Formed, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = await _host(cluster, "host2")
    ca = cluster.authority.issuer.ca
    if kind == "none":
        people = ClientTls.for_api(host.ca)
        tls = ClientTls(context=people.context, expect=Expect("host"))
    else:
        issuer = ClusterCa.create(cluster="test") if kind == "foreign" else ca
        days = -0.5 if kind == "expired" else 30.0
        write_identity(tmp_path / "it", issue(issuer, role="host", name="host9", days=days))
        stranger = Identity.load(tmp_path / "it")
        context = ClientTls.for_api(host.ca).context
        context.load_cert_chain(stranger.cert, stranger.key)
        tls = ClientTls(context=context, expect=Expect("host"))
    async with agent(host.directory) as (_, url), PeerClient(url, tls=tls) as client:
        with pytest.raises(PeerUnreachable):
            await client.request("GET", "/")
        words = {
            "none": "it shows no certificate",
            "expired": "certificate has expired",
            "foreign": "unable to get local issuer certificate",
        }
        await until(lambda: f"refused a connection: {words[kind]}" in caplog.text)


async def test_the_journal_forgets_nothing_in_a_power_cut(cluster: Formed) -> None:
    issuer = cluster.authority.issuer
    count = len(issuer.noted())
    with (issuer.directory / "issued.jsonl").open("a") as stream:
        stream.write('{"role": "host", "na')
    made = issue(issuer.ca, role="host", name="host8")
    stream_line = describe(made.cert, role="host", name="host8", now=0.0)
    issuer.note([stream_line])
    assert [one.name for one in Issuer(issuer.directory).noted()][count:] == ["host8"]
