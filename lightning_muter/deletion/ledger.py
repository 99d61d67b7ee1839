"""The ledger of one trained model: every request that changed it, in an SQLite file beside the checkpoint.

Tables (schema version 1; the file itself is :mod:`lightning_muter.deletion.ledger_file`'s):

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
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.deletion.chain import Entry, chain_problems, columns, counts_anew
from lightning_muter.deletion.ledger_file import IDENTITY, connect, make, opened, readable
from lightning_muter.deletion.receipts import GENESIS, make_receipt, parse_receipt
from lightning_muter.errors import RequestError
from lightning_muter.storage.atomic import fsync_file, fsync_folder
from lightning_muter.storage.fingerprint import DigestKey
from lightning_muter.storage.signing import PublicKey

_SIGNER = re.compile(rb'"previous":"[0-9a-f]{64}","public_key":"([0-9a-f]{64})"')


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
            make(path)
        ledger = cls(path, opened(path, readonly))
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
        self._connection = opened(self.path, readonly=False)
        fsync_file(self.path)
        fsync_folder(self.path.parent)

    @staticmethod
    def unborn(path: Path) -> bool:
        """Whether the file was begun but nothing was ever entered: its process died before its tables were in it."""
        if not path.exists():
            return False
        with contextlib.closing(connect(path, readonly=True)) as connection:
            try:
                numbers = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in IDENTITY]
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
        with contextlib.closing(sqlite3.connect(path)) as copy, readable(path):
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
        with readable(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with readable(self.path):
            return self._connection.execute(query, values).fetchall()

    def _one(self, query: str) -> Any:
        return self._all(query)[0]
