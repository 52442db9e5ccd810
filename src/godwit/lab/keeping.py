"""What keeps a lab's records: the embedded daemon on the control node, or etcd on its hosts.

    hosts   members
    1       host1: when it is gone, nothing can be recorded
    2       host1, host2, and a witness on the control node, which no host's fault reaches
    3..     host1, host2, host3

A member is a unit of its node's supervisor, so that a node's power takes its member along and one
that ends is started again. Its data lies on the node's own disk and outlives both.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any, Final

from godwit.host.netns import opened_netns, socket_in_netns
from godwit.lab.configs import LOGS, STATE, STORE_SOCKET, STORE_TLS, Unit
from godwit.lab.layout import CONTROL, OPERATOR, Layout
from godwit.model.errors import OperationFailed
from godwit.store import etcd
from godwit.store.api import MemberView
from godwit.store.client import StoreClient
from godwit.store.members import leader_of
from godwit.wire.identity import STORE, STORE_MEMBER_DNS, Identity
from godwit.wire.tls import ClientTls, Expect

ETCD: Final = "etcd"  # the unit, and the program
READY_S: Final = 40.0
_LOOK_S: Final = 1.0
_RETRY_S: Final = 0.05


def unit(layout: Layout, node: str) -> tuple[Unit, ...]:
    """The member of a node as a unit; none where it has none."""
    mine = next((member for member in layout.store_members if member.name == node), None)
    if mine is None:
        return ()
    words = etcd.argv(
        mine,
        layout.store_members,
        data=STATE / "etcd",
        tls=STORE_TLS,
        member_dns=STORE_MEMBER_DNS,
        cluster=f"godwit-{layout.name}",
        revoked=True,
        program=ETCD,
    )
    # It has no watchdog, and tells only a systemd that it is ready.
    return (Unit(ETCD, words, f"{LOGS}/{ETCD}.log", notify=False, watchdog_s=None),)


def client(layout: Layout, *, control_root: str, timeout: float = 5.0) -> StoreClient:
    """The store for a root on the real machine, whatever network is cut.

    Each member is spoken to from inside of its own node, as the lab's manager; the embedded one
    over the unix socket of the control node, whose root is ``control_root``.
    """
    if not layout.store_members:
        return StoreClient([f"unix:{control_root}{STORE_SOCKET}"], timeout=timeout)
    nodes = {member.address: member.name for member in layout.store_members}

    def inside(address: str) -> socket.socket:
        with opened_netns(layout.netns(nodes[address])) as space:
            return socket_in_netns(space, socket.AF_INET)

    tls = ClientTls.for_daemon(Identity.load(layout.pki / OPERATOR), Expect(STORE))
    return StoreClient(
        [member.client_url for member in layout.store_members],
        ssl_context=tls.context,
        verify_peer=lambda peer: tls.verify(peer, where="the store"),
        make_socket=inside,
        timeout=timeout,
    )


async def look(store: StoreClient) -> tuple[MemberView, ...]:
    """What every member says at this moment."""
    return await store.members(timeout=_LOOK_S)


def wait_led(store: StoreClient, *, timeout: float = READY_S) -> str:
    """Return who leads, once all members answer and follow it; OperationFailed when late."""

    async def led() -> str:
        views: tuple[MemberView, ...] = ()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    views = await look(store)
                    leader = leader_of(views)
                    if leader is not None and all(view.status for view in views):
                        return leader.endpoint
                    # A member announces neither that it serves nor that it follows.
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            away = [f"{view.endpoint}: {view.problem or 'no leader'}" for view in views]
            raise OperationFailed(
                f"the store's members do not agree after {timeout:g} s; {'; '.join(away)}",
                hint="look: godwit lab up --retain, then godwit lab logs host1 etcd",
            ) from None
        finally:
            await store.aclose()

    return asyncio.run(led())


def members_view(layout: Layout, views: Sequence[MemberView]) -> list[dict[str, Any]]:
    """The members for ``lab status -o json``: each with its state in a word; pure."""
    leader = leader_of(views)
    by_url = {view.endpoint: view for view in views}
    rows = []
    for member in layout.store_members:
        view = by_url.get(member.client_url)
        if view is None or view.status is None:
            state = "away"
        elif view == leader:
            state = "leads"
        else:
            state = "follows" if view.status.leader else "no leader"
        rows.append(
            {
                "node": member.name,
                "url": member.client_url,
                "state": state,
                "term": view.status.raft_term if view and view.status else None,
                "revision": view.status.revision if view and view.status else None,
                "witness": member.name == CONTROL,
            }
        )
    return rows


def quorum(layout: Layout, rows: Sequence[dict[str, Any]]) -> str:
    """What the members mean for the lab, in words, and whether records can be changed now; pure."""
    if not rows:
        return "the embedded store on the control node"
    names = [f"{row['node']} (witness)" if row["witness"] else row["node"] for row in rows]
    words = etcd.quorum_words(names)
    here = [row for row in rows if row["state"] in ("leads", "follows")]
    if any(row["state"] == "leads" for row in rows):
        away = [row["node"] for row in rows if row not in here]
        return f"{words}; away now: {', '.join(away)}" if away else words
    return f"{words}; there is no leader now: nothing can be recorded"
