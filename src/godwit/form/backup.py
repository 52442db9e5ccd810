"""The store's whole content in one file: a consistent copy, and what becomes of it elsewhere.

JSON lines: a head, one line for each key, a tail with the count and the SHA-256 of all lines
before. One list is one revision, so the copy is consistent. What hangs on a lease (who is alive,
who leads) says nothing about later and stays out, and so do the hosts' renewals: a guard's word in
a copy is not its last. The file holds user data and hashes: 0600.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.form.restore_rules import HostSaid, restored
from godwit.model import keys
from godwit.model.errors import GodwitError, InvalidRequest, OperationFailed, Refused
from godwit.model.host import HostInfo
from godwit.model.ownership import Owner
from godwit.model.trust import ClusterIdentity
from godwit.store.api import Op, Store, absent, delete, put, value_is
from godwit.store.records import encode, new_event
from godwit.wire.ca import write_whole

FORMAT = 1
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Backup:
    """A file's content, whole and checked. Times in seconds since the epoch."""

    cluster: str
    ca_fingerprint: str
    revision: int
    taken_at: float
    records: Mapping[str, bytes]
    sha256: str

    def hosts(self) -> dict[str, HostInfo]:
        """The hosts that were members."""
        return {info.name: info for info in self._all(keys.HOSTS, "/info", HostInfo)}

    def owners(self) -> dict[str, Owner]:
        """The ownership records by VM."""
        prefix, suffix = keys.VMS, "/owner"
        return {
            key.removeprefix(prefix).removesuffix(suffix): Owner.model_validate_json(value)
            for key, value in self.records.items()
            if key.startswith(prefix) and key.endswith(suffix)
        }

    def _all(self, prefix: str, suffix: str, kind: type[HostInfo]) -> list[HostInfo]:
        return [
            kind.model_validate_json(value)
            for key, value in self.records.items()
            if key.startswith(prefix) and key.endswith(suffix)
        ]


async def export(store: Store, path: Path) -> Backup:
    """Write the store's content to a new file. Errors: those of the store, Refused."""
    if path.exists():
        raise Refused(f"{path} exists", hint="name a new file")
    found = await store.range(keys.ROOT)
    records = {kv.key: kv.value for kv in found.kvs if not (kv.lease or keys.is_renewal(kv.key))}
    about = records.get(keys.TRUST_CLUSTER)
    cluster = ClusterIdentity.model_validate_json(about) if about else None
    head = {
        "godwit_export": FORMAT,
        "cluster": cluster.name if cluster else "",
        "ca_fingerprint": cluster.ca_fingerprint if cluster else "",
        "revision": found.revision,
        "taken_at": time.time(),
    }
    lines = [json.dumps(head)]
    for key, value in records.items():
        lines.append(json.dumps({"key": key, "value": base64.b64encode(value).decode()}))
    body = "".join(f"{line}\n" for line in lines).encode()
    tail = {"end": True, "records": len(records), "sha256": hashlib.sha256(body).hexdigest()}
    write_whole(path, body + json.dumps(tail).encode() + b"\n", mode=0o600)
    return read(path)


def read(path: Path) -> Backup:
    """A file that is whole; InvalidRequest says what is wrong with another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", hint="name an exported file") from None
    body, _, last = content.rstrip(b"\n").rpartition(b"\n")
    try:
        head, tail = json.loads(body.partition(b"\n")[0]), json.loads(last)
        sha256 = hashlib.sha256(body + b"\n").hexdigest()
        whole = tail["end"] is True and tail["sha256"] == sha256
        if head["godwit_export"] != FORMAT:
            raise InvalidRequest(
                f"{path} has the format {head['godwit_export']}, not {FORMAT}",
                hint="import it with the version of Godwit that wrote it",
            )
        lines = [json.loads(line) for line in body.split(b"\n")[1:]]
        records = {line["key"]: base64.b64decode(line["value"]) for line in lines}
        if not whole or len(records) != tail["records"]:
            raise InvalidRequest(f"{path} is damaged or cut off", hint="take another copy")
        return Backup(
            cluster=str(head["cluster"]),
            ca_fingerprint=str(head["ca_fingerprint"]),
            revision=int(head["revision"]),
            taken_at=float(head["taken_at"]),
            records=records,
            sha256=sha256,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidRequest(f"{path} is no whole export", hint="take another copy") from None


@dataclass(frozen=True, slots=True)
class Plan:
    """What an import writes, and a sentence for each VM."""

    records: Mapping[str, bytes]
    sentences: Mapping[str, str]


def plan(
    backup: Backup, said: Mapping[str, HostSaid], *, gone: Sequence[str], keep_running: bool
) -> Plan:
    """Judge every VM; Refused, with all of them, when one forbids it. Pure."""
    silent = sorted(set(backup.hosts()) - set(said) - set(gone))
    if silent:
        raise Refused(
            f"hosts do not say which epochs they have seen: {', '.join(silent)}",
            hint="start their agents; or, for one that is off for good, say: --gone HOST",
        )
    records = {key: value for key, value in backup.records.items() if not keys.is_renewal(key)}
    sentences, forbidden = {}, []
    for vm, owner in backup.owners().items():
        verdict = restored(vm, owner, said, absent=bool(gone), keep_running=keep_running)
        if verdict.owner is None:
            forbidden.append(f"{vm} {verdict.reason}")
        else:
            records[keys.vm_owner(vm)] = encode(verdict.owner)
            sentences[vm] = verdict.reason
    known = set(backup.owners())
    for host, one in said.items():
        forbidden += [
            f"{vm} runs on {host} and is not in the backup" for vm in one.running if vm not in known
        ]
    if forbidden:
        raise Refused(
            f"VMs run: {'; '.join(forbidden)}",
            hint="stop them first; or, to move a store while they run: --keep-running",
        )
    return Plan(records, sentences)


async def import_into(store: Store, backup: Backup, planned: Plan, *, by: str) -> int:
    """Fill an empty store; the number of keys. Interrupted, it may be run again to its end.

    Until it is whole the store carries a mark that managers and agents wait for
    (`godwit.store.whole`). Errors: Refused, OperationFailed, those of the store.
    """
    mark = json.dumps({"sha256": backup.sha256}).encode()
    there = await _content(store)
    if there and there.get(keys.RESTORING) != mark:
        raise Refused(
            f"the store is not empty: it has {len(there)} keys, such as {min(there)}",
            hint="import into a new store only",
        )
    if not there:
        begun = await store.txn([absent(keys.RESTORING)], [put(keys.RESTORING, mark)])
        if not begun.succeeded:
            raise Refused("somebody else imports into this store", hint="wait for it")
    ops = [put(key, value) for key, value in planned.records.items()]
    for start in range(0, len(ops), _AT_ONCE):
        await _write(store, mark, ops[start : start + _AT_ONCE])
    await _check(store, planned)
    event = new_event(
        "cluster.restored",
        "cluster/store",
        f"{len(ops)} records of {backup.cluster or 'a cluster'} were imported by {by}",
        at=time.time(),
        level="warning",
    )
    ended: list[Op] = [delete(keys.RESTORING), put(keys.event(event.id), encode(event))]
    await _write(store, mark, ended)
    return len(ops)


async def _write(store: Store, mark: bytes, ops: Sequence[Op]) -> None:
    answer = await store.txn([value_is(keys.RESTORING, mark)], ops)
    if not answer.succeeded:
        raise OperationFailed(
            "somebody else writes to the store that is being filled", hint="use a new store"
        )


async def _content(store: Store) -> dict[str, bytes]:
    """What is there to stay: not who is alive just now."""
    found = await store.range(keys.ROOT)
    return {kv.key: kv.value for kv in found.kvs if not kv.lease}


async def _check(store: Store, planned: Plan) -> None:
    stored = await _content(store)
    stored.pop(keys.RESTORING, None)
    if stored != dict(planned.records):
        raise OperationFailed(
            "the store holds something else than what was written to it",
            hint="somebody uses it already: use a new store",
        )


async def ask_hosts(hosts: Mapping[str, HostInfo], ask: Any) -> dict[str, HostSaid]:
    """What every host that answers knows by itself. ``ask(info)`` answers the agent's JSON."""
    said = {}
    for name, info in sorted(hosts.items()):
        try:
            answer = await ask(info)
        except GodwitError:
            continue
        said[name] = HostSaid(seen=dict(answer["seen"]), running=dict(answer["running"]))
    return said
