"""Lists of the API: some fields, some rows, page by page; and the SDK that reads the pages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from godwit.client import link
from godwit.client.api import AsyncClient
from godwit.client.link import next_page
from godwit.manager.api.listing import pieces
from godwit.wire.errors import PeerRefused

TOKEN = "a-token-of-many-letters"


@pytest.fixture
async def five(api: Any) -> Any:
    """Five VMs, two of which run on host1."""
    for name in ("c", "a", "e", "b", "d"):
        await api.make_vm(name)
    for name in ("b", "d"):
        assert (await api.act("POST", f"/v1/vms/{name}/actions/start", {"host": "host1"}))[
            "error"
        ] is None
    return api


@pytest.fixture
async def sdk(api: Any, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    async with AsyncClient(
        api.api.url, token_file=token, ca_file=api.identities["m1"].ca
    ) as client:
        yield client


async def ask(api: Any, path: str, **query: Any) -> tuple[list[Any], str]:
    answer = await api.api.request("GET", path, query=query)
    return answer.json(), answer.headers.get("link", "")


def names(rows: list[Any]) -> list[str]:
    return [row["name"] for row in rows]


async def test_a_list_is_whole_unless_less_is_asked_for(five: Any) -> None:
    rows, next_ = await ask(five, "/v1/vms")
    assert (names(rows), next_) == (list("abcde"), "")
    for row in rows:
        assert row == await five.api.get(f"/v1/vms/{row['name']}")
    few, _ = await ask(five, "/v1/vms", fields="name,host")
    assert few == [{"name": row["name"], "host": row["host"]} for row in rows]
    hosts, _ = await ask(five, "/v1/hosts", fields="name,state")
    assert hosts == [{"name": f"host{n}", "state": "up"} for n in (1, 2)]


async def test_rows_are_chosen_by_host_and_state(five: Any) -> None:
    assert names((await ask(five, "/v1/vms", host="host1"))[0]) == ["b", "d"]
    assert names((await ask(five, "/v1/vms", host="host2"))[0]) == []
    assert names((await ask(five, "/v1/vms", state="stopped"))[0]) == ["a", "c", "e"]
    assert names((await ask(five, "/v1/vms", state="running", host="host1", limit=1))[0]) == ["b"]


async def test_pages_follow_each_other_whatever_comes_and_goes(five: Any) -> None:
    rows, next_ = await ask(five, "/v1/vms", limit=2, fields="name")
    assert names(rows) == ["a", "b"]
    assert next_ == '</v1/vms?limit=2&fields=name&after=b>; rel="next"'
    query = next_page(next_)
    assert query == {"limit": "2", "fields": "name", "after": "b"}
    assert (await five.act("DELETE", "/v1/vms/a"))["state"] == "completed"
    rows, next_ = await ask(five, "/v1/vms", **query)
    assert names(rows) == ["c", "d"]
    rows, next_ = await ask(five, "/v1/vms", **(next_page(next_) or {}))
    assert (names(rows), next_) == (["e"], "")
    rows, next_ = await ask(five, "/v1/hosts", limit=1)
    assert names(rows) == ["host1"]
    assert names((await ask(five, "/v1/hosts", **(next_page(next_) or {})))[0]) == ["host2"]


@pytest.mark.parametrize(
    ("query", "said"),
    [({"fields": "colour"}, "colour"), ({"limit": 0}, "limit"), ({"state": "odd"}, "state")],
)
async def test_nonsense_is_refused_with_what_there_is(
    api: Any, query: dict[str, Any], said: str
) -> None:
    with pytest.raises(PeerRefused) as caught:
        await api.api.get("/v1/vms", query=query)
    assert caught.value.problem.status == 400
    assert said in caught.value.problem.detail + caught.value.problem.hint


async def test_the_sdk_reads_all_pages(
    five: Any, sdk: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PAGE_ROWS", 2)
    assert [vm.name for vm in await sdk.vms.list()] == list("abcde")
    assert [vm.name for vm in await sdk.vms.list(host="host1", state="running")] == ["b", "d"]
    assert [host.name for host in await sdk.hosts.list()] == ["host1", "host2"]
    assert await sdk.rows("vms", fields=("name",)) == [{"name": name} for name in "abcde"]
    assert len(await sdk.tasks.list()) == 7  # a list without pages


def test_pieces_are_one_document() -> None:
    for count in (0, 1, 3):
        rows = [json.dumps({"n": number}).encode() for number in range(count)]
        assert json.loads(b"".join(pieces(rows))) == [{"n": number} for number in range(count)]
    large = [b'"' + b"x" * 100_000 + b'"'] * 20
    parts = list(pieces(large))
    assert len(parts) > 4
    assert json.loads(b"".join(parts)) == ["x" * 100_000] * 20


def test_a_link_that_leads_nowhere_ends_the_list() -> None:
    for header in ("", '</v1/vms?after=x>; rel="prev"', "nonsense"):
        assert next_page(header) is None
