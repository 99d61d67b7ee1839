"""The ledger of one trained model: every request that changed it, in an SQLite file beside the checkpoint.

Tables (schema version 1, kept in `user_version`; a rollback journal, so that the one file is all of it; foreign keys on,
every commit synced, and its folder too):

    requests   number, id, kind, time, method, scope, status, fingerprints, metrics, versions, and the receipt itself
    forgotten  position (primary key: no row of the training set can be forgotten twice), request; emptied where the model
               goes on with another training set (positions count anew; receipts and digests keep what was before)
    users      request, keyed hash of a user id (never the id)
    switches   request, target, stage, sha256: the files that a committed request moves into place

A request is written in one SQLite transaction, with status `committed`: from then on it counts, whatever happens to the
process. When its files are in place it is `done`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.deletion.chain import Entry, chain_problems, columns, counts_anew
from lightning_muter.deletion.receipts import GENESIS, make_receipt, parse_receipt
from lightning_muter.errors import CorruptFileError, RequestError
from lightning_muter.storage.atomic import STAGE, beside, fsync_file, fsync_folder
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.storage.signing import PublicKey

SCHEMA = 1
_BUSY_SECONDS = 10.0
_APPLICATION = 0x4D757465  # "Mute", in the file's header
_IDENTITY = ("user_version", "application_id")
_TABLES = (
    """CREATE TABLE requests (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    time TEXT NOT NULL,
    method TEXT NOT NULL,
    scope TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('committed', 'done')),
    asked TEXT NOT NULL,
    fingerprint_before TEXT NOT NULL,
    fingerprint_after TEXT NOT NULL,
    metrics TEXT NOT NULL,
    versions TEXT NOT NULL,
    receipt BLOB NOT NULL,
    sha256 TEXT NOT NULL
) STRICT""",
    """CREATE TABLE forgotten (
    position INTEGER PRIMARY KEY,
    request INTEGER NOT NULL REFERENCES requests (number)
) STRICT""",
    """CREATE TABLE users (
    request INTEGER NOT NULL REFERENCES requests (number),
    digest TEXT NOT NULL,
    PRIMARY KEY (request, digest)
) STRICT""",
    """CREATE TABLE switches (
    request INTEGER NOT NULL REFERENCES requests (number),
    target TEXT NOT NULL,
    stage TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (request, target)
) STRICT""",
)
_SIGNER = re.compile(rb'"previous":"[0-9a-f]{64}","public_key":"([0-9a-f]{64})"')
_ADVICE = "Restore the ledger from a backup; the receipts beside it tell what it held."


@dataclass(frozen=True)
class Switch:
    """A file that a committed request moves into place: `stage` becomes `target` (names in the ledger's folder)."""

    target: str
    stage: str
    sha256: str


class Ledger:
    """The ledger in one file. Use :meth:`open` in a `with` block.

    Not for two writers at once: the lock of :mod:`lightning_muter.deletion.transactions` sees to that.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._connection = path, connection
        self.verified_with: DigestKey | None = None  # see lightning_muter.deletion.verified
        self.complete_up_to = 0  # requests whose receipt files are known to be there
        self.changed = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, *, create: bool = False, readonly: bool = False) -> Iterator[Ledger]:
        """Open (or create) a ledger.

        Args:
            readonly: only look: no file is made or changed, and none need be writable.

        Raises:
            RequestError: there is none and `create` is off.
            CorruptFileError: not an SQLite file, not a ledger, of a newer schema, or damaged.
        """
        if not path.exists():
            if not create:
                raise RequestError(f"{path}: no ledger here. `muter snapshot --ckpt_path …` starts one.")
            _make(path)
        ledger = cls(path, _opened(path, readonly))
        try:
            yield ledger
        finally:
            ledger._connection.close()

    def reopen(self) -> None:
        """Begin anew with what the disk holds: after an error nobody but the disk knows what counts.

        Raises:
            RequestError, CorruptFileError, OSError: the disk does not say, or does not hold for sure what it says.
        """
        self._connection.close()
        self._connection = _opened(self.path, readonly=False)
        fsync_file(self.path)
        fsync_folder(self.path.parent)

    @staticmethod
    def unborn(path: Path) -> bool:
        """Whether the file was begun but nothing was ever entered: its process died before its tables were in it."""
        if not path.exists():
            return False
        with contextlib.closing(_connect(path, readonly=True)) as connection:
            try:
                numbers = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in _IDENTITY]
                return not any(numbers) and not connection.execute("SELECT 1 FROM sqlite_master").fetchall()
            except sqlite3.Error:
                return False  # damaged, or somebody else's: opening says so

    @classmethod
    def discard_unborn(cls, path: Path) -> bool:
        """Remove such a file; the caller holds the model's lock. Returns whether there was one."""
        if not cls.unborn(path):
            return False
        cls.remove(path)
        return True

    @staticmethod
    def remove(path: Path) -> None:
        """Remove a ledger in which nothing is entered; its logs first, which a new file of its name would take for its own."""
        for ending in ("-wal", "-shm", "-journal", ""):
            Path(f"{path}{ending}").unlink(missing_ok=True)

    def __len__(self) -> int:
        return self._one("SELECT coalesce(max(number), 0) FROM requests")[0]

    def head(self) -> str:
        """The hash of the last receipt, which all before it are chained to; 64 zeros when there is none."""
        rows = self._all("SELECT sha256 FROM requests ORDER BY number DESC LIMIT 1")
        return str(rows[0][0]) if rows else GENESIS

    def public_keys(self) -> list[PublicKey]:
        """The keys that signed the receipts, oldest first (receipts of format 1 name none)."""
        found = (_SIGNER.search(text) for _, _, text in self.texts())
        return [PublicKey(name.decode()) for name in dict.fromkeys(match[1] for match in found if match is not None)]

    def receipts(self) -> list[dict[str, Any]]:
        """All receipts, oldest first."""
        rows = self._all("SELECT number, receipt FROM requests ORDER BY number")
        return [parse_receipt(text, f"{self.path}, receipt {number}") for number, text in rows]

    def last(self, kind: str | None = None) -> dict[str, Any] | None:
        """The latest receipt (of this kind), if there is any."""
        where, values = ("WHERE kind = ?", (kind,)) if kind is not None else ("", ())
        rows = self._all(f"SELECT number, receipt FROM requests {where} ORDER BY number DESC LIMIT 1", values)
        return parse_receipt(rows[0][1], f"{self.path}, receipt {rows[0][0]}") if rows else None

    def contains(self, head: str) -> bool:
        """Whether this hash is a receipt's: the head, or one in its history."""
        return bool(self._all("SELECT 1 FROM requests WHERE sha256 = ?", (head,)))

    def kinds(self) -> dict[int, str]:
        """The kind of every request, by its number."""
        return dict(self._all("SELECT number, kind FROM requests ORDER BY number"))

    def texts(self) -> list[tuple[int, str, bytes]]:
        """Number, id and canonical receipt text of every request."""
        return self._all("SELECT number, id, receipt FROM requests ORDER BY number")

    def names(self, after: int = 0) -> list[tuple[int, str]]:
        """Number and id of every request after this one, oldest first."""
        query = "SELECT number, id FROM requests WHERE number > ? ORDER BY number"
        return [(int(number), str(name)) for number, name in self._all(query, (after,))]

    def find(self, request_id: str) -> dict[str, Any] | None:
        """The receipt of the request with this id, if it was carried out."""
        rows = self._all("SELECT number, receipt FROM requests WHERE id = ?", (request_id,))
        return parse_receipt(rows[0][1], f"{self.path}, receipt {rows[0][0]}") if rows else None

    def asked(self, request_id: str) -> str | None:
        """The digest of what the request with this id asked for."""
        rows = self._all("SELECT asked FROM requests WHERE id = ?", (request_id,))
        return rows[0][0] if rows else None

    def forgotten(self) -> dict[int, str]:
        """The forgotten rows of the training set, and the id of the request that removed each."""
        query = "SELECT position, id FROM forgotten JOIN requests ON request = number ORDER BY position"
        return dict(self._all(query))

    def forgotten_by(self) -> dict[int, int]:
        """The forgotten rows, and the number of the request that removed each."""
        return dict(self._all("SELECT position, request FROM forgotten"))

    def unfinished(self) -> list[tuple[dict[str, Any], list[Switch]]]:
        """Committed requests whose files are not all in place yet: the last, or none, for it is finished before the next."""
        query = """SELECT number, receipt FROM requests
            WHERE number = (SELECT max(number) FROM requests) AND status = 'committed'"""
        return [
            (parse_receipt(text, f"{self.path}, receipt {number}"), self.switches(number))
            for number, text in self._all(query)
        ]

    def switches(self, number: int) -> list[Switch]:
        """The files that a request moved into place."""
        rows = self._all("SELECT target, stage, sha256 FROM switches WHERE request = ? ORDER BY target", (number,))
        return [Switch(*row) for row in rows]

    def commit(
        self, content: Mapping[str, Any], asked: str, switches: Sequence[Switch], key: DigestKey
    ) -> dict[str, Any]:
        """Enter a request; when this returns it counts. Returns its receipt.

        Args:
            content: the receipt's content (see :mod:`lightning_muter.deletion.receipts`) without number, links and seals.
            asked: digest of what was asked for, to tell a repeated request from another one under the same id.
            switches: the files, already durable under their stage names, that are to be moved into place.
            key: seals the receipt.
        """
        with self._transaction():
            last = self.last()
            receipt = make_receipt(content, last["number"] + 1 if last else 1, last["sha256"] if last else GENESIS, key)
            number = receipt["number"]
            row = columns(receipt)
            self._connection.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, 'committed', ?, ?, ?, ?, ?, ?, ?)",
                (*row[:6], asked, *row[6:]),
            )
            if counts_anew(receipt):
                self._connection.execute("DELETE FROM forgotten")
            insert = self._connection.executemany
            insert("INSERT INTO forgotten VALUES (?, ?)", [(position, number) for position in receipt["forgotten"]])
            insert("INSERT INTO users VALUES (?, ?)", [(number, digest) for digest in receipt["users"]])
            insert(
                "INSERT INTO switches VALUES (?, ?, ?, ?)", [(number, s.target, s.stage, s.sha256) for s in switches]
            )
        self.changed = True
        return receipt

    def finish(self, number: int) -> None:
        """Note that the files of a request are in place."""
        with self._transaction():
            self._connection.execute("UPDATE requests SET status = 'done' WHERE number = ?", (number,))

    def copy_to(self, path: Path) -> None:
        """A copy of the whole ledger in a new file (for a model that goes on under another name)."""
        with contextlib.closing(sqlite3.connect(path)) as copy, _readable(path):
            copy.execute("PRAGMA journal_mode = OFF")
            self._connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        fsync_file(path)

    def verify(self, key: DigestKey | None, trusted: Sequence[PublicKey] = ()) -> list[str]:
        """Everything that is wrong with the ledger in itself, one line each: damage, a broken chain, a false signature.

        Args:
            key: must have signed the last receipt; it checks the seals of receipts from before signatures too.
            trusted: without the key, public keys one of which must have; none: any may have.
        """
        problems = [f"SQLite: {row[0]}" for row in self._all("PRAGMA integrity_check") if row[0] != "ok"]
        problems += [f"SQLite: dangling row in {row[0]}" for row in self._all("PRAGMA foreign_key_check")]
        users: dict[int, set[str]] = {}
        for number, digest in self._all("SELECT request, digest FROM users"):
            users.setdefault(number, set()).add(digest)
        query = """SELECT number, id, kind, time, method, scope, fingerprint_before, fingerprint_after, metrics,
            versions, receipt, sha256 FROM requests ORDER BY number"""
        entries = [Entry(row, users.get(row[0], set())) for row in self._all(query)]
        return problems + chain_problems(entries, self.forgotten(), key, trusted)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _readable(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with _readable(self.path):
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str) -> Any:
        return self._all(query)[0]


def _opened(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection to a file that was checked to be a ledger."""
    with _readable(path):
        connection = _connect(path, readonly)
        try:
            # Nothing that the file's own schema says is run: no triggers, views or functions of somebody else's.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = EXTRA")  # the folder too, once the journal is gone
            _check_schema(connection, path)
            if not readonly and connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
                connection.execute("PRAGMA journal_mode = DELETE")  # a ledger of an earlier release
        except BaseException:
            connection.close()
            raise
    return connection


def _make(path: Path) -> None:
    """An empty ledger, complete before it has its name: whoever dies in between leaves none."""
    half = beside(path, STAGE)
    try:
        with contextlib.closing(sqlite3.connect(half, isolation_level=None)) as connection, _readable(path):
            connection.execute("PRAGMA journal_mode = OFF")
            for table in _TABLES:
                connection.execute(table)
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        fsync_file(half)
        os.replace(half, path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection; where nothing may be written, one that does not try."""
    if not readonly and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    mode = "mode=ro"
    if _is_wal(path):  # of an earlier release: even looking wants files of its own beside it
        wal = Path(f"{path}-wal")
        if wal.exists() and wal.stat().st_size:
            raise RequestError(f"{path}: changes wait in {wal.name}. Any `muter` command that writes takes them in.")
        mode = "immutable=1"
    uri = f"{path.absolute().as_uri()}?{mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_SECONDS)


def _is_wal(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(20)[18:] == b"\2\2"
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}).") from error


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Insist on exactly the tables of this version."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    found = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")]
    if application != _APPLICATION or version == 0:
        raise CorruptFileError(f"{path}: an SQLite file, but not a ledger of lightning_muter. {_ADVICE}")
    if version > SCHEMA:
        raise CorruptFileError(
            f"{path}: ledger of schema version {version}, this release knows {SCHEMA}. Install a newer lightning-muter."
        )
    if found != list(_TABLES):
        raise CorruptFileError(f"{path}: its tables are not those of a ledger: altered. {_ADVICE}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn SQLite's complaints into ours: damage into CorruptFileError, the file system's into OSError's message."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        reason = f"{path}: the ledger refuses this request ({error})"
        raise RequestError(f"{reason}: its id, or a row that it wants forgotten, is entered already.") from error
    except sqlite3.OperationalError as error:
        reason = f"{path}: the ledger cannot be used ({error}); nothing was entered"
        raise RequestError(f"{reason}. Is the folder writable, the disk full, another process busy with it?") from error
    except (sqlite3.DatabaseError, sqlite3.Warning, UnicodeError) as error:
        raise CorruptFileError(f"{path}: not a readable ledger ({error}). {_ADVICE}") from error
