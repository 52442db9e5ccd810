"""Hosts join by token: over real TLS, with everything that may be wrong with a token."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest
from tests.unit.form.conftest import Formed

from godwit.form.init import init
from godwit.form.places import HostFacts, Places
from godwit.host.config import AgentConfig
from godwit.manager.config import ManagerConfig
from godwit.model import keys
from godwit.model.errors import Conflict, InvalidRequest, NotAllowed, Refused
from godwit.model.join import Token, new_token, parse_token
from godwit.model.trust import JoinToken
from godwit.store.records import encode
from godwit.wire.ca import ClusterCa, issue, write_identity
from godwit.wire.errors import PeerRefused, PeerUnreachable
from godwit.wire.http import PeerClient
from godwit.wire.identity import Identity, PeerIdentity
from godwit.wire.server import Listener, ServerTls, WireServer
from godwit.wire.tls import ClientTls


def test_init_writes_what_the_daemons_read(tmp_path: Path) -> None:
    places = Places(tmp_path)
    networks = {"lan": ("br-lan", "eth1")}
    facts = HostFacts(name="host1", address="127.0.0.1", networks=networks)
    made = init(places, facts, cluster="test")
    host, manager = (
        AgentConfig.load(places.config("host")),
        ManagerConfig.load(places.config("manager")),
    )
    assert host.store.endpoints == manager.store_endpoints == ("https://127.0.0.1:7379",)
    assert host.networks["lan"].uplink == "eth1"
    assert manager.keeps == (places.store_tls,)
    assert manager.ca_dir == places.ca
    holders = {
        "host/host1": places.tls,
        "manager/host1": places.manager_tls,
        "store/host1": places.store_tls,
    }
    for peer, directory in holders.items():
        assert str(Identity.load(directory).peer) == peer
        assert stat.S_IMODE((directory / "key.pem").stat().st_mode) == 0o600
    for secret in (places.ca / "ca-key.pem", places.tokens, places.admin_token):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert made.units == ("godwit-store", "godwit-manager", "godwit-guard", "godwit-agent")
    with pytest.raises(Refused, match="belongs to a cluster already"):
        init(places, facts, cluster="again")


def test_a_failed_init_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(tmp_path)
    places.etc.mkdir(parents=True)
    (places.etc / "mine.toml").write_text("")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("godwit.form.init.ensure_dh_params", full)
    with pytest.raises(OSError, match="no space"):
        init(places, HostFacts(name="host1", address="127.0.0.1"), cluster="test")
    assert [path.name for path in places.etc.iterdir()] == ["mine.toml"]


async def test_a_host_joins_and_is_whom_its_certificate_names(cluster: Formed) -> None:
    made = await cluster.join("host2", await cluster.token())
    assert (made.cluster, made.host) == ("test", "host2")
    places = Places(cluster.root / "host2")
    identity = Identity.load(places.tls)
    assert identity.peer == PeerIdentity("host", "host2")
    assert AgentConfig.load(places.config("host")).store.endpoints == ("https://127.0.0.1:7379",)
    assert (places.migration_tls / "ca-crl.pem").exists()
    key = keys.issued("host", "host2", f"{identity.serial:x}")
    assert await cluster.store.get(key) is not None
    # Its key never left it: the store and the manager's files know only certificates.
    secret = identity.key.read_bytes().split(b"\n")[1]
    everything = b"".join(kv.value for kv in (await cluster.store.range("")).kvs)
    assert secret not in everything


async def test_a_token_works_once(cluster: Formed, caplog: pytest.LogCaptureFixture) -> None:
    token = await cluster.token()
    await cluster.join("host2", token)
    with pytest.raises(NotAllowed, match=r"has been used, by host2 at 127\.0\.0\.1"):
        await cluster.join("host3", token)
    assert not Places(cluster.root / "host3").tls.exists()
    assert f"token {parse_token(token).id}: the join token has been used" in caplog.text
    await _nothing_leaked(cluster, token, caplog)


async def test_two_hosts_with_one_token_at_once_and_one_gets_in(cluster: Formed) -> None:
    """Both have read the token unused before either is let in: the transaction decides."""
    token, authority = await cluster.token(), cluster.authority
    async with authority._joining:
        tasks = [
            asyncio.create_task(authority.join(_ask(name, token), where="here"), name=name)
            for name in ("host2", "host3")
        ]
        async with asyncio.timeout(10):
            while True:
                if len(authority._joining._waiters or ()) == len(tasks):
                    break
                await asyncio.sleep(0.01)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(type(one).__name__ for one in done) == ["JoinAnswer", "NotAllowed"]


async def test_a_wrong_secret_an_expired_and_anothers_token_are_refused(
    cluster: Formed, caplog: pytest.LogCaptureFixture
) -> None:
    good = parse_token(await cluster.token())
    wrong = Token(good.id, new_token("").secret, good.fingerprint)
    with pytest.raises(NotAllowed, match=r"^the join token is not valid$"):
        await cluster.join("host2", wrong.text)
    unknown = new_token(good.fingerprint)
    with pytest.raises(NotAllowed, match=r"^the join token is not valid$"):
        await cluster.join("host2", unknown.text)
    mine = await cluster.token(host="host7")
    with pytest.raises(NotAllowed, match="is for host7, not for host2"):
        await cluster.join("host2", mine)
    late = await cluster.token(ttl_s=1.0)
    stored = await cluster.records.get(keys.join_token(parse_token(late).id), JoinToken)
    assert stored is not None
    await asyncio.sleep(max(0.0, stored.value.expires_at - cluster.manager.world.clock.realtime()))
    with pytest.raises(NotAllowed, match="expired"):
        await cluster.join("host2", late)
    assert len([r for r in caplog.records if "refused" in r.message]) == 4
    for token in (wrong.text, unknown.text, mine, late):
        await _nothing_leaked(cluster, token, caplog)
    assert not Places(cluster.root / "host2").tls.exists()


async def test_whoever_writes_to_the_store_cannot_make_a_token(cluster: Formed) -> None:
    forged = new_token(cluster.authority.issuer.fingerprint)
    real = await cluster.records.get(
        keys.join_token(parse_token(await cluster.token()).id), JoinToken
    )
    assert real is not None
    record = real.value.but(id=forged.id, hash=forged.hash)
    await cluster.store.put(keys.join_token(forged.id), encode(record))
    with pytest.raises(NotAllowed, match="not valid"):
        await cluster.join("host2", forged.text)


async def test_a_member_cannot_be_replaced_by_a_token(cluster: Formed) -> None:
    await cluster.join("host2", await cluster.token())
    await cluster.store.put(keys.host_info("host2"), b"{}")
    with pytest.raises(Conflict, match="host2 is a member already"):
        await cluster.authority.join(_ask("host2", await cluster.token()), where="127.0.0.1")


async def test_a_name_that_joins_anew_leaves_no_old_certificate_valid(cluster: Formed) -> None:
    await cluster.join("host2", await cluster.token())
    first = Identity.load(Places(cluster.root / "host2").tls)
    (cluster.root / "host2").rename(cluster.root / "lost")
    await cluster.join("host2", await cluster.token())
    listed = await cluster.authority.lists.newest("host")
    assert first.serial in listed.value.serials
    assert Identity.load(Places(cluster.root / "host2").tls).serial not in listed.value.serials


async def test_nothing_secret_is_sent_to_another_cluster(cluster: Formed, tmp_path: Path) -> None:
    """A machine in the middle with a CA of its own sees one question for a public file."""
    other = ClusterCa.create(cluster="test")
    write_identity(tmp_path / "fake", issue(other, role="manager", name="host1"))
    fake = Identity.load(tmp_path / "fake")
    heard: list[bytes] = []

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        heard.append(str(scope).encode())
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": other.pem})  # type: ignore[operator]

    server = WireServer(app, [Listener.tcp("127.0.0.1", 0, tls=ServerTls(fake, roles=None))])
    await server.start()
    try:
        token = await cluster.token()
        with pytest.raises(Refused, match="belongs to another cluster"):
            await cluster.join("host2", token, url=f"https://127.0.0.1:{server.ports[0]}")
    finally:
        await server.stop(grace_s=0)
    assert len(heard) == 1
    assert b"/v1/cluster/ca" in heard[0]
    assert parse_token(token).secret.encode() not in heard[0]


async def test_it_shows_the_right_ca_but_holds_no_key_of_it(
    cluster: Formed, tmp_path: Path
) -> None:
    """A thief of the public certificate passes the first look and fails the second."""
    other = ClusterCa.create(cluster="test")
    write_identity(tmp_path / "fake", issue(other, role="manager", name="host1"))
    fake = Identity.load(tmp_path / "fake")
    true_ca = (cluster.places.tls / "ca.pem").read_bytes()
    asked: list[str] = []

    async def app(scope: dict[str, str], receive: object, send: object) -> None:
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": true_ca})  # type: ignore[operator]

    server = WireServer(app, [Listener.tcp("127.0.0.1", 0, tls=ServerTls(fake, roles=None))])
    await server.start()
    try:
        with pytest.raises(PeerUnreachable):
            await cluster.join(
                "host2", await cluster.token(), url=f"https://127.0.0.1:{server.ports[0]}"
            )
    finally:
        await server.stop(grace_s=0)
    assert asked == ["/v1/cluster/ca"]


async def test_tokens_are_for_callers_of_the_api_and_no_text_is_repeated(cluster: Formed) -> None:
    tls = ClientTls.for_api(cluster.places.tls / "ca.pem")
    async with PeerClient(cluster.url, tls=tls) as nobody:
        with pytest.raises(PeerRefused) as caught:
            await nobody.post("/v1/cluster/tokens", {})
        assert caught.value.status == 401
        with pytest.raises(PeerRefused) as caught:
            await nobody.post("/v1/cluster/join", {"token": "hunter2", "name": "host2"})
        assert "hunter2" not in str(caught.value.to_problem())
    with pytest.raises(InvalidRequest, match="not a join token") as wrong:
        await cluster.join("host2", "hunter2")
    assert "hunter2" not in wrong.value.message


def test_a_token_does_not_show_itself() -> None:
    token = new_token("00" * 32)
    assert token.secret not in repr(token)
    assert parse_token(f" {token.text}\n") == token


def _ask(name: str, token: str):  # type: ignore[no-untyped-def]
    from godwit.model.trust import JoinAsk
    from godwit.wire.ca import request

    return JoinAsk(
        token=token,
        name=name,
        csr=request("host", name)[1].decode(),
        migration_csr=request("migration", name)[1].decode(),
    )


async def _nothing_leaked(cluster: Formed, token: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = parse_token(token).secret
    assert secret not in caplog.text
    assert not any(secret.encode() in kv.value for kv in (await cluster.store.range("")).kvs)
