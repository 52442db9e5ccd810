"""The store on disk: one SQLite file with the keys, the log of changes and the leases.

Every revision is written in one SQLite transaction with its log entry and the new revision
number, WAL and ``synchronous=FULL``: after a crash a revision is there as a whole or not at all.
The log keeps revisions from ``compact_revision`` on, for watches that resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from godwit.store.engine import FIRST_REVISION, Change, Engine, Record

_APPLICATION_ID = 0x67647774
_SCHEMA_VERSION = 1
# About 4 MiB of write-ahead log; under unbroken load it may grow to ten times that.
_FOLD_AFTER_PAGES = 1000
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE kv (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL);
CREATE TABLE log (
    revision INTEGER NOT NULL, position INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
    create_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL,
    prev_revision INTEGER NOT NULL, PRIMARY KEY (revision, position)) WITHOUT ROWID;
CREATE TABLE lease (id INTEGER PRIMARY KEY, ttl_s INTEGER NOT NULL);
"""


class DatabaseError(Exception):
    """The data directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What one request writes. All of it becomes durable together."""

    revision: int
    changes: tuple[Change, ...] = ()
    granted: tuple[tuple[int, int], ...] = ()
    revoked: tuple[int, ...] = ()
    compact_to: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this store is. The term grows with every start, so a restored copy shows."""

    cluster_id: int
    member_id: int
    term: int


@dataclass(slots=True)
class Loaded:
    """Everything the service needs to begin."""

    engine: Engine
    identity: Identity
    log_sizes: list[tuple[int, int]] = field(default_factory=list)


class Database:
    """The open file. ``load`` first; then one thread commits, another may read the log."""

    def __init__(self, directory: Path) -> None:
        """Lock the directory and open or create the file. Raises DatabaseError."""
        self._pages = 0
        self._lock = _lock(directory)
        self.path = directory / "store.db"
        try:
            self._write = _open(self.path)
            _prepare(self._write, self.path)
            self._read = _open(self.path)
            self._read.execute("PRAGMA query_only=ON")
        except sqlite3.Error as error:
            os.close(self._lock)
            raise _unusable(self.path, error) from error
        except DatabaseError:
            os.close(self._lock)
            raise

    def load(self) -> Loaded:
        """Check the content, begin a new term, and hand everything over to memory."""
        try:
            return self._load()
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    def _load(self) -> Loaded:
        connection = self._write
        problems = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
        if problems != ["ok"]:
            raise _unusable(self.path, "; ".join(str(problem) for problem in problems))
        meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        records = [Record(*row) for row in connection.execute("SELECT * FROM kv")]
        newest = max((record.mod_revision for record in records), default=0)
        (logged,) = connection.execute("SELECT coalesce(max(revision), 0) FROM log").fetchone()
        missing = {"revision", "compacted", "term", "cluster_id", "member_id"} - meta.keys()
        if missing or max(newest, logged) > meta["revision"]:
            raise _unusable(self.path, "its revisions contradict each other")
        with _transaction(connection):
            connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'term'")
        engine = Engine(
            revision=meta["revision"],
            compact_revision=meta["compacted"],
            records=records,
            leases=dict(connection.execute("SELECT id, ttl_s FROM lease").fetchall()),
        )
        sizes = connection.execute(
            "SELECT revision, sum(length(value) + length(key)) FROM log GROUP BY revision"
            " ORDER BY revision"
        ).fetchall()
        identity = Identity(meta["cluster_id"], meta["member_id"], meta["term"] + 1)
        return Loaded(engine, identity, sizes)

    def commit(self, batch: Iterable[Commit]) -> None:
        """Make a batch durable, all or nothing. In the writer's thread."""
        connection = self._write
        with _transaction(connection):
            revision = 0
            for commit in batch:
                self._apply(commit)
                self._pages += 5 + sum(len(c.record.value) for c in commit.changes) // 2048
                revision = max(revision, commit.revision)
            connection.execute("UPDATE meta SET value = ? WHERE name = 'revision'", (revision,))

    def _apply(self, commit: Commit) -> None:
        connection = self._write
        for position, change in enumerate(commit.changes):
            record = change.record
            if change.deleted:
                connection.execute("DELETE FROM kv WHERE key = ?", (record.key,))
            else:
                connection.execute(
                    "INSERT OR REPLACE INTO kv VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        record.key,
                        record.value,
                        record.create_revision,
                        record.mod_revision,
                        record.version,
                        record.lease,
                    ),
                )
            connection.execute(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    commit.revision,
                    position,
                    record.key,
                    record.value,
                    record.create_revision,
                    record.version,
                    record.lease,
                    change.prev.mod_revision if change.prev else 0,
                ),
            )
        for lease_id, ttl_s in commit.granted:
            connection.execute("INSERT INTO lease VALUES (?, ?)", (lease_id, ttl_s))
        for lease_id in commit.revoked:
            connection.execute("DELETE FROM lease WHERE id = ?", (lease_id,))
        if commit.compact_to:
            connection.execute("DELETE FROM log WHERE revision < ?", (commit.compact_to,))
            connection.execute(
                "UPDATE meta SET value = ? WHERE name = 'compacted'", (commit.compact_to,)
            )

    def fold(self, *, idle: bool) -> None:
        """Move a grown write-ahead log into the main file. In the writer's thread."""
        if self._pages < _FOLD_AFTER_PAGES * (1 if idle else 10):
            return
        # Passive: the log's file keeps its size, and overwriting is cheaper to flush than growing.
        self._write.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self._pages = 0

    def history(self, first: int, last: int) -> dict[int, list[Change]]:
        """The durable changes of revisions ``first`` to ``last``. Not in the writer's thread."""
        found: dict[int, list[Change]] = {}
        rows = self._read.execute(
            "SELECT l.key, l.value, l.create_revision, l.revision, l.version, l.lease,"
            " p.key, p.value, p.create_revision, p.revision, p.version, p.lease"
            " FROM log l LEFT JOIN log p ON p.revision = l.prev_revision AND p.key = l.key"
            " AND p.version > 0 WHERE l.revision BETWEEN ? AND ? ORDER BY l.revision, l.position",
            (first, last),
        )
        for row in rows:
            prev = None if row[6] is None else Record(*row[6:])
            found.setdefault(row[3], []).append(Change(Record(*row[:6]), prev))
        return found

    def size(self) -> int:
        """Bytes of the main file."""
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file and give the directory free. The writer's thread must have ended."""
        self._read.close()
        with contextlib.suppress(sqlite3.Error):
            self._write.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._write.close()
        os.close(self._lock)


def _lock(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DatabaseError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise DatabaseError(f"another store daemon already uses {directory}") from error
    return handle


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute("PRAGMA synchronous=FULL")
        # Folding the log costs two flushes; the writer does it when nobody waits.
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("PRAGMA cache_size=-2048")
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if (application, version) == (_APPLICATION_ID, _SCHEMA_VERSION):
        return
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables or version or application:
        raise DatabaseError(
            f"{path} is not a store of this version (application {application:#x},"
            f" schema {version}); move it away or use the release that wrote it"
        )
    path.chmod(0o600)
    with _transaction(connection):
        for statement in filter(str.strip, _SCHEMA.split(";")):
            connection.execute(statement)
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [
                ("revision", FIRST_REVISION),
                ("compacted", 0),
                ("term", 0),
                ("cluster_id", secrets.randbits(62) + 1),
                ("member_id", secrets.randbits(62) + 1),
            ],
        )
        connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _unusable(path: Path, why: object) -> DatabaseError:
    return DatabaseError(
        f"{path} is damaged ({why}); keep the file for inspection, and restore the directory"
        " from a backup or move it away to begin with an empty store"
    )
