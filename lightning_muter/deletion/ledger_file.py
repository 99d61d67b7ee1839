"""The SQLite file of a ledger: how it is made, opened and checked, so that it is one whole file or none.

A rollback journal, foreign keys on, every commit synced, and its folder too; of somebody else's schema nothing is run.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from lightning_muter.errors import CorruptFileError, RequestError
from lightning_muter.storage.atomic import STAGE, beside, fsync_file, fsync_folder

SCHEMA = 1
_BUSY_SECONDS = 10.0
_APPLICATION = 0x4D757465  # "Mute", in the file's header
IDENTITY = ("user_version", "application_id")
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
_ADVICE = "Restore the ledger from a backup; the receipts beside it tell what it held."


def opened(path: Path, readonly: bool) -> sqlite3.Connection:
    """A connection to a file that was checked to be a ledger."""
    with readable(path):
        connection = connect(path, readonly)
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


def make(path: Path) -> None:
    """An empty ledger, complete before it has its name: whoever dies in between leaves none."""
    half = beside(path, STAGE)
    try:
        with contextlib.closing(sqlite3.connect(half, isolation_level=None)) as connection, readable(path):
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


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
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
def readable(path: Path) -> Iterator[None]:
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
