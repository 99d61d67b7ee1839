"""What a deletion request names, and the rows of the training set that this means."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muter.errors import ArgumentError, RequestError
from lightning_muter.storage.fingerprint import DigestKey

_MAX_TEXT = 1 << 30


@dataclass
class ForgetConfig:
    """Whom or what to forget: either `indices`, or `ids` with a table that says which rows belong to whom.

    Args:
        indices: positions in the training dataset, e.g. [3,17].
        ids: a text file with one user id per line.
        table: a CSV file whose row i holds the id of the user to whom row i of the training dataset belongs. Without
            it the datamodule's `sample_ids()` is asked.
        column: the table's column of ids, by its name in the first line; by default the first column, and the first
            line is a heading if there is one line more than the dataset has rows.
    """

    indices: list[int] | None = None
    ids: str | None = None
    table: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class Rows:
    """The rows to forget (sorted, each once) and the user ids that were named (stored only as keyed hashes)."""

    indices: list[int]
    users: list[str]

    def digests(self, key: DigestKey) -> list[str]:
        """The keyed hashes of the user ids, sorted."""
        return sorted(key.digest_id(user) for user in self.users)


def resolve(forget: ForgetConfig, n_total: int, datamodule: object = None) -> Rows:
    """The rows that a request names.

    Raises:
        ArgumentError: nothing or too much is named, an index is out of range or named twice, an id is unknown, or the
            table does not have one row per sample.
    """
    if (forget.indices is None) == (forget.ids is None):
        raise ArgumentError(
            "forget", "both" if forget.indices else "nothing", "either forget.indices or forget.ids",
            "Pass --forget.indices [3,17], or --forget.ids users.txt with --forget.table ids.csv.",
        )  # fmt: skip
    if forget.indices is not None:
        if forget.table is not None or forget.column is not None:
            raise ArgumentError("forget.table", forget.table or forget.column, "only together with forget.ids")
        return Rows(_checked(forget.indices, n_total), [])
    users = list(dict.fromkeys(line.strip() for line in _lines("forget.ids", forget.ids) if line.strip()))
    if not users:
        raise ArgumentError("forget.ids", forget.ids, "a file with one user id per line", "It names nobody.")
    owners = _owners(forget, n_total, datamodule)
    rows: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        rows.setdefault(owner, []).append(index)
    if unknown := [user for user in users if user not in rows]:
        shown = ", ".join(map(repr, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise ArgumentError(
            "forget.ids", f"{len(unknown)} unknown ids ({shown})", "ids that occur in the table",
            "Nothing was forgotten for anybody. Take them out if they never were in the training set.",
        )  # fmt: skip
    return Rows(sorted(index for user in users for index in rows[user]), users)


def _checked(indices: Sequence[int], n_total: int) -> list[int]:
    if not indices:
        raise ArgumentError("forget.indices", [], "at least one index")
    if outside := [index for index in indices if not 0 <= index < n_total]:
        raise ArgumentError("forget.indices", outside[:10], f"positions 0 to {n_total - 1} of the training dataset")
    if len(set(indices)) != len(indices):
        twice = [index for index, count in sorted(Counter(indices).items()) if count > 1]
        raise ArgumentError("forget.indices", twice[:10], "each index once")
    return sorted(indices)


def _owners(forget: ForgetConfig, n_total: int, datamodule: object) -> list[str]:
    """The user id of every row of the training set."""
    if forget.table is None:
        if not callable(sample_ids := getattr(datamodule, "sample_ids", None)):
            raise ArgumentError(
                "forget.table", None, "a CSV file whose row i holds the user id of sample i",
                "Or give the datamodule a method `sample_ids()` that returns one id per sample.",
            )  # fmt: skip
        owners = [str(owner) for owner in sample_ids()]
        if len(owners) != n_total:
            raise ArgumentError("sample_ids()", f"{len(owners)} ids", f"one for each of the {n_total} samples")
        return owners
    try:
        table = list(csv.reader(_lines("forget.table", forget.table), strict=True))
    except csv.Error as error:
        raise ArgumentError("forget.table", forget.table, f"a CSV file ({error})") from error
    while table and not table[-1]:
        table.pop()
    column = 0
    if forget.column is not None:
        heading = table[0] if table else []
        if heading.count(forget.column) != 1:
            raise ArgumentError("forget.column", forget.column, f"one of the table's columns {heading[:20]}")
        column = heading.index(forget.column)
    body = table[1:] if forget.column is not None or len(table) == n_total + 1 else table
    if len(body) != n_total:
        raise ArgumentError(
            "forget.table", f"{len(body)} rows", f"one row for each of the {n_total} samples (and at most one heading)",
            "Row i must belong to position i of the training dataset.",
        )  # fmt: skip
    for i, row in enumerate(body):
        if len(row) <= column or not row[column].strip():
            raise ArgumentError("forget.table", f"no id in row {i}", "an id in every row")
    return [row[column].strip() for row in body]


def _lines(argument: str, path: str | None) -> list[str]:
    try:
        with open(Path(str(path)), encoding="utf-8-sig", newline="") as file:
            return file.read(_MAX_TEXT).splitlines()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(argument, path, f"a readable UTF-8 text file ({reason})") from error


def asked_digest(kind: str, content: Mapping[str, Any]) -> str:
    """A digest of what a request asks for: the same id with another content is another request."""
    return hashlib.sha256(json.dumps([kind, dict(content)], sort_keys=True).encode()).hexdigest()


def new_request_id(kind: str) -> str:
    """A fresh id, readable and sortable by time."""
    return f"{kind}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def checked_request_id(request_id: str | None, kind: str) -> str:
    """The given id, or a fresh one; ids are short, printable, and no secrets."""
    if request_id is None:
        return new_request_id(kind)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:@+-]{0,99}", request_id):
        raise ArgumentError(
            "request_id", request_id, "1 to 100 letters, digits or _.:@+- beginning with a letter or digit",
            "It is stored in clear text: use a ticket number, not a person's name.",
        )  # fmt: skip
    return request_id


def refuse_forgotten(indices: Sequence[int], forgotten: Mapping[int, str]) -> None:
    """Insist that none of the rows is forgotten already; says which request did it."""
    again = [index for index in indices if index in forgotten]
    if again:
        by = ", ".join(map(repr, sorted({forgotten[index] for index in again})[:5]))
        count = "all" if len(again) == len(indices) else str(len(again))
        rest = "There is nothing left to do." if count == "all" else "Ask for the others alone."
        raise RequestError(f"{count} of the {len(indices)} rows are forgotten already, by {by}: {again[:20]}. {rest}")
