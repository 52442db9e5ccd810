"""How an etcd member is started: its command line, and what its members' number means; pure.

Debian's etcd-server 3.4 and newer. Everything it says travels over TLS with certificates of the
cluster CA on both sides; the client here insists on version 1.3, which etcd speaks too.

- ``--client-cert-auth`` lets in whoever has a certificate of the CA. etcd's own narrower check
  (``--client-cert-allowed-hostname``) cannot be used: its JSON gateway, which is what we speak,
  fails on it (etcd issue 15755). So that CA signs daemons only, and QEMU's certificates come from
  another one.
- Among members the check works: only the store's own certificates carry the name.
- ``--pre-vote``: a member that was cut off does not depose the leader when it comes back.
- The history is kept for ten minutes: a watch that was away longer lists again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CLIENT_PORT: Final = 2379
PEER_PORT: Final = 2380
HEARTBEAT_MS: Final = 100
ELECTION_MS: Final = 1000
HISTORY: Final = "10m"
# Entries kept in memory until a snapshot; etcd's own 100,000 would be some hundred megabytes.
_SNAPSHOT_COUNT: Final = 10_000


@dataclass(frozen=True, slots=True)
class EtcdMember:
    """One member: its name, and where it listens for clients and for its peers."""

    name: str
    address: str
    client_port: int = CLIENT_PORT
    peer_port: int = PEER_PORT
    peer_address: str = ""  # where it differs

    @property
    def client_url(self) -> str:
        """Where clients reach it."""
        return f"https://{self.address}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        """Where the other members reach it."""
        return f"https://{self.peer_address or self.address}:{self.peer_port}"


def argv(
    me: EtcdMember,
    members: Sequence[EtcdMember],
    *,
    data: Path,
    tls: Path,
    member_dns: str,
    cluster: str,
    revoked: bool = False,
    program: str = "etcd",
) -> tuple[str, ...]:
    """The command line of a member, one option a line.

    ``tls`` is a directory with cert.pem, key.pem and ca.pem; ``member_dns`` the name that a peer's
    certificate must carry; ``cluster`` keeps members of different clusters apart. ``revoked``:
    there is a crl.pem, too, which etcd reads anew with each connection that begins. A member with
    an empty ``data`` begins the cluster together with the others, and refuses where it had begun
    before.
    """
    initial = ",".join(f"{member.name}={member.peer_url}" for member in members)
    cert, key, ca, crl = (str(tls / f"{name}.pem") for name in ("cert", "key", "ca", "crl"))
    return (
        program,
        *("--name", me.name),
        *("--data-dir", str(data)),
        *("--listen-client-urls", me.client_url),
        *("--advertise-client-urls", me.client_url),
        *("--listen-peer-urls", me.peer_url),
        *("--initial-advertise-peer-urls", me.peer_url),
        *("--initial-cluster", initial),
        *("--initial-cluster-token", cluster),
        *("--initial-cluster-state", "new"),
        *("--cert-file", cert),
        *("--key-file", key),
        *("--trusted-ca-file", ca),
        "--client-cert-auth",
        *(("--client-crl-file", crl, "--peer-crl-file", crl) if revoked else ()),
        *("--peer-cert-file", cert),
        *("--peer-key-file", key),
        *("--peer-trusted-ca-file", ca),
        "--peer-client-cert-auth",
        *("--peer-cert-allowed-hostname", member_dns),
        "--pre-vote",
        *("--heartbeat-interval", str(HEARTBEAT_MS)),
        *("--election-timeout", str(ELECTION_MS)),
        *("--auto-compaction-mode", "periodic"),
        *("--auto-compaction-retention", HISTORY),
        *("--snapshot-count", str(_SNAPSHOT_COUNT)),
        *("--logger", "zap"),
        *("--log-outputs", "stderr"),
        *("--log-level", "warn"),
    )


def may_be_lost(members: int) -> int:
    """How many of ``members`` may be gone while the rest still is a majority."""
    return max(0, (members - 1) // 2)


def quorum_words(names: Sequence[str]) -> str:
    """What the number of members means, in a sentence."""
    count, spare = len(names), may_be_lost(len(names))
    shown = ", ".join(names)
    if count == 1:
        return f"one member, {shown}: when it is gone, nothing can be recorded until it is back"
    if not spare:
        return f"{count} members, {shown}: when any of them is gone, nothing can be recorded"
    which = "any one of them" if spare == 1 else f"any {spare} of them"
    return f"{count} members, {shown}: {which} may be gone, {spare + 1} may not"
