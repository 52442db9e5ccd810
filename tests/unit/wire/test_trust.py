"""Who may talk to whom: real handshakes on loopback, good and hostile."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tests.unit.wire.conftest import App, Pki, running

from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.errors import IdentityUnusable, PeerNotTrusted, PeerRefused
from godwit.wire.http import PeerClient
from godwit.wire.identity import Identity, PeerIdentity
from godwit.wire.server import ServerTls
from godwit.wire.tls import ClientTls, Expect

HOSTS = {"host"}


async def test_mutual_tls_shows_both_sides_who_the_other_is(pki: Pki) -> None:
    async with (
        running(App(), ServerTls(pki.identity("host", "host1"), HOSTS)) as (_, url),
        PeerClient(url, tls=pki.client()) as client,
    ):
        assert (await client.get("/who"))["peer"] == "host/host2"
        assert client.peer == PeerIdentity(role="host", name="host1")


async def test_without_a_certificate_nothing_is_served(pki: Pki) -> None:
    app = App()
    tls = ClientTls(
        context=ClientTls.for_api(pki.identity("host", "host1").ca).context,
        expect=Expect("host"),
    )
    async with (
        running(app, ServerTls(pki.identity("host", "host1"), HOSTS)) as (_, url),
        PeerClient(url, tls=tls) as client,
    ):
        with pytest.raises(PeerNotTrusted):
            await client.get("/who")
    assert app.count == 0


async def test_a_client_of_another_ca_is_refused_and_refuses(pki: Pki) -> None:
    other = ClusterCa.create(cluster="test")
    stranger = pki.identity("host", "host2", ca=other)
    app = App()
    async with running(app, ServerTls(pki.identity("host", "host1"), HOSTS)) as (_, url):
        theirs = ClientTls.for_daemon(stranger, Expect("host"))
        async with PeerClient(url, tls=theirs) as client:
            with pytest.raises(PeerNotTrusted, match=r"is not accepted: .*certificate"):
                await client.get("/who")
        # It knows our CA but holds a certificate of its own: only the server can refuse.
        context = ClientTls.for_api(pki.identity("host", "host1").ca).context
        context.load_cert_chain(stranger.cert, stranger.key)
        mixed = ClientTls(context=context, expect=Expect("host"))
        async with PeerClient(url, tls=mixed) as client:
            with pytest.raises(PeerNotTrusted, match="instead of accepting us"):
                await client.post("/echo", {})
    assert app.count == 0


async def test_an_expired_certificate_is_refused_on_either_side(pki: Pki) -> None:
    good, expired = pki.identity("host", "host1"), pki.identity("host", "host1", days=-0.5)
    assert -86400 < expired.seconds_left() < 0 < good.seconds_left()
    app = App()
    async with (
        running(app, ServerTls(expired, HOSTS)) as (_, url),
        PeerClient(url, tls=pki.client()) as client,
    ):
        with pytest.raises(PeerNotTrusted, match="expired"):
            await client.get("/who")
    late = ClientTls.for_daemon(expired, Expect("host"))
    async with (
        running(app, ServerTls(good, HOSTS)) as (_, url),
        PeerClient(url, tls=late) as client,
    ):
        with pytest.raises(PeerNotTrusted):
            await client.get("/who")
    assert app.count == 0


@pytest.mark.parametrize("expect", ["host/host3", "manager", "store/host1"])
async def test_the_wrong_peer_is_noticed_before_anything_is_sent(pki: Pki, expect: str) -> None:
    app = App()
    async with (
        running(app, ServerTls(pki.identity("host", "host1"), HOSTS)) as (_, url),
        PeerClient(url, tls=pki.client(expect=expect), token="secret") as client,
    ):
        with pytest.raises(PeerNotTrusted, match=r"host/host1, not"):
            await client.get("/who")
        with pytest.raises(PeerNotTrusted, match=r"host/host1, not"):
            async with client.websocket("/ws"):
                pass
    assert app.count == 0


async def test_a_role_that_may_not_enter_is_told_so(pki: Pki) -> None:
    app = App()
    migration = ClientTls.for_daemon(pki.identity("migration", "host2"), Expect("host"))
    async with (
        running(app, ServerTls(pki.identity("host", "host1"), HOSTS)) as (_, url),
        PeerClient(url, tls=migration) as client,
    ):
        with pytest.raises(PeerRefused) as caught:
            await client.get("/who")
        with pytest.raises(PeerRefused):
            async with client.websocket("/ws"):
                pass
    assert caught.value.status == 403
    assert caught.value.error.exit_code == 4
    assert app.count == 0


async def test_people_need_no_certificate_but_the_manager_does(pki: Pki) -> None:
    ca = pki.identity("host", "host1").ca
    async with (
        running(App(), ServerTls(pki.identity("manager", "m1"), None)) as (_, url),
        PeerClient(url, tls=ClientTls.for_api(ca), token="t0ken") as client,
    ):
        assert (await client.get("/who", query={"wait": 3, "dry_run": True, "no": None})) == {
            "peer": "None",
            "query": "wait=3&dry_run=true",
        }
    async with (
        running(App(), ServerTls(pki.identity("host", "host1"), None)) as (_, url),
        PeerClient(url, tls=ClientTls.for_api(ca), token="t0ken") as client,
    ):
        with pytest.raises(PeerNotTrusted, match=r"host/host1, not manager/\*"):
            await client.get("/who")


async def test_reload_renews_certificate_and_ca_without_closing(pki: Pki) -> None:
    first, second = pki.identity("host", "host1"), pki.identity("host", "host1", days=20)
    moved = pki.identity("host", "host1", ca=ClusterCa.create(cluster="test"))
    async with (
        running(App(), ServerTls(first, HOSTS)) as (server, url),
        PeerClient(url, tls=pki.client()) as old,
        PeerClient(url, tls=pki.client()) as new,
        PeerClient(url, tls=pki.client()) as late,
    ):
        await old.get("/who")
        await server.reload(second)
        await new.get("/who")
        assert (await old.get("/who"))["peer"] == "host/host2"
        used = [c._idle[0].ssl_object.getpeercert() for c in (old, new)]  # type: ignore[union-attr]
        assert used[0]["notAfter"] != used[1]["notAfter"]
        await server.reload(moved)
        with pytest.raises(PeerNotTrusted):
            await late.get("/who")
        assert (await new.get("/who"))["peer"] == "host/host2"


def test_files_have_narrow_rights_and_leave_no_temporaries(tmp_path: Path) -> None:
    ca = ClusterCa.create(cluster="test")
    ca.save(tmp_path / "ca")
    write_identity(tmp_path / "id", issue(ClusterCa.load(tmp_path / "ca"), role="store", name="s1"))
    write_identity(tmp_path / "gid", issue(ca, role="store", name="s1"), gid=0)

    def modes(name: str) -> dict[str, int]:
        found = (tmp_path / name).iterdir()
        return {p.name: stat.S_IMODE(p.stat().st_mode) for p in found}

    assert modes("ca") == {"ca-key.pem": 0o600, "ca.pem": 0o644}
    assert modes("id") == {"key.pem": 0o600, "cert.pem": 0o644, "ca.pem": 0o644}
    assert modes("gid")["key.pem"] == 0o640
    loaded = Identity.load(tmp_path / "id")
    assert loaded.peer == PeerIdentity(role="store", name="s1")
    assert len(loaded.fingerprint) == 64


@pytest.mark.parametrize("swapped", ["key.pem", "ca.pem"])
def test_files_that_do_not_belong_together_are_named(tmp_path: Path, swapped: str) -> None:
    for name in ("a", "b"):
        ca = ClusterCa.create(cluster=name)
        write_identity(tmp_path / name, issue(ca, role="host", name="host1"))
    (tmp_path / "a" / swapped).write_bytes((tmp_path / "b" / swapped).read_bytes())
    with pytest.raises(IdentityUnusable, match=r"cert\.pem"):
        Identity.load(tmp_path / "a")
    (tmp_path / "a" / swapped).unlink()
    with pytest.raises(IdentityUnusable, match=swapped):
        Identity.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["", "Host1", "a/b", "host1\n", "-a", "x" * 64, "h?x"])
def test_names_that_could_be_misread_are_no_identity(name: str) -> None:
    with pytest.raises(ValueError, match="valid role and name"):
        PeerIdentity(role="host", name=name)


def test_two_identities_in_one_certificate_are_none() -> None:
    names = (("URI", "godwit://host/a"), ("URI", "godwit://manager/m"))
    assert PeerIdentity.from_certificate({"subjectAltName": names}) is None
    assert PeerIdentity.from_certificate({"subjectAltName": names[:1]}) is not None
